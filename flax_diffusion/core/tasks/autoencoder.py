"""Training of an autoencoder, from images to latents and back: `train autoencoder`.

The preview shows pictures beside their reconstructions. At the end the scale of the latents is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.defaults import with_defaults
from flax_diffusion.core.config.options import Reads, also
from flax_diffusion.core.data.batches import ExampleFn
from flax_diffusion.core.data.extra import check_there, images_to_draw_over
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import WeightsError
from flax_diffusion.core.families import folders
from flax_diffusion.core.families.autoencoder import AUTOENCODER_KL
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import write_json
from flax_diffusion.core.spec.pipeline import AutoencoderLoss, PipelineSpec, check_variant
from flax_diffusion.core.tasks.common.dataset import DATA_OPTIONS, DatasetConfig, open_dataset, stand_in
from flax_diffusion.core.tasks.parts import check_channels, check_resolution, from_scratch, pretrained, sized
from flax_diffusion.core.tasks.task import TASKS, Preview, Task


@with_defaults(output_dir="autoencoder-model")
class AutoencoderConfig(DatasetConfig):
    """Images to latents and back: `train autoencoder`. The result is for --vae of the other tasks."""

    vae: Annotated[dict[str, Any] | str | None, Reads.MODEL] = Field(
        None,
        description="From scratch: config of the AutoencoderKL, as a mapping, or the folder or .json file with it.",
    )
    rec_loss: Literal["l1", "l2"] = Field("l2", description="Reconstruction loss: absolute or squared error.")
    kl_scale: float = Field(1e-6, ge=0, description="Weight of the posterior's divergence from a normal distribution.")
    eval_batch_size: int = Field(16, ge=1, description="Pictures in the grid, each beside its reconstruction.")
    validation_images: list[str] = Field(
        [],
        validation_alias=also("validation_images", "validation_image"),
        description="Pictures in the grid. None: pictures from all over the data.",
    )

    @model_validator(mode="after")
    def _check_autoencoder(self) -> AutoencoderConfig:
        if (self.vae is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError(
                "give one of --vae, the config of an AutoencoderKL to make, and --pretrained_model_name_or_path, a "
                "pipeline whose vae to go on with"
            )
        return self


class AutoencoderTask(Task[AutoencoderConfig]):
    """Training of an AutoencoderKL."""

    name = "autoencoder"
    config_class = AutoencoderConfig
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
        """Read the config of the autoencoder."""
        config = self.config
        if config.pretrained_model_name_or_path:
            vae = pretrained(config, _subfolder(config), AUTOENCODER_KL, train=True)
        else:
            assert config.vae is not None
            vae = from_scratch(config.vae, "--vae", AUTOENCODER_KL)
        check_variant([vae], config.variant)
        vae = sized(vae, config.resolution)
        spec = PipelineSpec(
            kind="AutoencoderKL",
            components={"vae": vae},
            scheduler={},
            resolution=config.resolution,
            autoencoder_loss=AutoencoderLoss(rec_loss=config.rec_loss, kl_scale=config.kl_scale),
        )
        check_there("--validation_images", config.validation_images)
        check_resolution(config.resolution, spec.vae_factor)
        check_channels(spec)
        return spec

    def reopen_spec(self, run: Path) -> PipelineSpec:
        """Raise WeightsError, because an autoencoder draws nothing."""
        raise WeightsError(f"{run}: trained an autoencoder, which draws nothing by itself: it is the --vae of a run")

    def _pictures(self, spec: PipelineSpec, source: Source) -> _Pictures:
        return _Pictures(source, self.make_example_fn(spec), self.config)

    def make_preview(self, spec: PipelineSpec, source: Source) -> Preview | None:
        """Show pictures beside their reconstructions: those of the options, or some of the dataset."""
        names, side = self.config.validation_images, self.config.resolution
        if not names:
            return Preview(partial(_compare, pictures=self._pictures(spec, source)), columns=8)
        pixels = images_to_draw_over("--validation_images", names, (side, side), spec.image_channels)
        at_mean = np.zeros((len(pixels), *spec.sample_shape), np.float32)
        return Preview(lambda backend: _beside(backend, pixels, at_mean), columns=8)

    def export_trained(
        self, backend: Backend, spec: PipelineSpec, source: Source, folder: Path, *, only_trained: bool = False
    ) -> None:
        """Write the autoencoder, with the scale of its latents."""
        super().export_trained(backend, spec, source, folder, only_trained=only_trained)
        _write_scaling_factor(backend, self._pictures(spec, source), spec, folder)

    def export(self, backend: Backend, spec: PipelineSpec, source: Source, folder: Path) -> None:
        """Write the autoencoder without a pipeline."""
        self.export_trained(backend, spec, source, folder)


TASKS.register(AutoencoderTask.name, AutoencoderTask)


def _subfolder(config: AutoencoderConfig) -> str | None:
    """Return the subfolder of a pipeline's autoencoder; None for an autoencoder without a pipeline."""
    source = str(config.pretrained_model_name_or_path)
    index = folders.read_index(source, config.revision)
    if not index:
        alone = model_files.resolve(source, None, config.revision, allow_patterns=["config.json"]) / "config.json"
        return None if alone.is_file() else "vae"
    for name in ("vae", "vqvae"):
        if folders.has_part(index, name):
            return name
    raise WeightsError(f"{source} is a {index['_class_name']} without an autoencoder: name a pipeline that has a vae")


SCALED_BY = 256
"""Largest number of pictures on which the scale of the latents is measured."""


@dataclass(frozen=True)
class _Pictures:
    """Pictures from all over the dataset, in batches of `eval_batch_size`, which are read when they are needed."""

    source: Source
    make_example: ExampleFn
    config: AutoencoderConfig

    def batches(self, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield whole batches of at most `most` pictures in all, but at least one batch; always the same pictures.

        Yields:
            Pixels (N, C, H, W) in -1..1, and noise (N, c, h, w) that samples the posterior.
        """
        from flax_diffusion.core.data.loader import Loader  # Grain, which takes long to import

        size = min(self.config.eval_batch_size, len(self.source))
        loader = Loader(
            self.source,
            self.make_example,
            seed=self.config.seed,
            batch_size=size,
            num_steps=max(1, min(most, len(self.source)) // size),
            skip_bad_images=self.config.skip_bad_images,
        )
        with loader:
            for batch in loader:
                yield batch["pixel_values"][0], batch["latent_noise"][0]


def _compare(backend: Backend, pictures: _Pictures) -> np.ndarray:
    """Return some pictures of the dataset and their reconstructions in turn, uint8 (2N, H, W, C)."""
    return _beside(backend, *next(pictures.batches(pictures.config.eval_batch_size)))


def _beside(backend: Backend, pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return pictures and their reconstructions in turn, uint8 (2N, H, W, C).

    Args:
        backend: The backend.
        pixels: The pictures, (N, C, H, W) in -1..1.
        noise: What samples the posterior, (N, c, h, w); zeros for its mean.
    """
    made = backend.decode(backend.encode(pixels, noise))
    given = np.round((pixels / 2 + 0.5) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.stack([given, made], axis=1).reshape(-1, *given.shape[1:])


def _write_scaling_factor(backend: Backend, pictures: _Pictures, spec: PipelineSpec, folder: Path) -> None:
    """Write the scale that brings the latents to unit variance to vae/config.json, unless its config has one.

    Reference:
        Rombach et al., https://arxiv.org/abs/2112.10752, section D.1.
    """
    vae = spec.components["vae"]
    if "scaling_factor" in vae.config or vae.weights is not None:
        return
    deviation = np.concatenate([backend.encode(*batch) for batch in pictures.batches(SCALED_BY)]).std()
    if backend.process_index == 0:
        path = folder / "vae" / "config.json"
        write_json(path, model_files.read_json(path) | {"scaling_factor": float(vae["scaling_factor"] / deviation)})
