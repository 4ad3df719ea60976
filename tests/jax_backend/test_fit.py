"""Whole runs through the public function: what they leave on disk, and what they refuse."""

import json

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from tiny import CONDITION_UNET, ONE_BLOCK, RUN, TEXT_RUN, UNET, VAE, pictures, stable_diffusion

from flax_diffusion.core.errors import CheckpointError, ConfigError, DataError, UserError, WeightsError
from flax_diffusion.train import _keep_programs, train


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image)


def scalars(folder):
    """{tag: {step: value}} of a run's event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}, events.Tags()


def test_unconditional_run_leaves_everything(tmp_path, caplog):
    out = train(
        "unconditional", **RUN, output_dir=str(tmp_path / "run"), checkpointing_steps=2, checkpoints_total_limit=2,
        use_ema=True, validation_steps=3,
    )  # fmt: skip
    assert sorted(p.name for p in out.output_dir.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["00000003.png", "00000006.png"]
    assert picture(out / "samples/00000006.png").shape[1] >= 512
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert (saved["task"], saved["train_batch_size"], saved["unet"]) == ("unconditional", 8, UNET)
    curves, tags = scalars(out / "logs")
    names = ("loss", "grad_norm", "learning_rate", "images_per_second", "data_wait_seconds")
    assert set(curves) == {f"train/{name}" for name in names}
    assert list(curves["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert curves["train/learning_rate"][1] == 0.0
    assert tags["images"] == ["samples"]


@pytest.mark.acceptance
def test_text_to_image_from_scratch(tmp_path):
    out = train("text_to_image", **TEXT_RUN, output_dir=str(tmp_path / "run"))
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["vae"] == [None, None]
    assert (out / "tokenizer/tokenizer.json").is_file()
    grid = picture(out / "samples/00000006.png")
    assert grid.ndim == 2
    assert grid.shape[0] < grid.shape[1] < 2 * grid.shape[0]  # two prompts, four images each, with captions


def test_fine_tuning_a_stable_diffusion_pipeline(tmp_path):
    base = stable_diffusion(tmp_path / "base", "v_prediction")
    out = train(
        "text_to_image", pretrained_model_name_or_path=str(base), train_data_dir=str(pictures(tmp_path / "data")),
        resolution=16, train_batch_size=2, max_train_steps=3, output_dir=str(tmp_path / "run"),
        validation_prompts=["a dog"], eval_batch_size=2, validation_num_inference_steps=3, snr_gamma=5.0,
        noise_offset=0.1, input_perturbation=0.1, random_flip=True,
    )  # fmt: skip
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe("a dog", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    before = StableDiffusionPipeline.from_pretrained(base)
    moved = {n: (dict(before.unet.named_parameters())[n] - p).abs().max() for n, p in pipe.unet.named_parameters()}
    assert max(moved.values()) > 0
    for name, parameter in pipe.vae.named_parameters():
        assert parameter.equal(dict(before.vae.named_parameters())[name]), f"frozen {name} moved"


def test_latent_unconditional_model_opens_in_diffusers(tmp_path):
    from diffusers import AutoencoderKL, LDMPipeline

    AutoencoderKL(**VAE).save_pretrained(tmp_path / "vae")
    unet = UNET | ONE_BLOCK | {"in_channels": 4, "out_channels": 4}
    out = train(
        "unconditional", **RUN | {"unet": unet, "dataset_name": None, "resolution": 16, "max_train_steps": 2},
        train_data_dir=str(pictures(tmp_path / "data")), vae=str(tmp_path / "vae"), output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    images = LDMPipeline.from_pretrained(out)(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert picture(out / "samples/00000002.png").ndim == 3


def last_loss(folder, precision):
    out = train(
        "unconditional", **RUN, mixed_precision=precision, output_dir=str(folder), lr_scheduler="constant",
        gradient_checkpointing=precision != "no",
    )  # fmt: skip
    return scalars(out / "logs")[0]["train/loss"][6]


@pytest.fixture(scope="module")
def float32_loss(tmp_path_factory):
    return last_loss(tmp_path_factory.mktemp("float32"), "no")


@pytest.mark.acceptance
@pytest.mark.parametrize("mixed_precision", ["bf16", "fp16"])
def test_mixed_precision_learns_about_as_well(tmp_path, float32_loss, mixed_precision):
    loss = last_loss(tmp_path, mixed_precision)
    assert loss == pytest.approx(float32_loss, rel=0.02)
    assert loss != float32_loss


def test_resuming_with_another_architecture_names_the_difference(tmp_path):
    run = RUN | {"max_train_steps": 1, "output_dir": str(tmp_path)}
    train("unconditional", **run)
    again = run | {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint-1 is of another model or optimizer: params/unet/.* is \(.*\) there and \(.*\) here",
    ):
        train("unconditional", **again | {"unet": UNET | {"block_out_channels": [16, 16]}})
    with pytest.raises(CheckpointError, match=r"checkpoint-1 is of another model or optimizer: .*ema"):
        train("unconditional", **again, use_ema=True)


def test_a_broken_checkpoint_is_one_line(tmp_path):
    run = RUN | {"max_train_steps": 1, "output_dir": str(tmp_path)}
    train("unconditional", **run)
    for file in (tmp_path / "checkpoint-1/state").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        train("unconditional", **run | {"max_train_steps": 2}, resume_from_checkpoint="latest")


BAD = [
    ({"resolution": 9}, ConfigError, "--resolution 9: must be a multiple of 2, .*: 8 or 10"),
    ({"global_batch_size": 9, "gradient_accumulation_steps": 2}, ConfigError, "not divisible over 1 devices x 2"),
    ({"data_parallelism": 3}, ConfigError, "mesh of data 3 x fsdp 1 does not fit 1 devices"),
    ({"data_parallelism": -1, "fsdp_parallelism": 3}, ConfigError, "must be one of 1,"),
    ({"unet": UNET | {"block_out_chanels": [8, 16]}}, ConfigError, "block_out_chanels.*block_out_channels"),
    ({"unet": UNET | {"out_channels": 2}}, ConfigError, "in_channels 1 and out_channels 2"),
    ({"unet": UNET | {"in_channels": 2, "out_channels": 2}}, ConfigError, r"1 \(grey\) or 3"),
    ({"unet": UNET | {"down_block_types": ["DownBlock", "AttnDownBlock2D"]}}, ConfigError, "DownBlock"),
    ({"unet": "nowhere/config.json"}, UserError, "nowhere/config.json"),
    ({"ddpm_beta_schedule": "quadratic"}, ConfigError, "quadratic"),
    ({"noise_scheduler": {"rescale_betas_zero_snr": True}}, ConfigError, "use v_prediction"),
    ({"noise_scheduler": {"num_train_timestep": 10}}, ConfigError, "num_train_timestep"),
    ({"dataset_name": None, "train_data_dir": "/nowhere"}, DataError, "/nowhere"),
    ({"resume_from_checkpoint": "checkpoint-7"}, CheckpointError, "checkpoint-7: not in"),
    ({"pretrained_model_name_or_path": "/nowhere", "unet": None}, WeightsError, "/nowhere"),
]


@pytest.mark.parametrize(("change", "kind", "says"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_before_any_training(tmp_path, change, kind, says):
    with pytest.raises(kind, match=says) as caught:
        train("unconditional", **RUN | {"output_dir": str(tmp_path / "run")} | change)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_bad_text_models_are_named(tmp_path):
    run = TEXT_RUN | {"output_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="hidden_size 16 and UNet of cross_attention_dim 24"):
        train("text_to_image", **run | {"unet": CONDITION_UNET | {"cross_attention_dim": 24}})
    sdxl = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 32}
    with pytest.raises(ConfigError, match="it belongs to a StableDiffusionXLPipeline; use a whole pipeline"):
        train("text_to_image", **run | {"unet": CONDITION_UNET | sdxl})


def test_missing_and_misshapen_weights_are_all_listed(tmp_path):
    from safetensors.numpy import load_file, save_file

    base = stable_diffusion(tmp_path / "base")
    path = base / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    tensors["conv_out.bias"] = np.zeros(5, np.float32)
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=r"(?s)conv_in.bias.*conv_out.bias|conv_out.bias.*conv_in.bias"):
        train(
            "text_to_image", pretrained_model_name_or_path=str(base), train_data_dir=str(pictures(tmp_path / "data")),
            resolution=16, output_dir=str(tmp_path / "run"), train_batch_size=2,
        )  # fmt: skip


@pytest.fixture
def own_programs(tmp_path):
    """Compiled programs are kept in a folder of this test's."""
    before = jax.config.values["jax_compilation_cache_dir"]
    for folder in (str(tmp_path / "programs"), before):
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", folder)
        if folder != before:
            yield tmp_path / "programs"


@pytest.mark.acceptance
def test_a_second_start_compiles_no_step(tmp_path, own_programs):
    def steps(name):
        train("unconditional", **RUN | {"max_train_steps": 1}, output_dir=str(tmp_path / name))
        return {path.name for path in own_programs.glob("jit_train_step*-cache")}

    first = steps("first")
    assert len(first) == 1
    assert steps("second") == first


def test_programs_of_accelerators_are_kept(monkeypatch, tmp_path, own_programs):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for named, kept in ((str(own_programs), own_programs), (None, tmp_path / "flax_diffusion/programs")):
        jax.config.update("jax_compilation_cache_dir", named)
        _keep_programs()
        assert jax.config.values["jax_compilation_cache_dir"] == str(kept)
