"""The interface between the training loop and a framework. JAX and PyTorch each implement it once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from flax_diffusion.core.checkpoints.portable import Arrays
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.io.files import write_text

if TYPE_CHECKING:
    from flax_diffusion.core.metrics.judging import Extractor

Batch = dict[str, np.ndarray]
"""Arrays of one optimizer step on the host, shaped (accumulation, images of this process, …)."""


MIN_LOSS_SCALE = 1.0
"""Smallest loss scale of fp16: where a gradient overflows even at this scale, the scale is not the cause."""


def refuse(config: TrainConfig, options: Mapping[str, str], backend: str) -> None:
    """Refuse options that only the other backend has.

    Args:
        config: The run's options.
        options: Names of the refused options, each with what to use instead.
        backend: The backend that has them: "JAX" or "PyTorch".

    Raises:
        ConfigError: For the first of them that is set.
    """
    fields = type(config).model_fields
    for name, instead in options.items():
        if getattr(config, name) != fields[name].default:
            raise ConfigError(f"--{name}: only the {backend} backend has it; {instead}")


def check_optimizer(config: TrainConfig, known: Iterable[str]) -> None:
    """Raise ConfigError for an optimizer that a backend does not have.

    Args:
        config: The run's options.
        known: Names of those that it has.
    """
    if config.optimizer not in known:
        raise unknown("--optimizer", config.optimizer, known)


class Described(NamedTuple):
    """What a backend says of itself once its weights are loaded.

    Attributes:
        device: Name of one of its devices, such as "NVIDIA H100" or "cpu".
        frozen_parameters: Number of the parameters that do not train.
        compiles: Whether the first step is compiled before it is taken.
    """

    device: str
    frozen_parameters: int
    compiles: bool


class Backend(Protocol):
    """Owner of models, optimizer state and devices; the loop owns order, time and files.

    Attributes:
        command: The command that trains on this backend.
        process_index: Index of this process, from 0.
        process_count: Number of processes in the run.
        device_count: Number of devices over all processes; the batch is divided over them.
        average: Name of the moving average that samples and exports take; None for the main one.
    """

    command: str
    process_index: int
    process_count: int
    device_count: int
    average: str | None

    @staticmethod
    def check_options(config: TrainConfig) -> None:
        """Refuse options that this backend does not have, before any input is opened.

        Raises:
            ConfigError: For such an option.
        """
        ...

    def init_state(self) -> int:
        """Load or draw the weights, make the optimizer state, and return the number of trained parameters."""
        ...

    def describe(self) -> Described:
        """Return what this backend says of itself, after `init_state`."""
        ...

    def put(self, batch: Batch) -> Any:
        """Start the copy of a host batch to the devices, and return a handle for `train_step`."""
        ...

    def train_step(self, batch: Any, learning_rate: float, ema_decays: Mapping[str, float]) -> Any:
        """Start one optimizer step without waiting for it.

        Args:
            batch: A handle from `put`.
            learning_rate: Learning rate of this step.
            ema_decays: Decays of the moving averages at this step, by name.

        Returns:
            A handle for `read`.
        """
        ...

    def validation_loss(self, average: str | None) -> Callable[[Any], Any]:
        """Return a function that starts to compute the loss of a batch, without dropout; it changes no state.

        It takes a handle from `put`, and returns one for `read`, which then has the `loss` alone. It is of the present
        weights, so the next step ends its use.

        Args:
            average: Name of the moving average to compute with; None for the weights themselves.
        """
        ...

    def set_step(self, step: int) -> None:
        """Make the next step draw the dropout masks of the step that follows `step`."""
        ...

    def read(self, metrics: Any) -> dict[str, float]:
        """Wait for a step, and return its metrics.

        Returns:
            `loss` and its parts, `grad_norm` and, under fp16, `loss_scale`. Where devices tell it, also
            `device_memory_gib`, the most that was in use of a device's memory so far; and where their peak of FLOP/s
            is known, `peak_seconds`, in which the step's FLOPs would be done at this peak.
        """
        ...

    def profiled(self, folder: Path) -> AbstractContextManager[None]:
        """Record what the devices do until the context ends, steps that are under way included.

        Args:
            folder: Folder of this machine for the files, which TensorBoard and Perfetto open.
        """
        ...

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Start to write a checkpoint; training may go on meanwhile.

        Args:
            folder: The new checkpoint's folder, which does not exist yet. The previous save is complete.
            metadata: The loop's metadata, as JSON.
        """
        ...

    def state_bytes(self) -> int:
        """Return the size of the state in bytes, which is most of a checkpoint."""
        ...

    def wait(self) -> None:
        """Wait for the running save, and raise its error if it failed.

        Any thread may call this, and not all processes need to.
        """
        ...

    def all_processes(self, condition: bool) -> bool:
        """Wait until every process calls this, and return whether a condition is true in all of them."""
        ...

    def broadcast_from_first(self, value: int) -> int:
        """Return the first process's value in all processes."""
        ...

    def should_stop(self, requested: bool, step: int) -> bool:
        """Return whether the run must end after a step, which is the same step in all processes.

        Args:
            requested: Whether this process was told to end the run.
            step: The step that was just started.
        """
        ...

    def check(self, folder: Path) -> None:
        """Compare names and shapes of a checkpoint's arrays with those of the state, without reading the arrays.

        Raises:
            CheckpointError: If the checkpoint is of another architecture or optimizer.
        """
        ...

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint into the state, and return its metadata.

        Raises:
            CheckpointError: As in `check`.
        """
        ...

    def state_arrays(self) -> Arrays:
        """Return the whole state as plain arrays on the host, by the names of `core.checkpoints.portable`."""
        ...

    def embed_prompts(self, prompts: list[str]) -> dict[str, np.ndarray]:
        """Encode N prompts, and return what the text encoders make of them by array of a batch, float32 (N, …)."""
        ...

    def posteriors(self, pixels: np.ndarray) -> np.ndarray:
        """Encode images to the posteriors of their latents.

        Args:
            pixels: The images, float32 (N, C, H, W) in -1..1. N is a multiple of the number of this process's devices.

        Returns:
            Means and log variances of the latents, which are not scaled, float32 (P x N, 2, c, h, w): those of the
            images of all P processes, one process after the other.
        """
        ...

    def release(self, name: str) -> None:
        """Free the memory of a frozen component, which only samples need from now on."""
        ...

    def trained_arrays(self) -> Arrays:
        """Return the trained weights, averaged if there is an average, in PyTorch's layout.

        Returns:
            Arrays by component and PyTorch name, such as `unet/conv_in.weight`.
        """
        ...

    def encode(self, pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Encode images to scaled latents.

        Args:
            pixels: The images, float32 (N, C, H, W) in -1..1.
            noise: Standard normal noise that samples the posterior, float32 (N, c, h, w).

        Returns:
            The latents, (N, c, h, w).
        """
        ...

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decode scaled latents (N, c, h, w) to images, uint8 (N, H, W, C)."""
        ...

    def sample(
        self,
        *,
        prompts: list[str],
        num_images: int,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
        batch_size: int = 64,
        extra: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Draw images with the averaged weights if there are any.

        Args:
            prompts: Texts to draw; empty for an unconditional pipeline.
            num_images: Images per prompt, or in all where there are no prompts.
            num_inference_steps: Denoising steps.
            guidance_scale: Scale of classifier-free guidance; 1 or less turns it off.
            seed: Seed of all noise.
            batch_size: Images drawn at a time, over all devices.
            extra: What the denoiser is told beside the prompts, by its name in a batch: arrays (prompts, …). None for
                nothing.

        Returns:
            Images, uint8 (prompts x num_images, H, W, C), or (num_images, H, W, C) where there are no prompts.
        """
        ...

    def draw(self, **options: Any) -> Iterator[np.ndarray]:
        """Draw images as `sample` does, a batch at a time.

        Args:
            options: Arguments of `sample`.

        Yields:
            Images, uint8 (N, H, W, C), in the order of `sample`.
        """
        ...

    def extractor(self, feature: str, inception: str | None, batch_size: int) -> Extractor:
        """Return what computes features of pictures for the metrics.

        Args:
            feature: Name of the feature.
            inception: File of the Inception network's weights; None where the feature needs none.
            batch_size: Pictures at a time.

        Raises:
            UserError: For a feature that this backend does not have, or weights that cannot be read.
        """
        ...

    def export(self, folder: Path, *, only_trained: bool = False) -> None:
        """Write the weights of the pipeline's models, one subfolder each, in Diffusers' format.

        Args:
            folder: Folder of the pipeline.
            only_trained: Whether to leave out the models that do not train.
        """
        ...


def shared_folder(folder: Path, backend: Backend, option: str) -> None:
    """Make sure that all processes see the same folder.

    Args:
        folder: The folder, which exists.
        backend: The backend of this process.
        option: The option that names the folder, for messages.

    Raises:
        ConfigError: If a process does not see what the first one writes. Every process raises it.
    """
    if backend.process_count == 1:
        return
    sign = folder / ".shared"
    if backend.process_index == 0:
        write_text(sign, "all processes of a run must see this\n")
    backend.all_processes(True)
    seen = backend.all_processes(sign.exists())
    if backend.process_index == 0:
        sign.unlink()
    if not seen:
        raise ConfigError(
            f"{option} {folder}: is not the same folder on all {backend.process_count} hosts; name one that they "
            "share, such as gs://bucket/folder"
        )
