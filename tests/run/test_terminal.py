"""Real runs, of which one writes to a terminal of 80 columns and one to a file."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
from test_display import screen
from tiny import ONE_BLOCK, RUN, UNET
from xla_flags import QUICK

OPTIONS = RUN | {"unet": UNET | ONE_BLOCK, "max_train_steps": 12, "checkpointing_steps": 5, "eval_batch_size": 1}
MOVING = re.compile(r"(.*… \d+:\d\d|.*\d of \d.*, \d+:\d\d( left)?| *\d+% (\[[#.]+\] )?\d+/12.*)")


def start(request, backend, folder, stderr, *flags):
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"task": "unconditional"} | OPTIONS | {"output_dir": str(folder / "run")}))
    command = [sys.executable, "-m", f"{backend}.train", "--config", str(recipe), *flags]
    variables = os.environ | {"XLA_FLAGS": QUICK}
    return subprocess.Popen(command, cwd=request.config.rootpath, stderr=stderr, env=variables)


def expected(folder, first):
    run, kinds = folder / "run", "pipeline, checkpoints and samples"
    return [
        f"{first} the first step …",
        "the first step is taken after #",
        *(f"checkpoint saved: {run}/checkpoint-{step}" for step in (5, 10, 12)),
        f"exported at step 12: {run}",
        f"samples of step 12: {run}/samples/00000012.png",
        f"{kinds} are in {run}",
    ]


def events(lines):
    """The lines after the block, without their times, the checkpoints first: saves run beside training."""
    begin = next(place for place, line in enumerate(lines) if "the first step …" in line)
    said = [re.sub(r"after \d+:\d\d", "after #", line) for line in lines[begin:] if line]
    place = {"checkpoint": 1, "exported": 2, "samples": 2, "pipeline": 3}
    return sorted(said, key=lambda line: place.get(line.split()[0].rstrip(","), 0))


def test_a_terminal_of_80_columns(request, tmp_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    began = time.monotonic()
    process = start(request, "flax_diffusion", tmp_path, slave)
    os.close(slave)
    text, first = b"", None
    while True:
        try:
            read = os.read(master, 65536)
        except OSError:  # the process has closed the terminal
            break
        if not read:
            break
        text += read
        if first is None and b"\n" in text:
            first = time.monotonic() - began
    os.close(master)
    assert process.wait() == 0, text.decode()
    assert first is not None
    assert first < 1, f"the first line came after {first:.2f} s"
    said = text.decode().replace("\r\n", "\n")
    lines = screen(said)
    labels = [
        "flax-diffusion:",
        "task",
        "start",
        "data",
        "precision",
        "output",
        "pictures",
        "model",
        "devices",
        "steps",
    ]
    assert [line.split()[0] for line in lines[:11]] == [*labels, "checkpoints"]
    assert re.fullmatch(r"model +DDPMPipeline: [\d,]+ parameters train, 0 stay as they are", lines[7])
    assert re.fullmatch(r"checkpoints 3 of about [\d.]+ kB, every 5 steps; .* are free", lines[10])
    assert events(lines) == expected(tmp_path, "compiling")
    drawn = [part for part in re.split("[\r\n]", said) if MOVING.fullmatch(part.rstrip())]
    assert [part for part in drawn if part.startswith("compiling the first step … 0:0")]
    assert any("12/12" in part for part in drawn)
    assert max(map(len, drawn)) < 80
    kept = {part.rstrip() for part in re.split("[\r\n]", said)} - set(lines)
    assert all(MOVING.fullmatch(part) for part in kept if part), kept  # what is overwritten is only what moves


@pytest.mark.acceptance
def test_a_file(request, tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        assert start(request, "torch_backend", tmp_path, stderr).wait() == 0, log.read_text()
    text = log.read_text()
    assert "\r" not in text
    stamped = [re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)", line) for line in text.splitlines()]
    assert all(stamped), text
    lines = [str(line[1]) for line in stamped if line and not MOVING.fullmatch(line[1])]
    assert [line.split()[0] for line in lines[:2]] == ["task", "start"]
    assert events(lines) == expected(tmp_path, "taking")
