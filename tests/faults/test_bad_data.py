"""Data that cannot be used end a run before it begins, on both backends: nothing is trained, drawn or written."""

import importlib

import pytest
from faults.trials import BACKENDS, FOLDERS
from PIL import Image
from tiny import TEXT_RUN, pictures, stable_diffusion

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.errors import DataError


def folder_of(path, count=60):
    path.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8)).save(path / f"{number:02}.png")
        (path / f"{number:02}.txt").write_text(f"a thing number {number}")
    return path


SCRATCH = {name: value for name, value in TEXT_RUN.items() if name not in ("dataset_name", "max_train_samples")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", ["from scratch", "pretrained"])
def test_one_of_sixty_captions(tmp_path, backend, start, monkeypatch):
    train = importlib.import_module(f"{backend}.train").train
    module = importlib.import_module(f"{FOLDERS[backend]}.backend")
    backends = [one for one in vars(module).values() if isinstance(one, type) and hasattr(one, "init_state")]
    for one in backends:
        if one is not Backend:
            monkeypatch.setattr(one, "init_state", lambda self: pytest.fail("loaded the weights"))
    data = folder_of(tmp_path / "data")
    (data / "37.txt").write_bytes(b"caf\xe9")
    run = SCRATCH
    if start == "pretrained":
        run = {"pretrained_model_name_or_path": str(stable_diffusion(tmp_path / "base")), "resolution": 16}
    with pytest.raises(DataError, match=r"caption file .*37\.txt cannot be read .*; it must be UTF-8 .*, or skip"):
        train("text_to_image", **run, train_data_dir=str(data), output_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.acceptance
def test_a_run_without_the_bad_caption(tmp_path):
    """Which the tokenizer that is made of the captions passes over, too."""
    from flax_diffusion.train import train

    data = folder_of(tmp_path / "data")
    (data / "37.txt").write_bytes(b"caf\xe9")
    options = {"train_data_dir": str(data), "output_dir": str(tmp_path / "run"), "skip_bad_images": True}
    assert (train("text_to_image", **SCRATCH | options | {"max_train_steps": 2}) / "checkpoint-2").is_dir()
    for number in (38, 39):
        (data / f"{number}.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"^3 of 60 examples cannot be used: .*37\.png, .*38\.png, .*39\.png; restore"):
        train("text_to_image", **SCRATCH | options | {"output_dir": str(tmp_path / "other")})
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").iterdir())


def test_class_pictures(tmp_path, monkeypatch):
    """Before any is drawn."""
    from flax_diffusion.jax_backend.backend import JaxBackend
    from flax_diffusion.train import train

    monkeypatch.setattr(JaxBackend, "sample", lambda *arguments, **options: pytest.fail("drew"))
    classes = tmp_path / "class"
    classes.mkdir()
    Image.new("RGB", (8, 8)).save(classes / "a.png")
    (classes / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.png is empty \(0 bytes\)"):
        train(
            "dreambooth",
            pretrained_model_name_or_path=str(stable_diffusion(tmp_path / "base")),
            instance_data_dir=str(pictures(tmp_path / "dog")),
            instance_prompt="a photo of sks dog",
            class_data_dir=str(classes),
            class_prompt="a photo of a dog",
            with_prior_preservation=True,
            num_class_images=4,
            resolution=16,
            output_dir=str(tmp_path / "run"),
        )
