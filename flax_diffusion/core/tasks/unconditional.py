"""Images of one kind from noise alone: `train unconditional`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_diffusion.core.config.defaults import with_defaults
from flax_diffusion.core.config.options import CONFIG_FILE
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.families.ddpm import DDPM, UNET_2D
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.common.dataset import DATA_OPTIONS, DatasetConfig, open_dataset, stand_in
from flax_diffusion.core.tasks.common.diffusion import DiffusionConfig, DiffusionTask
from flax_diffusion.core.tasks.common.evaluation import EvaluationConfig, evaluation_options
from flax_diffusion.core.tasks.parts import check_pipeline, from_scratch, frozen_vae, pretrained
from flax_diffusion.core.tasks.task import TASKS

TUTORIAL_UNET: dict[str, Any] = {
    "layers_per_block": 2,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}
"""The UNet of Diffusers' unconditional tutorial and script, used when none is named."""


@with_defaults(
    lr_scheduler="cosine",
    adam_beta1=0.95,
    adam_weight_decay=1e-6,
    ema_warmup=True,
    validation_epochs=10,
    validation_num_inference_steps=1000,
    save_model_epochs=10,
)
class UnconditionalConfig(DiffusionConfig, DatasetConfig, EvaluationConfig):
    """Images from noise alone: `train unconditional`."""


class UnconditionalTask(DiffusionTask[UnconditionalConfig]):
    """Trains a UNet2DModel, in pixel or latent space."""

    name = "unconditional"
    config_class = UnconditionalConfig
    data_options = DATA_OPTIONS

    @classmethod
    def stand_ins(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options that name data, for a plan, which reads none."""
        return stand_in(given)

    def open_source(self) -> Source:
        """Open the dataset."""
        return open_dataset(self.config, examples=self.examples)

    def open_validation(self, source: Source) -> Source | None:
        """Open the dataset for validation, if there is one."""
        return None if self.config.validation_data_dir is None else open_dataset(self.config, validation=True)

    def make_spec(self, source: Source) -> PipelineSpec:
        """Read the configs of the pipeline to train."""
        return self.checked(self.read_pipeline())

    def reopen_spec(self, run: Path) -> PipelineSpec:
        """Return the pipeline that a run trains."""
        try:
            return self.read_pipeline()
        except WeightsError as error:
            raise WeightsError(f"{run / CONFIG_FILE} names what is not there any more: {error}") from error

    def read_pipeline(self) -> PipelineSpec:
        """Read the configs of the pipeline."""
        config = self.config
        if config.pretrained_model_name_or_path:
            check_pipeline(config, [DDPM])
            unet = pretrained(config, "unet", UNET_2D, train=True)
        else:
            unet = from_scratch(TUTORIAL_UNET if config.unet is None else config.unet, "--unet", UNET_2D)
        if unet["num_class_embeds"] is not None:
            raise ConfigError(
                f"UNet with num_class_embeds {unet['num_class_embeds']}: is told the class of each picture; train it "
                "by the task class_conditional"
            )
        components = {"unet": unet}
        if config.vae:
            components["vqvae"] = frozen_vae(config.vae)
        return self.pipeline("LDMPipeline" if config.vae else "DDPMPipeline", components)

    def evaluation(self) -> dict[str, Any] | None:
        """Return what the run evaluates, by option of `evaluate`."""
        return evaluation_options(self.config)


TASKS.register(UnconditionalTask.name, UnconditionalTask)
