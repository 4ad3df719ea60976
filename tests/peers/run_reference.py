"""What runs in the environment of Diffusers 0.39: `folders FOLDER` makes folders with the Flax files that it writes
itself, `program FILE FOLDER OUT` runs a program and writes the arrays that its main returns.
"""

import importlib.util
import sys
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import transformers

_clip = jnp.clip


def clip(arr, min=None, max=None, *, a_min=None, a_max=None):
    """jnp.clip with the old names of its arguments, which JAX dropped and the safety checker of 0.39 still uses."""
    return _clip(arr, a_min if min is None else min, a_max if max is None else max)


def folders(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import make_folders

    make_folders.write(folder, formats=(True, False))  # `from_pt=True` of 0.39 reads pickles alone
    kinds = {"sd": "", "safe": "", "control": "ControlNet", "inpaint": "Inpaint", "sdxl": "XL"}
    for name, kind in kinds.items():
        cls = getattr(diffusers, f"FlaxStableDiffusion{kind}Pipeline")
        given = {} if name in ("safe", "sdxl") else {"safety_checker": None, "feature_extractor": None}
        pipeline, params = cls.from_pretrained(folder / name, from_pt=True, **given)
        pipeline.save_pretrained(folder / name, params=params)
    transformers.FlaxCLIPModel.from_pretrained(folder / "clip", from_pt=True).save_pretrained(folder / "clip")


def program(path: Path, folder: Path, out: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name: np.asarray(value) for name, value in module.main(str(folder)).items()}
    np.savez(out, **found)


if __name__ == "__main__":
    jnp.clip = clip
    jax.tree_map, jax.tree_flatten = jax.tree_util.tree_map, jax.tree_util.tree_flatten  # casts of 0.39 use both
    {"folders": folders, "program": program}[sys.argv[1]](*map(Path, sys.argv[2:]))
