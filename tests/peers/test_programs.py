"""Programs as users wrote them for Diffusers 0.39: they run here once `migrate` has changed their imports.

Those marked `peers` also compare what they return with what the environment of Diffusers 0.39 computes.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peers import make_folders

from flax_diffusion.migrate import examine

HERE = Path(__file__).parent
PROGRAMS = sorted((HERE / "programs").glob("*.py"))
NAMES = [program.stem for program in PROGRAMS]
QUICK = ("cache_imagenet_latents", "clip_scores", "img2img_notebook", "scheduler_loop")
"""Programs that run in the gate."""
WITHOUT_UNET = ("cache_imagenet_latents", "clip_scores", "scheduler_loop")
PICTURES = ("images", "output", "pictures", "one", "unchecked")
"""What the names of pictures in [0, 1] start with."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines that PyTorch saved."""
    folder = tmp_path_factory.mktemp("folders") / "made"
    make_folders.write(folder)
    return folder


def migrated(program: Path, folder: Path) -> Path:
    """The program as the command leaves it, in a folder."""
    change = examine(program)
    assert not change.remarks
    path = folder / program.name
    path.write_text(change.after)
    return path


def run(program: Path, folder: Path) -> dict[str, np.ndarray]:
    """What a program's main returns, as arrays."""
    spec = importlib.util.spec_from_file_location(f"program_{program.stem}", program)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: np.asarray(value) for name, value in module.main(str(folder)).items()}


def without_imports(text: str) -> str:
    """The code of a program but for its imports."""
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.unparse(tree).replace("flax_diffusion.", "diffusers.")


@pytest.mark.parametrize("name", NAMES)
def test_only_imports_change(name: str, tmp_path: Path) -> None:
    before = (HERE / "programs" / f"{name}.py").read_text()
    after = migrated(HERE / "programs" / f"{name}.py", tmp_path).read_text()
    assert without_imports(after) == without_imports(before)
    assert "from flax_diffusion import" in after or "import flax_diffusion" in after
    assert not [line for line in after.splitlines() if "import" in line and "Flax" in line and "diffusers" in line]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.acceptance) for name in NAMES]
)
def test_it_runs(name: str, folders: Path, tmp_path: Path) -> None:
    found = run(migrated(HERE / "programs" / f"{name}.py", tmp_path), folders)
    assert found
    for what, array in found.items():
        assert np.isfinite(array).all(), what
        assert array.size == 1 or len(np.unique(array)) > 1 or array.dtype == bool, f"{what} is one value"


def tolerance(program: str, what: str, theirs: np.ndarray) -> float:
    """How far two float32 computations may be apart; the UNet of 0.39 computes its GELU by tanh."""
    if theirs.dtype.kind != "f":
        return 0.0
    if what.startswith("bf16"):
        return 0.05 * np.abs(theirs).max()
    if program in WITHOUT_UNET:
        return 2e-5 * np.abs(theirs).max()
    return 2 / 255 if what.startswith(PICTURES) else 1e-3 * np.abs(theirs).max()


def in_the_reference(python: Path, *words: str | Path) -> None:
    """Runs a command of run_reference.py with as many devices as there are here."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [python, HERE / "run_reference.py", *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.fixture(scope="module")
def reference_folders(reference_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines that Diffusers 0.39 wrote."""
    folder = tmp_path_factory.mktemp("reference") / "made"
    in_the_reference(reference_python, "folders", folder)
    return folder


@pytest.mark.peers
@pytest.mark.parametrize("name", NAMES)
def test_it_computes_the_same(name: str, reference_python: Path, reference_folders: Path, tmp_path: Path) -> None:
    program, out = HERE / "programs" / f"{name}.py", tmp_path / "theirs.npz"
    in_the_reference(reference_python, "program", program, reference_folders, out)
    ours = run(migrated(program, tmp_path), reference_folders)
    with np.load(out) as kept:
        theirs: dict[str, Any] = dict(kept)
    assert ours.keys() == theirs.keys()
    for what, array in theirs.items():
        assert ours[what].dtype == array.dtype, what
        assert ours[what].shape == array.shape, what
        np.testing.assert_allclose(ours[what], array, rtol=0, atol=tolerance(name, what, array), err_msg=what)
