"""What a config asks for: its examples, its pipeline, how they divide into steps, and the loader of the batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from flax_diffusion.core import class_images, task_pipelines
from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config import DatasetConfig, DiffusionConfig, TextConfig, TrainConfig
from flax_diffusion.core.data.batches import ExampleFn, Precomputed
from flax_diffusion.core.data.concepts import (
    PairedSource,
    PromptedSource,
    open_instances,
    open_pairs,
    open_templated,
    templated_prompts,
)
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.noise import NoiseSpec
from flax_diffusion.core.data.sources import Source, open_source
from flax_diffusion.core.data.transforms import ImageTransform
from flax_diffusion.core.errors import ConfigError, DataError, naming
from flax_diffusion.core.files import as_path
from flax_diffusion.core.pipeline import PipelineSpec
from flax_diffusion.core.rates import learning_rate_schedule
from flax_diffusion.core.tasks import AutoencoderConfig, DreamBoothConfig, TextToImageConfig, TextualInversionConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a run's examples divide into steps. Progress is counted in examples, whatever the batch."""

    num_examples: int  # in the dataset
    batch_size: int  # a micro-batch over all devices
    accumulation: int  # micro-batches a step
    total_steps: int  # of the whole run
    limit: str  # what sets their number, for messages

    @property
    def step_examples(self) -> int:
        """Examples an optimizer step."""
        return self.batch_size * self.accumulation

    def ends_epoch(self, seen: int, every: int | None) -> bool:
        """Whether an epoch divisible by `every` ended in the step that brought the examples to `seen`."""
        if every is None:
            return False
        span = every * self.num_examples
        return seen // span > (seen - self.step_examples) // span


def make_schedule(
    config: TrainConfig, num_examples: int, device_count: int, step: int = 0, examples_seen: int = 0
) -> Schedule:
    """Divides the work over steps and devices.

    Args:
        config: Of the run.
        num_examples: In an epoch.
        device_count: Over which a batch is divided.
        step: That the run goes on from.
        examples_seen: Up to that step, in whatever batches.

    Raises:
        ConfigError: If the global batch cannot be divided.
    """
    accumulation = config.gradient_accumulation_steps
    share = device_count * accumulation
    if config.global_batch_size is None:
        micro = config.train_batch_size * device_count
    elif config.global_batch_size % share:
        near = max(1, round(config.global_batch_size / share)) * share
        raise ConfigError(
            f"--global_batch_size {config.global_batch_size}: not divisible over {device_count} devices x "
            f"{accumulation} accumulation steps; the nearest that is: {near}"
        )
    else:
        micro = config.global_batch_size // accumulation
    if config.max_train_steps is not None:
        steps, limit = config.max_train_steps, f"--max_train_steps is {config.max_train_steps}"
    else:
        wanted = config.num_train_epochs * num_examples
        steps = step + max(0, math.ceil((wanted - examples_seen) / (micro * accumulation)))
        limit = f"--num_train_epochs {config.num_train_epochs} are {wanted} examples, of which {examples_seen} are seen"
    return Schedule(
        num_examples=num_examples, batch_size=micro, accumulation=accumulation, total_steps=steps, limit=limit
    )


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
        return task_pipelines.autoencoder(config)
    assert isinstance(config, DiffusionConfig)
    spec = _diffusion_spec(config, source)
    if config.cache_latents and spec.vae is None:
        raise ConfigError(
            "--cache_latents: the model trains on pixels, there is no autoencoder; drop it, or give a --vae"
        )
    return spec


def _diffusion_spec(config: DiffusionConfig, source: Source) -> PipelineSpec:
    if not isinstance(config, TextConfig):
        return task_pipelines.unconditional(config)
    made_before = as_path(config.output_dir) / "tokenizer" if config.resume_from_checkpoint else None
    spec = task_pipelines.text_to_image(config, _captions(source), made_before)
    if isinstance(config, TextualInversionConfig):
        task_pipelines.check_new_word(spec, [*templated_prompts(config), *config.validation_prompts])
    return spec


def _captions(source: Source) -> Iterator[str]:
    """Those that can be read. `check_source` and the loader see to the others, and name them."""
    for index in range(len(source)):
        try:
            yield from _as_list(source[index].caption)
        except DataError:
            continue


def make_rate(config: TrainConfig, schedule: Schedule) -> Callable[[int], float]:
    """The learning rate by optimizer step."""
    peak = config.learning_rate * (schedule.step_examples if config.scale_lr else 1)
    return learning_rate_schedule(config, schedule.total_steps, peak)


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
) -> Loader:
    """The batches of one process of a run."""
    return Loader(
        source,
        make_example_fn(config, spec, made),
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


def make_example_fn(config: TrainConfig, spec: PipelineSpec, made: Precomputed | None = None) -> ExampleFn:
    """The recipe that makes one training example of this run."""
    diffusion = config if isinstance(config, DiffusionConfig) else None
    noise = NoiseSpec(
        shape=spec.sample_shape,
        num_train_timesteps=len(spec.alphas_cumprod) if diffusion else None,
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
        loss_weights=task_pipelines.loss_weights(diffusion, spec) if diffusion else None,
    )


def _as_list(caption: Any) -> list[str]:
    return [caption] if isinstance(caption, str) else list(caption or [])
