"""Make all calls with one of the two packages, and keep what they give.

    python calls.py ours|reference|mended FOLDER OUT.npz [PART OF A NAME]

`mended` is the reference with two changes: the names that JAX took away are back, and its attention has PyTorch's two
constants.
"""

import inspect
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from registry import CALLS, Package, kept

CLASSES = [
    "FlaxAutoencoderKL", "FlaxUNet2DConditionModel", "FlaxControlNetModel", "FlaxCLIPTextModel",
    "FlaxCLIPTextModelWithProjection", "FlaxCLIPModel", "FlaxCLIPVisionModel", "FlaxT5EncoderModel",
    "FlaxStableDiffusionSafetyChecker", "FlaxDDIMScheduler", "FlaxDDPMScheduler", "FlaxDPMSolverMultistepScheduler",
    "FlaxEulerDiscreteScheduler", "FlaxKarrasVeScheduler", "FlaxLMSDiscreteScheduler", "FlaxPNDMScheduler",
    "FlaxScoreSdeVeScheduler", "FlaxDiffusionPipeline", "FlaxStableDiffusionPipeline",
    "FlaxStableDiffusionImg2ImgPipeline", "FlaxStableDiffusionInpaintPipeline",
    "FlaxStableDiffusionControlNetPipeline", "FlaxStableDiffusionXLPipeline",
]  # fmt: skip


def give_old_names():
    """Give JAX the names back that 0.39 calls by."""
    import jax.numpy as jnp

    clip = jnp.clip
    jnp.clip = lambda a, low=None, high=None, *, a_min=None, a_max=None: clip(
        a, low if a_min is None else a_min, high if a_max is None else a_max
    )
    jax.tree_map, jax.tree_flatten = jax.tree_util.tree_map, jax.tree_util.tree_flatten


def give_pytorchs_constants():
    """Give 0.39's attention PyTorch's GELU, and its epsilon in the group norm before attention."""
    import flax.linen as nn
    from diffusers.models import attention_flax

    group_norm, gelu = nn.GroupNorm, nn.gelu
    attention_flax.nn = type("nn", (), dict(vars(nn)))
    attention_flax.nn.GroupNorm = staticmethod(lambda *args, **kwargs: group_norm(*args, **kwargs | {"epsilon": 1e-6}))
    attention_flax.nn.gelu = staticmethod(lambda value: gelu(value, approximate=False))


def public(cls):
    """Names of a class's public methods, without those of Linen's modules."""
    import flax.linen as nn

    names = [name for name in dir(cls) if not name.startswith("_") and name not in dir(nn.Module)]
    calls = [name for name in names if inspect.isroutine(getattr(cls, name))]
    return sorted([*calls, "__call__"] if "__call__" in dir(cls) and not hasattr(cls, "create_state") else calls)


def main(side, folder, out, part=""):
    """Make the calls whose names contain the part."""
    import model_calls  # noqa: F401
    import pipeline_calls  # noqa: F401
    import scheduler_calls  # noqa: F401
    import transformers_calls  # noqa: F401

    logging.disable(logging.CRITICAL)
    if side == "mended":
        give_old_names()
        give_pytorchs_constants()
    arrays, texts = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        package = Package(side == "ours", Path(folder), Path(scratch))
        for name, function in CALLS.items():
            if part in name:
                started = time.perf_counter()
                found, texts[name] = kept(name, function, package)
                arrays |= found
                if "PEERS_VERBOSE" in os.environ:
                    print(
                        f"{time.perf_counter() - started:5.1f} s  {name}  {texts[name].get('raises', '')}", flush=True
                    )
        methods = {name: public(getattr(package, name)) for name in CLASSES}
    np.savez(out, **arrays, texts=json.dumps(texts), methods=json.dumps(methods))


if __name__ == "__main__":
    main(*sys.argv[1:])
