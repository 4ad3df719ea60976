"""The Dockerfiles, as far as they can be tested where no daemon builds them; where one answers, it does."""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from flax_diffusion.core.cli.command_line import parse_train
from flax_diffusion.core.config.recipes import recipes

FILES = {"tpu/Dockerfile": ["tpu"], "torch_backend/Dockerfile": ["cuda", "torch"]}
KNOWN = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT", "CMD"}


@pytest.fixture(params=FILES)
def file(request):
    return request.param


@pytest.fixture
def instructions(request, file):
    """Name and arguments of each instruction."""
    text = (request.config.rootpath / file).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def of(instructions, name):
    return [rest for found, rest in instructions if found == name]


def test_instructions(instructions):
    assert {name for name, _ in instructions} <= KNOWN
    assert instructions[0][0] == "FROM"
    assert re.fullmatch(r"python:3\.11(-slim)?", instructions[0][1])
    assert [name for name, _ in instructions[-2:]] == ["ENTRYPOINT", "CMD"]
    for rest in of(instructions, "ENV"):
        assert all(re.fullmatch(r"[A-Z_]+=[\w,]+", word) for word in shlex.split(rest))


def test_what_is_installed(request, instructions, file):
    """The extras that there are, by the versions that the tests passed with."""
    (command,) = of(instructions, "RUN")
    *words, target = shlex.split(command)
    assert words == ["pip", "install", "--no-cache-dir", "-c", "constraints.txt"]
    extras = re.fullmatch(r"\.\[([\w,]+)\]", target)[1].split(",")
    project = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())["project"]
    assert extras == FILES[file]
    assert set(extras) <= project["optional-dependencies"].keys()


def test_what_runs(instructions):
    (entry,), (words,) = of(instructions, "ENTRYPOINT"), of(instructions, "CMD")
    assert json.loads(entry) == ["python", "-m"]
    module, *rest = json.loads(words)
    assert importlib.util.find_spec(module) is not None
    ran = subprocess.run([sys.executable, "-m", module, *rest], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "TASK" in ran.stdout


def test_what_is_copied_is_enough(request, instructions, tmp_path):
    """The wheel that is made of it alone holds the packages and the recipes."""
    (folder,) = of(instructions, "WORKDIR")
    assert folder == "/flax-diffusion"
    image = tmp_path / "image"
    image.mkdir()
    for rest in of(instructions, "COPY"):
        *sources, target = rest.split()
        for source in sources:
            here = request.config.rootpath / source
            if here.is_dir():
                shutil.copytree(here, image / target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(here, image / target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, str(tmp_path), str(image)], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info" not in name}
        held = {name.rpartition("/")[2] for name in wheel.namelist() if "/recipes/" in name}
    assert names == {"flax_diffusion", "torch_backend", "tpu"}
    assert {f"{name}.yaml" for name in recipes()} <= held


@pytest.mark.parametrize("document", ["tpu/README.md", "torch_backend/README.md"])
def test_documents_say_how_it_is_built_and_run(request, document):
    text = (request.config.rootpath / document).read_text()
    file = document.replace("README.md", "Dockerfile")
    image = re.search(rf"^docker build -f {file} -t (\S+) \.$", text, re.MULTILINE)[1]
    runs = [shlex.split(line) for line in re.findall(r"^docker run .*$", text, re.MULTILINE)]
    assert runs
    for words in runs:
        module, *arguments = words[words.index(image) + 1 :]
        assert module in ("flax_diffusion.train", "torch_backend.train")
        parse_train(arguments, module)


def daemon():
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True).returncode == 0


@pytest.mark.acceptance
def test_it_is_built(request, file):
    if not daemon():
        pytest.skip("no daemon of Docker answers")
    command = ["docker", "build", "-q", "-f", file, "."]
    built = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    ran = subprocess.run(["docker", "run", "--rm", built.stdout.strip()], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
