"""The cores of a CPU as parts of one device."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from eight_devices import EIGHT, losses
from tiny import ONE_BLOCK, RUN

from flax_diffusion.jax_backend import cores

SMALL = {"unet": RUN["unet"] | ONE_BLOCK | {"dropout": 0.1}}


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(cores, "offered", lambda: 4)
    monkeypatch.setattr(jax, "devices", lambda: EIGHT[:4])


@pytest.mark.parametrize("options", [
    pytest.param({"global_batch_size": 16}, marks=pytest.mark.acceptance),
    {"global_batch_size": None, "train_batch_size": 8, "gradient_accumulation_steps": 2},
])  # fmt: skip
def test_cores_compute_what_one_device_does(four, options):
    """Each core has all weights, moments and averages, and a quarter of the images; dropout is the same."""
    alone, _ = losses(1, **SMALL | options)
    shared, backend = losses(None, **SMALL | options)
    np.testing.assert_allclose(shared, alone, rtol=1e-5)
    assert alone[-1] < 0.9 * alone[0]
    assert backend.device_count == 1
    assert backend.mesh.shape == {"data": 1, "fsdp": 1, "cores": 4}
    for leaf in jax.tree.leaves(backend.state):
        assert len(leaf.addressable_shards) == 4
        assert leaf.addressable_shards[0].data.shape == leaf.shape


@pytest.mark.parametrize(("images", "weights", "expected"), [
    (8, 1, 4), (6, 1, 3), (7, 1, 1), (1, 1, 1), (9, 60_000_000, 3), (8, 60_000_000, 2), (8, 860_000_000, 1),
])  # fmt: skip
def test_how_many_share(four, images, weights, expected):
    """As many as divide the images evenly, with copies of at most 200 M weights."""
    assert cores.sharing(images, weights) == expected


def test_accelerators_are_left_alone(four, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert cores.sharing(8, 1) == 1
    assert len(cores.devices()) == 4


def test_one_device_of_a_model_that_is_too_large(four, monkeypatch):
    monkeypatch.setattr(cores, "COPIED", 1)
    _, backend = losses(None, max_train_steps=1, **SMALL)
    assert backend.mesh.shape == {"data": 1, "fsdp": 1}


TOLD = "from flax_diffusion.train import load_backend as load; load(); import jax; print(jax.device_count())"


@pytest.mark.parametrize("chosen", [None, {"JAX_NUM_CPU_DEVICES": "3"}])
def test_what_jax_offers(request, chosen):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | (chosen or {})
    said = subprocess.run(
        [sys.executable, "-c", TOLD], env=environment, capture_output=True, text=True, check=True,
        cwd=request.config.rootpath,
    ).stdout  # fmt: skip
    assert int(said) == (3 if chosen else cores.allowed())


@pytest.mark.parametrize(("quota", "expected"), [
    ("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("", 8), (None, 8),
])  # fmt: skip
def test_the_share_of_a_container(tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    assert cores.allowed() == expected


@pytest.mark.parametrize(("name", "value"), [
    ("XLA_FLAGS", "--xla_force_host_platform_device_count=8"), ("JAX_COORDINATOR_ADDRESS", "host:1"),
    ("JAX_PLATFORMS", "cpu"),
])  # fmt: skip
def test_who_chooses_otherwise(monkeypatch, name, value):
    """The user's own number, processes that find each other, and programs that use JAX already."""
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv(name, value)
    assert cores.offered.__wrapped__() == 1
    assert len(EIGHT) == 8
