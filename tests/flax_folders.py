"""Folders that the last Flax release wrote, out of `families/flax_release.zip` and `families/flax_folders.zip`."""

import shutil
import zipfile
from pathlib import Path

FAMILIES = Path(__file__).parent / "families"


def unpack(folder: Path) -> Path:
    """Unpacks all of them: `pipeline/`, what it computes, and those that `write_flax_folders.py` lists."""
    for name in ("flax_release.zip", "flax_folders.zip"):
        with zipfile.ZipFile(FAMILIES / name) as archive:
            archive.extractall(folder)
    for name in (folder / "same.txt").read_text().splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "pipeline" / Path(*Path(name).parts[1:]), folder / name)
    return folder
