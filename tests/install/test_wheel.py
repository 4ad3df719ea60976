"""The wheel: it holds the recipes, and its commands run in an empty folder."""

import os
import subprocess
import sys
import zipfile

import pytest

from flax_diffusion.__main__ import COMMANDS
from flax_diffusion.core.config.recipes import recipes


@pytest.fixture(scope="module")
def wheel(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(request.config.rootpath)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs the installed command in an empty folder; returns status, stdout and stderr."""
    folder, empty = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("empty")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)

    def run(*words):
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, str(folder / "bin/flax-diffusion"), *words]
        ran = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        return ran.returncode, ran.stdout, ran.stderr

    return run


def test_the_wheel_holds_code_and_recipes_alone(request, wheel):
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    packages = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert packages == {"flax_diffusion", "torch_backend", "tpu"}
    held = {name.removeprefix("flax_diffusion/recipes/") for name in names if "/recipes/" in name}
    configs = request.config.rootpath / "configs"
    assert held == {path.name for kind in ("*.yaml", "*.py") for path in configs.glob(kind)}


def test_the_page_of_a_run(installed, tmp_path):
    """Its style and script are in the wheel."""
    (tmp_path / "config.yaml").write_text("task: unconditional\nseed: 3\n")
    code, out, err = installed("report", str(tmp_path))
    assert (code, out, err) == (0, f"{tmp_path}/report.html\n", "")
    assert "showSamples" in (tmp_path / "report.html").read_text()


def test_a_recipe_by_name_in_an_empty_folder(installed):
    code, out, err = installed("inspect", "--config", "digits_unconditional")
    assert code == 0, err
    assert out.startswith("unconditional: digits (--dataset_name)")
    code, out, _ = installed()
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trane"], "error: command 'trane' is unknown; use one of train, generate"),
        (["train", "--config"], "error: --config: name a file, or one of the recipes butterflies_128, digits_"),
        (["train", "--config", "digits_uncond"], "No such file, and no recipe of that name; did you mean"),
        (["plan", "--config", "configs/sd15.yaml"], "the installed recipe of that name is --config sd15"),
    ],
)
def test_mistakes_are_one_line(installed, words, says):
    code, out, err = installed(*words)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_every_recipe_of_the_checkout_is_found_by_name(request):
    files = {path.stem: path.resolve() for path in (request.config.rootpath / "configs").glob("*.yaml")}
    assert {name: path.resolve() for name, path in recipes().items()} == files
