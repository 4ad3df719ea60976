"""The purpose of a run: its options, its examples, the models that train, the preview, and the results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data.batches import ExampleFn, Precomputed
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.data.sources.given import Examples
from flax_diffusion.core.data.sources.source import ArraySource, Source
from flax_diffusion.core.families.family import GROUP
from flax_diffusion.core.objectives.noising import NoiseSpec
from flax_diffusion.core.registry import Registry
from flax_diffusion.core.spec import writing
from flax_diffusion.core.spec.pipeline import PipelineSpec

if TYPE_CHECKING:
    from flax_diffusion.core.data.shards.streaming import StreamedSource

C = TypeVar("C", bound=TrainConfig, covariant=True)


class Preview(NamedTuple):
    """Preview of a run's progress.

    Attributes:
        draw: Makes N pictures, each uint8 (H, W, C), with the averaged weights if there are any.
        columns: Pictures in a row of the grid; None for a square grid.
        captions: Text under each picture; empty for none.
    """

    draw: Callable[[Backend], Sequence[np.ndarray] | np.ndarray]
    columns: int | None
    captions: Sequence[str] = ()


class Task(ABC, Generic[C]):
    """A task with the options of one run.

    Args:
        config: The options.
    """

    name: ClassVar[str]
    """Name by which a user chooses the task."""
    config_class: ClassVar[type[TrainConfig]]
    """Class of the task's options."""

    data_options: ClassVar[tuple[str, ...]] = ()
    """Options that name the data which `train` may be given in Python instead; none where it may not.

    The first then holds `EXAMPLES`, and the others nothing.
    """

    checks_captions: ClassVar[bool] = False
    """Whether captions come from data, so that they are checked before the start."""
    rows_per_example: int = 1
    """Pictures per example."""
    embeds_prompts: bool = False
    """Whether prompts are encoded once, before training."""
    embeds_empty_prompt: bool = False
    """Whether the empty prompt is encoded too, even if no caption is empty."""
    caches_latents: bool = False
    """Whether pictures are encoded once, before training."""
    precomputed_dir: str | None = None
    """Folder that keeps what is computed before training for later runs; None for none."""
    latents_dir: str | None = None
    """Folder of latents that a run reads in place of pictures, and that `precompute` fills; None for none."""
    latents_dtype: str = "float32"
    """Dtype in which these are stored, "float32" or "bfloat16"."""
    precomputed_dtype: str = "float32"
    """Dtype in which the embeddings of prompts are stored, "float32" or "bfloat16"."""
    makes_tokenizer: bool = False
    """Whether the captions make the tokenizer."""

    examples: Examples | None = None
    """Examples that `train` is given in Python; None for the data that the options name."""

    def __init__(self, config: C):
        self.config = config

    @classmethod
    def stand_ins(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options that name data, for a plan, which reads none.

        Args:
            given: The given options.
        """
        return {}

    def described_source(self) -> Source:
        """Return a picture with a caption and a second picture in place of the data, for a plan, which reads none.

        Where a tokenizer is made from captions, these are the data all the same.
        """
        if self.makes_tokenizer:
            return self.open_source()
        size = self.config.resolution
        images = np.zeros((1, size, size, 3), np.uint8)
        return ArraySource(images, ["a photo"], "described", extras=images)

    @abstractmethod
    def open_source(self) -> Source:
        """Open the examples, without those that the models draw.

        Raises:
            UserError: If they cannot be used.
        """

    def open_validation(self, source: Source) -> Source | None:
        """Open the examples of a validation folder; None where the options name none.

        Args:
            source: The examples of `open_source`.

        Raises:
            UserError: If they cannot be used, or are of another kind than those.
        """
        return None

    def open_pictures(self) -> Source:
        """Open the pictures of which latents are made, also where `open_source` opens latents in their place.

        Raises:
            UserError: If they cannot be used.
        """
        return self.open_source()

    def stream_of(self, source: Source) -> StreamedSource | None:
        """Return the shards that a run streams, among its examples; None where it streams none.

        Args:
            source: The examples of `open_source`.
        """
        return None

    def count_examples(self, source: Source) -> int:
        """Return the number of examples per epoch, including those that `complete_source` adds."""
        return len(source)

    def complete_source(self, source: Source, backend: Backend) -> Source:
        """Return the examples, including those that the models draw.

        Args:
            source: The examples of `open_source`.
            backend: The backend, with the weights that the run starts from.
        """
        return source

    @abstractmethod
    def make_spec(self, source: Source) -> PipelineSpec:
        """Read the configs of the pipeline to train; the captions make a tokenizer where there is none.

        Raises:
            UserError: For models that this task cannot train.
        """

    @abstractmethod
    def reopen_spec(self, run: Path) -> PipelineSpec:
        """Return the pipeline that a run trains, to draw from it.

        Args:
            run: Folder of the run.

        Raises:
            UserError: If the task draws nothing, or a file is missing.
        """

    def make_transform(self, spec: PipelineSpec) -> ImageTransform:
        """Return the transform of the pictures."""
        config = self.config
        return ImageTransform(
            resolution=config.resolution,
            resize_mode=config.resize_mode,
            center_crop=config.center_crop,
            random_flip=config.random_flip,
            interpolation=config.image_interpolation_mode,
            channels=spec.image_channels,
        )

    def noise(self, spec: PipelineSpec, dtype: DTypeLike) -> NoiseSpec:
        """Return the spec of each example's timestep and noises.

        Args:
            spec: The pipeline.
            dtype: Dtype of the objective's numbers.
        """
        return NoiseSpec(shape=spec.sample_shape, latent_noise=spec.vae is not None)

    def make_example_fn(
        self, spec: PipelineSpec, made: Precomputed | None = None, dtype: DTypeLike = np.float32
    ) -> ExampleFn:
        """Return the maker of examples.

        Args:
            spec: The pipeline.
            made: What was computed before training; None for nothing.
            dtype: Dtype of the objective's numbers.
        """
        return ExampleFn(
            transform=self.make_transform(spec),
            noise=self.noise(spec, dtype),
            tokenize=spec.tokenize,
            made=made or Precomputed(),
            told_sizes=spec.family.told_sizes,
        )

    @property
    def prompts(self) -> dict[str, list[str]]:
        """Prompts among the options, by option."""
        return {}

    @abstractmethod
    def make_preview(self, spec: PipelineSpec, source: Source) -> Preview | None:
        """Return the preview of progress; None for none."""

    def evaluation(self) -> dict[str, Any] | None:
        """Return what a run evaluates while it trains, by option of `evaluate`; None for nothing."""
        return None

    def export_trained(
        self, backend: Backend, spec: PipelineSpec, source: Source, folder: Path, *, only_trained: bool = False
    ) -> None:
        """Write the models, with the averaged weights if there are any.

        Args:
            backend: The backend, with the weights.
            spec: The pipeline.
            source: All examples of the run.
            folder: Folder to write to.
            only_trained: Whether to leave out models that do not train.
        """
        backend.export(folder, only_trained=only_trained)

    def export(self, backend: Backend, spec: PipelineSpec, source: Source, folder: Path) -> None:
        """Write the result of the run, which is a pipeline that Diffusers loads unless a task overrides this."""
        self.export_trained(backend, spec, source, folder)
        if backend.process_index == 0:
            writing.write_index(spec, folder)


_MODULES = (
    "unconditional", "class_conditional", "text_to_image", "dreambooth", "textual_inversion", "controlnet",
    "autoencoder",
)  # fmt: skip

TASKS: Registry[type[Task[TrainConfig]]] = Registry(
    "task", [f"flax_diffusion.core.tasks.{name}" for name in _MODULES], GROUP
)
"""All tasks by name."""


def task_of(config: TrainConfig, examples: Examples | None = None) -> Task[TrainConfig]:
    """Return the task of a run's options.

    Args:
        config: The options.
        examples: Examples that Python gives, where an option holds `EXAMPLES`.
    """
    made = next(task(config) for task in TASKS.values() if task.config_class is type(config))
    made.examples = examples
    return made
