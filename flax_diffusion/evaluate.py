"""Judgement of pictures: `python -m flax_diffusion.evaluate --model DIR --reference FOLDER --inception FILE`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.display import console
from flax_diffusion.core.drawing import evaluation, evaluation_options
from flax_diffusion.core.drawing.evaluation_options import EvaluateOptions
from flax_diffusion.core.drawing.options import GenerateConfig
from flax_diffusion.core.metrics.judging import INCEPTION, Extractor
from flax_diffusion.core.spec.pipeline import PipelineSpec


def evaluate(**options: Any) -> list[evaluation.Row]:
    """Judge the pictures that a model draws, or that are in a folder.

    Args:
        options: Values of the command line's flags, by name. A single metric, prompt or scale may stand for a list.

    Returns:
        Values by column, such as `fid`: a row for each scale of guidance, or one for a folder.

    Raises:
        UserError: For input that cannot be used; its message is one line with the fix.
    """
    return evaluation.run(evaluation_options.options_of(options), _JaxBackend())


class _JaxBackend:
    """Draws and computes features with JAX, over all devices."""

    def __init__(self) -> None:
        # JAX is imported only now, so that --help and mistakes in options are answered at once.
        import jax

        from flax_diffusion.jax_backend import processes
        from flax_diffusion.jax_backend.sharding import make_mesh

        processes.connect()
        self.is_main = console.current().main = jax.process_index() == 0
        self._mesh = make_mesh(-1, 1)

    def extractor(self, config: EvaluateOptions) -> Extractor:
        from flax_diffusion.jax_backend.features import FeatureExtractor
        from flax_diffusion.models.inception import read_inception

        weights = read_inception(str(config.inception)) if config.features == INCEPTION else None
        return FeatureExtractor(config.features, self._mesh, config.batch_size, weights)

    def open_spec(self, config: GenerateConfig) -> PipelineSpec:
        from flax_diffusion.jax_backend import drawing

        return drawing.open_spec(config, [config])

    def drawer(self, config: GenerateConfig, spec: PipelineSpec) -> Callable[[GenerateConfig], Iterator[np.ndarray]]:
        from flax_diffusion.jax_backend import drawing

        return partial(drawing.pictures, drawing.open_pipeline(config, spec, self._mesh))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    config = evaluation_options.parse(sys.argv[1:] if argv is None else argv, "python -m flax_diffusion.evaluate")
    backend = _JaxBackend()
    evaluation.show(config, evaluation.run(config, backend), backend)


if __name__ == "__main__":
    command_line.main_guard(main)
