"""Pushes of a run's results to the Hub, in a thread beside training. A push that fails never ends the run."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import TypeVar

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.checkpoints import snapshots
from flax_diffusion.core.config import pushing
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.io import publishing
from flax_diffusion.core.io.files import as_path, copy_file, is_local, remove_tree, temporary_folder, walk
from flax_diffusion.core.report.files import PAGE
from flax_diffusion.core.run import output_folder
from flax_diffusion.core.run.hub.facts import facts_of
from flax_diffusion.core.run.preemption import Preemption
from flax_diffusion.core.spec import cards
from flax_diffusion.core.spec.pipeline import PipelineSpec
from flax_diffusion.core.tasks.task import Task
from flax_diffusion.core.tracking import profile

log = logging.getLogger(__name__)

DELAYS = (5.0, 30.0, 120.0)
"""Seconds before a push that failed is tried again; after the last one it is given up."""
CHECK_SECONDS = 60.0
"""Time for the Hub to answer before the run starts without it."""
STAGE = ".pushed"
"""Folder in a run's folder for what is being pushed."""

_POLL_SECONDS = 0.1
_LINKED = (".safetensors", ".msgpack")
"""Files that an export writes anew and never in place, so that a link to one keeps its content."""

Result = TypeVar("Result")


def stay_home(config: TrainConfig) -> list[str]:
    """Return the patterns of what is not pushed, such as checkpoints, logs, caches and results with further averages.

    The page of the run is not pushed either: it shows training pictures.

    Args:
        config: Options of the run.
    """
    folders = [config.logging_dir, profile.FOLDER, "precomputed", snapshots.FOLDER]
    folders += [output_folder.AVERAGES, output_folder.REPLACED]
    return ["checkpoint-*", "nonfinite-*.json", PAGE, *(f"{name}/*" for name in folders), *publishing.HIDDEN]


class Pusher:
    """Pushes of one run. Without --push_to_hub, and in all processes but the first, its methods do nothing.

    Args:
        task: The task, with the run's options.
        spec: The pipeline.
        backend: The backend of this process.
    """

    def __init__(self, task: Task[TrainConfig], spec: PipelineSpec, backend: Backend):
        config = task.config
        self._task, self._spec, self._backend, self._config = task, spec, backend, config
        self._folder = as_path(config.output_dir)
        self._asked = config.push_to_hub and config.repeat_step is None
        self._works = self._asked and backend.process_index == 0
        self._token = pushing.token_of(config)
        self.repository = config.hub_model_id or self._folder.absolute().name
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._bars_hidden = False
        self._last = self._done = 0  # steps whose results were written, and that were pushed
        self._why = "the run was ended before it was pushed"

    def open(self) -> None:
        """Make sure that one may push, and make the repository. Where the Hub cannot be reached, say that.

        Raises:
            ConfigError: If one may not, in every process.
        """
        if not self._asked:
            return
        failure = None
        if self._works:
            try:
                remove_tree(self._folder / STAGE)
                self.repository = _within(CHECK_SECONDS, self._check)
                log.info("results go to the Hub, as %s", self.repository)
            except publishing.PushError as error:
                if not error.passing:
                    failure = ConfigError(f"--push_to_hub: {error}")
                else:
                    log.warning(
                        "--push_to_hub: %s: the run trains, and nothing is pushed to %s until the Hub answers; it is "
                        "tried again when results are written, and at the end", error, self.repository,
                    )  # fmt: skip
        if self._backend.broadcast_from_first(int(failure is not None)):
            raise failure or ConfigError("--push_to_hub: the first process cannot push; its message says why")

    def _check(self) -> str:
        options = {"token": self._token, "private": self._config.hub_private_repo}
        return publishing.check_repository(self.repository, **options)

    def push(self, step: int) -> None:
        """Start to push the results that were just written, unless an earlier push still runs.

        Args:
            step: The optimizer step.
        """
        if not self._works:
            return
        self._last = step
        if self._thread is not None and self._thread.is_alive():
            log.info("step %d is not pushed by itself: the push before it still runs", step)
            return
        try:
            self._write_card(step)
            staged = self._stage()
        except (OSError, WeightsError) as error:  # a full disk, say
            self._give_up(step, publishing.reason(error, self._token))
            return
        self._why = "the run was ended before it was pushed"
        self._hide_bars()
        self._thread = threading.Thread(target=self._push, args=(staged, step), daemon=True, name="push to the Hub")
        self._thread.start()

    def _hide_bars(self) -> None:
        """Keep the bars of the Hub's client out of the run's own."""
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars

        if not are_progress_bars_disabled():
            disable_progress_bars()
            self._bars_hidden = True

    def _write_card(self, step: int) -> None:
        facts = facts_of(self._task, self._backend.command, step, self._folder, self.repository)
        cards.write(self._folder, self._spec, facts, self.repository)

    def _stage(self) -> Path:
        """Return a folder with what is pushed, as it is now, whatever training writes meanwhile."""
        from huggingface_hub.utils import filter_repo_objects

        local = is_local(self._folder)
        staged = self._folder / STAGE if local else temporary_folder()
        remove_tree(staged)
        for name in filter_repo_objects([*walk(self._folder)], ignore_patterns=stay_home(self._config)):
            source, target = self._folder / name, staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if local and target.suffix in _LINKED:
                try:
                    os.link(source, target)
                    continue
                except OSError:
                    log.debug("%s: no links on this file system; it is copied", source)
            copy_file(source, target)
        return staged

    def _push(self, staged: Path, step: int) -> None:
        """Push a folder, and again if that fails; what runs in the thread."""
        try:
            address = self._push_until_done(staged, step)
            if address is not None:
                self._done = step
                log.info("step %d is pushed: %s", step, address)
        except Exception as error:  # whatever it is, the run goes on
            self._give_up(step, publishing.reason(error, self._token))
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _push_until_done(self, staged: Path, step: int) -> str | None:
        """Push a folder, and return the address of the commit; None where the run ends between two tries."""
        token, private = self._token, self._config.hub_private_repo
        for delay in (*DELAYS, None):
            try:
                return publishing.push_folder(
                    staged, self.repository, token=token, private=private, commit_message=f"Step {step}"
                )
            except publishing.PushError as error:
                if delay is None or not error.passing:
                    raise
                why = publishing.reason(error, token)
                log.info("step %d could not be pushed (%s); it is tried again in %g s", step, why, delay)
                if self._ended.wait(delay):
                    break
        return None

    def _give_up(self, step: int, why: str) -> None:
        self._why = why
        log.warning("step %d is not pushed to %s (%s); the run goes on", step, self.repository, why)

    def finish(self, step: int, preemption: Preemption) -> None:
        """Push the results at the end of the run, and wait for that, unless a signal comes.

        Args:
            step: The optimizer step.
            preemption: Says when to wait no longer.
        """
        if self._asked:
            self._wait(preemption)
            self.push(step)
            self._wait(preemption)

    def _wait(self, preemption: Preemption) -> None:
        # Processes meet again and again: one that waited minutes for another would take it for dead.
        while not self._backend.all_processes(preemption.requested or self._is_idle()):
            pass

    def _is_idle(self) -> bool:
        if self._thread is not None:
            self._thread.join(_POLL_SECONDS)
        return self._thread is None or not self._thread.is_alive()

    def close(self) -> None:
        """Say what is not pushed, and by which command it is; what runs is not waited for."""
        self._ended.set()
        if self._bars_hidden:
            from huggingface_hub.utils import enable_progress_bars

            enable_progress_bars()
        if self._last == self._done:
            return
        command = publishing.upload_command(
            self._folder,
            self.repository,
            private=self._config.hub_private_repo,
            ignore_patterns=stay_home(self._config),
        )
        first = "" if is_local(self._folder) else "copy the folder to this machine, and "
        log.warning("step %d is not on the Hub (%s); %spush it by: %s", self._last, self._why, first, command)


def _within(seconds: float, work: Callable[[], Result]) -> Result:
    """Do work in a thread, and wait for it so long.

    Raises:
        PushError: If it takes longer.
    """
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # the waiting thread handles it
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="check of the Hub").start()
    try:
        return done.result(seconds)
    except FutureTimeout as error:
        raise publishing.PushError(f"the Hub does not answer within {seconds:g} s", passing=True) from error
