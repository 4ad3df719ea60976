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
    ],
)
def test_banned_imports(request, folder, banned):
    files = list((request.config.rootpath / folder).rglob("*.py"))
    assert len(files) > 10
    for path in files:
        assert not banned & set(imported(path)), path


def test_core_imports_no_flax_side_module(request):
    for path in (request.config.rootpath / "flax_diffusion/core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("flax_diffusion"):
                assert str(node.module).startswith("flax_diffusion.core"), path


def test_training_code_loads_no_torch(request):
    code = (
        "import sys, flax_diffusion.backend, flax_diffusion.core.loop, flax_diffusion.generate;"
        "from transformers import CLIPTokenizer;"
        "bad = sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'diffusers', 'accelerate'));"
        "assert not bad, bad[:5]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=request.config.rootpath)
