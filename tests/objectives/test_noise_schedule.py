"""Tables bit for bit against PyTorch; loss weights against their formulas."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
from torch_reference import exact_roots, make

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.objectives import noise_schedule


def _ulps(actual: np.ndarray, expected: np.ndarray) -> int:
    bits = [np.ascontiguousarray(a).view(np.int32).astype(np.int64) for a in (actual, expected)]
    return int(np.abs(bits[0] - bits[1]).max())


@pytest.mark.parametrize("steps", [1, 2, 37, 1000, 2001])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace"])
def test_tables_are_pytorchs(name: str, steps: int) -> None:
    reference = diffusers.DDPMScheduler(num_train_timesteps=steps, beta_schedule=name, beta_start=0.00085)
    betas = noise_schedule.betas(name, steps, beta_start=0.00085)
    assert betas.dtype == np.float32
    np.testing.assert_array_equal(betas, reference.betas.numpy())
    np.testing.assert_array_equal(noise_schedule.alphas_cumprod(betas), reference.alphas_cumprod.numpy())


def test_sigmoid_is_within_two_units() -> None:
    """PyTorch's vectorised exponential is not correctly rounded."""
    reference = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    betas = noise_schedule.betas("sigmoid")
    assert _ulps(betas, reference.betas.numpy()) <= 2
    assert _ulps(noise_schedule.alphas_cumprod(betas), reference.alphas_cumprod.numpy()) <= 1


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_is_pytorchs_with_exact_roots(name: str) -> None:
    reference = make("DDPMScheduler", beta_schedule=name, rescale_betas_zero_snr=True)
    betas = noise_schedule.betas(name, rescale_betas_zero_snr=True)
    bar = noise_schedule.alphas_cumprod(betas)
    assert bar[-1] == 0
    np.testing.assert_array_equal(betas, reference.betas.numpy())
    np.testing.assert_array_equal(bar, reference.alphas_cumprod.numpy())


def test_zero_terminal_snr_is_pytorchs_but_for_its_square_root() -> None:
    """Its roots are off by one unit in the last place, the rescaled ones by up to four (2⁻²⁴ each)."""
    reference = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    bar = noise_schedule.alphas_cumprod(noise_schedule.betas(rescale_betas_zero_snr=True))
    np.testing.assert_allclose(np.sqrt(bar), np.sqrt(reference.alphas_cumprod.numpy()), rtol=0, atol=4 * 2**-24)


def test_trained_betas_and_config() -> None:
    values = [0.1, 0.2, 0.4]
    config = {"trained_betas": values, "num_train_timesteps": 3, "clip_sample": True}
    expected = np.cumprod(1 - np.array(values))
    np.testing.assert_allclose(noise_schedule.alphas_cumprod_from_config(config), expected, rtol=2e-7)
    with exact_roots():
        reference = diffusers.DDIMScheduler(**config)
    np.testing.assert_array_equal(noise_schedule.alphas_cumprod_from_config(config), reference.alphas_cumprod.numpy())


def test_snr() -> None:
    bar = np.array([0.9, 0.5, 0.2], np.float32)
    np.testing.assert_allclose(noise_schedule.snr(bar), [9, 1, 0.25], rtol=1e-6)
    np.testing.assert_allclose(noise_schedule.snr(bar, [[2], [0]]), [[0.25], [9]], rtol=1e-6)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [("epsilon", [5 / 9, 1, 1]), ("v_prediction", [5 / 10, 1 / 2, 0.25 / 1.25]), ("sample", [5, 1, 0.25])],
)
def test_min_snr(prediction_type: str, expected: list[float]) -> None:
    weights = noise_schedule.min_snr_weights(np.array([0.9, 0.5, 0.2]), 5.0, prediction_type)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_zero_terminal_snr_weights() -> None:
    bar = noise_schedule.alphas_cumprod(noise_schedule.betas(rescale_betas_zero_snr=True))
    assert noise_schedule.min_snr_weights(bar, 5.0, "v_prediction")[-1] == 0
    assert noise_schedule.sample_weights(bar)[-1] == 0
    with pytest.raises(ConfigError, match="v_prediction"):
        noise_schedule.min_snr_weights(bar, 5.0, "epsilon")


def test_sample_weights() -> None:
    np.testing.assert_allclose(noise_schedule.sample_weights(np.array([0.9, 0.5, 0.2])), [9, 1, 0.25], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: noise_schedule.betas("cosine"), "'cosine' is unknown; use one of linear"),
        (lambda: noise_schedule.betas(num_train_timesteps=0), "num_train_timesteps is 0"),
        (lambda: noise_schedule.betas(trained_betas=[0.1]), r"shape \(1,\)"),
        (lambda: noise_schedule.betas(beta_end=2.0), r"must lie in \[0, 1\]"),
        (lambda: noise_schedule.betas("scaled_linear", beta_start=-0.1), "needs both"),
        (lambda: noise_schedule.betas(num_train_timesteps=1, rescale_betas_zero_snr=True), "at least two"),
        (lambda: noise_schedule.snr(np.ones(2)), "infinite"),
        (lambda: noise_schedule.min_snr_weights(np.array([0.5]), 0.0), "snr_gamma is 0.0"),
        (lambda: noise_schedule.min_snr_weights(np.array([0.5]), 5.0, "noise"), "'noise' is unknown"),
    ],
)
def test_errors(call, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
