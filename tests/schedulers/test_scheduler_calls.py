"""Calls of Diffusers 0.39's Flax schedulers as public code makes them, and configurations of all ages."""

from __future__ import annotations

import inspect
import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_diffusion
from flax_diffusion import schedulers
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.schedulers import (
    CommonSchedulerState,
    FlaxDDIMScheduler,
    FlaxDDPMScheduler,
    FlaxDPMSolverMultistepScheduler,
    FlaxEulerDiscreteScheduler,
    FlaxKarrasDiffusionSchedulers,
    FlaxKarrasVeScheduler,
    FlaxLMSDiscreteScheduler,
    FlaxPNDMScheduler,
    FlaxSchedulerMixin,
    FlaxSchedulerOutput,
    FlaxScoreSdeVeScheduler,
    scheduler_from_config,
)

BETAS = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"]
STEP = ["state", "model_output", "timestep", "sample"]
CONSTRUCTORS = {
    FlaxDDPMScheduler: [*BETAS, "variance_type", "clip_sample", "prediction_type", "dtype"],
    FlaxDDIMScheduler: [
        *BETAS, "clip_sample", "clip_sample_range", "set_alpha_to_one", "steps_offset", "prediction_type", "dtype",
    ],
    FlaxPNDMScheduler: [*BETAS, "skip_prk_steps", "set_alpha_to_one", "steps_offset", "prediction_type", "dtype"],
    FlaxEulerDiscreteScheduler: [*BETAS, "prediction_type", "timestep_spacing", "dtype"],
    FlaxLMSDiscreteScheduler: [*BETAS, "prediction_type", "dtype"],
    FlaxDPMSolverMultistepScheduler: [
        *BETAS, "solver_order", "prediction_type", "thresholding", "dynamic_thresholding_ratio", "sample_max_value",
        "algorithm_type", "solver_type", "lower_order_final", "timestep_spacing", "dtype",
    ],
    FlaxKarrasVeScheduler: ["sigma_min", "sigma_max", "s_noise", "s_churn", "s_min", "s_max"],
    FlaxScoreSdeVeScheduler: ["num_train_timesteps", "snr", "sigma_min", "sigma_max", "sampling_eps", "correct_steps"],
}  # fmt: skip
STEPS = {
    FlaxDDPMScheduler: [*STEP, "key", "return_dict"],
    FlaxDDIMScheduler: [*STEP, "eta", "return_dict"],
    FlaxPNDMScheduler: [*STEP, "return_dict"],
    FlaxEulerDiscreteScheduler: [*STEP, "return_dict"],
    FlaxLMSDiscreteScheduler: [*STEP, "order", "return_dict"],
    FlaxDPMSolverMultistepScheduler: [*STEP, "return_dict"],
    FlaxKarrasVeScheduler: ["state", "model_output", "sigma_hat", "sigma_prev", "sample_hat", "return_dict"],
}
SAMPLERS = [cls for cls in STEPS if cls is not FlaxKarrasVeScheduler]
SHAPE = (1, 3, 4, 4)


def positional(call) -> list[str]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [name for name, one in inspect.signature(call).parameters.items() if one.kind is kind and name != "self"]


@pytest.mark.parametrize("cls", CONSTRUCTORS)
def test_positional_arguments(cls) -> None:
    assert positional(cls) == CONSTRUCTORS[cls]
    assert positional(cls.step) == STEPS[cls] if cls in STEPS else not hasattr(cls, "step")
    assert positional(cls.set_timesteps)[:3] == ["state", "num_inference_steps", "shape"]
    assert positional(cls.from_pretrained) == [
        "pretrained_model_name_or_path", "subfolder", "return_unused_kwargs",
    ]  # fmt: skip
    assert positional(cls.from_config)[:2] == ["config", "return_unused_kwargs"]


def test_given_by_position() -> None:
    scheduler = FlaxDDIMScheduler(500, 0.001, 0.012, "scaled_linear", None, False, 2.0, False, 1, "v_prediction")
    assert scheduler == FlaxDDIMScheduler(
        num_train_timesteps=500, beta_start=0.001, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        clip_sample_range=2.0, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    assert len(scheduler) == scheduler.num_train_timesteps == scheduler.config.num_train_timesteps == 500
    assert "beta_end" not in scheduler.config["_use_default_values"]
    assert FlaxDDPMScheduler.from_config(scheduler.config).beta_end == 0.012
    assert FlaxDDPMScheduler(np.int64(3), trained_betas=jnp.array([0.1, 0.2, 0.3])).num_train_timesteps == 3


@pytest.mark.parametrize("cls", SAMPLERS)
def test_sampling_loop(cls) -> None:
    """The loop of Diffusers' Flax pipelines, jitted."""
    scheduler = cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    state = scheduler.set_timesteps(scheduler.create_state(), num_inference_steps=10, shape=SHAPE)
    key = (jax.random.key(1),) if cls is FlaxDDPMScheduler else ()

    def body(step, carry):
        latents, state = carry
        t = jnp.array(state.timesteps, dtype=jnp.int32)[step] if cls is not FlaxLMSDiscreteScheduler else (
            state.timesteps[step]
        )  # fmt: skip
        model_input = scheduler.scale_model_input(state, latents, t)
        return scheduler.step(state, 0.1 * model_input, state.timesteps[step], latents, *key).to_tuple()

    latents = jax.random.normal(jax.random.key(0), SHAPE) * state.init_noise_sigma
    if cls is FlaxEulerDiscreteScheduler:  # its fractional timesteps are no integers
        state = cls(timestep_spacing="leading").set_timesteps(scheduler.create_state(), 10, SHAPE)
    latents, after = jax.jit(lambda *carry: jax.lax.fori_loop(0, 10, body, carry))(latents, state)
    assert latents.shape == SHAPE
    assert bool(jnp.isfinite(latents).all())
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_training_step(cls) -> None:
    """What `train_text_to_image_flax.py` calls, and the state that is shared."""
    scheduler = cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
    state = scheduler.create_state(CommonSchedulerState.create(scheduler))
    latents, noise = jnp.ones((2, *SHAPE[1:])), jnp.full((2, *SHAPE[1:]), 0.5)
    timesteps = jnp.array([3, 700])
    noisy = jax.jit(scheduler.add_noise)(state, latents, noise, timesteps)
    alpha_bar = np.asarray(state.common.alphas_cumprod)[np.array([3, 700])]
    expected = np.sqrt(alpha_bar) + 0.5 * np.sqrt(1 - alpha_bar)
    if cls in (FlaxEulerDiscreteScheduler, FlaxLMSDiscreteScheduler):
        expected = expected / np.sqrt(alpha_bar)
    np.testing.assert_allclose(noisy[:, 0, 0, 0], expected, rtol=1e-6)
    velocity = scheduler.get_velocity(state, latents, noise, timesteps)
    np.testing.assert_allclose(velocity[:, 0, 0, 0], 0.5 * np.sqrt(alpha_bar) - np.sqrt(1 - alpha_bar), rtol=1e-5)


def test_ddim_of_0_39() -> None:
    """Numbers of the release itself, for one call by position."""
    scheduler = FlaxDDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", None, False, 1.0, False, 1)
    state = scheduler.set_timesteps(scheduler.create_state(), 50)
    sample = jnp.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    output = scheduler.step(state, 0.3 * sample, 501, sample, 0.0, True)
    np.testing.assert_allclose(output.prev_sample[0, 0, 0, 0], -1.0312237739562988, rtol=1e-6)
    plain = scheduler.step(state, 0.3 * sample, 501, sample, 0.0, False)
    assert type(plain) is tuple
    np.testing.assert_array_equal(plain[0], output["prev_sample"])


def test_outputs() -> None:
    scheduler = FlaxPNDMScheduler(skip_prk_steps=True)
    state = scheduler.set_timesteps(scheduler.create_state(), 5, SHAPE)
    output = scheduler.step(state, jnp.ones(SHAPE), state.timesteps[0], jnp.ones(SHAPE))
    assert isinstance(output, schedulers.FlaxPNDMSchedulerOutput)
    assert isinstance(output, FlaxSchedulerOutput)
    assert output["prev_sample"] is output[0] is output.prev_sample is output.to_tuple()[0]
    assert output["state"] is output.state
    assert tuple(output.keys()) == ("prev_sample", "state")
    again = jax.tree.map(lambda leaf: leaf, output)
    assert type(again) is FlaxSchedulerOutput


def test_compatibles() -> None:
    names = [one.name for one in FlaxKarrasDiffusionSchedulers]
    assert len(names) == 6
    for cls in SAMPLERS:
        scheduler = cls()
        assert isinstance(scheduler, FlaxSchedulerMixin)
        assert scheduler.has_state
        assert {one.__name__ for one in scheduler.compatibles} == set(names)
    assert FlaxKarrasVeScheduler().compatibles == [FlaxKarrasVeScheduler]
    assert flax_diffusion.FlaxSchedulerMixin is FlaxSchedulerMixin
    assert flax_diffusion.FlaxKarrasDiffusionSchedulers is FlaxKarrasDiffusionSchedulers


@pytest.mark.parametrize("cls", CONSTRUCTORS)
def test_saved_and_loaded(cls, tmp_path) -> None:
    scheduler = cls()
    scheduler.save_config(tmp_path / "scheduler")
    scheduler.save_pretrained(str(tmp_path), push_to_hub=False)
    again, state = cls.from_pretrained(tmp_path, "scheduler", cache_dir=None, local_files_only=True, revision="main")
    assert again == scheduler
    assert state is not None
    assert scheduler_from_config(tmp_path) == scheduler
    assert isinstance(json.loads(scheduler.to_json_string()), dict)
    config, rest, commit = cls.load_config(
        tmp_path, return_unused_kwargs=True, return_commit_hash=True, output_loading_info=False, other=1
    )
    assert cls.from_config(config) == cls.from_config(str(tmp_path)) == scheduler
    assert (rest, commit) == ({"other": 1}, None)


def test_overrides_and_unused_keywords(tmp_path) -> None:
    FlaxDDPMScheduler(beta_end=0.03).save_pretrained(tmp_path)
    scheduler, state, unused = FlaxDDIMScheduler.from_pretrained(
        str(tmp_path), return_unused_kwargs=True, beta_start=0.001, from_pt=True
    )
    assert (scheduler.beta_start, scheduler.beta_end) == (0.001, 0.03)
    assert state.num_inference_steps is None
    assert unused["from_pt"] is True
    assert unused["_class_name"] == "DDPMScheduler"
    assert unused["variance_type"] == "fixed_small"
    made, unused = FlaxDDIMScheduler.from_config({"beta_end": 0.03}, return_unused_kwargs=True, dtype=jnp.float32, x=1)
    assert made.beta_end == 0.03
    assert unused == {"x": 1}
    first = FlaxDDPMScheduler(beta_end=0.03, clip_sample=False)
    made, unused = FlaxPNDMScheduler.from_config(first.config, return_unused_kwargs=True, x=1)
    assert made.beta_end == 0.03
    assert unused == {"x": 1, "clip_sample": False}


def test_dpm_solver_without_its_last_noise_level() -> None:
    """0.39's constructor has no `final_sigmas_type`, and "dpmsolver" cannot end at σ = 0."""
    assert FlaxDPMSolverMultistepScheduler(algorithm_type="dpmsolver").final_sigmas_type == "sigma_min"
    assert FlaxDPMSolverMultistepScheduler(1000, algorithm_type="dpmsolver++").final_sigmas_type == "zero"


def test_push_to_hub(tmp_path, monkeypatch) -> None:
    calls = []

    def upload(_, **options):
        (file,) = (tmp_path.__class__(options.pop("folder_path"))).iterdir()
        calls.append((file.name, options))
        return "address"

    class Made:
        repo_id = "me/name"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *args, **kwargs: Made)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    FlaxDDIMScheduler().save_pretrained(tmp_path / "name", True, commit_message="words", create_pr=True)
    assert FlaxDDIMScheduler().push_to_hub("name", subfolder="scheduler") == "address"
    assert [name for name, _ in calls] == ["scheduler_config.json"] * 2
    assert calls[0][1]["repo_id"] == "me/name"
    assert calls[0][1]["commit_message"] == "words"
    assert calls[1][1]["path_in_repo"] == "scheduler"


def test_options_of_the_hub(tmp_path, monkeypatch) -> None:
    asked = {}
    (tmp_path / "snapshots" / ("0" * 40)).mkdir(parents=True)
    folder = tmp_path / "snapshots" / ("0" * 40)

    def download(name, **options):
        asked.update(options, name=name)
        FlaxPNDMScheduler().save_pretrained(folder / "scheduler")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    FlaxPNDMScheduler.from_pretrained("owner/name", subfolder="scheduler", cache_dir="here", token="t", revision="bf16")
    assert asked == {
        "name": "owner/name", "revision": "bf16", "allow_patterns": ["scheduler/scheduler_config.json"],
        "cache_dir": "here", "token": "t",
    }  # fmt: skip
    *_, commit = FlaxPNDMScheduler.load_config(
        "owner/name", subfolder="scheduler", force_download=True, return_commit_hash=True
    )
    assert commit == "0" * 40


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FlaxDDPMScheduler(beta_strat=0.1), "has no field 'beta_strat'.*did you mean 'beta_start'"),
        (lambda: FlaxDDPMScheduler.from_config({}, beta_strat=0.1), "no keyword 'beta_strat'.* mean 'beta_start'"),
        (lambda: FlaxDDPMScheduler.from_config({}, revison="x"), "no keyword 'revison'.* mean 'revision'"),
        (lambda: FlaxDDPMScheduler.load_config(".", subfoldr="x"), "no keyword 'subfoldr'.* mean 'subfolder'"),
        (lambda: FlaxDDPMScheduler().save_config(__file__), "is a file; name a folder"),
        (lambda: FlaxDDPMScheduler().save_config("x", repo_id="y"), "add push_to_hub=True"),
        (lambda: FlaxDDPMScheduler().push_to_hub("x", privat=True), "no keyword 'privat'.* mean 'private'"),
    ],
)
def test_errors(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_proxies_are_said_to_be_left_alone(tmp_path) -> None:
    FlaxDDPMScheduler().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="HTTPS_PROXY"):
        FlaxDDPMScheduler.from_pretrained(tmp_path, proxies={"https": "x"})


STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
OLD = [
    # DDPM on CIFAR-10, Diffusers 0.1
    ({"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
      "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "timestep_values": None,
      "trained_betas": None, "variance_type": "fixed_large", "tensor_format": "pt"}, {"variance_type": "fixed_large"}),
    # 0.3 to 0.10 said by a flag what a model predicts
    ({"_class_name": "DDPMScheduler", "_diffusers_version": "0.4.0", "predict_epsilon": False, "clip_sample": False},
     {"prediction_type": "sample", "clip_sample": False}),
    ({"_class_name": "DDPMScheduler", "_diffusers_version": "0.9.0", "predict_epsilon": True},
     {"prediction_type": "epsilon"}),
    # Stable Diffusion 1.4, 0.2: LMS, and DDIM of its repository
    ({"_class_name": "LMSDiscreteScheduler", "_diffusers_version": "0.2.4", "tensor_format": "pt",
      "trained_betas": None, **STABLE}, {"beta_end": 0.012}),
    ({"_class_name": "DDIMScheduler", "_diffusers_version": "0.2.2", "clip_sample": False, "set_alpha_to_one": False,
      "timestep_values": None, "trained_betas": None, **STABLE}, {"set_alpha_to_one": False, "steps_offset": 0}),
    # Stable Diffusion 1.5
    ({"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "set_alpha_to_one": False, "skip_prk_steps": True,
      "steps_offset": 1, "trained_betas": None, "clip_sample": False, **STABLE}, {"skip_prk_steps": True}),
    # Stable Diffusion 2 and 2.1
    ({"_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "clip_sample": False, "set_alpha_to_one": False,
      "prediction_type": "v_prediction", "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, **STABLE},
     {"prediction_type": "v_prediction", "steps_offset": 1}),
    ({"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.9.0", "prediction_type": "epsilon",
      "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False,
      "trained_betas": None, **STABLE}, {"use_karras_sigmas": False}),
    # SDXL
    ({"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "clip_sample": False,
      "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
      "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
      "use_karras_sigmas": False, **STABLE}, {"timestep_spacing": "leading", "steps_offset": 1}),
    # Flax folders of 0.14 and 0.39
    ({"_class_name": "FlaxDPMSolverMultistepScheduler", "_diffusers_version": "0.14.0", "algorithm_type": "dpmsolver++",
      "lower_order_final": True, "solver_order": 2, "solver_type": "midpoint", "thresholding": False,
      "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "trained_betas": None, **STABLE},
     {"final_sigmas_type": "sigma_min"}),
    ({"_class_name": "FlaxDPMSolverMultistepScheduler", "_diffusers_version": "0.39.0", "algorithm_type": "dpmsolver",
      "solver_order": 2, **STABLE}, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ({"_class_name": "FlaxLMSDiscreteScheduler", "_diffusers_version": "0.39.0", "prediction_type": "epsilon",
      "trained_betas": None, **STABLE}, {"timestep_spacing": "linspace"}),
    ({"_class_name": "FlaxKarrasVeScheduler", "_diffusers_version": "0.39.0", "s_churn": 80, "s_max": 50,
      "s_min": 0.05, "s_noise": 1.007, "sigma_max": 100, "sigma_min": 0.02}, {"sigma_max": 100}),
    # The score models of CelebA-HQ, 0.1
    ({"_class_name": "ScoreSdeVeScheduler", "_diffusers_version": "0.1.1", "correct_steps": 1,
      "num_train_timesteps": 2000, "sampling_eps": 1e-05, "sigma_max": 1348, "sigma_min": 0.01, "snr": 0.15,
      "tensor_format": "pt"}, {"sigma_max": 1348}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "says"), OLD, ids=[f"{c['_class_name']}-{c['_diffusers_version']}" for c, _ in OLD])
def test_configs_of_all_ages(config, says, tmp_path) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = scheduler_from_config(tmp_path)
    assert type(scheduler).__name__ == "Flax" + config["_class_name"].removeprefix("Flax")
    assert {key: scheduler.config[key] for key in says} == says
    for key in STABLE.keys() & config.keys():
        assert scheduler.config[key] == config[key]
    again, _ = type(scheduler).from_pretrained(tmp_path)
    assert again == scheduler
