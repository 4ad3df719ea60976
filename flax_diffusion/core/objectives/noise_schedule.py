"""Noise schedules and the loss weights that depend on them: the only source of these tables, in NumPy.

The Flax schedulers, the training data pipeline and the PyTorch backend all read the tables built here. They are
float32 and bit-identical with those of Diffusers' PyTorch schedulers, except "sigmoid", where PyTorch's vectorised
exponential differs from the correctly rounded one used here by one unit in the last place of some entries.

Notation of DDPM (arXiv:2006.11239): β_t, α_t = 1 − β_t, ᾱ_t = Π_{s≤t} α_s; T is the number of training timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from flax_diffusion.core.errors import ConfigError, unknown
from flax_diffusion.core.typed import BetaSchedule, PredictionType, Size, check_values

Beta = Annotated[float, Field(ge=0, le=1)]
Table = NDArray[np.float32]

BETA_SCHEDULES: tuple[str, ...] = get_args(BetaSchedule)
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)

_MAX_BETA = 0.999  # cap of Improved DDPM (arXiv:2102.09672, section 3.2)


def betas(
    beta_schedule: str = "linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 0.0001,
    beta_end: float = 0.02,
    trained_betas: ArrayLike | None = None,
    rescale_betas_zero_snr: bool = False,
) -> Table:
    """Return β_t of a named schedule.

    Args:
        beta_schedule: One of `BETA_SCHEDULES`; not read if `trained_betas` is given.
        num_train_timesteps: T.
        beta_start: β_0 of the linear, scaled_linear and sigmoid schedules.
        beta_end: β_{T−1} of the same schedules.
        trained_betas: The T values themselves.
        rescale_betas_zero_snr: Whether to shift and scale √ᾱ so that ᾱ_{T−1} is exactly 0.

    Returns:
        β_t, float32 (T,).

    Raises:
        ConfigError: If the schedule is unknown, T < 1, `trained_betas` are not T values, or a β is outside [0, 1].

    Reference:
        `DDPMScheduler.__init__` in PyTorch; zero terminal SNR: arXiv:2305.08891, algorithm 1.
    """
    if num_train_timesteps < 1:
        raise ConfigError(f"num_train_timesteps is {num_train_timesteps}; it must be at least 1 (usually 1000)")
    if trained_betas is not None:
        table = np.asarray(trained_betas, np.float32)
        if table.shape != (num_train_timesteps,):
            raise ConfigError(
                f"trained_betas has shape {table.shape}; give one value for each of the "
                f"num_train_timesteps={num_train_timesteps} timesteps"
            )
    else:
        table = _named_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
    if not np.all((table >= 0) & (table <= 1)):
        raise ConfigError(
            f"betas range from {table.min()} to {table.max()}; every beta must lie in [0, 1]: "
            f"check beta_start={beta_start}, beta_end={beta_end} and trained_betas"
        )
    return rescale_zero_terminal_snr(table) if rescale_betas_zero_snr else table


def _named_betas(beta_schedule: str, steps: int, beta_start: float, beta_end: float) -> Table:
    if beta_schedule == "linear":
        return linspace(beta_start, beta_end, steps)
    if beta_schedule == "scaled_linear":
        if beta_start < 0 or beta_end < 0:
            raise ConfigError(f"beta_start={beta_start}, beta_end={beta_end}: scaled_linear needs both to be >= 0")
        return linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    if beta_schedule == "squaredcos_cap_v2":
        return _betas_of_alpha_bar(_cosine_alpha_bar, steps)
    if beta_schedule == "laplace":
        return _betas_of_alpha_bar(_laplace_alpha_bar, steps)
    if beta_schedule == "sigmoid":
        exponential = np.exp(-linspace(-6.0, 6.0, steps).astype(np.float64)).astype(np.float32)
        return np.float32(1) / (np.float32(1) + exponential) * np.float32(beta_end - beta_start) + np.float32(
            beta_start
        )
    raise unknown("beta_schedule", beta_schedule, BETA_SCHEDULES)


def linspace(start: float, end: float, steps: int) -> Table:
    """Return evenly spaced float32 values, rounded as `torch.linspace` rounds them on a CPU.

    Args:
        start: First value.
        end: Last value.
        steps: Number of values.

    Returns:
        The values, float32 (steps,).

    Reference:
        PyTorch counts up from `start` in the first half and down from `end` in the second, with a float32
        increment and one rounding (a fused multiply-add); the float64 product and sum here round the same way.
    """
    if steps == 1:
        return np.array([start], np.float32)
    first, last = np.float32(start), np.float32(end)
    increment = float(np.float32(last - first) / np.float32(steps - 1))
    index = np.arange(steps)
    rising = float(first) + increment * index
    falling = float(last) - increment * (steps - 1 - index)
    return np.where(index < steps // 2, rising, falling).astype(np.float32)


def _cosine_alpha_bar(time: float) -> float:
    """Compute ᾱ(t) of Improved DDPM (arXiv:2102.09672, equation 17), up to a constant factor; t in [0, 1]."""
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(time: float) -> float:
    """Compute √(SNR/(1+SNR)) of the Laplace schedule (arXiv:2407.03297, µ = 0, b = ½), as PyTorch's DDPM does."""
    half_log = -0.5 * math.copysign(1, 0.5 - time) * math.log(1 - 2 * math.fabs(0.5 - time) + 1e-6)
    ratio = math.exp(half_log)
    return math.sqrt(ratio / (1 + ratio))


def _betas_of_alpha_bar(alpha_bar: Callable[[float], float], steps: int) -> Table:
    edges = [alpha_bar(i / steps) for i in range(steps + 1)]
    ratios = zip(edges[1:], edges[:-1], strict=True)
    return np.array([min(1 - after / before, _MAX_BETA) for after, before in ratios], np.float32)


def alphas_cumprod(betas: ArrayLike) -> Table:
    """Return ᾱ_t = Π (1 − β_s), accumulated in float64 and stored in float32 as `torch.cumprod` does on a CPU.

    Args:
        betas: β_t, array (T,).

    Returns:
        ᾱ_t, float32 (T,).
    """
    alphas = np.float32(1) - np.asarray(betas, np.float32)
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def rescale_zero_terminal_snr(betas: ArrayLike) -> Table:
    """Return betas whose √ᾱ is shifted to end at 0 and scaled to start where it did.

    Args:
        betas: β_t, array (T,).

    Returns:
        β_t, float32 (T,); the last entry is 1.

    Raises:
        ConfigError: If there are fewer than two timesteps or all betas are 0, which leaves nothing to scale.

    Reference:
        arXiv:2305.08891, algorithm 1; `rescale_zero_terminal_snr` in PyTorch.
    """
    root = np.sqrt(alphas_cumprod(betas))
    first, last = root[0], root[-1]
    if first == last:
        raise ConfigError("rescale_betas_zero_snr needs at least two timesteps with noise between them")
    bar = ((root - last) * (first / (first - last))) ** 2
    return np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


class _Keys:
    beta_schedule: str
    num_train_timesteps: Size
    beta_start: Beta
    beta_end: Beta
    trained_betas: Sequence[float] | None
    rescale_betas_zero_snr: bool


def betas_from_config(config: Mapping[str, Any]) -> Table:
    """Return β_t of a scheduler configuration, as a `scheduler_config.json` holds it.

    Args:
        config: Keys `beta_schedule`, `num_train_timesteps`, `beta_start`, `beta_end`, `trained_betas` and
            `rescale_betas_zero_snr`, each with Diffusers' default if absent; other keys are not read.

    Returns:
        β_t, float32 (T,).

    Raises:
        ConfigError: As `betas`, and if a value has a wrong type.
    """
    values = {name: config[name] for name in _Keys.__annotations__ if name in config}
    check_values(_Keys, values, "scheduler config")
    return betas(**values)


def alphas_cumprod_from_config(config: Mapping[str, Any]) -> Table:
    """Return ᾱ_t of a scheduler configuration, float32 (T,); arguments and errors as for `betas_from_config`."""
    return alphas_cumprod(betas_from_config(config))


def timesteps_with_signal(alphas_cumprod: Table, lambda_min: float) -> int:
    """Count the timesteps, from the first, whose λ = log α − log σ is at least a minimum.

    Args:
        alphas_cumprod: ᾱ, float32 (T,), decreasing.
        lambda_min: The minimum, `lambda_min_clipped` of DPM-Solver.

    Raises:
        ConfigError: If there is no such timestep.
    """
    with np.errstate(divide="ignore"):  # λ is infinite where there is no noise, or only noise
        lam = np.log(np.sqrt(alphas_cumprod)) - np.log(np.sqrt(np.float32(1) - alphas_cumprod))
    count = len(lam) - int(np.searchsorted(lam[::-1], np.float32(lambda_min)))
    if count < 1:
        raise ConfigError(
            f"lambda_min_clipped is {lambda_min}, the largest λ of this noise schedule is {lam[0]:.2f}: lower it (-5.1 "
            "suits squaredcos_cap_v2)"
        )
    return count


def snr(alphas_cumprod: ArrayLike, t: int | Sequence[int] | NDArray[Any] | None = None) -> NDArray[np.float64]:
    """Return the signal-to-noise ratio ᾱ/(1 − ᾱ).

    Args:
        alphas_cumprod: ᾱ, array (T,).
        t: Timesteps to look up, integers of any shape; None for all T.

    Returns:
        The ratio, float64 of the shape of `t`, or (T,).

    Raises:
        ConfigError: If an ᾱ is 1 (no noise at all), which has no finite ratio.
    """
    bar = np.asarray(alphas_cumprod, np.float64)
    if np.any(bar >= 1):
        raise ConfigError(
            f"alphas_cumprod is 1 at timestep {int(np.argmax(bar >= 1))}, where the signal-to-noise ratio is "
            "infinite; raise beta_start above 0"
        )
    ratio = bar / (1 - bar)
    return ratio if t is None else ratio[np.asarray(t)]


def min_snr_weights(alphas_cumprod: ArrayLike, gamma: float, prediction_type: str = "epsilon") -> Table:
    """Return the min-SNR-γ loss weight of every timestep.

    Args:
        alphas_cumprod: ᾱ, array (T,).
        gamma: γ > 0; 5 is usual.
        prediction_type: What the model predicts. The weight is min(SNR, γ)/SNR for "epsilon", min(SNR, γ)/(SNR + 1) for
            "v_prediction", min(SNR, γ) for "sample".

    Returns:
        The weights, float32 (T,), to be indexed by timestep and multiplied with each example's mean squared error.

    Raises:
        ConfigError: If γ ≤ 0, the prediction type is unknown, or the terminal SNR is zero with "epsilon", where the
            weight is 0/0.

    Reference:
        arXiv:2303.09556, section 3.4.
    """
    if not gamma > 0:
        raise ConfigError(f"snr_gamma is {gamma}; it must be greater than 0 (5.0 is usual), or left out")
    ratio = snr(alphas_cumprod)
    clipped = np.minimum(ratio, gamma)
    if prediction_type == "epsilon":
        if np.any(ratio == 0):
            raise ConfigError(
                "min-SNR weights are 0/0 for prediction_type 'epsilon' with zero terminal SNR: use prediction_type "
                "'v_prediction', or leave out rescale_betas_zero_snr or snr_gamma"
            )
        weights = clipped / ratio
    elif prediction_type == "v_prediction":
        weights = clipped / (ratio + 1)
    elif prediction_type == "sample":
        weights = clipped
    else:
        raise unknown("prediction_type", prediction_type, PREDICTION_TYPES)
    return weights.astype(np.float32)


def sample_weights(alphas_cumprod: ArrayLike) -> Table:
    """Return ᾱ/(1 − ᾱ) for every timestep: the weight of unconditional training on the "sample" target.

    Args:
        alphas_cumprod: ᾱ, array (T,).

    Returns:
        The weights, float32 (T,).

    Raises:
        ConfigError: As `snr`.

    Reference:
        Diffusers' `train_unconditional.py`.
    """
    return snr(alphas_cumprod).astype(np.float32)
