"""Rule 3 of the design: core knows no framework, the JAX side no torch."""

import ast
import subprocess
import sys

import pytest


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("flax_diffusion/core", {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "diffusers", "accelerate"}),
        ("flax_diffusion", {"torch", "diffusers", "accelerate", "peft", "torch_backend", "torchvision"}),
        ("torch_backend", {"jax", "jaxlib", "flax", "optax", "orbax"}),
    ],
)
def test_banned_imports(request, folder, banned):
    files = [path for path in (request.config.rootpath / folder).rglob("*.py") if path.name != "parity.py"]
    assert len(files) > 5
    for path in files:
        assert not banned & set(imported(path)), path


@pytest.mark.parametrize("folder", ["flax_diffusion/core", "torch_backend"])
def test_only_core_is_shared(request, folder):
    for path in (request.config.rootpath / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("flax_diffusion"):
                assert str(node.module).startswith("flax_diffusion.core"), path


def run_python(request, code):
    subprocess.run([sys.executable, "-c", code], check=True, cwd=request.config.rootpath)


def test_jax_side_loads_no_torch(request):
    run_python(
        request,
        "import sys, flax_diffusion.core.loop, flax_diffusion.backend, flax_diffusion.generate;"
        "from transformers import CLIPTokenizer;"
        "bad = sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'diffusers', 'accelerate'));"
        "assert not bad, bad[:5]",
    )


def test_torch_side_needs_no_jax(request):
    """Grain takes JAX where it finds it; nothing on the torch side may need it to be there."""
    run_python(
        request,
        "import sys; sys.modules.update(dict.fromkeys(['jax', 'jaxlib', 'flax', 'optax', 'orbax']));"
        "import torch_backend.train, torch_backend.backend, torch_backend.generate;"
        "from transformers import CLIPTokenizer",
    )
