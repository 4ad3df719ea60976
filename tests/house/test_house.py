"""How the house stands: who may import whom, no circles, no room and no file that is too large."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.families.family import FAMILIES
from flax_diffusion.core.tasks.task import TASKS

PACKAGES = ("flax_diffusion", "torch_backend", "tpu")
CORE = "flax_diffusion.core."
BELOW = {
    "display": set(),
    "io": {"display"},
    "config": {"io"},
    "randomness": {"io"},
    "objectives": {"io", "randomness"},
    "data": {"display", "io", "randomness", "objectives"},
    "metrics": {"io", "data"},
    "checkpoints": {"io"},
    "families": {"io", "objectives"},
    "spec": {"io", "randomness", "objectives", "data", "checkpoints", "families"},
    "tasks": {"display", "io", "config", "objectives", "data", "families", "spec"},
    "cli": {"io", "config", "tasks"},
}
"""What a room of `core` may import beside itself and the files that lie in `core` directly."""


@pytest.fixture
def root(request):
    return request.config.rootpath


def files(root, folder):
    return [path for path in (root / folder).rglob("*.py") if path.name != "parity.py"]


def top_level(path):
    """The packages that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]


def module_of(root, path):
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(root, *, typing=False):
    """Module to the modules of ours that it imports, also inside of functions; for type checkers only if `typing`."""
    paths = {module_of(root, path): path for package in PACKAGES for path in (root / package).rglob("*.py")}
    found = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text())
        guarded = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        nodes = [node for node in ast.walk(tree) if typing or id(node) not in guarded]
        found[module] = set()
        for node in nodes:
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [(alias.name, alias.name) for alias in node.names]
            found[module] |= {inner if inner in paths else outer for inner, outer in names} & paths.keys()
        found[module].discard(module)
    return found


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("flax_diffusion/core", {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "diffusers", "accelerate"}),
        ("flax_diffusion", {"torch", "diffusers", "accelerate", "peft", "torch_backend", "torchvision"}),
        ("torch_backend", {"jax", "jaxlib", "flax", "optax", "orbax"}),
    ],
)
def test_banned_imports(root, folder, banned):
    assert len(files(root, folder)) > 5
    for path in files(root, folder):
        assert not banned & set(top_level(path)), path


@pytest.mark.parametrize("folder", ["flax_diffusion/core", "torch_backend"])
def test_only_core_is_shared(root, folder):
    start = folder.replace("/", ".")
    for module, used in imports(root, typing=True).items():
        if module.startswith(start):
            theirs = {name for name in used if name.startswith("flax_diffusion")}
            assert all(name.startswith(CORE) for name in theirs), (module, theirs)


def test_no_two_files_import_each_other(root):
    graphlib.TopologicalSorter(imports(root)).prepare()  # names the circle, if there is one


def test_rooms_import_downwards(root):
    found = set()
    for module, used in imports(root).items():
        room = module.removeprefix(CORE).split(".")[0]
        if not module.startswith(CORE) or room not in BELOW:
            continue
        rooms = {name.removeprefix(CORE).split(".")[0] for name in used if name.startswith(CORE)}
        rooms = {name for name in rooms if (root / "flax_diffusion/core" / name).is_dir()} - {room}
        assert rooms <= BELOW[room], module
        found.add(room)
    assert found == BELOW.keys()


def literals(path):
    """The texts in a file, but for docstrings."""
    tree = ast.parse(path.read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


def outside(root, *rooms):
    """The files of all packages that lie in none of the folders of these names."""
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            if not set(rooms) & set(path.relative_to(root).parts):
                yield path


def test_no_file_outside_tasks_and_families_names_a_component(root):
    pipelines = [pipeline for family in FAMILIES.values() for pipeline in family.pipelines.values()]
    components = {name for pipeline in pipelines for name in pipeline.parts}
    classes = {model for family in FAMILIES.values() for model in family.models}
    assert {"unet", "vae", "text_encoder"} <= components
    found = {
        (path.name, text)
        for path in outside(root, "tasks", "families", "models", "pipelines")
        for text in literals(path)
        if text in components | classes
    }
    assert not found


def test_no_file_asks_what_task_options_are_of(root):
    for path in outside(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                kinds = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                assert not [kind for kind in kinds if kind.endswith(("Config", "Task"))], (path, ast.unparse(node))


def test_no_room_and_no_file_is_too_large(root):
    assert len(list((root / "flax_diffusion/core").glob("*.py"))) <= 6
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path
            assert len(list(path.parent.glob("*.py"))) <= 12 or "core" not in path.parts, path.parent


def test_modules_of_tests_have_names_of_their_own(root):
    """Their folders all lie in sys.path: of two modules of one name, the order of the tests would choose one."""
    paths = [path for path in (root / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert len({path.name for path in paths}) == len(paths)
    assert not [path for path in paths if re.search(r"^\s*(from|import) conftest\b", path.read_text(), re.MULTILINE)]


def run_python(root: Path, code):
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


def test_jax_side_loads_no_torch(root):
    run_python(
        root,
        "import sys, flax_diffusion.core.run.loop, flax_diffusion.jax_backend.backend, flax_diffusion.generate;"
        "from transformers import CLIPTokenizer;"
        "bad = sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'diffusers', 'accelerate'));"
        "assert not bad, bad[:5]",
    )


def test_torch_side_needs_no_jax(root):
    """Grain takes JAX where it finds it; nothing on the torch side may need it to be there."""
    run_python(
        root,
        "import sys; sys.modules.update(dict.fromkeys(['jax', 'jaxlib', 'flax', 'optax', 'orbax']));"
        "import torch_backend.train, torch_backend.backend, torch_backend.generate;"
        "from transformers import CLIPTokenizer",
    )


SECTIONS = ("Attributes", "Args", "Returns", "Yields", "Raises", "Reference")


def test_docstrings_have_one_form(root):
    """Sections stand in one order, each in lines of its own; ruff sees to the summary."""
    for path in outside(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                continue
            lines = (ast.get_docstring(node) or "").splitlines()
            if not isinstance(node, ast.Module):
                assert not [line for line in lines if line.startswith("Reference: ")], (path, node.name)
            heads = [line[:-1] for line in lines if line.endswith(":") and line[:-1] in SECTIONS]
            assert heads == sorted(heads, key=SECTIONS.index), (path, getattr(node, "name", "module"), heads)


def test_no_task_repeats_an_option_to_change_its_default():
    for task in TASKS.values():
        for owner in task.config_class.__mro__:
            for name in vars(owner).get("__annotations__", {}) if issubclass(owner, TrainConfig) else ():
                inherited = [one for one in owner.__mro__[1:] if name in getattr(one, "model_fields", {})]
                if inherited:
                    own, theirs = owner.model_fields[name], inherited[0].model_fields[name]
                    assert own.description != theirs.description, f"{owner.__name__}.{name}: use with_defaults"
