"""Common parts of the tasks that train a denoiser."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike
from pydantic import Field, model_validator

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.options import Reads, TrainConfig, also
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families import folders
from flax_diffusion.core.families.family import family_of
from flax_diffusion.core.io import model_files
from flax_diffusion.core.objectives.ddpm import DdpmOptions
from flax_diffusion.core.objectives.edm import EdmOptions
from flax_diffusion.core.objectives.flow_matching import FlowMatchingOptions
from flax_diffusion.core.objectives.noising import NoiseSpec
from flax_diffusion.core.objectives.objective import OBJECTIVES, Objective, check_options, find, objective_of
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, check_variant
from flax_diffusion.core.tasks.parts import check_channels, check_resolution, sized
from flax_diffusion.core.tasks.task import Preview, Task

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


log = logging.getLogger(__name__)


_COMPUTED_ONCE = ("cache_latents", "pre_compute_text_embeddings")
"""Options by which something is computed once, before training. Not every task has all of them."""


class DiffusionConfig(EdmOptions, FlowMatchingOptions, DdpmOptions, TrainConfig):
    """Options of tasks that train a denoiser."""

    unet: Annotated[dict[str, Any] | str | None, Reads.MODEL] = Field(
        None,
        validation_alias=also("unet", "model_config_name_or_path"),
        description="From scratch: Diffusers config of the UNet, as a mapping, or the folder or .json file with it.",
    )
    vae: Annotated[str | None, Reads.MODEL] = Field(
        None,
        validation_alias=also("vae", "pretrained_vae_model_name_or_path"),
        description="Folder or Hub id of an AutoencoderKL. None: train on pixels.",
    )
    noise_scheduler: dict[str, Any] | None = Field(
        None,
        description="Config of a Diffusers scheduler. None: that of the pretrained pipeline, or one of the "
        "objective's options.",
    )
    objective: str | None = Field(
        None,
        description="Objective: ddpm (epsilon, v_prediction or sample), flow_matching, edm, or one of your own as "
        "module:Class. None: that of the scheduler's config.",
    )
    noise_offset: float = Field(0.0, ge=0, description="Strength of the offset that is added to each channel's noise.")
    input_perturbation: float = Field(0.0, ge=0, description="Strength of extra noise on the input. 0.1 is usual.")
    cache_latents: bool = Field(
        False, description="Encode each picture once, before training. The steps then need no autoencoder."
    )
    precomputed_dir: str | None = Field(
        None,
        description="Folder that keeps latents and text embeddings between runs, here or gs://. None: each run "
        "computes its own.",
    )
    validation_num_inference_steps: int = Field(
        50,
        ge=1,
        validation_alias=also("validation_num_inference_steps", "ddpm_num_inference_steps"),
        description="Denoising steps of the samples during training.",
    )

    @model_validator(mode="after")
    def _check_diffusion(self) -> DiffusionConfig:
        if self.pretrained_model_name_or_path and self.unet is not None:
            raise ValueError("--unet is for training from scratch: drop it or --pretrained_model_name_or_path")
        for name in ("ddpm_num_steps", "ddpm_beta_schedule"):
            value = getattr(self, name)
            owner = "noise_scheduler" if self.noise_scheduler is not None else "pretrained_model_name_or_path"
            if getattr(self, owner) is not None and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"--{name} {value} is for a scheduler that we choose, and --{owner} brings its own: drop --{name}, "
                    "or give the whole scheduler by --noise_scheduler"
                )
        if self.cache_latents and not (self.center_crop or self.resize_mode == "stretch"):
            raise ValueError(
                "--cache_latents encodes each picture once, and crops at random would differ from epoch to epoch: add "
                "--center_crop, or --resize_mode stretch"
            )
        once = [name for name in _COMPUTED_ONCE if name in type(self).model_fields]
        if self.precomputed_dir is not None and not any(getattr(self, name) for name in once):
            raise ValueError(
                "--precomputed_dir keeps what is computed once, before training: add "
                f"{' or '.join(f'--{name}' for name in once)}, or drop it"
            )
        return self


D = TypeVar("D", bound=DiffusionConfig, covariant=True)


class DiffusionTask(Task[D]):
    """Training of a denoiser."""

    def __init__(self, config: D):
        super().__init__(config)
        self.caches_latents = config.cache_latents
        self.precomputed_dir = config.precomputed_dir

    def checked(self, spec: PipelineSpec) -> PipelineSpec:
        """Return a pipeline that can be trained with the options that say what is made before."""
        if self.caches_latents and spec.vae is None:
            option = "cache_latents" if self.config.cache_latents else "latents_dir"
            raise ConfigError(
                f"--{option}: the model trains on pixels, there is no autoencoder; drop it, or give a --vae"
            )
        return spec

    def objective(self, spec: PipelineSpec, dtype: DTypeLike = np.float32) -> Objective:
        """Return what the denoiser learns; its numbers are of `dtype`."""
        conditional = spec.text_encoder is not None or bool(spec.classes)
        return spec.objective.from_scheduler(spec.scheduler, self.config, dtype, conditional=conditional)

    def noise(self, spec: PipelineSpec, dtype: DTypeLike) -> NoiseSpec:
        """Return what is drawn for each example; the objective's numbers are of `dtype`."""
        return NoiseSpec(
            shape=spec.sample_shape,
            objective=self.objective(spec, dtype),
            noise_offset=self.config.noise_offset,
            input_perturbation=self.config.input_perturbation,
            latent_noise=spec.vae is not None,
        )

    def make_preview(self, spec: PipelineSpec, source: Source) -> Preview | None:
        """Draw pictures from noise."""
        return self._samples([], 1.0, None)

    def _samples(
        self,
        prompts: list[str],
        guidance_scale: float,
        columns: int | None,
        extra: Mapping[str, np.ndarray] | None = None,
        names: Sequence[str] | None = None,
        own: Sequence[Mapping[str, Any]] = (),
    ) -> Preview:
        """Draw pictures of prompts or classes, or from noise alone.

        Args:
            prompts: The prompts or classes; empty for noise alone.
            guidance_scale: Scale of classifier-free guidance.
            columns: As of `Preview`.
            extra: As of `Backend.sample`.
            names: What captions call the prompts; None for themselves.
            own: Options of each prompt, as of `config.prompt_file.Prompt`, which then is drawn as `generate` draws it
                alone; empty to draw all together.
        """
        config, size = self.config, self.config.resolution
        count, shown = config.eval_batch_size, names or prompts
        common: dict[str, Any] = {
            "num_images": count, "num_inference_steps": config.validation_num_inference_steps,
            "guidance_scale": guidance_scale, "seed": config.seed,
        }  # fmt: skip

        def draw(backend: Backend) -> Sequence[np.ndarray] | np.ndarray:
            if not own:
                return backend.sample(prompts=prompts, extra=extra, **common)
            pictures: list[np.ndarray] = []
            for place, (prompt, given) in enumerate(zip(prompts, own, strict=True)):
                options = common | dict(given)
                options["size"] = (options.pop("height", size), options.pop("width", size))
                rows = None if extra is None else {name: array[place : place + 1] for name, array in extra.items()}
                for batch in backend.draw(prompts=[prompt], extra=rows, **options):
                    pictures += [*batch]
            return pictures

        seeds = [given.get("seed", config.seed) for given in own] or [config.seed] * len(shown)
        captions = [
            f"{name}\nseed {seed}, image {number + (0 if own else place * count)}"
            for place, (name, seed) in enumerate(zip(shown, seeds, strict=True))
            for number in range(count)
        ]
        return Preview(draw, columns, captions)

    def pipeline(
        self, kind: str, components: dict[str, Component], tokenizers: Mapping[str, CLIPTokenizer] | None = None
    ) -> PipelineSpec:
        """Put a pipeline together and check that its parts can be trained with one another.

        Args:
            kind: Class of the pipeline.
            components: Its models.
            tokenizers: Tokenizers of the prompts by name; None where there are none.

        Raises:
            ConfigError: If they cannot.
        """
        config = self.config
        scheduler, objective = self._scheduler(kind)
        check_variant(components.values(), config.variant)
        spec = PipelineSpec(
            kind=kind,
            components=components,
            scheduler=scheduler,
            resolution=config.resolution,
            tokenizers=tokenizers or {},
            objective_name=None if objective is objective_of(scheduler) else objective.name,
        )
        own = spec.denoiser["sample_size"] if config.pretrained_model_name_or_path else None
        if isinstance(own, int) and 4 * config.resolution < own * spec.vae_factor:
            log.warning(
                "--resolution %d: the model was trained at %d pixels, and at fewer than a quarter of them it draws "
                "little that can be recognised", config.resolution, own * spec.vae_factor,
            )  # fmt: skip
        if not spec.trains_adapters:
            denoiser = sized(spec.denoiser, config.resolution // spec.vae_factor)
            spec = replace(spec, components=components | {spec.denoiser_name: denoiser})
        denoiser, vae = spec.denoiser, spec.vae
        check_resolution(config.resolution, spec.size_factor)
        self.check_channels(denoiser)
        if vae and vae["latent_channels"] != (predicted := denoiser.channels[1]):
            raise ConfigError(
                f"the VAE has {vae['latent_channels']} latent channels, the {denoiser.model.noun} takes {predicted}: "
                "use a pair made for each other"
            )
        check_channels(spec)
        spec.family.check(spec)
        self.objective(spec)  # which looks at its options
        return spec

    def check_channels(self, denoiser: Component) -> None:
        """Raise ConfigError for a denoiser that takes or gives something beside the sample."""
        given, predicted = denoiser.channels
        if given != predicted:
            raise ConfigError(
                f"{denoiser.model.noun} with in_channels {given} and out_channels {predicted}: inpainting models are "
                "trained by text_to_image --inpainting, and of models with learned variance only a DiT can be trained; "
                "use one that has both equal"
            )

    def _scheduler(self, kind: str) -> tuple[dict[str, Any], type[Objective]]:
        """Return the scheduler's config, and what is learnt.

        The config is that of the options, of the pretrained model, or of the objective where it is ours to choose.
        """
        config = self.config
        asked = find(config.objective) if config.objective else None
        if config.noise_scheduler is not None:
            # A mapping without a class is one of the objective's own.
            default = (asked or OBJECTIVES[DEFAULT_OBJECTIVE]).schedulers[0]
            values = {"_class_name": default} | config.noise_scheduler
        elif config.pretrained_model_name_or_path:
            folder = model_files.resolve(config.pretrained_model_name_or_path, "scheduler", config.revision)
            values = folders.read_scheduler(folder)
        else:
            values = self._new_scheduler(asked or OBJECTIVES[DEFAULT_OBJECTIVE], kind)
        objective = objective_of(values)
        if asked not in (None, objective):
            if str(values["_class_name"]).removeprefix("Flax") not in asked.schedulers:
                if config.noise_scheduler is not None:
                    raise ConfigError(
                        f"--objective {config.objective} with a --noise_scheduler of {values['_class_name']}, whose "
                        f"models are trained by {objective.name}: drop one of them"
                    )
                values = self._new_scheduler(asked, kind)
            objective = asked
        check_options(objective, config)
        return objective.changed(values, config), objective

    def _new_scheduler(self, objective: type[Objective], kind: str) -> dict[str, Any]:
        values = objective.scheduler(self.config)
        if objective.name == DEFAULT_OBJECTIVE:
            # Latents have no bounds to clip to, and Diffusers' StableDiffusionPipeline turns clipping off and the
            # offset on in whatever it opens: written so, both sample alike.
            values |= {"clip_sample": False, "steps_offset": 0}
            values |= family_of(kind).pipelines[kind].scheduler
        return values


DEFAULT_OBJECTIVE = "ddpm"
