"""What `train` returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flax_diffusion.core.checkpoints import folders
from flax_diffusion.core.io.files import names_in
from flax_diffusion.core.io.metrics_file import METRICS_FILE, read_metrics
from flax_diffusion.core.io.sheets import to_pillow


class Ended(NamedTuple):
    """The end of a run.

    Attributes:
        output_dir: Folder of the run.
        steps: Optimizer steps that it has taken, earlier starts included.
        complete: Whether these are all that it was to take.
        metrics: Values of the last step that this start took, by name; none where it took none.
    """

    output_dir: Path
    steps: int
    complete: bool
    metrics: dict[str, float]


@dataclass(frozen=True)
class TrainResult(os.PathLike[str]):
    """The result of a run, which stands for the path of its folder wherever a path is taken.

    Attributes:
        output_dir: Folder of the run: a Diffusers pipeline, an autoencoder or adapters, with checkpoints, samples and
            logs.
        steps: Optimizer steps that it has taken, earlier starts included.
        complete: Whether these are all that it was to take. They are not after SIGTERM.
        metrics: Last value of everything that was measured, by name: what is logged of each step, such as `loss`, of
            the last step that this start took, and what the run was judged by.
        history: What the run was judged by, such as the loss on pictures that do not train: the rows of metrics.jsonl,
            each with its `step`.
        samples: Grids of pictures, in order.
        checkpoints: Folders of the checkpoints that are there, the oldest first.
        generate: Function that draws, that of the backend which trained.
    """

    output_dir: Path
    steps: int
    complete: bool
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    samples: list[Path]
    checkpoints: list[Path]
    generate: Callable[..., np.ndarray] = field(repr=False, compare=False)

    def __fspath__(self) -> str:
        return str(self.output_dir)

    def __str__(self) -> str:
        return str(self.output_dir)

    def __truediv__(self, name: str | os.PathLike[str]) -> Path:
        return self.output_dir / name

    def sample(self, prompt: str | Sequence[str] = (), **options: Any) -> list[Image.Image]:
        """Draw pictures from the model that was trained, as `generate` does, on the backend that trained it.

        Args:
            prompt: Text or texts to draw, for models of texts.
            options: Other options of `generate` by name: num_images, num_inference_steps, guidance_scale, seed,
                class_label, height, width, …

        Returns:
            The pictures, prompt by prompt.

        Raises:
            UserError: For options that the model cannot draw with, or if the run has written no model yet.
        """
        prompts = [prompt] if isinstance(prompt, str) else [*prompt]
        return [to_pillow(image) for image in self.generate(self.output_dir, prompt=prompts, **options)]


def result_of(ended: Ended, generate: Callable[..., np.ndarray]) -> TrainResult:
    """Return the result of a run, as it is in its folder.

    Args:
        ended: The end of the run.
        generate: Function of a model and options that draws, as `flax_diffusion.generate.generate`.
    """
    folder = ended.output_dir
    history = read_metrics(folder / METRICS_FILE)
    judged = {name: value for row in history for name, value in row.items() if name != "step" and value is not None}
    return TrainResult(
        output_dir=folder,
        steps=ended.steps,
        complete=ended.complete,
        metrics=judged | ended.metrics,
        history=history,
        samples=[folder / "samples" / name for name in sorted(names_in(folder / "samples")) if name.endswith(".png")],
        checkpoints=folders.committed(folder),
        generate=generate,
    )
