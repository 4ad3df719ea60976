"""Schedulers that train by their betas, whatever draws images in their place; values that nobody knows."""

import inspect
import json
import logging

import diffusers
import jax
import numpy as np
import pytest
from proofs import proof
from tiny import pictures, stable_diffusion

import flax_diffusion.generate
import flax_diffusion.train
import torch_backend.generate
import torch_backend.train
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data.images.transforms import ImageTransform
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.objectives import noise_schedule, samplers
from flax_diffusion.core.objectives.ddpm import ddpm
from flax_diffusion.core.run.schedule import rates
from flax_diffusion.core.spec.pipeline import AutoencoderLoss
from flax_diffusion.models.remat import checkpointed
from flax_diffusion.schedulers import (
    FlaxDDPMScheduler,
    FlaxDPMSolverMultistepScheduler,
    FlaxEulerDiscreteScheduler,
    common,
    dpm_coefficients,
    scheduler_from_config,
    sigmas,
    timesteps,
)
from torch_backend.sampling import scheduler_from_config as torch_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # in Diffusers' classes

BACKENDS = {"jax": flax_diffusion, "torch": torch_backend}
OTHERS = sorted(samplers._OTHERS)
HIDDEN = {"DPMSolverSDEScheduler"}  # an empty shell in Diffusers where torchsde is missing
NO_COMMON_BETAS = {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "IPNDMScheduler"}  # ᾱ is shifted; another rule


def test_every_scheduler_of_diffusers_with_betas_is_known():
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    with_betas = {
        name for name in names if "beta_start" in inspect.signature(getattr(diffusers, name).__init__).parameters
    }
    assert with_betas <= set(OTHERS) | set(samplers.OF_BETAS.values()) | NO_COMMON_BETAS


@pytest.mark.parametrize("given", [{}, {"beta_schedule": "scaled_linear", "beta_start": 0.001}])
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in HIDDEN])
def test_the_betas_are_the_classs_own(name, given):
    given = given if name != "UnCLIPScheduler" else {}
    theirs = getattr(diffusers, name)(**given)
    config = {"_class_name": name} | given
    ours = noise_schedule.alphas_cumprod_from_config(samplers.noise_config(config))
    np.testing.assert_array_equal(ours, theirs.alphas_cumprod.numpy())


@pytest.mark.parametrize("name", OTHERS)
def test_the_nearest_sampler_takes_a_whole_config_of_another_class(name, caplog):
    config = {"_class_name": name, "prediction_type": "v_prediction"}
    if name not in HIDDEN:
        config = dict(getattr(diffusers, name)().config) | config
        config = {key: value for key, value in config.items() if key != "_use_default_values"}
    with caplog.at_level(logging.WARNING):
        used = samplers.sampler_config(config)
    assert caplog.text.count(f"{name} does not draw images here") == 1
    ours, theirs = scheduler_from_config(used), torch_scheduler(used)
    assert type(theirs).__name__ == ours.torch_class_name == used["_class_name"]
    assert ours.prediction_type == theirs.config["prediction_type"] == "v_prediction"
    np.testing.assert_array_equal(ours.numpy_alphas_cumprod(), theirs.alphas_cumprod.numpy())


def test_a_sampler_that_is_here_stays_as_it_is(caplog):
    for name in samplers.OF_BETAS.values():
        config = {"_class_name": name, "beta_end": 0.01}
        assert samplers.sampler_config(config) == config
    assert not caplog.text
    as_sample = {"_class_name": "PNDMScheduler", "prediction_type": "sample"}  # which PNDM itself does not take
    assert samplers.sampler_config(as_sample)["_class_name"] == "DDIMScheduler"


def test_dpm_solver_starts_where_there_is_signal_on_both_backends():
    config = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
    ours, theirs = scheduler_from_config(config, "dpm++"), torch_scheduler(config, "dpm++")
    assert ours.config["lambda_min_clipped"] == theirs.config["lambda_min_clipped"] == -5.1


@pytest.mark.parametrize("backend", [proof("jax"), "torch"])
@pytest.mark.parametrize(
    "scheduler", [{"_class_name": "EulerAncestralDiscreteScheduler"}, {"_class_name": "LCMScheduler", "beta_end": None}]
)
def test_training_on_another_scheduler(tmp_path, backend, scheduler, caplog):
    """Says once who draws, trains on its betas, and exports the file as it was."""
    model = stable_diffusion(tmp_path / "model")
    file = model / "scheduler/scheduler_config.json"
    values = json.loads(file.read_text()) | scheduler
    values = {key: value for key, value in values.items() if value is not None}
    file.write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        out = BACKENDS[backend].train.train(
            "text_to_image", pretrained_model_name_or_path=str(model), train_data_dir=str(pictures(tmp_path / "data")),
            resolution=16, train_batch_size=2, max_train_steps=1, lr_warmup_steps=0, report_to="none",
            draw_samples=False,
            validation_prompts=["a dog"], validation_num_inference_steps=2, eval_batch_size=1,
            output_dir=str(tmp_path / "run"),
        )  # fmt: skip
    assert caplog.text.count("does not draw images here") == 1
    assert json.loads((out / "scheduler/scheduler_config.json").read_text()) == values
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", scheduler["_class_name"]]
    drawn = BACKENDS[backend].generate.generate(out, prompt="a dog", num_inference_steps=2)
    assert drawn.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prediction_type": "velocity"}, "prediction_type 'velocity' is unknown; use one of epsilon, v_prediction"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "not among those whose models train here, which are DDPM"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting needs a shift for each size",
        ),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "of an EDMEulerScheduler 'v_pred"),
        ({"_class_name": "EulerDiscretScheduler"}, r"did you mean 'EulerDiscreteScheduler'\?"),
        ({"_class_name": None}, "has no _class_name"),
        ({"timestep_spacing": "trailin"}, "timestep_spacing is 'trailin'; it must be .*; did you mean 'trailing'"),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed"}, "variance_type is 'fixed'; it must be"),
        ({"beta_schedule": "cosine"}, "beta_schedule 'cosine' is unknown; use one of linear"),
        ({"lambda_min_clipped": "x"}, "scheduler config: lambda_min_clipped is 'x'; it must be a valid number"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": 5.0},
            r"lambda_min_clipped is 5\.0, the largest λ of this noise schedule is 3\.53: lower it \(-5\.1 suits",
        ),
    ],
)
def test_unknown_values_are_refused_before_any_work(tmp_path, backend, given, says):
    model = stable_diffusion(tmp_path / "model")
    file = model / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    with pytest.raises(ConfigError, match=says):
        BACKENDS[backend].train.train(
            "dreambooth", pretrained_model_name_or_path=str(model), instance_data_dir=str(pictures(tmp_path / "data")),
            instance_prompt="a dog", resolution=16, max_train_steps=1, report_to="none", draw_samples=False,
            output_dir=str(tmp_path / "run"),
        )  # fmt: skip
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize(
    ("config", "kind", "says"),
    [
        ({"_class_name": "UniPCMultistepScheduler"}, None, "^scheduler UniPC.* does not draw images here; use one of"),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"},
            "ddim",
            "^scheduler DDIMScheduler does not take this config: sigmoid .* DDIMScheduler; choose another --scheduler$",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True},
            None,
            r"^scheduler EulerDiscreteScheduler .*: Only one of .* can be used; correct its scheduler_config\.json$",
        ),
    ],
)
def test_what_diffusers_classes_do_not_take(config, kind, says):
    with pytest.raises(ConfigError, match=says):
        torch_scheduler(config, kind)


def changed(scheduler, **values):
    """A scheduler with values that its class would not take."""
    for name, value in values.items():
        object.__setattr__(scheduler, name, value)
    return scheduler


def stepped(scheduler):
    x = np.ones((1, 1, 1, 1), np.float32)
    state = scheduler.set_timesteps(scheduler.create_state(), 2, x.shape)
    return scheduler.step(state, x, state.timesteps[0], x, jax.random.key(0))


def test_no_function_takes_an_unknown_value_for_the_last_one():
    one = np.ones((1, 1, 1, 1), np.float32)
    noise_predicted = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    levels = np.array([2.0, 1.0, 0.5])
    config = TrainConfig().model_copy(update={"lr_scheduler": "x"})
    from PIL import Image

    calls = [
        lambda: common.predict_original("x", one, one, one),
        lambda: common.predict_noise("x", one, one, one),
        lambda: timesteps.spaced_timesteps("x", 2, 10, 0),
        lambda: sigmas.sigma_after_last("x", levels),
        lambda: dpm_coefficients.update_coefficients(levels, levels, "x", "midpoint", 2),
        lambda: dpm_coefficients.update_coefficients(levels, levels, "dpmsolver++", "x", 2),
        lambda: noise_schedule.betas("x"),
        lambda: noise_schedule.min_snr_weights(np.array([0.5]), 5, "x"),
        lambda: ImageTransform(resolution=2, resize_mode="x")(Image.new("RGB", (4, 4)), np.random.default_rng),  # pyright: ignore
        lambda: rates.learning_rate_schedule(config, 10, 1.0)(600),
        lambda: AutoencoderLoss(rec_loss="x", kl_scale=0.0),  # pyright: ignore
        lambda: checkpointed(object, "x"),  # pyright: ignore
        lambda: ddpm(np.ones(1), "x"),
        lambda: stepped(changed(FlaxDDPMScheduler(), variance_type="x")),
        lambda: stepped(changed(FlaxEulerDiscreteScheduler(), prediction_type="x")),
        lambda: stepped(changed(FlaxDPMSolverMultistepScheduler(), prediction_type="x")),
        lambda: stepped(changed(FlaxDPMSolverMultistepScheduler(**noise_predicted), prediction_type="x")),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"is unknown; use one of|it must be"):
            call()
