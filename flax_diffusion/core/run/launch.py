"""The command that trains, for either backend: from options to a run."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub.utils import disable_progress_bars

from flax_diffusion.core.checkpoints import folders
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.config.options import EXAMPLES, Reads, TrainConfig, named_inputs
from flax_diffusion.core.data.sources.given import Examples
from flax_diffusion.core.display import block, console, first_line
from flax_diffusion.core.display.console import LAST
from flax_diffusion.core.errors import ConfigError, MemoryLimitError, UserError, is_out_of_memory
from flax_diffusion.core.io.files import as_path
from flax_diffusion.core.run.preemption import INTERRUPTED, Preempted, Preemption
from flax_diffusion.core.run.result import Ended, TrainResult, result_of
from flax_diffusion.core.tasks.task import TASKS, Task, task_of
from flax_diffusion.core.tracking import boards
from flax_diffusion.core.tracking.callbacks import Callback

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

_LEVELS = {
    "debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR,
}  # fmt: skip
_PRECISION = {"no": "float32", "bf16": "bfloat16, with weights in float32", "fp16": "float16, with weights in float32"}

LoadBackend = Callable[[], Any]
"""Function that imports a framework and returns its backend's class.

It is called late, so that --help and mistakes are answered at once.
"""


R = TypeVar("R")

PYTORCH_PACKAGES = ("torch", "diffusers", "accelerate")
INSTALL_PYTORCH = "pip install -c constraints.txt 'flax-diffusion[torch]'"


def require(packages: Sequence[str], install: str) -> None:
    """Make sure that packages are installed.

    Args:
        packages: Names of the packages.
        install: The command that installs them.

    Raises:
        ConfigError: If one is missing; the message holds the command.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed: {install}")


def train(
    load_backend: LoadBackend,
    task: str,
    config: str | Path | None,
    options: dict[str, Any],
    *,
    generate: Callable[..., np.ndarray],
    examples: Examples | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a model, when called from Python.

    Args:
        load_backend: Loads the framework's backend.
        task: Name of the task.
        config: Path of a YAML recipe; None for none.
        options: Values by flag; they override the recipe.
        generate: Draws from a model with this backend.
        examples: Examples in place of the data that options name; None for these.
        callbacks: What is told of the run.

    Returns:
        The result.

    Raises:
        UserError: For input that cannot be used, and for a callback that raised an error.
        KeyboardInterrupt: After Ctrl-C, once everything is saved.
    """
    options = _with_examples(task, options, examples)
    values = command_line.merge(task, command_line.read_yaml(config) if config else {}, options, str(config))
    preemption = Preemption()
    ended = _train(load_backend, task_of(values, examples), preemption, callbacks)
    if preemption.interrupted:
        raise KeyboardInterrupt
    return result_of(ended, generate)


def precompute(load_backend: LoadBackend, task: str, config: str | Path | None, options: dict[str, Any]) -> Path:
    """Compute what is computed before training, when called from Python; with arguments and errors as of `train`.

    Returns:
        The folder of `--latents_dir` or `--precomputed_dir`.
    """
    values = command_line.merge(task, command_line.read_yaml(config) if config else {}, options, str(config))
    preemption = Preemption()
    folder = _fill(load_backend, task_of(values), preemption)
    if preemption.interrupted:
        raise KeyboardInterrupt
    return folder


def _with_examples(task: str, options: dict[str, Any], examples: Examples | None) -> dict[str, Any]:
    """Return options that say that Python gives the data, where it does, whatever a recipe says.

    Raises:
        ConfigError: If other options name data too, or the task takes no examples.
    """
    if examples is None or task not in TASKS:  # which `merge` says
        return options
    names = TASKS[task].data_options
    if not names:
        raise ConfigError(f"examples: the task {task} takes none; drop them")
    for name in names:
        if options.get(name) not in (None, EXAMPLES):
            raise ConfigError(f"examples and --{name} {options[name]} are both the data of the run: drop one of them")
    return options | dict.fromkeys(names) | {names[0]: EXAMPLES}


def main(load_backend: LoadBackend, prog: str, argv: Sequence[str] | None, *, only_precompute: bool = False) -> None:
    """Run the command line.

    Args:
        load_backend: Loads the framework's backend.
        prog: Name of the command, for its help.
        argv: The words of the command line; None for those of this process.
        only_precompute: Whether to end with what is computed before training, in the folder of
            `--latents_dir` or `--precomputed_dir`.

    Raises:
        UserError: For input that cannot be used.
        SystemExit: After Ctrl-C, once everything is saved.
    """
    _, config = command_line.parse_train(sys.argv[1:] if argv is None else argv, prog)
    _set_up_logging(config)
    preemption = Preemption()
    (_fill if only_precompute else _train)(load_backend, task_of(config), preemption)
    status = INTERRUPTED if preemption.interrupted else 0
    if preemption.requested and preemption.single_process:
        # Everything is saved; a normal exit would wait for threads that may wait for a disk.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        raise SystemExit(status)


def _train(
    load_backend: LoadBackend, task: Task[TrainConfig], preemption: Preemption, callbacks: Sequence[Callback] = ()
) -> Ended:
    def load() -> Callable[[Any], Ended]:
        from flax_diffusion.core.run.loop import fit

        return lambda backend: fit(task, backend, preemption, callbacks)

    ended = _run(load_backend, task, preemption, load, " before the first step; nothing had to be saved")
    if ended is not None:
        return ended
    folder = as_path(task.config.output_dir)
    saved = folders.committed(folder)
    return Ended(folder, folders.step_of(saved[-1]) if saved else 0, False, {})


def _fill(load_backend: LoadBackend, task: Task[TrainConfig], preemption: Preemption) -> Path:
    def load() -> Callable[[Any], Path]:
        from flax_diffusion.core.run.start import fill

        return lambda backend: fill(task, backend, preemption)

    folder = _run(load_backend, task, preemption, load, "; what was written stays: give the same command again")
    return as_path(str(task.latents_dir or task.precomputed_dir)) if folder is None else folder


def _run(
    load_backend: LoadBackend,
    task: Task[TrainConfig],
    preemption: Preemption,
    load_work: Callable[[], Callable[[Any], R]],
    kept: str,
) -> R | None:
    """Do the work of a run with a backend, and say what it is.

    Args:
        load_backend: Loads the framework's backend.
        task: The task, with the run's options.
        preemption: Says when to end early.
        load_work: Imports what is needed, and returns a function of the backend that does the work.
        kept: What is kept if the run is told to end, for the message.

    Returns:
        What the work returned; None if the run was told to end.

    Raises:
        UserError: For input that cannot be used.
    """
    config, here = task.config, console.current()
    # Signals come first, before a framework of several hosts installs its own handler of them.
    with preemption, _speaking(config), here.ticking():
        boards.prepare(config.report_to, main=here.main)
        _say_options(task)
        try:
            with here.doing("importing libraries"):
                work, backend = load_work(), load_backend()
            backend.check_options(config)
            return work(backend)
        except Preempted:
            log.info("ended by %s%s", preemption.signal_name, kept, extra=LAST)
            return None
        except Exception as error:
            if isinstance(error, UserError) or not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise MemoryLimitError(f"out of memory ({reason}): {', '.join(_memory_advice(config))}") from error


def _set_up_logging(config: TrainConfig) -> None:
    """Have what is logged in this process said on the console, without what the user can do nothing about.

    Args:
        config: Options of the run.
    """
    debugs = config.log_level == "debug"
    logging.basicConfig(level=logging.INFO if debugs else logging.WARNING, handlers=[console.Handler()])
    if not debugs:
        for chatty in ("absl", "asyncio"):  # logged in Orbax's threads; this program reports their failures itself
            logging.getLogger(chatty).setLevel(logging.CRITICAL)
        if not sys.warnoptions:
            for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):  # for who writes programs
                warnings.simplefilter("ignore", kind)
    warnings.showwarning = _show_warning  # in one line, beside the moving one
    if not console.current().live:  # a library's bar is no text for a file
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        disable_progress_bars()


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    console.current().say(f"{category.__name__}: {' '.join(str(message).split())}", logging.WARNING)


@contextmanager
def _speaking(config: TrainConfig) -> Iterator[None]:
    """Say inside of a `with` block what the options want said, and what is logged, unless it is logged elsewhere.

    Args:
        config: Options of the run.
    """
    here = console.current()
    was = here.level, here.moves, here.main
    here.level, here.moves, here.main = _LEVELS[config.log_level], not config.quiet, first_line.is_first_process()
    if config.quiet:
        here.level = max(here.level, logging.WARNING)
    try:
        with _logged():
            yield
    finally:
        here.level, here.moves, here.main = was


@contextmanager
def _logged() -> Iterator[None]:
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in console.OURS]
    before = [logger.level for logger in ours]
    handler = None if root.handlers else console.Handler()
    if handler is not None:
        root.addHandler(handler)
    for logger in ours:
        if logger.level == logging.NOTSET:  # the console itself leaves out what is below its own level
            logger.setLevel(min(console.current().level, logging.INFO))
    try:
        yield
    finally:
        for logger, was in zip(ours, before, strict=True):
            logger.setLevel(was)
        if handler is not None:
            root.removeHandler(handler)


def _say_options(task: Task[TrainConfig]) -> None:
    """Say what is known from the options alone."""
    config, here = task.config, console.current()
    defaults = {name: field.default for name, field in type(config).model_fields.items()}
    inputs = [one for one in named_inputs(config) if one[2] != defaults.get(one[0])]
    models = [text for _, kind, text in inputs if kind is Reads.MODEL]
    data = [text for _, kind, text in inputs if kind is not Reads.MODEL]
    here.say(block.row("task", task.name))
    here.say(block.row("start from", ", ".join(dict.fromkeys(models)) or "new weights"))
    named_data = ", ".join(dict.fromkeys(data)) or EXAMPLES  # which are no named input
    here.say(block.row("data", f"{named_data}, at {config.resolution} pixels"))
    here.say(block.row("precision", _PRECISION[config.mixed_precision]))
    goes_on = f", going on from {config.resume_from_checkpoint}" if config.resume_from_checkpoint else ""
    here.say(block.row("output", f"{config.output_dir}{goes_on}"))


def _memory_advice(config: TrainConfig) -> list[str]:
    """Return the ways to save memory that the options do not use yet, the cheapest first."""
    batch = config.global_batch_size or config.train_batch_size
    name = "global_batch_size" if config.global_batch_size else "train_batch_size"
    advice = []
    if batch > 1:
        advice.append(f"lower --{name} {batch} (--gradient_accumulation_steps makes up for it)")
    if config.mixed_precision == "no":
        advice.append("add --mixed_precision bf16")
    if not config.gradient_checkpointing:
        advice.append("add --gradient_checkpointing minimal")
    elif config.gradient_checkpointing == "minimal":
        advice.append("use --gradient_checkpointing without minimal")
    if not config.use_8bit_adam:
        advice.append("add --use_8bit_adam")
    if getattr(config, "cache_latents", True) is False:
        advice.append("add --cache_latents")
    advice.append("or divide the state by --fsdp_parallelism; `python -m tpu.plan` tells what fits a TPU")
    return advice
