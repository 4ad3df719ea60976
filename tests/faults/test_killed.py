"""SIGKILL at any moment: the run that goes on ends bit for bit as one that nothing happened to."""

import random
import threading
import time

import pytest
from faults.trials import BACKENDS, STEPS, assert_same, die, ended, go_on, left, log_of, start

from flax_diffusion.core.checkpoints import folders
from flax_diffusion.core.checkpoints.folders import committed, find_damage
from flax_diffusion.core.run import saving

SHORT = {"max_train_steps": 24, "checkpointing_steps": 3}


class Saves:
    """Watches the saves of this process."""

    def __init__(self, number=None, fraction=0.0):
        self.count, self.under_way, self.length = 0, False, 0.05
        real, complete = saving.Saver.start, saving.Saver._complete
        began = 0.0

        def start(saver, *arguments):
            nonlocal began
            saver.wait()
            self.count, self.under_way, began = self.count + 1, True, time.monotonic()
            if self.count == number:
                threading.Timer(fraction * self.length, self.die).start()
            real(saver, *arguments)

        def timed(saver, folder):
            complete(saver, folder)
            self.under_way, self.length = False, time.monotonic() - began

        saving.Saver.start, saving.Saver._complete = start, timed

    def die(self):
        die("in a save" if self.under_way else "between")


def after(seconds):
    """Dies at some time after the first step."""
    from flax_diffusion.core.run.loop import _Run

    saves, real = Saves(), _Run._steps

    def steps(self, loader):
        threading.Timer(seconds, saves.die).start()
        real(self, loader)

    _Run._steps = steps


def in_save(number, fraction):
    """Dies in a save, when a fraction of the time of the one before it is over."""
    Saves(number, fraction)


def in_rotation(number, files):
    """Dies in a rotation, when some files of the old checkpoint are deleted."""
    real, deletions = folders.remove_tree, 0

    def remove_tree(folder):
        nonlocal deletions
        if folder.exists():
            deletions += 1
            if deletions == number:
                for file in sorted(path for path in folder.rglob("*") if path.is_file())[:files]:
                    file.unlink()
                die("in a rotation")
        real(folder)

    folders.remove_tree = remove_tree


def happenings(kinds, last_save):
    draw = random.Random(0)
    return [
        {
            "any": (after, draw.uniform(0, 4)),
            "save": (in_save, draw.randint(2, last_save), draw.uniform(0, 0.8)),
            "rotation": (in_rotation, draw.randint(1, last_save - 2), draw.randint(0, 5)),
        }[kind]
        for kind in kinds
    ]


def survive(backend, folder, happens, **options):
    """Kills a run, checks what it left, and goes on; returns where it was killed."""
    code = ended(start(backend, folder, happens, **options))
    assert code in (0, -9), log_of(folder)
    where = log_of(folder).rpartition("killed ")[2] if code else "after the end"
    assert all(find_damage(one) is None for one in committed(folder))
    go_on(backend, folder, **options)
    return where


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """What a run of PyTorch's, whose saves are the quicker ones, ends with."""
    whole = tmp_path_factory.mktemp("short") / "whole"
    assert ended(start("torch_backend", whole, **SHORT)) == 0, log_of(whole)
    return left(whole, SHORT["max_train_steps"])


@pytest.mark.acceptance
@pytest.mark.parametrize("kind", ["save", "rotation"])
def test_killed(short, tmp_path, kind):
    (happens,) = happenings([kind], 7)
    assert survive("torch_backend", tmp_path / "run", happens, **SHORT) == f"in a {kind}"
    assert_same(left(tmp_path / "run", SHORT["max_train_steps"]), short)


@pytest.mark.acceptance
@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_fifty_times(tmp_path, backend, figure):
    """At any moment, and often where a save or a rotation is under way."""
    whole = tmp_path / "whole"
    assert ended(start(backend, whole)) == 0, log_of(whole)
    expected, found = left(whole), []
    for number, happens in enumerate(happenings(["save"] * 24 + ["rotation"] * 6 + ["any"] * 20, 18)):
        folder = tmp_path / str(number)
        found.append(survive(backend, folder, happens))
        assert_same(left(folder), expected)
    kinds = {kind: found.count(kind) for kind in sorted(set(found))}
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    figure(1, f"{backend}: SIGKILL to {len(found)} runs of {STEPS} steps ({said}): bitwise the same after the restart")
    assert found.count("in a save") >= 20
    assert found.count("in a rotation") >= 5


@pytest.mark.acceptance
@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_in_rotation_with_one_checkpoint(tmp_path, backend, figure):
    """There is always one that is whole."""
    options = {"checkpoints_total_limit": 1, "max_train_steps": 20, "checkpointing_steps": 2}
    draw, killed = random.Random(1), 0
    for number in range(50):
        folder = tmp_path / str(number)
        happens = (in_rotation, draw.randint(1, 8), draw.randint(0, 8))
        killed += ended(start(backend, folder, happens, **options)) == -9
        assert any(find_damage(one) is None for one in committed(folder)), number
    assert killed == 50
    figure(7, f"{backend}: {killed} kills in the rotation of one checkpoint: a whole one every time")
