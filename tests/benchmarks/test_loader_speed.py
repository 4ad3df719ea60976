"""How fast the loader is. Run: python -m pytest -m acceptance -s tests/benchmarks/test_loader_speed.py

Machines differ, so each figure is a ratio of two loaders that take turns in one run.
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def torchvision(request):
    """Folders that Python has to look in for torchvision: none where it is installed, else one in pytest's cache."""
    if importlib.util.find_spec("torchvision") is not None:
        return []
    version = f"0.{int(torch.__version__.split('.')[1]) + 15}.*"  # the one that goes with this PyTorch
    folder = request.config.cache.mkdir(f"torchvision-{version[:-2]}")
    if not (folder / "torchvision").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        done = subprocess.run([*command, f"torchvision=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"torchvision {version} is not installed, nor can it be: {done.stderr.strip()[-200:]}")
    return [str(folder)]


@pytest.mark.parametrize(("size", "batches", "least"), [((512, 512), 30, 1.5), ((1600, 1200), 8, None)])
def test_pictures_a_second(request, torchvision, tmp_path, size, batches, least):
    """Against PyTorch's loader, both with two workers, at 512 pixels; of larger photographs decoding is the most."""
    script = Path(__file__).with_name("loader_speed.py")
    path = os.pathsep.join([str(request.config.rootpath), *torchvision, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, *map(str, (*size, batches, 5)), tmp_path],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    rates = json.loads(done.stdout)
    ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["ours"], rates["theirs"], strict=True))
    print(
        f"\nJPEGs of {size[0]}x{size[1]}, pictures a second with two workers: {statistics.median(rates['ours']):.0f}, "
        f"PyTorch with torchvision {statistics.median(rates['theirs']):.0f}, {ratio:.2f} times"
    )
    assert least is None or ratio >= least
