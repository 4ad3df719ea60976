"""Every training command of the documents runs when only its launcher and its paths are replaced by ours."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import flax_folders
import pytest
import torch
from tiny import pictures, stable_diffusion
from xla_flags import QUICK

from flax_diffusion.core.cli.command_line import parse_train
from flax_diffusion.core.data.sources.folders import image_files

TEXT = (Path(__file__).parent / "dreambooth.sh").read_text()
COMMANDS = [block for block in re.split(r"\n\n+", TEXT) if not block.startswith("#")]
LAUNCHERS = {
    "accelerate launch train_dreambooth.py": "torch_backend.train dreambooth",
    "python train_dreambooth_flax.py": "flax_diffusion.train dreambooth",
}
CUDA_ONLY = {"--enable_xformers_memory_efficient_attention": None, "--mixed_precision=fp16": None}


def made_for(models, command, folder):
    """The same, with the model that the module is for."""
    module, _ = words(command, "", folder)
    return words(command, models[module], folder)


def words(command, model, folder):
    """The module to run and its arguments."""
    joined = re.sub(r"\s*\\?\n\s*", " ", command)  # also where the backslash was forgotten
    launcher = next(name for name in LAUNCHERS if joined.startswith(name))
    module, task = LAUNCHERS[launcher].split()
    values = {"MODEL_NAME": model, "INSTANCE_DIR": folder / "new", "CLASS_DIR": folder / "class"}
    values["OUTPUT_DIR"] = folder / "out"
    text = joined.removeprefix(launcher)
    for name, value in values.items():
        text = text.replace(f"${name}", shlex.quote(str(value)))
    return module, [task, *shlex.split(text)]


def test_all_are_here():
    assert len(COMMANDS) == 9
    assert sum(command.startswith("python") for command in COMMANDS) == 3


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_every_option_is_known(tmp_path, number):
    _, arguments = words(COMMANDS[number], tmp_path / "model", tmp_path)
    task, config = parse_train(arguments, "train")
    assert task == "dreambooth"
    assert config.resolution == 512


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny pipelines that halve pictures six times, so that 512 pixels are cheap; for JAX one of the last Flax release.

    Like `duongna/stable-diffusion-v1-4-flax`, which the document's Flax commands name, that one is a
    FlaxStableDiffusionPipeline in msgpack.
    """
    levels = 7
    vae = {
        "block_out_channels": [4] * levels, "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels, "norm_num_groups": 2, "mid_block_add_attention": False,
    }  # fmt: skip
    model = stable_diffusion(tmp_path_factory.mktemp("model"), vae=vae)
    return {
        "torch_backend.train": model,
        "flax_diffusion.train": flax_folders.unpack(tmp_path_factory.mktemp("flax")) / "guide",
    }


def run(module, arguments, root, **variables):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | variables
    launcher = ["accelerate.commands.launch", "-m"] if module.startswith("torch") else []
    command = [sys.executable, "-m", *launcher, module, *arguments]
    return subprocess.run(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.acceptance
@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_it_runs(request, tmp_path, models, number):
    """From end to end, as it stands. What only a CUDA device has is refused where there is none, and left out then."""
    pictures(tmp_path / "new", 5, size=520)
    module, arguments = made_for(models, COMMANDS[number], tmp_path)
    needs_cuda = [word for word in arguments if word in CUDA_ONLY]
    if needs_cuda and not torch.cuda.is_available():
        refused = run(module, arguments, request.config.rootpath)
        assert refused.returncode != 0
        assert f"error: {needs_cuda[0].split('=')[0]}" in refused.stderr
        arguments = [word for word in arguments if word not in CUDA_ONLY]
    ran = run(module, arguments, request.config.rootpath)
    assert ran.returncode == 0, ran.stderr[-2000:]
    _, config = parse_train(arguments, "train")
    steps = config.max_train_steps
    assert (tmp_path / f"out/checkpoint-{steps}").is_dir()
    assert (tmp_path / "out/model_index.json").is_file()
    if config.with_prior_preservation:
        assert len(image_files(tmp_path / "class")) == config.num_class_images

    from diffusers import DiffusionPipeline, UNet2DConditionModel

    UNet2DConditionModel.from_pretrained(tmp_path / f"out/checkpoint-{500 if steps > 500 else steps}/unet")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    images = pipeline("A photo of sks dog in a bucket", num_inference_steps=2, guidance_scale=7.5).images
    assert images[0].size == (512, 512)


@pytest.mark.parametrize("number", [1, *(pytest.param(number, marks=pytest.mark.acceptance) for number in (2, 3))])
def test_the_same_cut_short(request, tmp_path, models, number):
    """Some of each launcher, with fewer steps and class pictures."""
    pictures(tmp_path / "new", 3, size=520)
    module, arguments = made_for(models, COMMANDS[number], tmp_path)
    arguments += ["--max_train_steps=1"]
    if number > 1:
        arguments += ["--num_class_images=2"]
    ran = run(module, arguments, request.config.rootpath, XLA_FLAGS=QUICK)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (tmp_path / "out/model_index.json").is_file()
    assert len(image_files(tmp_path / "class")) == 2 if number > 1 else not (tmp_path / "class").exists()


@pytest.mark.acceptance
@pytest.mark.parametrize("number", [number for number in range(9) if COMMANDS[number].startswith("python")])
def test_the_flax_commands_on_pytorch(request, tmp_path, models, number):
    """The same folder and options, cut short: the file format does not tell one backend from the other."""
    pictures(tmp_path / "new", 3, size=520)
    _, arguments = words(COMMANDS[number], models["flax_diffusion.train"], tmp_path)
    arguments += ["--max_train_steps=1"] + ["--num_class_images=2"] * ("--class_prompt" in COMMANDS[number])
    ran = run("torch_backend.train", arguments, request.config.rootpath)
    assert ran.returncode == 0, ran.stderr[-2000:]

    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(tmp_path / "out")
