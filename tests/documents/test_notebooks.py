"""The notebooks run from top to bottom, with fewer steps, where there is neither IPython nor a TPU."""

import ast
import importlib.util
import json
import re
import shlex
from types import SimpleNamespace

import jax
import pytest
from fake_hub import Hub
from PIL import Image
from tiny import ONE_BLOCK, UNET

from flax_diffusion.core.cli.command_line import parse_train
from flax_diffusion.core.migration.notebooks import cells_of
from tpu import topologies
from tpu.plan import without_data

CPU, TPU = "configs/notebook_cpu.ipynb", "tpu/notebook.ipynb"


@pytest.fixture
def root(request, tmp_path, monkeypatch):
    """Cells run in a folder with the recipes, as in that of the repository."""
    (tmp_path / "configs").symlink_to(request.config.rootpath / "configs")
    monkeypatch.chdir(tmp_path)
    return request.config.rootpath


def read(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def python(text):
    """A cell's Python: a line for the shell is a call of `shell`, whose braces are filled in as IPython does."""
    assert not re.search(r"^\s*%", text, re.MULTILINE), text
    return re.sub(r"^(\s*)!(.*)$", lambda line: f"{line[1]}shell(f{line[2]!r})", text, flags=re.MULTILINE)


class Session:
    """Executes cells one after the other in one namespace, and keeps what they show."""

    def __init__(self):
        self.shown, self.asked = [], []
        self.names = {"display": self.shown.append, "shell": self.asked.append, "__name__": "__main__"}

    def execute(self, text):
        tree = ast.parse(python(text))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), self.names)  # noqa: S102
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), self.names)  # noqa: S307
            if value is not None:
                self.shown.append(value)

    def run(self, path, **parameters):
        for cell in read(path):
            tags = cell["metadata"].get("tags", [])
            if "install" not in tags:
                self.execute("".join(cell["source"]))
            if "parameters" in tags:
                assert parameters.keys() <= self.names.keys()
                self.names |= parameters
        return self


@pytest.mark.parametrize("path", [CPU, TPU])
def test_they_are_notebooks(root, path):
    """Of a format that every program opens, without anything that was shown once."""
    book = json.loads((root / path).read_text())
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in book["cells"]]
    assert len(set(names)) == len(names)
    for cell in book["cells"]:
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    assert [cell.text for cell in cells_of((root / path).read_text())] == [
        "".join(c["source"]) for c in read(root / path)
    ]
    (install,) = [cell for cell in read(root / path) if "install" in cell["metadata"].get("tags", [])]
    target = re.search(r'%pip install -q -c constraints\.txt "\.(?:\[(\w+)\])?"', "".join(install["source"]))
    assert target is not None
    assert target[1] == (None if path == CPU else "tpu")


def test_on_a_cpu(root, tmp_path, capsys):
    session = Session().run(
        root / CPU, STEPS=4, MORE_STEPS=2, BATCH_SIZE=8, DRAWING_STEPS=2, OPTIONS={"unet": UNET | ONE_BLOCK}
    )
    pictures = [one for one in session.shown if isinstance(one, Image.Image)]
    assert len(pictures) == 4  # of the data, of both parts of the run, and of what is drawn afterwards
    steps, loss, checkpoints = next(one for one in session.shown if isinstance(one, tuple))
    assert (steps, [path.name for path in checkpoints]) == (4, ["checkpoint-2", "checkpoint-4"])
    assert 0 < loss < 10
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1797 examples, such as a 3"
    assert [line.split(":")[0] for line in said[1:5]] == [f"step {step}" for step in (1, 2, 3, 4)]
    assert said[-1] == "6 steps; losses of 6 steps were told"


@pytest.mark.filterwarnings("ignore:Use 'content=")  # by the Hub's client, of its own calls
@pytest.mark.parametrize("planned", [True, False])
def test_on_a_tpu(root, tmp_path, monkeypatch, capsys, planned):
    """With the TPU's compiler and the Hub, or with neither."""
    real = importlib.util.find_spec
    found = SimpleNamespace() if planned else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found if name == "libtpu" else real(name, *rest)
    )
    small = {"transformer": {"in_channels": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}}
    options = {"STEPS": 2, "DRAWING_STEPS": 2, "OPTIONS": small | {"eval_batch_size": 1, "train_batch_size": 4}}
    with Hub() as hub:
        hub.use(monkeypatch)
        session = Session().run(root / TPU, **options, HUB_MODEL_ID="me/digits" if planned else "")
        assert ("me/digits" in hub.files) == planned
        assert not hub.unknown
    said = capsys.readouterr().out
    assert ("no plan: libtpu is not installed" in said) == (not planned)
    for command in session.asked:
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "tpu.plan"]
        place = words.index("--topology")
        assert words[place + 1] in topologies.KNOWN_TOPOLOGIES
        assert parse_train(words[3:place], "tpu.plan", without_data)[0] == "class_conditional"
    assert len(session.asked) == planned
    assert "There is no TPU here, only 1 x cpu: the cells below run on that, slowly. In Colab choose" in said
    pictures = [one for one in session.shown if isinstance(one, Image.Image)]
    assert [one.size for one in pictures[1:]] == [(128, 128)] * 4
    assert next(one for one in session.shown if isinstance(one, tuple))[0] == 2
    assert said.splitlines()[-1] == ("https://huggingface.co/me/digits" if planned else
                                     "nothing was pushed: HUB_MODEL_ID is empty")  # fmt: skip


def test_a_tpu_that_is_there(root, monkeypatch, capsys):
    chip = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    monkeypatch.setattr(jax, "devices", lambda: [chip] * 8)
    (cell,) = [cell for cell in read(root / TPU) if cell["id"] == "find"]
    Session().execute("".join(cell["source"]))
    assert capsys.readouterr().out == "8 x TPU v5 lite, of 1 hosts\n"
