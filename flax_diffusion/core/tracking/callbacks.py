"""Callbacks of `train`: what Python code is told while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from flax_diffusion.core.errors import CallbackError, ConfigError


class Callback:
    """What `train(…, callbacks=[…])` calls. Override any of the methods; here they do nothing.

    They are called in the first process of a run alone, in the thread that trains, which waits for them. If one raises,
    no callback is called any more: the step that is under way is finished, the run saves as at SIGTERM, and `train`
    raises a `CallbackError` with the error as its `__cause__`.
    """

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Receive the values of a step.

        So that devices need not wait, they are read when two later steps have been started already, or before a save, a
        sample or a judgement. A step that was passed over as not finite is left out.

        Args:
            step: Number of the optimizer step, from 1.
            metrics: Values by name: `loss` and its parts, `grad_norm`, `learning_rate`, `images_per_second`, and what
                else is logged of each step.
        """

    def on_sample(self, step: int, picture: Image.Image, captions: Sequence[str]) -> None:
        """Receive a grid of pictures that was drawn, once its file is written.

        Args:
            step: Optimizer steps taken before it was drawn.
            picture: The grid, as in `samples/`.
            captions: Text under each picture; empty for none.
        """

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Receive a checkpoint, once it is whole on disk. As saves go on beside training, some steps have followed.

        Args:
            step: Number of the optimizer step that it is of.
            path: Its folder.
        """


class Callbacks:
    """The callbacks of a run, up to the first error of one.

    Args:
        callbacks: The callbacks.
        end: Function that asks the run to end, for a reason that it is given.

    Raises:
        ConfigError: If they are no sequence of `Callback`.
    """

    def __init__(self, callbacks: Sequence[Callback] = (), end: Callable[[str], None] | None = None):
        if isinstance(callbacks, Callback):
            raise ConfigError(f"callbacks: must be a list, and is one {type(callbacks).__name__}: put it into a list")
        for place, callback in enumerate(callbacks):
            if not isinstance(callback, Callback):
                raise ConfigError(
                    f"callbacks[{place}] is a {type(callback).__name__}: it must be an object of a subclass of Callback"
                )
        self._callbacks, self._end = callbacks, end
        self._failure: tuple[str, BaseException] | None = None

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Tell the values of a step."""
        self._each("on_step", step, lambda one: one.on_step(step, dict(metrics)))

    def sample(self, step: int, picture: Image.Image, captions: Sequence[str]) -> None:
        """Tell of a grid of pictures."""
        self._each("on_sample", step, lambda one: one.on_sample(step, picture.copy(), list(captions)))

    def checkpoint(self, step: int, path: Path) -> None:
        """Tell of a checkpoint."""
        self._each("on_checkpoint", step, lambda one: one.on_checkpoint(step, path))

    def _each(self, method: str, step: int, call: Callable[[Callback], None]) -> None:
        for callback in self._callbacks:
            if self._failure is not None:
                return
            try:
                call(callback)
            except BaseException as error:  # also sys.exit(): the run saves first
                name = f"{type(callback).__name__}.{method}"
                self._failure = f"{name} failed at step {step}", error
                if self._end is not None:
                    self._end(f"an error in {name}")

    def raise_if_failed(self, saved: str) -> None:
        """Raise the error of a callback.

        Args:
            saved: What is saved, for the message.

        Raises:
            CallbackError: If one failed.
        """
        if self._failure is not None:
            said, error = self._failure
            raise CallbackError(f"callback {said} ({type(error).__name__}: {error}); {saved}") from error
