"""What a config asks for: its examples, its pipeline, how they divide into steps, and the loader of the batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.options import DatasetConfig, DiffusionConfig, TextConfig, TrainConfig
from flax_diffusion.core.data.batches import ExampleFn, Precomputed
from flax_diffusion.core.data.combined import PairedSource, PromptedSource
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import ConfigError, DataError, naming
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.objectives.noising import NoiseSpec
from flax_diffusion.core.run.schedule import Schedule
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks import class_images, pipelines
from flax_diffusion.core.tasks.autoencoder import AutoencoderConfig
from flax_diffusion.core.tasks.dreambooth import DreamBoothConfig, open_instances, open_pairs
from flax_diffusion.core.tasks.text_to_image import TextToImageConfig
from flax_diffusion.core.tasks.textual_inversion import TextualInversionConfig, open_templated, templated_prompts

log = logging.getLogger(__name__)


def open_run_source(config: TrainConfig) -> Source:
    """The examples that a config names; DreamBooth's without those of the classes, which may still have to be drawn."""
    if isinstance(config, DreamBoothConfig):
        source = open_instances(config)
        if config.with_prior_preservation:
            class_images.check(config)
        return source
    if isinstance(config, TextualInversionConfig):
        return open_templated(config)
    assert isinstance(config, DatasetConfig)
    with naming("--train_data_dir" if config.train_data_dir else "--dataset_name"):
        return open_source(
            dataset_name=config.dataset_name,
            dataset_config_name=config.dataset_config_name,
            train_data_dir=config.train_data_dir,
            image_column=config.image_column,
            caption_column=config.caption_column if isinstance(config, TextToImageConfig) else None,
            max_train_samples=config.max_train_samples,
            cache_dir=config.cache_dir,
        )


def count_examples(config: TrainConfig, source: Source) -> int:
    """Examples an epoch, those that `complete_source` adds among them."""
    if isinstance(config, DreamBoothConfig) and config.with_prior_preservation:
        return max(len(source), config.num_class_images * sum(concept.repeats for concept in config.all_concepts))
    return len(source)


def complete_source(config: TrainConfig, source: Source, backend: Backend) -> Source:
    """Adds the examples that the models themselves draw."""
    if not (isinstance(config, DreamBoothConfig) and config.with_prior_preservation):
        return source
    class_images.draw_missing(config, backend)
    return open_pairs(config, cast(PromptedSource, source))


def make_spec(config: TrainConfig, source: Source) -> PipelineSpec:
    """The pipeline that a config names; the source's captions make a tokenizer where there is none."""
    if isinstance(config, AutoencoderConfig):
        return pipelines.autoencoder(config)
    assert isinstance(config, DiffusionConfig)
    spec = _diffusion_spec(config, source)
    if config.cache_latents and spec.vae is None:
        raise ConfigError(
            "--cache_latents: the model trains on pixels, there is no autoencoder; drop it, or give a --vae"
        )
    return spec


def _diffusion_spec(config: DiffusionConfig, source: Source) -> PipelineSpec:
    if not isinstance(config, TextConfig):
        return pipelines.unconditional(config)
    made_before = as_path(config.output_dir) / "tokenizer" if config.resume_from_checkpoint else None
    spec = pipelines.text_to_image(config, _captions(source), made_before)
    if isinstance(config, TextualInversionConfig):
        pipelines.check_new_word(spec, [*templated_prompts(config), *config.validation_prompts])
    return spec


def _captions(source: Source) -> Iterator[str]:
    """Those that can be read. `check_source` and the loader see to the others, and name them."""
    for index in range(len(source)):
        try:
            yield from _as_list(source[index].caption)
        except DataError:
            continue


def say_what_is_in_vain(config: TrainConfig, spec: PipelineSpec, schedule: Schedule) -> None:
    """Warns, once before training, of a warm-up that does not end and of prompts that the text encoder cuts off.

    Captions of a dataset, of which there may be millions, are `check_source`'s.
    """
    warms_up = config.lr_scheduler not in ("constant", "piecewise_constant")
    if warms_up and config.lr_warmup_steps >= schedule.total_steps:
        log.warning(
            "--lr_warmup_steps %d: the run ends after %d steps, and the learning rate rises to the end; give fewer: %d",
            config.lr_warmup_steps, schedule.total_steps, schedule.total_steps // 10,
        )  # fmt: skip
    tokenize = spec.tokenize
    if tokenize is None:
        return
    for option, prompts in _prompts(config).items():
        rests = {prompt: rest for prompt in prompts if (rest := tokenize.cut_off(prompt))}
        if rests:
            prompt, rest = next(iter(rests.items()))
            count = f", and {len(rests)} of {len(prompts)} prompts are longer" if len(prompts) > 1 else ""
            log.warning(
                "--%s '%s': the text encoder takes %d tokens%s; it does not see '%s'",
                option, prompt, tokenize.length, count, rest,
            )  # fmt: skip


def _prompts(config: TrainConfig) -> dict[str, list[str]]:
    """The prompts that a config holds, by the option that has them."""
    prompts: dict[str, list[str]] = {}
    if isinstance(config, DreamBoothConfig):
        concepts, inside = config.all_concepts, "concepts." if config.concepts else ""
        prompts[f"{inside}instance_prompt"] = [concept.instance_prompt for concept in concepts]
        prompts[f"{inside}class_prompt"] = [concept.class_prompt for concept in concepts if concept.class_prompt]
    if isinstance(config, TextualInversionConfig):
        prompts["prompt_templates"] = templated_prompts(config)
    if isinstance(config, TextConfig):
        prompts["validation_prompts"] = config.validation_prompts
    return prompts


def make_loader(
    config: TrainConfig,
    spec: PipelineSpec,
    source: Source,
    schedule: Schedule,
    *,
    num_steps: int,
    made: Precomputed | None = None,
    process_index: int = 0,
    process_count: int = 1,
    start_example: int = 0,
    dtype: DTypeLike = np.float32,
) -> Loader:
    """The batches of one process of a run; the objective's numbers are of `dtype`."""
    return Loader(
        source,
        make_example_fn(config, spec, made, dtype),
        seed=config.seed,
        batch_size=schedule.batch_size // process_count,
        accumulation=schedule.accumulation,
        process_index=process_index,
        process_count=process_count,
        start_example=start_example,
        num_steps=num_steps,
        num_workers=config.dataloader_num_workers,
        skip_bad_images=config.skip_bad_images,
        rows=2 if isinstance(source, PairedSource) else 1,
    )


def make_transform(config: TrainConfig, spec: PipelineSpec) -> ImageTransform:
    """What happens to the pictures of this run."""
    return ImageTransform(
        resolution=config.resolution,
        resize_mode=config.resize_mode,
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        interpolation=config.image_interpolation_mode,
        channels=spec.image_channels,
    )


def make_example_fn(
    config: TrainConfig, spec: PipelineSpec, made: Precomputed | None = None, dtype: DTypeLike = np.float32
) -> ExampleFn:
    """What makes one training example of this run; the objective's numbers are of `dtype`."""
    diffusion = config if isinstance(config, DiffusionConfig) else None
    noise = NoiseSpec(
        shape=spec.sample_shape,
        objective=pipelines.objective(diffusion, spec, dtype) if diffusion else None,
        noise_offset=diffusion.noise_offset if diffusion else 0.0,
        input_perturbation=diffusion.input_perturbation if diffusion else 0.0,
        latent_noise=spec.vae is not None,
    )
    return ExampleFn(
        transform=make_transform(config, spec),
        noise=noise,
        tokenize=spec.tokenize,
        made=made or Precomputed(),
        proportion_empty_prompts=config.proportion_empty_prompts if isinstance(config, TextToImageConfig) else 0.0,
    )


def _as_list(caption: Any) -> list[str]:
    return [caption] if isinstance(caption, str) else list(caption or [])
