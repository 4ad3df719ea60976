"""Both backends compute the same run: losses, weights, averages, samples, and a run that moves between them."""

import json
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from proofs import proof
from tiny import (
    ONE_BLOCK,
    RUN,
    TEXT_RUN,
    VAE,
    paired_pictures,
    pictures,
    shaped_pictures,
    stable_diffusion,
    stable_diffusion_xl,
)

from flax_diffusion import generate as jax_generate
from flax_diffusion.core.cli.command_line import merge
from flax_diffusion.core.errors import CheckpointError, ConfigError
from flax_diffusion.core.families.family import FAMILIES
from flax_diffusion.core.objectives.objective import OBJECTIVES
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.tasks.task import TASKS, task_of
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.jax_backend.families.family import FAMILIES as jax_families
from flax_diffusion.parity import NO_GRADIENT, Row, compare, difference, main, verdict
from torch_backend import generate as torch_generate
from torch_backend.backend import TorchBackend
from torch_backend.families.family import FAMILIES as torch_families

STEPS = 6
QUIET = {"report_to": "none", "draw_samples": False, "validation_epochs": None, "save_model_epochs": None}

CASES = {
    "sample": {"prediction_type": "sample", "lr_scheduler": "linear", "gradient_checkpointing": "minimal"},
    "v_min_snr": {"prediction_type": "v_prediction", "snr_gamma": 5.0, "lr_scheduler": "cosine_with_restarts"},
    "flow": {"objective": "flow_matching", "weighting_scheme": "logit_normal", "shift": 3.0, "noise_offset": 0.1},
    "edm": {"objective": "edm", "gradient_accumulation_steps": 2, "input_perturbation": 0.1},
    "everything": {
        "snr_gamma": 5.0, "noise_offset": 0.1, "input_perturbation": 0.1, "gradient_accumulation_steps": 2,
        "ema_warmup": False, "max_grad_norm": 0.05, "lr_scheduler": "polynomial", "random_flip": True,
    },
}  # fmt: skip


def make_config(task, **options):
    base = TEXT_RUN if task == "text_to_image" else RUN
    return merge(task, {}, base | QUIET | {"use_ema": True, "max_train_steps": STEPS} | options, "test")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "everything" else pytest.mark.acceptance) for case in CASES]
)
def test_unconditional_float64(case):
    rows = list(compare(make_config("unconditional", validation_split=0.2, **CASES[case]), STEPS))
    assert len(rows) == STEPS
    assert [row.validation is None for row in rows] == [True] * (STEPS - 1) + [False]
    assert rows[-1].loss_jax != rows[0].loss_jax
    equal, line = verdict(rows, "float64")
    assert equal, line


@pytest.mark.acceptance
def test_text_to_image_float64():
    equal, line = verdict(
        list(compare(make_config("text_to_image", noise_offset=0.1, validation_split=0.2), STEPS)), "float64"
    )
    assert equal, line


@pytest.mark.acceptance
def test_fine_tuning_float32(tmp_path):
    base = stable_diffusion(tmp_path / "base", "v_prediction")
    config = merge("text_to_image", {}, QUIET | {
        "pretrained_model_name_or_path": str(base), "train_data_dir": str(pictures(tmp_path / "data")),
        "resolution": 16, "train_batch_size": 2, "max_train_steps": STEPS, "learning_rate": 1e-4, "use_ema": True,
        "train_text_encoder": True,
    }, "test")  # fmt: skip
    equal, line = verdict(list(compare(config, STEPS, "float32")), "float32")
    assert equal, line


SCHEDULES = {
    "linear": {}, "cosine": {}, "cosine_with_restarts": {"lr_num_cycles": 2}, "polynomial": {"lr_power": 2.0},
    "constant": {}, "constant_with_warmup": {}, "piecewise_constant": {"lr_step_rules": "1:10,0.1:30,0.01"},
}  # fmt: skip
LONG = [
    (task, prediction, schedule, dtype)
    for task in ("unconditional", "text_to_image")
    for dtype in ("float64", "float32")
    for prediction, schedule in [
        *[("epsilon", name) for name in SCHEDULES],
        ("v_prediction", "cosine"),
        ("sample", "linear"),
        ("flow_matching", "cosine"),
        ("edm", "linear"),
    ]
]


@pytest.mark.acceptance
@pytest.mark.parametrize(("task", "prediction", "schedule", "dtype"), LONG)
def test_fifty_steps(task, prediction, schedule, dtype):
    number = list(SCHEDULES).index(schedule)
    predicts = {"objective" if prediction in OBJECTIVES else "prediction_type": prediction}
    gamma = 5.0 if number % 2 and prediction not in OBJECTIVES else None
    config = make_config(
        task, max_train_steps=50, lr_scheduler=schedule, lr_warmup_steps=5,
        gradient_accumulation_steps=1 if number % 2 else 4, max_grad_norm=1.0 if number % 3 else 0.05,
        ema_warmup=bool(number % 2), snr_gamma=gamma, noise_offset=0.1 if number % 3 else 0.0,
        **predicts, **SCHEDULES[schedule],
    )  # fmt: skip
    equal, line = verdict(list(compare(config, 50, dtype)), dtype)
    print(f"\n{task} {prediction} {schedule}: {line}")
    assert equal, line


METHODS = {
    "dreambooth": {"pre_compute_text_embeddings": True},
    "dreambooth_prior": {"with_prior_preservation": True, "snr_gamma": 5.0, "train_text_encoder": True},
    "dreambooth_lora": {
        "with_prior_preservation": True, "lora_rank": 2, "lora_alpha": 3, "train_text_encoder": True,
        "text_encoder_learning_rate": 1e-3,
    },
    "text_to_image_lora": {"lora_rank": 4, "gradient_accumulation_steps": 2},
    "text_to_image_inpainting": {"inpainting": True, "random_flip": True},
    "text_to_image_buckets": {"bucket_resolutions": ["auto"], "random_flip": True, "center_crop": True},
    "text_to_image_buckets_cached": {
        "bucket_resolutions": ["auto"], "random_flip": True, "center_crop": True, "cache_latents": True,
        "pre_compute_text_embeddings": True,
    },
    "dreambooth_prior_buckets_cached": {
        "with_prior_preservation": True, "bucket_resolutions": ["auto"], "center_crop": True, "cache_latents": True,
    },
    "textual_inversion": {
        "placeholder_token": "<dog-toy>", "initializer_token": "dog", "num_vectors": 2, "gradient_checkpointing": True,
    },
    "controlnet": {"proportion_empty_prompts": 0.3, "random_flip": True, "center_crop": False},
    "controlnet_cached": {
        "cache_latents": True, "pre_compute_text_embeddings": True, "random_flip": True, "snr_gamma": 5.0,
        "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    },
    "text_to_image_xl": {"random_flip": True, "proportion_empty_prompts": 0.3, "noise_offset": 0.1},
    "text_to_image_xl_cached": {
        "cache_latents": True, "center_crop": True, "pre_compute_text_embeddings": True, "random_flip": True,
        "snr_gamma": 5.0, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    },
    "text_to_image_xl_flow": {"objective": "flow_matching"},
    "text_to_image_xl_inpainting": {"inpainting": True},
    "dreambooth_xl_lora": {
        "with_prior_preservation": True, "lora_rank": 2, "lora_alpha": 3, "train_text_encoder": True,
        "text_encoder_learning_rate": 1e-3, "adam_weight_decay": 1e-2,
    },
    "dreambooth_xl_whole": {"train_text_encoder": True},
    "textual_inversion_xl": {"placeholder_token": "<dog-toy>", "initializer_token": "dog", "num_vectors": 2},
    "controlnet_xl": {"proportion_empty_prompts": 0.3, "random_flip": True, "center_crop": False},
    "autoencoder": {"kl_scale": 1e-3},
    "autoencoder_l1": {"kl_scale": 1e-3, "rec_loss": "l1"},
}  # fmt: skip


def method_config(method, tmp_path, **options):
    task = next(name for name in TASKS if method.startswith(name))
    data = (paired_pictures if task == "controlnet" else pictures)(tmp_path / "data", 4)
    if "buckets" in method:
        data = shaped_pictures(tmp_path / "shaped", [(24, 24), (25, 24), (40, 20), (41, 20)])
    values = QUIET | METHODS[method] | {
        "resolution": 16, "train_batch_size": 2, "learning_rate": 1e-2, "use_ema": True, "lr_warmup_steps": 0,
    } | options  # fmt: skip
    if task == "autoencoder":
        return merge(task, {}, values | {"train_data_dir": str(data), "vae": VAE}, "test")
    make = stable_diffusion_xl if "_xl" in method else stable_diffusion
    values["pretrained_model_name_or_path"] = str(make(tmp_path / "base", length=40))
    if task == "dreambooth":
        values |= {"instance_data_dir": str(data), "instance_prompt": "a photo of sks dog"}
    else:
        values |= {"train_data_dir": str(data)}
    if values.get("with_prior_preservation"):
        classes = pictures(tmp_path / "class", 5, size=30)
        values |= {"class_data_dir": str(classes), "class_prompt": "a photo of dog", "num_class_images": 5}
    return merge(task, {}, values, "test")


@pytest.mark.acceptance
@pytest.mark.parametrize("method", METHODS)
def test_thirty_steps_of_every_method(tmp_path, method):
    rows = list(compare(method_config(method, tmp_path, max_train_steps=30), 30))
    equal, line = verdict(rows, "float64")
    print(f"\n{method}: {line}")
    assert equal, line
    assert rows[0].grad_norm_jax > 0


def test_lora_of_both_models_float64(tmp_path):
    equal, line = verdict(list(compare(method_config("dreambooth_lora", tmp_path), 3)), "float64")
    assert equal, line


SHORT = [
    "controlnet", "text_to_image_xl",
    *map(proof, ("controlnet_cached", "text_to_image_buckets_cached", "dreambooth_prior_buckets_cached")),
    *map(proof, ("text_to_image_inpainting", "dreambooth_xl_lora")),
]  # fmt: skip


@pytest.mark.parametrize("method", SHORT)
def test_three_steps_float64(tmp_path, method):
    rows = list(compare(method_config(method, tmp_path), 3))
    equal, line = verdict(rows, "float64")
    assert equal, line
    assert rows[0].grad_norm_jax > 0


def test_the_measure_sees_a_difference():
    a = {"params/unet/a": np.ones(4), "params/unet/b": np.zeros(4)}
    assert difference(a, a, "params") == 0.0
    b = a | {"params/unet/b": np.array([0, 0, 1e-6, 0])}
    assert difference(a, b, "params") == pytest.approx(1e-6 * 2**0.5)
    assert difference(a, b, "ema") == 0.0
    assert difference(a, b, "params", re.compile("b$")) == 0.0
    for name in a:
        broken = a | {name: np.where(np.arange(4) == 2, np.nan, a[name])}
        assert np.isnan(difference(a, broken, "params"))
        assert np.isnan(difference(broken, a, "params"))


@pytest.mark.parametrize("name", ["loss_torch", "params", "ema", "validation", "parts"])
def test_what_is_not_a_number_is_different(name):
    equal = Row(1, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    assert verdict([equal, equal], "float32")[0]
    assert not verdict([replace(equal, **{name: float("nan")})], "float32")[0]
    assert not verdict([equal, replace(equal, **{name: float("nan")})], "float32")[0]
    if name != "validation":  # which only the last step has
        assert not verdict([replace(equal, **{name: float("nan")}), equal], "float32")[0]


def test_key_biases_change_nothing():
    """What float32 parity leaves out has no influence: the loss is the same whatever these weights are."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(**{"sample_size": 8} | RUN["unet"]).double()
    sample, step = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([3, 500])
    before = unet(sample, step).sample
    names = [name for name, _ in unet.named_parameters() if NO_GRADIENT.search(name)]
    assert len(names) == 4
    with torch.no_grad():
        for name in names:
            unet.get_parameter(name).normal_()
    torch.testing.assert_close(unet(sample, step).sample, before, rtol=1e-12, atol=1e-12)


def test_command_line(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"task": "unconditional"} | RUN))
    report = tmp_path / "report"
    main(["--config", str(config), "--steps", "2", "--report_dir", str(report)])
    assert "EQUAL in float64 over 2 steps" in capsys.readouterr().out
    assert [row["step"] for row in json.loads((report / "parity.json").read_text())["steps"]] == [1, 2]
    assert (report / "parity.png").stat().st_size > 1000


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="--dtype float64 with --mixed_precision bf16: drop one"):
        list(compare(make_config("unconditional", mixed_precision="bf16"), 1))
    with pytest.raises(ConfigError, match="--use_8bit_adam rounds moments differently"):
        list(compare(make_config("unconditional", use_8bit_adam=True), 1))
    with pytest.raises(ConfigError, match=r"unet: dropout 0\.1 draws different masks"):
        list(compare(make_config("unconditional", unet=RUN["unet"] | {"dropout": 0.1}), 1))
    with pytest.raises(ConfigError, match=r"^--lora_dropout 0\.1 draws different masks on .*: set it to 0$"):
        list(compare(method_config("text_to_image_lora", tmp_path, lora_dropout=0.1), 1))


def test_both_backends_have_every_model_that_a_pipeline_may_hold():
    assert set(jax_families) == set(torch_families) == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert set(jax_families[name].classes) == set(torch_families[name].classes) == set(family.models)


class Kept:
    """Makes backends of one kind in float64 and keeps the last."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, config, spec):
        if self.kind == "jax":
            self.last = JaxBackend(config, spec, jax.devices()[:1], np.float64)
        else:
            self.last = TorchBackend(config, spec, torch.float64)
        return self.last


def run(kind, folder, **options):
    kept = Kept(kind)
    with jax.enable_x64(True):
        fit(task_of(make_config("unconditional", output_dir=str(folder), **options)), kept)
        return kept.last.state_arrays()


def test_a_run_that_moves_ends_where_one_that_stays_does(tmp_path):
    options = {"max_train_steps": 9, "unet": RUN["unet"] | ONE_BLOCK}
    stayed = run("jax", tmp_path / "stayed", checkpointing_steps=3, **options)
    moving = tmp_path / "moving"
    # Interrupted after each checkpoint: what was saved later is gone.
    shutil.copytree(tmp_path / "stayed/checkpoint-3", moving / "checkpoint-3")
    run("torch", moving, checkpointing_steps=3, resume_from_checkpoint="latest", **options)
    (moving / "checkpoint-9").rename(tmp_path / "torch-9")
    moved = run("jax", moving, resume_from_checkpoint="checkpoint-6", **options)
    assert set(moved) == set(stayed)
    assert int(moved["count"]) == 9
    for kind in ("params", "ema", "mu", "nu"):
        assert difference(stayed, moved, kind) <= 1e-9, kind


def test_a_checkpoint_of_another_architecture_is_named(tmp_path):
    run("jax", tmp_path, max_train_steps=1)
    wider = RUN["unet"] | {"block_out_channels": [16, 16]}
    again = {"max_train_steps": 2, "resume_from_checkpoint": "latest", "unet": wider}
    with pytest.raises(CheckpointError, match=r"checkpoint-1 is of another model .*: params/unet/\S+ is \(.*\) there"):
        run("torch", tmp_path, **again)
    run("torch", tmp_path / "other", max_train_steps=1)
    again["resume_from_checkpoint"] = str(tmp_path / "other/checkpoint-1")
    with pytest.raises(CheckpointError, match=r"checkpoint-1 is of another model .*: params/unet/\S+ is \(.*\) there"):
        run("jax", tmp_path / "third", **again)


# Diffusers hands tensors to np.array.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("scheduler", [None, "ddpm", "ddim", "euler", "dpm++"])
def test_same_seed_same_images(pipeline, scheduler):
    options = {
        "prompt": ["a handwritten seven", "a photo of a dog"], "num_images": 2, "num_inference_steps": 6,
        "guidance_scale": 3.0, "seed": 4, "scheduler": scheduler,
    }  # fmt: skip
    ours, theirs = jax_generate.generate(pipeline, **options), torch_generate.generate(pipeline, **options)
    assert ours.shape == theirs.shape
    assert ours.std() > 5
    assert np.abs(ours.astype(int) - theirs).mean() < 1


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("base"))
