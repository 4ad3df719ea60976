"""Whole trajectories against PyTorch: all in float64 to 1e-12, some in float32 to 1e-6, jitted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import flax_trajectory, make, relative, torch_trajectory

from flax_diffusion.schedulers import SCHEDULERS

CLASSES = {cls.torch_class_name: cls for cls in SCHEDULERS.values()}
DDPM, DDIM, PNDM = "DDPMScheduler", "DDIMScheduler", "PNDMScheduler"
EULER, LMS, DPM = "EulerDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler"
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}

CASES: list[tuple[str, dict, dict]] = [
    (DDPM, {}, {}),
    *[(DDPM, {"beta_schedule": name}, {}) for name in ("scaled_linear", "squaredcos_cap_v2", "laplace")],
    (DDPM, {"num_train_timesteps": 40, "trained_betas": np.linspace(0.001, 0.3, 40).tolist()}, {}),
    (DDPM, {"prediction_type": "sample", "clip_sample_range": 0.5}, {}),
    (DDPM, {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "linspace"}, {}),
    (DDPM, {"steps_offset": 1, **THRESHOLD}, {}),
    (DDPM, ZERO_SNR, {}),
    (DDPM, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "sample"}, {}),
    *[(DDPM, {"variance_type": name}, {}) for name in ("fixed_small_log", "fixed_large", "learned", "learned_range")],
    (DDIM, {}, {}),
    (DDIM, {}, {"eta": 0.7}),
    (DDIM, {"clip_sample_range": 0.7}, {"eta": 1.0, "use_clipped_model_output": True}),
    (DDIM, {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}, {}),
    (DDIM, {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}, {}),
    (DDIM, {"prediction_type": "v_prediction", "timestep_spacing": "linspace", "clip_sample": False}, {}),
    (DDIM, THRESHOLD, {}),
    (DDIM, ZERO_SNR, {}),
    (PNDM, {}, {}),
    (PNDM, {"skip_prk_steps": True}, {}),
    (PNDM, {"skip_prk_steps": True, "beta_schedule": "scaled_linear", "steps_offset": 1}, {}),
    (PNDM, {"set_alpha_to_one": True, "timestep_spacing": "linspace", "prediction_type": "v_prediction"}, {}),
    (PNDM, {"skip_prk_steps": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}, {}),
    (EULER, {}, {}),
    (EULER, {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}, {}),
    (EULER, {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}, {}),
    (EULER, {"interpolation_type": "log_linear"}, {}),
    (EULER, {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 20.0}, {}),
    (EULER, {"use_exponential_sigmas": True}, {}),
    (EULER, {"use_beta_sigmas": True}, {}),
    (EULER, {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}, {}),
    (EULER, {"timestep_type": "continuous", "prediction_type": "v_prediction"}, {}),
    (EULER, ZERO_SNR, {}),
    (EULER, {}, {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 50.0, "s_noise": 1.003}),
    (LMS, {}, {}),
    *[(LMS, {"beta_schedule": "scaled_linear"}, {"order": order}) for order in (1, 2, 3)],
    (LMS, {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "v_prediction"}, {}),
    (LMS, {"timestep_spacing": "trailing", "prediction_type": "sample"}, {}),
    (LMS, {"beta_schedule": "squaredcos_cap_v2"}, {}),
    (LMS, {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"}, {}),
    (LMS, {"use_exponential_sigmas": True}, {}),
    (LMS, {"use_beta_sigmas": True}, {}),
    *[
        (DPM, {"algorithm_type": algorithm, "solver_order": order, "solver_type": form, "final_sigmas_type": final}, {})
        for algorithm, final in (
            ("dpmsolver++", "zero"),
            ("dpmsolver", "sigma_min"),
            ("sde-dpmsolver++", "zero"),
            ("sde-dpmsolver", "sigma_min"),
        )
        for order, form in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
        if (algorithm, order) != ("sde-dpmsolver", 3)
    ],
    (DPM, {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}, {}),
    (DPM, {"solver_order": 3, "euler_at_final": True, "final_sigmas_type": "sigma_min"}, {}),
    (DPM, {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"}, {}),
    (DPM, {"use_exponential_sigmas": True}, {}),
    (DPM, {"use_beta_sigmas": True}, {}),
    (DPM, {"use_lu_lambdas": True}, {}),
    (DPM, {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}, {}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "use_karras_sigmas": True}, {}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, {}),
    (DPM, {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "v_prediction"}, {}),
    (DPM, {"prediction_type": "sample", **THRESHOLD}, {}),
    (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "prediction_type": "sample"}, {}),
    (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"}, {}),
    (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", **THRESHOLD}, {}),
    (DPM, {"variance_type": "learned_range"}, {}),
    (DPM, ZERO_SNR, {}),
]
pytestmark = [
    # Diffusers deprecates `dpmsolver` and `sde-dpmsolver`, and turns tensors to arrays in a way NumPy 2 deprecates.
    pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


def _id(case: tuple[str, dict, dict]) -> str:
    name, config, step = case
    words = [f"{k}={v}" for k, v in {**config, **step}.items() if k != "trained_betas"]
    return "-".join([name.removesuffix("Scheduler"), *words])


def _steps(config: dict) -> int:
    """16 leaves the high orders to the end; 11 makes `lower_order_final` end with lower ones."""
    return 11 if config.get("solver_order") == 3 and config.get("algorithm_type") == "dpmsolver++" else 16


# Where PyTorch's own float32 exponential or logarithm makes the table.
FLOAT64_TOLERANCE = {"log_linear": 2e-7, "continuous": 1e-11}

# In float32 the two sides differ by up to 5e-6 where coefficients cancel (order 3, beta_sigmas, sde-dpmsolver++ and
# small λ of squaredcos_cap_v2): each lies that far from the float64 result. These stay within 1e-6.
FLOAT32: list[tuple[str, dict, dict]] = [
    (DDPM, {"variance_type": "learned_range"}, {}),
    (DDIM, THRESHOLD, {"eta": 0.7}),
    (PNDM, {}, {}),
    (PNDM, {"skip_prk_steps": True, "beta_schedule": "scaled_linear", "steps_offset": 1}, {}),
    (EULER, {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}, {}),
    (EULER, ZERO_SNR, {"s_churn": 3.0}),
    (LMS, {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"}, {}),
    (DPM, {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"}, {}),
    (DPM, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
]


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_float64(case: tuple[str, dict, dict]) -> None:
    name, config, step = case
    doubled = "learned" in str(config.get("variance_type"))
    expected = torch_trajectory(make(name, **config), _steps(config), True, doubled, **step)
    with jax.enable_x64(True):
        scheduler = CLASSES[name](**config, dtype=jnp.float64)
        actual = flax_trajectory(scheduler, _steps(config), doubled, **step)
    assert actual.dtype == np.float64
    assert np.isfinite(expected).all()
    limit = max([FLOAT64_TOLERANCE.get(str(value), 1e-12) for value in config.values()], default=1e-12)
    assert relative(actual, expected) <= limit


@pytest.mark.parametrize("case", FLOAT32, ids=_id)
def test_float32_jitted_scan(case: tuple[str, dict, dict]) -> None:
    name, config, step = case
    doubled = "learned" in str(config.get("variance_type"))
    expected = torch_trajectory(make(name, **config), _steps(config), False, doubled, **step)
    actual = flax_trajectory(CLASSES[name](**config), _steps(config), doubled, scan=True, **step)
    assert actual.dtype == np.float32
    assert relative(actual, expected) <= 1e-6
