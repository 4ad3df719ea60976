"""Runs that something happens to, each in a process of its own, of either backend."""

import json
import multiprocessing
import os
import signal
import sys
import time

import numpy as np
from tiny import ONE_BLOCK, RUN, UNET, losses
from xla_flags import QUICK

from flax_diffusion.core.checkpoints import portable

BACKENDS = ("flax_diffusion", "torch_backend")
FOLDERS = {"flax_diffusion": "flax_diffusion.jax_backend", "torch_backend": "torch_backend"}
"""Where the parts of each are that the commands do not show."""
STEPS = 200
CONFIG = RUN | {
    "max_train_steps": STEPS, "checkpointing_steps": 10, "checkpoints_total_limit": 2, "use_ema": True,
    "validation_epochs": None, "eval_batch_size": 1, "max_train_samples": 24,
    "unet": UNET | ONE_BLOCK | {"dropout": 0.1},
}  # fmt: skip

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two of PyTorch's threads wait for each other where the cores are busy
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["jax", "flax.linen", "optax", "torch", "sklearn.datasets", "grain"])


def start(backend, folder, happens=None, **options):
    """Starts a run.

    Args:
        backend: One of BACKENDS.
        folder: Of the run.
        happens: Called with `what` it needs first thing in the process: (function, *arguments), picklable.
        options: Of the run, beside CONFIG.
    """
    folder.mkdir(parents=True, exist_ok=True)
    process = _PROCESSES.Process(target=_train, args=(backend, folder, happens, CONFIG | options))
    process.start()
    return process


def _train(backend, folder, happens, options):
    with (folder.with_name(f"{folder.name}.log")).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["XLA_FLAGS"] = QUICK  # on the cores that the machine has
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, also where the tests ignore it
    if happens is not None:
        function, *arguments = happens
        function(*arguments)
    recipe = folder.with_name(f"{folder.name}.yaml")
    recipe.write_text(json.dumps({"task": "unconditional"} | options | {"output_dir": str(folder)}))
    from importlib import import_module

    from flax_diffusion.core.cli.command_line import main_guard

    sys.argv = ["train", "--config", str(recipe)]
    main_guard(import_module(f"{backend}.train").main)


def ended(process, within=600):
    """The exit status; negative for a signal."""
    process.join(within)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def log_of(folder):
    return folder.with_name(f"{folder.name}.log").read_text()


def go_on(backend, folder, **options):
    """Resumes, to the end."""
    process = start(backend, folder, resume_from_checkpoint="latest", **options)
    assert ended(process) == 0, log_of(folder)


def left(folder, step=STEPS):
    """What a run ended with: all arrays, the loop's metadata, and the logged losses."""
    arrays, metadata = portable.read(folder / f"checkpoint-{step}")
    return arrays, metadata, losses(folder)


def assert_same(ours, theirs):
    assert ours[0].keys() == theirs[0].keys()
    for name, array in theirs[0].items():
        np.testing.assert_array_equal(ours[0][name], array, err_msg=name)
    assert ours[1:] == theirs[1:]


def wait_for(condition, process, within=120):
    """Waits until something holds, or the process has ended."""
    until = time.monotonic() + within
    while not condition() and process.is_alive():
        assert time.monotonic() < until, "it never came to that"
        time.sleep(0.002)


def die(where):
    os.write(2, f"killed {where}".encode())
    os.kill(os.getpid(), signal.SIGKILL)
