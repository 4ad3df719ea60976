"""What is computed once before training: the same run with it as without, on both backends."""

import importlib

import numpy as np
import pytest
from tiny import RUN, losses, pictures, stable_diffusion

from flax_diffusion.core.errors import ConfigError, DataError, NonFiniteError
from flax_diffusion.train import train


@pytest.fixture
def options(tmp_path):
    return {
        "pretrained_model_name_or_path": str(stable_diffusion(tmp_path / "base")),
        "train_data_dir": str(pictures(tmp_path / "data", 5)), "resolution": 16, "train_batch_size": 2,
        "max_train_steps": 6, "center_crop": True, "random_flip": True, "proportion_empty_prompts": 0.3,
        "learning_rate": 1e-3, "lr_warmup_steps": 0, "output_dir": str(tmp_path / "run"),
        "validation_prompts": ["a dog"], "validation_num_inference_steps": 2, "eval_batch_size": 1,
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["flax_diffusion", "torch_backend"])
def test_the_losses_are_those_of_a_run_without(options, tmp_path, backend):
    """Over three epochs with flips, empty prompts and a broken picture; the models come back for the samples."""
    start = importlib.import_module(f"{backend}.train").train
    (tmp_path / "data/1.png").write_bytes(b"not a picture")
    options |= {"skip_bad_images": True}
    cached = {"cache_latents": True, "pre_compute_text_embeddings": True, "dataloader_num_workers": 1}
    runs = [
        start("text_to_image", **options | changes | {"output_dir": str(tmp_path / name)})
        for name, changes in (("each", {}), ("once", cached))
    ]
    np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=1e-5)
    assert not (runs[1] / "precomputed").exists()
    assert (runs[1] / "samples/00000006.png").is_file()


def test_a_picture_that_cannot_be_read(options, tmp_path):
    (tmp_path / "data/1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"1\.png"):
        train("text_to_image", **options, cache_latents=True)


def test_latents_that_are_not_finite(options, tmp_path):
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "base/vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"encoder.conv_in.bias": np.full_like(weights["encoder.conv_in.bias"], np.nan)}, file)
    with pytest.raises(NonFiniteError, match=r"the latents of .*0\.png are not finite: check the picture, or"):
        train("text_to_image", **options, cache_latents=True)


def test_what_cannot_be_cached(options, tmp_path):
    with pytest.raises(ConfigError, match="crops at random would differ from epoch to epoch: add --center_crop"):
        train("text_to_image", **options | {"cache_latents": True, "center_crop": False})
    with pytest.raises(ConfigError, match="the model trains on pixels, there is no autoencoder"):
        train("unconditional", **RUN, cache_latents=True, center_crop=True, output_dir=str(tmp_path / "run"))
