"""A filled cache makes the next start quick.

Run: python -m pytest -m acceptance -s tests/benchmarks/test_second_start.py
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import pictures, stable_diffusion

PICTURES, RESOLUTION = 1200, 128
VAE = {"block_out_channels": [32, 64], "layers_per_block": 1}


@pytest.mark.acceptance
@pytest.mark.parametrize("package", ["flax_diffusion", "torch_backend"])
def test_first_step_of_a_second_run(request, tmp_path, package):
    """From the start of the process to the end of the first step, with all programs compiled by an earlier run."""
    base = stable_diffusion(tmp_path / "base", vae=VAE)
    options = {
        "pretrained_model_name_or_path": str(base), "resolution": RESOLUTION, "train_batch_size": 4,
        "max_train_steps": 2, "center_crop": True, "random_flip": True, "lr_warmup_steps": 0, "cache_latents": True,
        "pre_compute_text_embeddings": True, "validation_epochs": None,
    }  # fmt: skip
    programs = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"), "JAX_PLATFORMS": "cpu"}
    programs |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | programs
    environment["PYTHONPATH"] = os.pathsep.join([str(request.config.rootpath), os.environ.get("PYTHONPATH", "")])

    def seconds(name, data):
        values = {"train_data_dir": data, "precomputed_dir": f"{data}-kept", "output_dir": str(tmp_path / name)}
        command = [sys.executable, Path(__file__).with_name("first_step.py"), package, "text_to_image"]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(
            command, input=json.dumps(options | values), env=environment, capture_output=True, text=True, check=False
        )
        assert "first step" in done.stdout, done.stderr[-2000:]
        used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        return time.perf_counter() - start, used, done.stderr

    few, many = (str(pictures(tmp_path / f"{count}", count, RESOLUTION)) for count in (4, PICTURES))
    seconds("compiles", few)
    first, first_used, said = seconds("first", many)
    assert f"encoding {PICTURES} pictures" in said
    second, second_used, said = seconds("second", many)
    assert "encoding 0 pictures" in said
    print(
        f"\n{package}: the first step ends {first:.1f} s after the start of a run that encodes {PICTURES} pictures, "
        f"and {second:.1f} s after that of the next, {first / second:.1f} times as soon; "
        f"processor time {first_used:.1f} and {second_used:.1f} s"
    )
    assert second <= first / 10
