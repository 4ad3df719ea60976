"""Configurations: both ways with Diffusers, conversion between classes, and every kind of mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import jax.numpy as jnp
import pytest

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.schedulers import (
    SCHEDULERS,
    FlaxDDIMScheduler,
    FlaxDDPMScheduler,
    FlaxDPMSolverMultistepScheduler,
    FlaxEulerDiscreteScheduler,
    FlaxPNDMScheduler,
    scheduler_from_config,
)
from flax_diffusion.schedulers.common import BetaScheduler

# Diffusers' LMS class turns tensors to arrays in a way NumPy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

# The scheduler files of Stable Diffusion 1.5 and SDXL hold keys of other classes.
STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
CHANGED: dict[str, dict[str, Any]] = {
    "ddpm": {"variance_type": "fixed_large", "num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 0.3]},
    "ddim": {"set_alpha_to_one": False, "clip_sample_range": 2.0},
    "pndm": {"skip_prk_steps": True, "steps_offset": 1},
    "euler": {"use_karras_sigmas": True, "sigma_min": 0.1},
    "lms": {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
    "dpm++": {"solver_order": 3, "lambda_min_clipped": -5.1},
}

WITH_BETAS = [kind for kind, cls in SCHEDULERS.items() if issubclass(cls, BetaScheduler)]


def _plain(config: Any) -> dict[str, Any]:
    values = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    betas = values["trained_betas"]
    return {**values, "trained_betas": None if betas is None else list(betas)}


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("kind", WITH_BETAS)
def test_round_trip(kind: str, changed: bool, tmp_path: Path) -> None:
    cls = SCHEDULERS[kind]
    theirs = getattr(diffusers, cls.torch_class_name)
    given = CHANGED[kind] if changed else {}
    ours = cls(**given)
    assert _plain(ours.config) == _plain(theirs(**given).config)

    ours.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "scheduler_config.json").read_text())
    assert written["_class_name"] == cls.torch_class_name
    loaded = theirs.from_pretrained(tmp_path / "ours")
    assert _plain(loaded.config) == _plain(ours.config)

    loaded.save_pretrained(tmp_path / "pipeline" / "scheduler")
    again, state = cls.from_pretrained(str(tmp_path / "pipeline"), subfolder="scheduler")
    assert again == ours
    assert hash(again) == hash(ours)
    assert state.common.betas.shape == (ours.num_train_timesteps,)
    assert scheduler_from_config(tmp_path / "ours") == ours
    assert scheduler_from_config(tmp_path / "ours" / "scheduler_config.json") == ours


@pytest.mark.parametrize("kind", WITH_BETAS)
@pytest.mark.parametrize("loaded", [False, True])
def test_conversion_is_diffusers(kind: str, loaded: bool) -> None:
    """From the file's keys, and from the `.config` of a loaded scheduler, whose defaults do not travel."""
    cls = SCHEDULERS[kind]
    source: Any = FlaxPNDMScheduler.from_config(STABLE_DIFFUSION).config if loaded else STABLE_DIFFUSION
    source_theirs: Any = diffusers.PNDMScheduler.from_config(STABLE_DIFFUSION).config if loaded else STABLE_DIFFUSION
    expected = _plain(getattr(diffusers, cls.torch_class_name).from_config(source_theirs).config)
    if loaded and "clip_sample" in cls.field_names():
        # Diffusers remembers the keys PNDM has no use for and hands them on; ours drops them when it loads.
        assert expected.pop("clip_sample") is False
        source = {**source, "clip_sample": False}
        expected["clip_sample"] = False
    actual = _plain(scheduler_from_config(source, kind).config)
    assert actual == {key: value for key, value in expected.items() if key in cls.field_names()}


def test_class_by_name() -> None:
    assert isinstance(scheduler_from_config(STABLE_DIFFUSION), FlaxPNDMScheduler)
    flax_name = {**STABLE_DIFFUSION, "_class_name": "FlaxPNDMScheduler"}
    assert isinstance(scheduler_from_config(flax_name), FlaxPNDMScheduler)
    unipc = {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "solver_order": 3, "predict_x0": True}
    converted = scheduler_from_config(unipc, "dpm++")
    assert isinstance(converted, FlaxDPMSolverMultistepScheduler)
    assert (converted.solver_type, converted.solver_order) == ("midpoint", 3)


def test_config_access() -> None:
    config = FlaxDDIMScheduler(beta_end=0.03).config
    assert config.beta_end == config["beta_end"] == dict(config)["beta_end"] == 0.03
    assert "beta_end" not in config["_use_default_values"]
    with pytest.raises(AttributeError, match="no 'beta_ende'"):
        _ = config.beta_ende


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: scheduler_from_config({}), "no _class_name"),
        (
            lambda: scheduler_from_config({"_class_name": "EulerDiscretScheduler"}),
            "did you mean 'EulerDiscreteScheduler'",
        ),
        (lambda: scheduler_from_config({}, "haun"), "'haun' is unknown; use one of ddpm, ddim.*did you mean 'heun'"),
        (lambda: scheduler_from_config({"beta_strat": 1}, "ddim"), "'beta_strat'.*; did you mean 'beta_start'"),
        (lambda: FlaxDDPMScheduler(prediction_type="epsilom"), "'epsilom'; it must be .* mean 'epsilon'"),
        (lambda: FlaxDDIMScheduler(beta_schedule="sigmoid"), "FlaxDDIMScheduler: beta_schedule is 'sigmoid'"),
        (lambda: FlaxPNDMScheduler(prediction_type="sample"), "must be 'epsilon' or 'v_prediction'"),
        (lambda: FlaxDDPMScheduler(num_train_timesteps=10.0), "is 10.0; it must be a valid integer"),
        (lambda: FlaxDDPMScheduler(clip_sample="yes"), "clip_sample is 'yes'; it must be a valid boolean"),
        (lambda: FlaxDDPMScheduler(trained_betas=[0.1]), "one value for each"),
        (lambda: FlaxDDPMScheduler(dtype=jnp.bfloat16), "need float32 or float64"),
        (lambda: FlaxDDPMScheduler(dtype=jnp.float64), "64-bit mode is off"),
        (lambda: FlaxEulerDiscreteScheduler(use_karras_sigmas=True, use_beta_sigmas=True), "one way only"),
        (lambda: FlaxDPMSolverMultistepScheduler(use_lu_lambdas=True, use_flow_sigmas=True), "one way only"),
        (lambda: FlaxDPMSolverMultistepScheduler(solver_order=4), "solver_order is 4"),
        (
            lambda: FlaxDPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="zero"),
            "use 'sigma_min'",
        ),
        (lambda: FlaxDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver", solver_order=3), "no solver_order 3"),
        (lambda: FlaxDPMSolverMultistepScheduler(prediction_type="flow_prediction"), "needs use_flow_sigmas"),
        (lambda: FlaxDPMSolverMultistepScheduler(lambda_min_clipped=5.0), r"is 5\.0, the largest λ .* is 4\.61: lower"),
        (lambda: FlaxDPMSolverMultistepScheduler(lambda_min_clipped=float("nan")), "lambda_min_clipped is nan, the"),
        (lambda: FlaxDDPMScheduler.from_pretrained("."), "no scheduler_config.json"),
    ],
)
def test_errors(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_broken_json(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        scheduler_from_config(tmp_path)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="holds a list"):
        scheduler_from_config(tmp_path)


def test_dpm_solver_on_a_cosine_schedule_starts_where_there_is_signal() -> None:
    config = {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}
    assert scheduler_from_config(config, "dpm++").config["lambda_min_clipped"] == -5.1
    given = scheduler_from_config(config | {"lambda_min_clipped": -3.0}, "dpm++")
    assert given.config["lambda_min_clipped"] == -3.0
    linear = scheduler_from_config({"_class_name": "DDPMScheduler"}, "dpm++")
    assert linear.config["lambda_min_clipped"] == -float("inf")
