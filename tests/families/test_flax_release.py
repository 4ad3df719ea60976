"""Folders of the last Flax release: every task and command opens them, and the models compute what they computed there.

`flax_release.zip` was written by Diffusers 0.39.0, Transformers 4.57.6, JAX 0.10.2 and Flax 0.12.8 with
`write_flax_release.py`, which stands beside it and says how.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from proofs import proof
from tiny import pictures

import flax_diffusion.generate
import flax_diffusion.train
import torch_backend.generate
import torch_backend.train
from flax_diffusion.convert import convert
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.spec.pipeline import open_pipeline
from flax_diffusion.jax_backend import modules as jax_modules
from flax_diffusion.models import FlaxUNet2DConditionModel
from flax_diffusion.parity import compare, verdict
from flax_diffusion.schedulers import FlaxPNDMScheduler, scheduler_from_config
from torch_backend import modules as torch_modules

QUICK = ("text_to_image", "autoencoder")
"""Tasks that the gate starts; the others are acceptance tests."""
BACKENDS = {"jax": flax_diffusion, "torch": torch_backend}
RUN = {
    "resolution": 16, "train_batch_size": 2, "max_train_steps": 1, "lr_warmup_steps": 0, "report_to": "none",
    "draw_samples": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    with zipfile.ZipFile(Path(__file__).with_name("flax_release.zip")) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def model(release):
    return str(release / "pipeline")


@pytest.fixture(scope="module")
def reference(release):
    return dict(np.load(release / "reference.npz"))


@pytest.fixture(params=["jax", "torch"])
def computed(request, model, reference):
    """What one backend computes of the reference's inputs."""
    spec = open_pipeline(model)
    arguments = {
        "text": ("input_ids",), "mean": ("pixels",), "decoded": ("sample",), "unet": ("sample", "timesteps", "hidden"),
    }  # fmt: skip
    if request.param == "jax":
        built = jax_modules.build_modules(spec)
        params = {name: jax_modules.load_pretrained(part) for name, part in spec.components.items()}
        given = {name: (params, *(reference[key] for key in keys)) for name, keys in arguments.items()}
    else:
        built = torch_modules.build_modules(
            spec, seed=0, frozen_dtype=torch.float32, trained_dtype=torch.float32, device=torch.device("cpu")
        )
        given = {name: tuple(torch.from_numpy(reference[key]) for key in keys) for name, keys in arguments.items()}
    with torch.no_grad():
        return {
            "hidden": np.asarray(
                built.condition(*given["text"][:-1], {"input_ids": given["text"][-1]})["text_embeddings"]
            ),
            "mean": np.asarray(built.posterior(*given["mean"]).mean),
            "decoded": np.asarray(built.decode(*given["decoded"])),
            "unet": np.asarray(built.predict(*given["unet"][:-1], {"text_embeddings": given["unet"][-1]})),
        }


def test_the_models_compute_what_they_did(computed, reference):
    """To float32 rounding; the UNet's two constants that are not PyTorch's (see the script) move it by under 2e-4."""
    for name in ("hidden", "mean", "decoded"):
        np.testing.assert_allclose(computed[name], reference[name], rtol=0, atol=4e-6, err_msg=name)
    np.testing.assert_allclose(computed["unet"], reference["unet_exact"], rtol=0, atol=4e-6)
    np.testing.assert_allclose(computed["unet"], reference["unet"], rtol=0, atol=2e-4)


def test_both_backends_draw_the_same_pictures(model):
    options = {"prompt": "a dog", "num_inference_steps": 3, "num_images": 2}
    ours, theirs = (backend.generate.generate(model, **options) for backend in BACKENDS.values())
    assert ours.shape == (2, 16, 16, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


TASKS = {
    "text_to_image": {"train_data_dir": "DATA"},
    "text_to_image with text encoder": {"train_data_dir": "DATA", "train_text_encoder": True},
    "dreambooth": {"instance_data_dir": "DATA", "instance_prompt": "sks dog"},
    "dreambooth with LoRA": {"instance_data_dir": "DATA", "instance_prompt": "sks dog", "lora_rank": 2},
    "textual_inversion": {"train_data_dir": "DATA", "placeholder_token": "<x>", "initializer_token": "a"},
    "autoencoder": {"train_data_dir": "DATA"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("task", [task if task in QUICK else proof(task) for task in TASKS])
def test_every_task_starts_from_it(model, tmp_path, task, backend):
    data = str(pictures(tmp_path / "data"))
    options = {name: data if value == "DATA" else value for name, value in TASKS[task].items()}
    if task == "textual_inversion":
        options["prompt_templates"] = ["{}"]
    out = BACKENDS[backend].train.train(
        task.split()[0], pretrained_model_name_or_path=model, output_dir=str(tmp_path / "run"), **RUN, **options
    )
    if task in ("text_to_image", "dreambooth"):
        from diffusers import StableDiffusionPipeline

        made = StableDiffusionPipeline.from_pretrained(out)
        assert made.unet.config["sample_size"] == 8
        assert "split_head_dim" not in json.loads((out / "unet/config.json").read_text())
        assert json.loads((out / "scheduler/scheduler_config.json").read_text())["_class_name"] == "PNDMScheduler"


@pytest.mark.parametrize("form", ["diffusers", "flax", "single_file"])
def test_it_converts(model, reference, tmp_path, form):
    out = convert(model, tmp_path / "out", format=form)
    if form == "diffusers":
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
        inputs = (torch.from_numpy(reference[name]) for name in ("sample", "timesteps", "hidden"))
        with torch.no_grad():
            np.testing.assert_allclose(unet(*inputs).sample.numpy(), reference["unet_exact"], rtol=0, atol=4e-6)
        return
    back = {"model": out} if form == "flax" else {"model": model, "checkpoint": str(out / "model.safetensors")}
    again = open_pipeline(str(convert(output_dir=tmp_path / "again", **back)))
    for name, part in open_pipeline(model).components.items():
        theirs = torch_modules.load(part).state_dict()
        for key, tensor in torch_modules.load(again.components[name]).state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), theirs[key].numpy(), err_msg=f"{name}/{key}")


def test_parity_starts_from_it(model, tmp_path):
    words = ["dreambooth", "--pretrained_model_name_or_path", model, "--instance_prompt", "a dog"]
    words += ["--instance_data_dir", str(pictures(tmp_path / "data")), "--resolution", "16"]
    words += ["--train_batch_size", "2", "--max_train_steps", "2", "--output_dir", str(tmp_path / "run")]
    rows = list(compare(command_line.parse_train(words, "parity")[1], 2))
    assert verdict(rows, "float64")[0]


def test_its_classes_open_by_themselves(model):
    unet, _ = FlaxUNet2DConditionModel.from_pretrained(model, subfolder="unet")
    assert "split_head_dim" not in unet.config
    assert isinstance(scheduler_from_config(Path(model) / "scheduler"), FlaxPNDMScheduler)


def test_half_precision_msgpack(model, tmp_path):
    """The Hub's `bf16` branches of Flax models hold bfloat16."""
    out = convert(model, tmp_path / "half", format="flax", dtype="bfloat16")
    part = open_pipeline(str(out)).components["unet"]
    params = dict(torch_modules.load(part).named_parameters())
    whole = dict(torch_modules.load(open_pipeline(model).components["unet"]).named_parameters())
    for name, parameter in params.items():
        torch.testing.assert_close(parameter, whole[name].to(torch.bfloat16).float(), rtol=0, atol=0)
