"""Installing by the versions that the gate was green with, and saying what is newer."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import releases
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def test_every_dependency_has_a_tested_version(request):
    project = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["torch"], *extras["parity"], *extras["test"]]
    asked = [Requirement(line) for line in lines if not line.startswith("flax-diffusion[")]
    tested = releases.read(releases.CONSTRAINTS.read_text())
    for requirement in asked:
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), requirement
    assert {canonicalize_name(requirement.name) for requirement in asked} <= set(releases.needed())


@pytest.mark.parametrize(
    "file",
    [
        "README.md",
        "CONTRIBUTING.md",
        "tpu/README.md",
        "torch_backend/README.md",
        "tpu/Dockerfile",
        "torch_backend/Dockerfile",
        "tpu/pod.sh",
        "tpu/notebook.ipynb",
        "configs/notebook_cpu.ipynb",
        "configs/accelerate/deepspeed_zero2_offload.yaml",
    ],
)
def test_commands_install_by_the_file(request, file):
    """All but the one that asks for newer releases, and the one that installs uv, in an environment of its own."""
    text = (request.config.rootpath / file).read_text().replace("\\\n", "")
    commands = re.findall(r"pip install ([^`&\n]+)", text)
    assert commands
    for command in commands:
        by_the_file = re.search(r"(^| )-c (flax-diffusion/)?constraints\.txt ", command)
        assert by_the_file or command.startswith("--upgrade ") or command == "-q uv ", command


def test_rows_give_one_version():
    assert releases.read("# head\nJax_lib==0.10.2\n\ntorch==2.13.0  # why\n") == {
        "jax-lib": "0.10.2",
        "torch": "2.13.0",
    }
    with pytest.raises(ValueError, match="torch>=2 does not give one version"):
        releases.read("torch>=2\n")


def test_versions_other_than_the_tested():
    here = {"jax": "0.10.2", "numpy": "2.4.6", "torch": "2.14.1"}
    tested = {"jax": "0.10.2", "torch": "2.13.0", "uvloop": "0.23.0"}
    assert releases.differences(here, tested) == ["numpy==2.4.6 (there: none)", "torch==2.14.1 (there: 2.13.0)"]
    assert releases.differences(here, here) == []


def test_what_is_needed(monkeypatch):
    """Extras, extras of extras, conditions, and not what PyTorch brings for CUDA."""
    requires = {
        "us": ["Torch>=2; extra == 'test'", "us[more]; extra == 'test'", "far; extra == 'more'", "no; extra == 'gpu'"],
        "torch": ["nvidia-cublas==13.1", "triton==3.7", "sym_py>=1"],
        "far": ["torch<3", "on-windows; sys_platform == 'win32'", "itself[x]"],
        "sym-py": None,
        "itself": ["itself[y]; extra == 'x'", "torch; extra == 'y'"],
    }  # fmt: skip
    monkeypatch.setattr(metadata, "requires", requires.__getitem__)
    asked = releases.needed("us[test]")
    assert list(asked) == ["far", "itself", "sym-py", "torch"]
    assert sorted(str(requirement.specifier) for requirement in asked["torch"]) == ["", "<3", ">=2"]


def test_what_is_newer():
    def row(name, version, latest):
        return {"name": name, "version": version, "latest_version": latest}

    outdated = [
        row("torch", "2.13.0+cpu", "2.15.0"),
        row("Sym_Py", "1", "2"),
        row("mpmath", "1.3", "1.4"),  # which another package does not take yet
        row("pip", "23", "26"),  # which nobody asks for
    ]
    needed = {"torch": "torch>=2.13", "sym-py": "sym-py", "mpmath": "mpmath<1.4"}
    asked = {name: [Requirement(text)] for name, text in needed.items()}
    assert releases.newer(outdated, asked) == ["torch 2.15.0 (tested: 2.13.0)", "Sym_Py 2 (tested: 1)"]


def test_an_index_that_does_not_answer():
    """Pip's list of what is outdated is empty then, which is not to be taken for an answer."""
    closed = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, releases.__file__, "newer"]
    ran = subprocess.run(command, env=os.environ | closed, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    said = "pip index versions jax says: ERROR: No matching distribution found for jax"
    assert ran.stdout == f"no word on newer releases; {said}\n"


def test_a_version_that_was_not_tested_fails_the_check(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(releases, "CONSTRAINTS", tmp_path / "constraints.txt")
    assert releases.main(["write"]) == 0
    assert releases.main(["check"]) == 0
    assert capsys.readouterr().out == "other than in constraints.txt:\n    nothing\n"
    written = releases.CONSTRAINTS.read_text()
    releases.CONSTRAINTS.write_text(re.sub(r"^jax==.*\n", "", written, flags=re.M))
    assert releases.main(["compare"]) == 0
    assert releases.main(["check"]) == 1
    assert f"    jax=={metadata.version('jax')} (there: none)\n" in capsys.readouterr().out
    assert releases.main(["look"]) == 2


@pytest.mark.newest
def test_the_gate_with_the_newest_releases(request):
    """Makes an environment of its own; takes as long as the gate, and some minutes to install."""
    outer = ("PYTEST_", "JAX_", "XLA_")  # what this run of pytest has set for itself
    environment = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    subprocess.run(["bash", request.config.rootpath / ".ci/run", "--newest"], check=True, env=environment)
