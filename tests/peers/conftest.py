"""An environment with the last Flax release, and what both packages give for all calls."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

PINNED = ["diffusers==0.39.0", "transformers==4.57.6", "jax==0.10.2", "flax==0.12.8", "torch==2.13.0", "safetensors"]
HERE = Path(__file__).parent
ENVIRONMENT = "FLAX_039_PYTHON"
"""Variable that names a Python which has these, in place of the environment that the tests make."""


@pytest.fixture(scope="session")
def reference_python(request):
    """A Python that has the last Flax release; its environment is made once and kept in pytest's cache."""
    if ENVIRONMENT in os.environ:
        return Path(os.environ[ENVIRONMENT])
    folder = request.config.cache.mkdir("flax-0.39")
    python, made = folder / "bin" / "python", folder / "pinned.json"
    if not made.exists() or json.loads(made.read_text()) != PINNED:
        made.unlink(missing_ok=True)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PINNED], check=True)
        made.write_text(json.dumps(PINNED))
    return python


@pytest.fixture(scope="session")
def given(reference_python, tmp_path_factory):
    """What all calls give: by side, the arrays, the texts and the public methods."""
    folder = tmp_path_factory.mktemp("peers")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"  # the last one counts
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"XLA_FLAGS": flags}
    ours = bare | {"PYTHONPATH": str(HERE.parents[1])}

    def run(python, environment, script, *arguments):
        ran = subprocess.run([python, HERE / script, *arguments], env=environment, stderr=subprocess.PIPE, text=True)
        assert ran.returncode == 0, ran.stderr[-4000:]

    run(reference_python, bare, "write_folders.py", folder)
    found = {}
    for side in ("ours", "reference", "mended"):
        out = folder / f"{side}.npz"
        python, environment = (sys.executable, ours) if side == "ours" else (reference_python, bare)
        run(python, environment, "calls.py", side, folder, out)
        with np.load(out) as kept:
            found[side] = dict(kept)
        for name in ("texts", "methods"):
            found[side][name] = json.loads(found[side][name].item())
    return found
