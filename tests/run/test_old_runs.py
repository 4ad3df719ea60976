"""Runs that were begun before the code moved into rooms go on as they would have.

`old_runs.zip` was written at commit b22e9a8: for each backend, a run of three steps with its config.yaml and its
checkpoint, and the weights that it had at step 6 when that commit itself went on.
"""

import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from flax_diffusion.core.checkpoints import portable


@pytest.mark.parametrize("backend", ["flax_diffusion", "torch_backend"])
def test_a_run_of_before_goes_on(tmp_path, backend):
    with zipfile.ZipFile(Path(__file__).with_name("old_runs.zip")) as archive:
        archive.extractall(tmp_path)
    run = tmp_path / backend
    options = {"output_dir": str(run), "max_train_steps": 6, "resume_from_checkpoint": "latest"}
    import_module(f"{backend}.train").train("unconditional", str(run / "config.yaml"), **options)
    arrays, metadata = portable.read(run / "checkpoint-6")
    expected = np.load(tmp_path / f"{backend}.npz")
    assert {name for name in arrays if name.startswith("params/")} == set(expected)
    for name in expected:
        # Bit for bit on the machine that wrote the file; others sum in another order.
        np.testing.assert_allclose(arrays[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert {name: metadata[name] for name in ("step", "examples_seen", "seed", "task", "data")} == {
        "step": 6, "examples_seen": 48, "seed": 0, "task": "unconditional", "data": "3e78a85f77baf3e8"
    }  # fmt: skip
