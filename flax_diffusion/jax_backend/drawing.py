"""Drawing from a pipeline with JAX, whoever wants the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from flax_diffusion.core.drawing import command
from flax_diffusion.core.drawing.options import GenerateConfig
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.spec.prompts import sampler_config
from flax_diffusion.jax_backend.modules import COMPUTE_DTYPES, build_modules, load_pretrained, shapes
from flax_diffusion.jax_backend.optimizers.optimizer import Params
from flax_diffusion.jax_backend.sampling import Sampler
from flax_diffusion.jax_backend.sharding import put_replicated
from flax_diffusion.schedulers import scheduler_from_config


@dataclass(frozen=True)
class Pipeline:
    """A pipeline with its weights, from which pictures can be drawn several times."""

    spec: PipelineSpec
    sampler: Sampler
    params: Params


def open_spec(config: GenerateConfig, calls: Sequence[GenerateConfig]) -> PipelineSpec:
    """Read a pipeline's configs, and check that the options fit; see `command.open_checked`.

    Args:
        config: The options.
        calls: The calls that they are; see `calls_of`.

    Raises:
        UserError: If the model is no pipeline, or something does not fit it.
    """
    return command.open_checked(config, calls, shapes)


def open_pipeline(config: GenerateConfig, spec: PipelineSpec, mesh: Mesh) -> Pipeline:
    """Load the weights of a pipeline onto all devices.

    Args:
        config: The options.
        spec: The pipeline.
        mesh: Devices over which a batch is split.

    Raises:
        UserError: If the weights or the scheduler do not fit.
    """
    modules = build_modules(spec, COMPUTE_DTYPES[config.mixed_precision], mesh=mesh)
    chosen = command.scheduler_of(config, spec)
    values = sampler_config(spec, chosen)
    scheduler = None if modules.objective else scheduler_from_config(values, kind=chosen)
    params = {name: put_replicated(load_pretrained(part), mesh) for name, part in spec.components.items()}
    return Pipeline(spec, Sampler(modules, scheduler, mesh), params)


def pictures(pipeline: Pipeline, config: GenerateConfig) -> Iterator[np.ndarray]:
    """Draw pictures, a batch at a time.

    Args:
        pipeline: The pipeline.
        config: The options; those that chose and opened the pipeline are those that it was opened with.

    Returns:
        Batches of pictures, uint8 (B, H, W, C), each drawn when it is asked for.

    Raises:
        UserError: For options that the pipeline cannot draw with, at once.
    """
    return pipeline.sampler.batches(pipeline.params, **command.sampler_options(config, pipeline.spec))
