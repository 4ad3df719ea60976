"""Signals at random moments inside samples, exports and saves: the run that goes on ends as one that had none."""

import os
import random
import signal
import threading
import time
from importlib import import_module

import pytest
from faults.trials import BACKENDS, FOLDERS
from tiny import ONE_BLOCK, RUN, UNET

from flax_diffusion.core.checkpoints import folders, portable
from flax_diffusion.core.run.saving import Saver

STEPS = 24
OPTIONS = RUN | {
    "max_train_steps": STEPS, "checkpointing_steps": 3, "checkpoints_total_limit": 2, "use_ema": True,
    "max_train_samples": 24, "unet": UNET | ONE_BLOCK | {"dropout": 0.1}, "report_to": "none", "validation_steps": 2,
    "eval_batch_size": 2, "save_model_epochs": 2, "checkpoint_models": True,
}  # fmt: skip
KINDS = ("sample", "export", "save", "seal")


class Signals:
    """Sends this process SIGTERM, once a session, while something of a kind is under way."""

    def __init__(self, patch, backend):
        self.kind, self.wait, self.sent = None, 0, False
        self._lock, self._inside = threading.Lock(), False
        self._length = dict.fromkeys(KINDS, 0.02)
        self._draw = random.Random(0)
        for kind in ("sample", "export", "save"):
            patch.setattr(backend, kind, self._watched(kind, getattr(backend, kind)))
        patch.setattr(Saver, "_complete", self._watched("seal", Saver._complete))

    def next_session(self):
        self.kind, self.wait, self.sent = self._draw.choice(KINDS), self._draw.randrange(2), False

    def _watched(self, kind, real):
        def watched(*arguments, **options):
            began = time.monotonic()
            timer = threading.Timer(self._draw.uniform(0, self._length[kind]), self._send)
            meant = kind == self.kind and not self.sent
            if meant and self.wait:
                self.wait, meant = self.wait - 1, False
            self._inside = self._inside or meant
            if meant:
                timer.start()
            try:
                return real(*arguments, **options)
            finally:
                if meant:
                    with self._lock:
                        self._inside = False
                    timer.cancel()
                self._length[kind] = time.monotonic() - began

        return watched

    def _send(self):
        with self._lock:
            if self._inside and not self.sent:
                self.sent = True
                os.kill(os.getpid(), signal.SIGTERM)


def left(folder):
    arrays, metadata = portable.read(folder / f"checkpoint-{STEPS}")
    files = {path.relative_to(folder): path.read_bytes() for path in folder.glob("unet/*")}
    pictures = {path.name: path.read_bytes() for path in folder.glob("samples/*.png")}
    return {name: array.tobytes() for name, array in arrays.items()}, metadata, files, pictures


def check(tmp_path, monkeypatch, backend, count):
    train = import_module(f"{backend}.train").train
    train("unconditional", **OPTIONS, output_dir=str(tmp_path / "whole"))
    expected, sent, runs = left(tmp_path / "whole"), dict.fromkeys(KINDS, 0), 0
    names = {"flax_diffusion": "JaxBackend", "torch_backend": "TorchBackend"}
    signals = Signals(monkeypatch, getattr(import_module(f"{FOLDERS[backend]}.backend"), names[backend]))
    while sum(sent.values()) < count:
        folder, runs = tmp_path / str(runs), runs + 1
        while not (folder / f"checkpoint-{STEPS}").exists() or signals.sent:
            signals.next_session()
            train("unconditional", **OPTIONS, output_dir=str(folder), resume_from_checkpoint="latest")
            sent[signals.kind] += signals.sent
            assert all(folders.find_damage(one) is None for one in folders.committed(folder))
        assert left(folder) == expected
    return sent, runs


@pytest.mark.acceptance
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hundred_signals(tmp_path, monkeypatch, backend, figure):
    sent, runs = check(tmp_path, monkeypatch, backend, 200)
    assert min(sent.values()) >= 20, sent
    said = ", ".join(f"{number} in a {kind}" for kind, number in sent.items())
    figure(2, f"{backend}: SIGTERM at {sum(sent.values())} moments of {runs} runs ({said}): bitwise the same")


def test_some_signals(tmp_path, monkeypatch):
    sent, _ = check(tmp_path, monkeypatch, "torch_backend", 4)
    assert sum(sent.values()) >= 4
