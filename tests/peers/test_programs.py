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


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, folders: Path, tmp_path: Path) -> None:
    found = run(migrated(HERE / "programs" / f"{name}.py", tmp_path), folders)
    assert found
    for what, array in found.items():
        assert np.isfinite(array).all(), what
        assert array.size == 1 or len(np.unique(array)) > 1 or array.dtype == bool, f"{what} is one value"
