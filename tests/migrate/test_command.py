"""The command: what it prints and writes, of files, notebooks and folders; its exit status; bad input."""

import json
import os
import stat
import subprocess
import sys

import pytest

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.migrate import main

OLD = b"import jax\nfrom diffusers import FlaxUNet2DConditionModel, StableDiffusionPipeline\n"
NEW = (
    b"import jax\nfrom diffusers import StableDiffusionPipeline\nfrom flax_diffusion import FlaxUNet2DConditionModel\n"
)
DIFF = """\
--- a/train.py
+++ b/train.py
@@ -1,2 +1,3 @@
 import jax
-from diffusers import FlaxUNet2DConditionModel, StableDiffusionPipeline
+from diffusers import StableDiffusionPipeline
+from flax_diffusion import FlaxUNet2DConditionModel
"""


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run the command; return its exit status, stdout and stderr without the last line, which counts."""

    def run(*words):
        try:
            main(words)
            status = 0
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err[: err[:-1].rfind("\n") + 1]

    return run


def test_the_diff_applies_and_a_second_run_finds_nothing(inside, run):
    file = inside / "train.py"
    file.write_bytes(OLD)
    assert run("train.py") == (1, DIFF, "")
    assert file.read_bytes() == OLD
    (inside / "change.diff").write_text(DIFF)
    subprocess.run(["git", "apply", "change.diff"], check=True, cwd=inside)
    assert file.read_bytes() == NEW
    assert run("train.py") == (0, "", "")


def test_write(inside, run):
    file = inside / "train.py"
    file.write_bytes(OLD)
    file.chmod(0o755)
    (inside / "link.py").symlink_to("train.py")
    assert run("link.py", "--write", "train.py") == (0, "", "")
    assert file.read_bytes() == NEW
    assert stat.S_IMODE(file.stat().st_mode) == 0o755
    assert (inside / "link.py").is_symlink()
    assert sorted(os.listdir(inside)) == ["link.py", "train.py"]
    assert run("train.py", "--write") == (0, "", "")


@pytest.mark.parametrize(
    ("head", "encoding"),
    [("# -*- coding: latin-1 -*-\r\n", "latin-1"), ("", "utf-8-sig"), ("# é\r\n", "utf-8")],
    ids=["latin-1", "byte-order mark", "UTF-8"],
)
def test_encodings_line_endings_and_a_last_line_without_one_stay(inside, run, head, encoding):
    file = inside / "a.py"
    old = f"{head}x = 'é'; from diffusers import FlaxDDPMScheduler\r\nx = '\f\x0b\u2028'\r\ny = 1"
    if encoding == "latin-1":
        old = old.replace("\u2028", "")
    file.write_bytes(old.encode(encoding))
    status, out, err = run("a.py")
    assert (status, err) == (1, "")
    assert out.endswith(" y = 1\n\\ No newline at end of file\n")
    assert run("a.py", "--write")[0] == 0
    assert file.read_bytes() == old.replace("diffusers", "flax_diffusion").encode(encoding)


CELLS = [
    ["# Flax\n", "from diffusers import FlaxA"],
    ["!pip install diffusers[flax]<0.40 \\\n", "  transformers==4.57.6\n", "%matplotlib inline\n", "import diffusers"],
    ["%%bash\n", "# python train_dreambooth_flax.py\n", "python train_text_to_image_flax.py --seed 0"],
    [
        "%%time\n", "files = !ls\n", "if files:\n", "    !echo é\n", "    %cd x\n", "print?\n",
        "x = diffusers.FlaxAutoencoderKL(\"é\" \"\\t\")",
    ],
    ["from diffusers import FlaxDDPMScheduler, DDPMScheduler\n", "x = diffusers.FlaxFooModel"],
    ["from diffusers import (\n"],
]  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1, 2, "\t"])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_notebook(inside, run, indent, ascii_only, whole):
    kinds = ["markdown", "code", "code", "code", "code", "code"]

    def book(cells):
        cells = [
            {"cell_type": kind, "metadata": {"é": [1.50, {}]}, "source": "".join(cell) if whole else cell}
            for kind, cell in zip(kinds, cells, strict=True)
        ]
        return (
            json.dumps({"cells": cells, "nbformat": 4, "metadata": {}}, indent=indent, ensure_ascii=ascii_only) + "\n"
        )

    file = inside / "a.ipynb"
    file.write_text(book(CELLS), encoding="utf-8")
    status, out, err = run("a.ipynb")
    assert status == 1
    assert out.startswith("--- a/a.ipynb\n")
    assert err == (
        "needs a look:\n"
        "a.ipynb:cell 2:1: diffusers<0.40: flax-diffusion goes with diffusers 0.40 and newer\n"
        "a.ipynb:cell 2:1: diffusers[flax]: diffusers has no such extra any more: install flax-diffusion\n"
        "a.ipynb:cell 2:2: transformers==4.57.6: flax-diffusion goes with transformers 5 and newer\n"
        "a.ipynb:cell 3:3: train_text_to_image_flax.py: `python -m flax_diffusion.train text_to_image` takes its "
        "flags\n"
        "a.ipynb:cell 5:2: flax_diffusion has no FlaxFooModel: copy it from diffusers 0.39 into your code, or keep "
        "diffusers<0.40 for it in an environment of its own\n"
        "a.ipynb:cell 6:1: the cell does not parse as Python 3, line 1: '(' was never closed: change it by hand\n"
    )
    new = [list(cell) for cell in CELLS]
    new[1][3:] = ["import diffusers\n", "import flax_diffusion"]
    new[3][6] = 'x = flax_diffusion.FlaxAutoencoderKL("é" "\\t")'
    new[4][:1] = ["from diffusers import DDPMScheduler\n", "from flax_diffusion import FlaxDDPMScheduler\n"]
    assert run("a.ipynb", "--write") == (0, "", err.replace("cell 5:2", "cell 5:3"))
    assert file.read_text(encoding="utf-8") == book(new)
    assert run("a.ipynb")[:2] == (1, "")


def test_notebook_of_another_language(inside, run):
    book = {"cells": [{"cell_type": "code", "source": "a <- b"}], "metadata": {"kernelspec": {"language": "R"}}}
    (inside / "a.ipynb").write_text(json.dumps(book))
    assert run("a.ipynb") == (0, "", "")


REQUIREMENTS = {
    "requirements.txt": {
        "diffusers[flax]": "diffusers[flax]",
        "diffusers[torch, flax] >= 0.20, < 0.40.0  # the last": "diffusers[flax]|diffusers<0.40.0",
        "diffusers==0.39.0": "diffusers==0.39.0",
        "transformers<5": "transformers<5",
        "transformers~=4.57; python_version > '3.8'": "transformers~=4.57",
        "transformers[flax]": "transformers[flax]",
        "diffusers>=0.39,!=0.39.1": "",
        "# diffusers==0.39.0": "",
        "my-diffusers==0.1\ndiffusers-x==0.1\ndiffusers<1\ntransformers>=4,<6\ndiffusers\ndiffusers==0.42": "",
    },
    "pyproject.toml": {
        'diffusers = "^0.39"': "diffusers^0.39",
        'transformers = "4.57.6"': "transformers==4.57.6",
        'diffusers = {version = "~0.39", extras = ["flax"]}': "diffusers[flax]",
        'dependencies = ["diffusers", "torch==0.1", "transformers>=5"]': "",
    },
    "environment.yml": {"  - diffusers=0.39": "diffusers=0.39", "  - diffusers[flax]": "diffusers[flax]"},
    "setup.py": {"install_requires = ['diffusers<=0.39', 'torch<2']": "diffusers<=0.39"},
    "run.sh": {
        "pip install diffusers torch==0.1": "",
        "python -m pip install 'diffusers==0.39.0'": "diffusers==0.39.0",
        "echo diffusers==0.39.0": "",
        "python examples/train_controlnet_flax.py": "train_controlnet_flax.py",
        "python textual_inversion_flax.py": "textual_inversion_flax.py",
        "python train_unknown_flax.py": "train_unknown_flax.py",
        "python run_flax.py": "",
    },
}


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [(name, line, expected) for name, rows in REQUIREMENTS.items() for line, expected in rows.items()],
)
def test_requirements_and_shell_files(inside, run, name, line, expected):
    (inside / name).write_text(f"\n{line}\n")
    status, out, err = run(name)
    found = [row.split(": ")[1] for row in err.splitlines()[1:]]
    assert (status, out, found) == (int(bool(expected)), "", sorted(expected.split("|")) if expected else [])
    assert all(row.startswith(f"{name}:2: ") for row in err.splitlines()[1:])


def test_a_reader_that_has_seen_enough_ends_it_quietly(inside):
    (inside / "a.py").write_bytes(OLD * 20_000)
    command = f"{sys.executable} -m flax_diffusion.migrate a.py | head -n 1"
    result = subprocess.run(command, shell=True, cwd=inside, check=True, capture_output=True, text=True)
    assert result.stdout == "--- a/a.py\n"
    assert result.stderr == "files to change: 1; places to look at: 0\n"


def test_a_script_of_a_task_that_is_not_here(inside, run):
    (inside / "run.sh").write_text("python train_unknown_flax.py\n")
    assert "flax_diffusion.train has no such task; it has unconditional, " in run("run.sh")[2]


def test_folder(inside, run):
    for name in ("pkg/a.py", ".git/a.py", "env/a.py", "env/pyvenv.cfg", "pkg/node_modules/a.py", "pkg/b.py"):
        (inside / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / "in" / name).write_bytes(OLD)
    (inside / "in/pkg/loop").symlink_to("..")
    (inside / "in/pkg/c.py").symlink_to("a.py")
    (inside / "in/pkg/dead.py").symlink_to("nothing.py")
    (inside / "in/pkg/broken.py").write_text("print 'é'\n")
    (inside / "in/pkg/bytes.py").write_bytes(b"x = '\xff'\n")
    os.mkfifo(inside / "in/pkg/pipe.py")
    status, out, err = run("in", "in/pkg", "in/pkg/a.py")
    assert status == 2
    assert [line for line in out.splitlines() if line.startswith("---")] == ["--- a/in/pkg/a.py", "--- a/in/pkg/b.py"]
    assert [line.partition(", line")[0] for line in err.splitlines()] == [
        "error: in/pkg/broken.py: does not parse as Python 3",
        "error: in/pkg/bytes.py: is not UTF-8: save it as UTF-8",
        "error: in/pkg/pipe.py: it is not a regular file",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.py", None, "no.py: there is no such file or folder: check the path"),
        ("a.py", b"def f(:\n", "a.py: does not parse as Python 3, line 1: invalid syntax"),
        ("a.py", b"x = 1\0\n", "a.py: does not parse as Python 3"),
        ("a.py", "x = 1\n".encode("utf-16"), "a.py: is not UTF-8: save it as UTF-8"),
        ("a.py", b"# coding: nothing\n", "a.py: unknown encoding: nothing: save it as UTF-8"),
        ("a.py", b"\n\n\n# \xe9\n", "a.py: is not UTF-8: save it as UTF-8"),
        ("a.txt", b"", "a.txt: is no Python file, notebook, shell file or list of requirements: leave it out"),
        ("a.ipynb", b"{", "a.ipynb: is no notebook: "),
        ("a.ipynb", b'{"worksheets": []}', "a.ipynb: is no notebook of format 4, "),
        (".", None, ".: the folder holds no .py and no .ipynb file: name another"),
    ],
)
def test_bad_input_is_one_line(inside, run, name, content, message):
    if content is not None:
        (inside / name).write_bytes(content)
    status, out, err = run(name)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {message}")


def test_command_line(capsys):
    with pytest.raises(ConfigError, match=r"command line: .*required: FILE_OR_FOLDER"):
        main([])
    with pytest.raises(ConfigError, match="unknown option '--wrote'; did you mean '--write'"):
        main(["--wrote", "a.py"])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--write" in capsys.readouterr().out


def test_it_answers_without_jax(inside):
    (inside / "a.py").write_bytes(OLD)
    code = (
        "import runpy, sys; sys.argv = ['migrate', 'a.py', '--write'];"
        "runpy.run_module('flax_diffusion.migrate', run_name='__main__');"
        "assert not {'jax', 'flax', 'torch', 'transformers', 'diffusers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=inside)
    assert (inside / "a.py").read_bytes() == NEW
