"""What `generate` draws from: runs and checkpoints, LoRA and new words, of other sizes; what it writes, and when."""

import json
import resource
import shutil
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import ONE_BLOCK, RUN, TEXT_RUN, UNET, VAE, pictures, stable_diffusion

from flax_diffusion.convert import convert
from flax_diffusion.core.drawing import command
from flax_diffusion.core.errors import ConfigError, UserError, WeightsError
from flax_diffusion.generate import generate as jax_generate
from flax_diffusion.generate import main
from torch_backend.generate import generate as torch_generate
from torch_backend.generate import main as torch_main
from torch_backend.train import train

BACKENDS = pytest.mark.parametrize("generate", [jax_generate, torch_generate], ids=["jax", "torch"])
PROMPT = "a photo of sks dog"
DRAW = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"), length=40)


@pytest.fixture(scope="module")
def shared(model, tmp_path_factory):
    return {
        "pretrained_model_name_or_path": str(model), "resolution": 16, "train_batch_size": 2, "max_train_steps": 2,
        "checkpointing_steps": 1, "report_to": "none", "draw_samples": False, "lr_warmup_steps": 0,
        "learning_rate": 1e-1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = pictures(tmp_path_factory.mktemp("new"), 3)
    (root / "metadata.jsonl").unlink()
    return root


@pytest.fixture(scope="module")
def lora(shared, folder, tmp_path_factory):
    return train(
        "dreambooth", **shared, instance_data_dir=str(folder), instance_prompt=PROMPT, lora_rank=2, lora_alpha=3,
        train_text_encoder=True, use_ema=True, output_dir=str(tmp_path_factory.mktemp("lora") / "run"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def inversion(shared, folder, tmp_path_factory):
    return train(
        "textual_inversion", **shared, train_data_dir=str(folder), placeholder_token="<dog>", initializer_token="dog",
        num_vectors=2, output_dir=str(tmp_path_factory.mktemp("inversion") / "run"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    options = RUN | {"unet": UNET | ONE_BLOCK, "max_train_steps": 2, "checkpointing_steps": 1}
    return train("unconditional", **options, output_dir=str(tmp_path_factory.mktemp("digits") / "run"))


def same(images, expected, *, apart=None):
    """Within rounding; and, of what was trained, apart from what is drawn without it."""
    assert images.shape == expected.shape
    assert np.abs(images.astype(int) - expected).max() <= 1
    if apart is not None:
        assert np.abs(images.astype(int) - apart).max() > 3


@pytest.mark.acceptance
def test_lora_run_and_its_checkpoint(model, lora, tmp_path):
    plain = torch_generate(model, prompt=PROMPT, **DRAW)
    end = torch_generate(convert(model, tmp_path / "end", lora=[str(lora)]), prompt=PROMPT, **DRAW)
    first = torch_generate(model, lora=[str(lora / "checkpoint-1")], prompt=PROMPT, **DRAW)
    for generate in (jax_generate, torch_generate):
        same(generate(lora, prompt=PROMPT, **DRAW), end, apart=plain)
        same(generate(lora / "checkpoint-1", prompt=PROMPT, **DRAW), first, apart=end)
    half = torch_generate(convert(model, tmp_path / "half", lora=[str(lora)], lora_scale=0.5), prompt=PROMPT, **DRAW)
    for generate in (jax_generate, torch_generate):
        same(generate(model, lora=f"{lora}:0.25", lora_scale=2, prompt=PROMPT, **DRAW), half, apart=end)


def test_textual_inversion_run_and_its_checkpoint(model, inversion, tmp_path):
    prompt = "a photo of <dog>"
    plain = torch_generate(model, prompt=prompt, **DRAW)
    end = torch_generate(convert(model, tmp_path / "end", embeddings=[str(inversion)]), prompt=prompt, **DRAW)
    word = f"{inversion / 'checkpoint-1'}:<Toy>"
    first = torch_generate(model, embeddings=word, prompt="a photo of <toy>", **DRAW)
    for generate in (jax_generate, torch_generate):
        same(generate(inversion, prompt=prompt, **DRAW), end, apart=plain)
        same(generate(inversion / "checkpoint-1", prompt=prompt, **DRAW), first)


def test_lora_and_words_together(model, lora, inversion, tmp_path):
    """In one call, of both backends, and as convert merges them."""
    prompt = "a photo of <dog>"
    made = convert(model, tmp_path / "made", lora=[str(lora)], embeddings=[str(inversion)])
    expected = torch_generate(made, prompt=prompt, **DRAW)
    for generate in (jax_generate, torch_generate):
        same(generate(model, lora=lora, embeddings=inversion, prompt=prompt, **DRAW), expected)
    same(torch_generate(lora, embeddings=inversion, prompt=prompt, **DRAW), expected)


def test_a_run_is_converted_as_it_is_drawn_from(lora, inversion, tmp_path):
    made = convert(lora / "checkpoint-2", tmp_path / "lora")
    same(torch_generate(made, prompt=PROMPT, **DRAW), torch_generate(lora, prompt=PROMPT, **DRAW))
    made = convert(inversion, tmp_path / "inversion")
    prompt = "a photo of <dog>"
    same(torch_generate(made, prompt=prompt, **DRAW), torch_generate(inversion, prompt=prompt, **DRAW))


@BACKENDS
def test_checkpoint_of_a_whole_model(digits, generate):
    end = generate(digits, num_inference_steps=3)
    first = generate(digits / "checkpoint-1", num_inference_steps=3)
    same(generate(digits / "checkpoint-2", num_inference_steps=3), end, apart=None)
    assert not np.array_equal(first, end)


def test_checkpoint_of_a_model_from_scratch_with_words(tmp_path):
    """Its tokenizer, too, is the run's own."""
    options = TEXT_RUN | {"max_train_steps": 2, "checkpointing_steps": 1, "validation_prompts": []}
    run = train("text_to_image", **options, output_dir=str(tmp_path / "run"))
    prompt = "a handwritten two"
    same(jax_generate(run / "checkpoint-2", prompt=prompt, **DRAW), jax_generate(run, prompt=prompt, **DRAW))
    (run / "tokenizer").rename(run / "moved")
    with pytest.raises(WeightsError, match="has no folder tokenizer"):
        jax_generate(run / "checkpoint-2", prompt=prompt)


def test_runs_that_cannot_be_drawn_from(model, lora, inversion, digits, folder, tmp_path):
    def copied(name, run, *files):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_bytes((run / file).read_bytes())
        return tmp_path / name

    def config(name, run, **changes):
        values = yaml.safe_load((run / "config.yaml").read_text()) | changes
        (copied(name, run) / "config.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / name

    moved = config("moved", lora, pretrained_model_name_or_path=str(tmp_path / "gone"))
    (moved / "pytorch_lora_weights.safetensors").write_bytes(b"")
    started = config("started", lora)
    (started / "checkpoint-7").mkdir()
    (tmp_path / "alone/checkpoint-1").mkdir(parents=True)
    vae = train(
        "autoencoder", train_data_dir=str(folder), vae=VAE, resolution=16, train_batch_size=2, max_train_steps=1,
        lr_warmup_steps=0, report_to="none", draw_samples=False, output_dir=str(tmp_path / "vae"),
    )  # fmt: skip
    less = config("less", inversion, num_vectors=1)
    (less / "learned_embeds.safetensors").write_bytes((inversion / "learned_embeds.safetensors").read_bytes())
    plain = config("plain", lora, train_text_encoder=False)
    shutil.copytree(lora / "checkpoint-1", plain / "checkpoint-1")
    wide = shutil.copytree(model, tmp_path / "wide")
    unet = json.loads((wide / "unet/config.json").read_text())
    (wide / "unet/config.json").write_text(json.dumps(unet | {"in_channels": 8}))
    for source, says in (
        (less, "says the word <dog> of 1 vectors, and its file has <dog> of 2: give the model by --model and the file"),
        (plain / "checkpoint-1", r"trained a text_encoder, and the config\.yaml of its run does not: use its own$"),
        (wide, "its UNet has in_channels 8 and out_channels 4; use one that has both equal, or one for inpainting"),
        (copied("file", lora, "pytorch_lora_weights.safetensors"), "give it by --lora, and its model by --model"),
        (copied("word", inversion, "learned_embeds.safetensors"), "give it by --embeddings, and its model by --model"),
        (started, r"started: is a run that has written no model yet: give one of its checkpoints: .*checkpoint-7$"),
        (config("new", lora), "has written no model yet: it has no checkpoint either; train on"),
        (moved, r"moved/config\.yaml names what is not there any more: .*there is no folder .*gone"),
        (
            config("odd", lora, task="paint"),
            "names the task paint, must be one of unconditional, class_conditional, text_to_image",
        ),
        (tmp_path / "alone/checkpoint-1", "is a checkpoint without its run, whose config.yaml names the model"),
        (started / "checkpoint-7", r"checkpoint-7: manifest\.json is missing"),
        (vae, "trained an autoencoder, which draws nothing by itself: it is the --vae of a run"),
    ):
        with pytest.raises(UserError, match=says):
            jax_generate(source, prompt=PROMPT)
    for source, words, says in (
        (digits, inversion, "a DDPMPipeline takes no prompts, so no new words$"),
        (
            model,
            f"{inversion}: ",
            r"--embeddings .*: : is not a word that the tokenizer accepts: name another, PATH:WORD$",
        ),
    ):
        with pytest.raises(UserError, match=says):
            jax_generate(source, prompt=[] if source is digits else PROMPT, embeddings=words)


def test_sizes_equal_diffusers(model):
    """Both backends, and plain Diffusers."""
    import torch
    from diffusers import StableDiffusionPipeline

    from flax_diffusion.core.randomness.streams import sampling_noise

    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.vae_scale_factor = 2  # Diffusers counts 8 pixels a latent whatever the autoencoder, but for this
    latents = torch.from_numpy(sampling_noise(0, np.arange(1), 0, (4, 6, 14)))
    theirs = pipe(
        PROMPT, height=48, width=112, latents=latents, num_inference_steps=2, guidance_scale=2.0, output_type="latent"
    ).images
    with torch.no_grad():
        theirs = pipe.vae.decode(theirs / pipe.vae.config.scaling_factor).sample
    expected = ((theirs / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    for generate in (jax_generate, torch_generate):
        images = generate(model, prompt=PROMPT, height=12, width=28, **DRAW)
        assert images.shape == (1, 12, 28, 3)
        same(images, expected.astype(int))
        assert generate(model, prompt=PROMPT, width=20, **DRAW).shape == (1, 16, 20, 3)


def test_sizes_that_cannot_be(model, digits):
    with pytest.raises(ConfigError, match=r"--width 15: must be a multiple of 2, .*: 14 or 16"):
        jax_generate(model, prompt=PROMPT, height=12, width=15)
    with pytest.raises(ConfigError, match=r"--height 1: must be a multiple of 2, .*: 2$"):
        torch_generate(model, prompt=PROMPT, height=1)
    assert jax_generate(digits, height=7, width=5, num_inference_steps=1).shape == (1, 7, 5, 1)


def test_what_is_cut_off_of_prompts_is_said_once(model, caplog):
    long = "a photo of a dog " * 10 + "on a sofa"
    jax_generate(model, prompt=[long, long, "a dog"], negative_prompt=long, num_inference_steps=1)
    (line,) = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
    assert line.startswith("the text encoder takes 40 tokens: cut off is '")
    assert "on a sofa' of 'a photo" in line


@pytest.mark.parametrize("main", [main, torch_main], ids=["jax", "torch"])
def test_a_used_folder(digits, tmp_path, main):
    call = ["--model", str(digits), "--num_inference_steps", "1", "--output_dir", str(tmp_path), "--num_images"]
    (tmp_path / "notes.png").write_text("mine")
    main([*call, "3"])
    with pytest.raises(ConfigError, match=r"holds 00000\.png of an earlier call, and 3 more: .*--overwrite_output_dir"):
        main([*call, "2"])
    assert len(list(tmp_path.iterdir())) == 5
    main([*call, "2", "--overwrite_output_dir"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.png", "00001.png", "grid.png", "notes.png"]
    with pytest.raises(WeightsError):
        main(["--model", str(tmp_path / "none/of/it"), "--output_dir", str(tmp_path), "--overwrite_output_dir"])
    assert (tmp_path / "00000.png").exists()  # what cannot be opened deletes nothing


def test_a_full_disk_is_found_before_drawing(tmp_path, monkeypatch):
    def draw(config, calls):
        raise AssertionError("opened the model")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # what is written beyond fails, as on a full disk
    try:
        with pytest.raises(ConfigError, match=r"--output_dir .*: cannot be written: File too large; make room"):
            command.main(draw, "generate", ["--model", "m", "--output_dir", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="a folder that not even root can write to")
def test_a_folder_that_cannot_be_written(tmp_path):
    def draw(config, calls):
        raise AssertionError("opened the model")

    with pytest.raises(ConfigError, match=r"--output_dir /proc/self/fdinfo: cannot be written: "):
        command.main(draw, "generate", ["--model", "m", "--output_dir", "/proc/self/fdinfo"])


def test_pictures_are_written_as_they_come(tmp_path):
    """What is drawn before something fails is there."""
    names = []

    def draw(config, calls):
        for _ in range(2):
            yield np.zeros((2, 8, 8, 1), np.uint8)
            names.append(sorted(path.name for path in tmp_path.iterdir()))
        (tmp_path / "00004.png").mkdir()  # which the next cannot replace
        yield np.zeros((1, 8, 8, 1), np.uint8)

    with pytest.raises(ConfigError, match=r"00004\.png could not be written: .*; the 4 pictures before it are there"):
        command.main(draw, "generate", ["--model", "m", "--output_dir", str(tmp_path)])
    assert names == [["00000.png", "00001.png"], [f"0000{number}.png" for number in range(4)]]
    with Image.open(tmp_path / "00003.png") as image:
        assert image.size == (8, 8)


@pytest.mark.parametrize("command", ["flax_diffusion.generate", "torch_backend.generate", "flax_diffusion.convert"])
def test_help_and_what_is_required(command, capsys):
    import importlib

    main = importlib.import_module(command).main
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "Undefined" not in text
    assert "(required)" in text
    with pytest.raises(ConfigError, match="--model is required"):
        main([])


def test_a_file_that_is_not_there_is_said_before_anything_is_loaded(model, tmp_path):
    with pytest.raises(WeightsError, match=r"--lora .*no\.safetensors does not exist: check the path"):
        jax_generate(model, prompt=PROMPT, lora=str(tmp_path / "no.safetensors"))
    with pytest.raises(ConfigError, match=r"the strength must be a finite number, such as .*:0\.8"):
        jax_generate(model, prompt=PROMPT, lora=f"{tmp_path}:nan")
    with pytest.raises(ConfigError, match="--lora_scale"):
        jax_generate(model, prompt=PROMPT, lora=str(tmp_path), lora_scale=float("inf"))
