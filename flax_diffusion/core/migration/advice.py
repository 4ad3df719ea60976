"""What a remark says: what is not here or has changed, and what to do."""

from __future__ import annotations

import ast
import re

ALONE = "in an environment of its own"
REPLACED_KEYWORDS = {
    "proxies": "set HTTPS_PROXY",
    "mirror": "set HF_ENDPOINT",
    "resume_download": "downloads always go on where they stopped",
}
"""Keywords of `from_pretrained` that the Hub's client does not take any more, and what to do."""

_BASES = ("FlaxModelMixin", "FlaxSchedulerMixin", "FlaxDiffusionPipeline", "FlaxPreTrainedModel", "FlaxGenerationMixin")
_OF_WEIGHTS = re.compile(r"load_flax|convert_pytorch|modeling_(?:flax_pytorch|pytorch_flax)|FLAX_WEIGHTS_NAME", re.I)


def lacking(module: str, name: str) -> str:
    """Return the remark for a Flax name that flax_diffusion does not have.

    Args:
        module: The module that had it.
        name: The name.
    """
    start = f"flax_diffusion has no {name}: "
    if name.startswith(("is_flax", "require_flax")):
        return f"{module} has no {name} any more: drop the test, Flax comes with flax_diffusion"
    if _OF_WEIGHTS.search(f"{module}.{name}"):
        return start + "`python -m flax_diffusion.convert` writes Flax weights as safetensors and back"
    if name in _BASES:
        return start + "it was a base class; derive from a class that is here, or test for the methods that you call"
    package = module.split(".")[0]
    if package == "transformers":
        torch = f"the PyTorch class {name.removeprefix('Flax')}" if re.match(r"Flax[A-Z]", name) else "PyTorch"
        return start + f"take {torch}, or keep transformers<5 for it {ALONE}"
    return start + f"copy it from diffusers 0.39 into your code, or keep diffusers<0.40 for it {ALONE}"


def module_is_gone(package: str, name: str) -> str:
    """Return the remark for the import of a Flax module as a whole.

    Args:
        package: Dotted name of the package that had it.
        name: Name of the module.
    """
    path = f"{package}.{name}"
    if _OF_WEIGHTS.search(path):
        return f"{path} is gone: `python -m flax_diffusion.convert` writes Flax weights as safetensors and back"
    return f"{path} is gone: import the names that you use from flax_diffusion"


def keyword(owner: str, name: str, value: ast.expr) -> str | None:
    """Return the remark for a keyword of `from_pretrained`, or None if there is nothing to say.

    Args:
        owner: Name of the class whose method is called.
        name: The keyword.
        value: Its value.
    """
    constant = value.value if isinstance(value, ast.Constant) else ...
    if name == "from_flax" and constant not in (False, None):
        return (
            "from_flax: PyTorch classes do not read Flax weights any more: `python -m flax_diffusion.convert --model "
            "DIR --output_dir OUT` writes them as safetensors"
        )
    if not owner.startswith("Flax"):
        return None
    if name == "use_safetensors" and constant is False:
        return "use_safetensors=False: flax_diffusion does not read pickled weights: leave it out"
    if name in REPLACED_KEYWORDS and constant is not None:
        return f"{name} is not read any more: {REPLACED_KEYWORDS[name]}"
    return None
