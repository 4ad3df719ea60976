"""A run in several processes of four virtual devices each, which meet as the hosts of a pod do."""

import json
import os
import socket
import subprocess
import sys


def start_together(request, folder, count, values, extra=None, program=("-m", "flax_diffusion.train"), **own):
    """Starts the command, or another program that takes a recipe, in several processes.

    Args:
        request: Of the test.
        folder: For recipes and logs.
        count: Processes.
        values: Options of the run, with its task.
        extra: Environment variables.
        program: Words that Python takes in place of the command.
        own: Options of which each process has its own: a list of values.

    Returns:
        The processes; `log_of` reads what they print.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    started = []
    for index in range(count):
        recipe = folder / f"{index}.yaml"
        recipe.write_text(json.dumps(values | {name: several[index] for name, several in own.items()}))
        meeting = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        command = [sys.executable, *program, "--config", str(recipe)]
        environment = os.environ | meeting | {"XLA_FLAGS": flags} | (extra or {})
        with (folder / f"{index}.log").open("w") as log:
            started.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=request.config.rootpath)
            )
    return started


def log_of(folder, index):
    return (folder / f"{index}.log").read_text()


def together(request, folder, count, values, **own):
    """Waits until all have ended; their statuses and what they printed."""
    codes = [process.wait() for process in start_together(request, folder, count, values, **own)]
    return codes, [log_of(folder, index) for index in range(count)]
