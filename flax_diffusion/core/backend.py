"""What the training loop asks of a framework. JAX and PyTorch each implement it once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flax_diffusion.core.checkpoints.portable import Arrays
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.io.files import write_text

Batch = dict[str, np.ndarray]
"""Arrays of one optimizer step on the host, shaped (accumulation, images of this process, …)."""


MIN_LOSS_SCALE = 1.0
"""Of fp16: a gradient that overflows without any scale is not the scale's fault."""


def refuse(config: TrainConfig, options: Mapping[str, str], backend: str) -> None:
    """Raises ConfigError for the first option that is set but that only the other backend has.

    Args:
        config: The run's options.
        options: Name to what to use instead.
        backend: The one that has them: "JAX" or "PyTorch".
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


class Backend(Protocol):
    """Owns models, optimizer state and devices; the loop owns order, time and files."""

    command: str
    """That trains on this backend."""
    process_index: int
    process_count: int
    device_count: int
    """Devices over all processes; the batch is divided over them."""

    @staticmethod
    def check_options(config: TrainConfig) -> None:
        """Raises ConfigError for options that this backend does not have, before any input is opened."""
        ...

    def init_state(self) -> int:
        """Loads or draws the weights, makes the optimizer state and returns the number of trained parameters."""
        ...

    def put(self, batch: Batch) -> Any:
        """Starts the copy of a host batch to the devices and returns a handle for `train_step`."""
        ...

    def train_step(self, batch: Any, learning_rate: float, ema_decay: float) -> Any:
        """Starts one optimizer step and returns a handle for `read`, without waiting for it."""
        ...

    def set_step(self, step: int) -> None:
        """Lets the next step draw its dropout as the one after `step` does."""
        ...

    def read(self, metrics: Any) -> dict[str, float]:
        """Waits for a step and returns its `loss` and `grad_norm` (and `loss_scale` under fp16)."""
        ...

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Starts writing state and metadata to a folder that is not there yet, the save before it being complete.

        Training may go on meanwhile.
        """
        ...

    def state_bytes(self) -> int:
        """Bytes of the state, which is most of a checkpoint."""
        ...

    def wait(self) -> None:
        """Waits for the save in flight and raises what went wrong in it. Any thread may call it, in some processes."""
        ...

    def everywhere(self, holds: bool) -> bool:
        """Waits until every process calls it, and returns whether `holds` is true in all of them."""
        ...

    def from_first(self, value: int) -> int:
        """Returns the first process's value in all of them."""
        ...

    def stops(self, wanted: bool, step: int) -> bool:
        """Returns whether the run ends after a step: in all processes after the same one.

        Args:
            wanted: This process was told to.
            step: That was just started.
        """
        ...

    def check(self, folder: Path) -> None:
        """Compares names and shapes of a checkpoint's arrays with those of the state, without reading the arrays.

        Raises:
            CheckpointError: If the checkpoint is of another architecture or optimizer.
        """
        ...

    def restore(self, folder: Path) -> dict[str, Any]:
        """Loads the state in place and returns the metadata.

        Raises:
            CheckpointError: As `check`.
        """
        ...

    def state_arrays(self) -> Arrays:
        """Returns the whole state as plain arrays on the host, by the names of `core.portable`."""
        ...

    def embed_prompts(self, prompts: list[str]) -> np.ndarray:
        """Encodes prompts to float32 (N, L, D)."""
        ...

    def posteriors(self, pixels: np.ndarray) -> np.ndarray:
        """Encodes images, float32 (N, C, H, W) in -1..1, N a multiple of this process's devices.

        Returns:
            Means and log variances of their latents, not scaled, float32 (P x N, 2, c, h, w): those of the images of
            all P processes, one process after the other.
        """
        ...

    def release(self, name: str) -> None:
        """Free a frozen component's memory: only samples need it from now on."""
        ...

    def trained_arrays(self) -> Arrays:
        """Returns what trains, averaged if there is an average, as `unet/conv_in.weight`, in PyTorch's layout."""
        ...

    def encode(self, pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Encodes images, float32 (N, C, H, W) in -1..1, to scaled latents (N, c, h, w), sampled with `noise`."""
        ...

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Decodes scaled latents to uint8 images (N, H, W, C)."""
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
    ) -> np.ndarray:
        """Draws images with the averaged weights if there are any, `batch_size` at a time over all devices.

        Returns:
            uint8 images shaped (prompts x num_images, height, width, channels), or (num_images, …) with no prompts.
        """
        ...

    def export(self, folder: Path, *, only_trained: bool = False) -> None:
        """Writes the weights of the pipeline's models, one subfolder each, in Diffusers' format."""
        ...


def shared_folder(folder: Path, backend: Backend, option: str) -> None:
    """Makes sure that all processes see the same folder.

    Args:
        folder: That exists.
        backend: Of this process.
        option: That names the folder.

    Raises:
        ConfigError: In every process, if one does not see what the first one writes.
    """
    if backend.process_count == 1:
        return
    sign = folder / ".shared"
    if backend.process_index == 0:
        write_text(sign, "all processes of a run must see this\n")
    backend.everywhere(True)
    seen = backend.everywhere(sign.exists())
    if backend.process_index == 0:
        sign.unlink()
    if not seen:
        raise ConfigError(
            f"{option} {folder}: is not the same folder on all {backend.process_count} hosts; name one that they "
            "share, such as gs://bucket/folder"
        )
