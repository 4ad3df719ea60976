"""The training commands of Diffusers' READMEs run with our launcher, and with a model and data of this machine."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import fake_wandb
import pytest
from fake_hub import Hub
from PIL import Image
from tiny import RUN, paired_pictures, pictures, stable_diffusion, stable_diffusion_xl

from flax_diffusion.core.cli.command_line import parse_train
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.run.hub import pusher
from flax_diffusion.train import main

TEXT = (Path(__file__).parent / "readmes.sh").read_text()
COMMANDS = [shlex.split(line) for line in TEXT.splitlines() if line and not line.startswith("#")]
TASKS = {"textual_inversion": "textual_inversion", "autoencoderkl": "autoencoder"}
"""Our name of what a script trains, where it is not the script's."""
WANTING = {
    "--from_pt": "weights are read whether PyTorch or Flax wrote them",
    "--streaming": "data are downloaded once",
    "--save_as_full_pipeline": "`python -m flax_diffusion.convert --model MODEL --embeddings RUN` writes it",
    "--decoder_only": "an autoencoder trains as a whole",
}
"""Options that are refused, and what the message says instead."""
CUDA_ONLY = ["--enable_xformers_memory_efficient_attention"]


def ours(command):
    """The task and the arguments of a command."""
    place = next(place for place, word in enumerate(command) if word.endswith(".py"))
    script = re.sub(r"^train_|_flax|_sdxl|\.py$", "", command[place])
    lora = script.endswith("_lora")
    script = script.removesuffix("_lora")
    return [TASKS.get(script, script), *["--rank=4"] * lora, *command[place + 1 :]]


def taken(command):
    """The same without the options that are refused."""
    return [word.replace("{timestamp}", "1") for word in ours(command) if word not in WANTING]


NAMES = [f"{number}-{taken(command)[0]}" for number, command in enumerate(COMMANDS)]


def test_all_are_here():
    assert len(COMMANDS) == 39
    assert {task.partition("-")[2] for task in NAMES} == {
        "unconditional", "text_to_image", "textual_inversion", "dreambooth", "controlnet", "autoencoder",
    }  # fmt: skip
    assert sum("--push_to_hub" in command for command in COMMANDS) == 17


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_every_option_is_known(command):
    parse_train(taken(command), "train")
    for option in WANTING.keys() & set(command):
        with pytest.raises(ConfigError, match=f"unknown option '{option}': drop it.* {re.escape(WANTING[option])}"):
            parse_train([*taken(command), option], "train")
    if any("{timestamp}" in word for word in command):
        with pytest.raises(ConfigError, match="a run that can be resumed has one name: write it out"):
            parse_train([word for word in ours(command) if word not in WANTING], "train")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, and models that halve pictures six times, so that 1,024 pixels are cheap; for ControlNets three times."""
    folder = tmp_path_factory.mktemp("world")
    for end, levels in (("", 7), ("-controlled", 4)):
        vae = {
            "block_out_channels": [4] * levels, "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels, "norm_num_groups": 2, "mid_block_add_attention": False,
        }  # fmt: skip
        stable_diffusion(folder / f"base{end}", vae=vae, length=40)
        stable_diffusion_xl(folder / f"xl{end}", vae=vae)
    pictures(folder / "plain", 3, size=520)
    shutil.copytree(folder / "plain", folder / "dog", ignore=shutil.ignore_patterns("*.jsonl"))
    for name in ("base", "xl"):
        shutil.copytree(folder / name / "vae", folder / f"{name}-vae")
    data = paired_pictures(folder / "data")
    text = (data / "metadata.jsonl").read_text()
    for old, new in (("text", "image_caption"), ("conditioning_image", "spiga_seg")):
        text = text.replace(f'"{old}', f'"{new}')
    shutil.copytree(data, folder / "faces")
    (folder / "faces/metadata.jsonl").write_text(text)
    Image.new("RGB", (520, 520), "red").save(folder / "picture.png")
    return folder


def replaced(words, world, out):
    """The words with the model, the data and the output folder of this machine, and an end after one step."""
    xl = any("sdxl" in word or "stable-diffusion-xl" in word or "playground" in word for word in words)
    joined = re.sub(r"(--\w+)=", r"\1\0", "\0".join(words)).split("\0")
    kind = ("xl" if xl else "base") + ("-controlled" if joined[0] == "controlnet" else "")
    models = {"--pretrained_model_name_or_path": world / kind, "--initializer_token": "dog"}
    models["--pretrained_vae_model_name_or_path"] = world / "xl-vae"
    if joined[0] == "autoencoder":
        models["--pretrained_model_name_or_path"] = world / "base-vae"
    found, name = [joined[0]], ""
    for word in joined[1:]:
        if word.startswith("--"):
            name = {"--dataset_name": "--train_data_dir"}.get(word, word)
            skipped = name in ("--revision", "--image_column", *CUDA_ONLY)
            found += [] if skipped else [name]
        elif name == "--train_data_dir":
            faces = "--caption_column\0image_caption" in "\0".join(joined)
            data = {"controlnet": "faces" if faces else "data", "textual_inversion": "dog"}.get(joined[0], "plain")
            found.append(str(world / data))
        elif name == "--instance_data_dir":
            found.append(str(world / "dog"))
        elif name == "--class_data_dir":
            found.append(str(out.parent / "class"))
        elif name in ("--validation_image", "--validation_images"):
            found.append(str(world / "picture.png"))
        elif name == "--output_dir":
            found.append(str(out))
        elif name not in ("--revision", "--image_column"):
            found.append(str(models.get(name, word)))
    if "--output_dir" not in found:
        found += ["--output_dir", str(out)]
    found += ["--max_train_steps", "1"]
    found += ["--validation_num_inference_steps", "2"] if joined[0] != "autoencoder" else ["--resolution", "512"]
    found += ["--resolution", "256"] if joined[0] == "controlnet" else []  # of 8 pixels a latent
    found += ["--num_class_images", "2"] * ("--with_prior_preservation" in found)
    return found


@pytest.mark.acceptance
@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_it_runs(world, tmp_path, monkeypatch, command):
    """From end to end, one step long, and pushes to a stand-in of the Hub. What only CUDA has is left out."""
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb.module())
    monkeypatch.setattr(pusher, "DELAYS", ())
    out = tmp_path / "out"
    words = replaced(taken(command), world, out)
    if words[0] == "unconditional":
        words += ["--unet", str({**RUN["unet"], "in_channels": 3, "out_channels": 3}), "--eval_batch_size", "2"]
    with Hub() as hub:
        if "--push_to_hub" in words:
            hub.use(monkeypatch)
        main(words)
        assert not hub.unknown
        assert bool(hub.commits) == ("--push_to_hub" in words)
    assert (out / "checkpoint-1").is_dir()
    assert list((out / "samples").glob("*.png"))
    results = ("model_index.json", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors", "vae/config.json")
    assert any((out / name).is_file() for name in results)
