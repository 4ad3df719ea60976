"""The metrics of pictures that the model draws while it trains."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from flax_diffusion.core import backend as training
from flax_diffusion.core.drawing import command, evaluation_options
from flax_diffusion.core.drawing.evaluation import Evaluation
from flax_diffusion.core.drawing.evaluation_options import EvaluateOptions
from flax_diffusion.core.drawing.options import GenerateConfig
from flax_diffusion.core.errors import ConfigError, DataError, WeightsError
from flax_diffusion.core.metrics.judging import Extractor
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.common.evaluation import EVERY, PREFIX
from flax_diffusion.core.tasks.task import Task


class DrawnPictures:
    """The metrics of a run's pictures, drawn with the main moving average if there is one; see `Judge`.

    Args:
        options: Options of `evaluate`, by name.
        task: The task, with the run's options.
        spec: The pipeline.
        backend: The backend of this process.

    Raises:
        UserError: For options that do not go together, or real pictures that do not fit, before anything is drawn.
    """

    def __init__(self, options: dict[str, Any], task: Task[Any], spec: PipelineSpec, backend: training.Backend):
        self.every: int | None = getattr(task.config, EVERY)
        try:
            config = evaluation_options.options_of(options | {"model": task.config.output_dir})
            self._evaluation = Evaluation(config, _Drawing(spec, backend))
        except (ConfigError, DataError, WeightsError) as error:
            names = "|".join(sorted(options, key=len, reverse=True))
            raise type(error)(re.sub(rf"--({names})\b", rf"--{PREFIX}\1", str(error))) from error
        self._scales = config.guidance_scale
        self.names = [name + end for end in self._ends for name in self._evaluation.names]
        self.of = f"{self._evaluation.count} drawn pictures"

    @property
    def _ends(self) -> list[str]:
        """Ends of the values' names, which tell several scales of guidance apart."""
        return [f"_cfg{scale:g}" for scale in self._scales] if len(self._scales) > 1 else [""]

    def __call__(self) -> dict[str, float]:
        """Draw the pictures and compute the metrics, by name, such as `fid` or, of several scales, `fid_cfg1.5`."""
        rows = self._evaluation.rows()
        return {
            name + end: value
            for end, row in zip(self._ends, rows, strict=True)
            for name, value in row.items()
            if name not in ("guidance_scale", "pictures")
        }


class _Drawing:
    """Draws and computes features with the models that train; see `drawing.evaluation.Backend`."""

    is_main = False  # nothing is printed here: the run reports the values

    def __init__(self, spec: PipelineSpec, backend: training.Backend):
        self._spec, self._backend = spec, backend

    def extractor(self, config: EvaluateOptions) -> Extractor:
        return self._backend.extractor(config.features, config.inception, config.batch_size)

    def open_spec(self, config: GenerateConfig) -> PipelineSpec:
        return self._spec

    def drawer(self, config: GenerateConfig, spec: PipelineSpec) -> Callable[[GenerateConfig], Iterator[np.ndarray]]:
        return partial(self._draw, spec)

    def _draw(self, spec: PipelineSpec, config: GenerateConfig) -> Iterator[np.ndarray]:
        return self._backend.draw(**command.sampler_options(config, spec))
