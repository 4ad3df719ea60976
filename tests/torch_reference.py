"""Diffusers' PyTorch schedulers as the reference, in float64 and with given noise; trajectories of both sides."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

MODULES = {
    "DDPMScheduler": "scheduling_ddpm",
    "DDIMScheduler": "scheduling_ddim",
    "PNDMScheduler": "scheduling_pndm",
    "EulerDiscreteScheduler": "scheduling_euler_discrete",
    "LMSDiscreteScheduler": "scheduling_lms_discrete",
    "DPMSolverMultistepScheduler": "scheduling_dpmsolver_multistep",
    "FlowMatchEulerDiscreteScheduler": "scheduling_flow_match_euler_discrete",
    "EDMEulerScheduler": "scheduling_edm_euler",
    "EDMDPMSolverMultistepScheduler": "scheduling_edm_dpmsolver_multistep",
    "FlowMatchHeunDiscreteScheduler": "scheduling_flow_match_heun_discrete",
}
SHAPE = (2, 3, 4, 4)


class _WideTorch:
    """The torch module with float32 standing for float64: two schedulers convert their samples to `torch.float32`."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def exact_roots() -> Iterator[None]:
    """Within: square roots, powers and logarithms of float32 tensors are correctly rounded.

    On x86 PyTorch takes them from MKL, which is off by one unit in the last place in a sixth of the
    entries, and by how much depends on the processor. Nothing else stands between its tables and ours.
    """
    root, power, log = torch.Tensor.sqrt, torch.Tensor.__pow__, torch.log

    def exact(self: torch.Tensor) -> torch.Tensor:
        return root(self.double()).to(self.dtype)

    torch.Tensor.sqrt = exact
    torch.log = lambda x: log(x.double()).to(x.dtype)
    torch.Tensor.__pow__ = lambda self, n: power(self.double(), n).to(self.dtype)
    try:
        yield
    finally:
        torch.Tensor.sqrt, torch.Tensor.__pow__, torch.log = root, power, log


def make(name: str, **config: Any) -> Any:
    """A PyTorch scheduler with correctly rounded tables."""
    with exact_roots():
        return getattr(diffusers, name)(**config)


@contextlib.contextmanager
def patched(scheduler: Any, draw: Callable[[], torch.Tensor], wide: bool) -> Iterator[None]:
    """Within: the scheduler's noise comes from `draw`; where `wide`, it steps in float64 on its float32 tables."""
    module = importlib.import_module(f"diffusers.schedulers.{MODULES[type(scheduler).__name__]}")
    saved = {name: getattr(module, name) for name in ("torch", "randn_tensor") if hasattr(module, name)}
    if wide:
        for name in ("alphas_cumprod", "final_alpha_cumprod", "one", "sigmas"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, getattr(scheduler, name).double())
        module.torch = _WideTorch()
    if "randn_tensor" in saved:
        module.randn_tensor = lambda *args, **kwargs: draw()
    try:
        with exact_roots():
            yield
    finally:
        for name, value in saved.items():
            setattr(module, name, value)


def toy_model(sample: Any, t: Any, doubled: bool) -> Any:
    """Something deterministic that depends on sample and time; a second half in (−1, 1) where channels double."""
    xp = torch if isinstance(sample, torch.Tensor) else jnp
    out = 0.3 * sample + 0.1 * xp.cos(sample) + 0.0002 * t
    if not doubled:
        return out
    second = 0.4 + 0.3 * xp.sin(sample)
    return torch.cat([out, second], 1) if xp is torch else jnp.concatenate([out, second], 1)


def drawn(steps: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """A first sample and the noise of each step."""
    rng = np.random.default_rng(7)
    first = rng.standard_normal(SHAPE)
    return first.astype(dtype), rng.standard_normal((steps, *SHAPE)).astype(dtype)


def torch_trajectory(
    scheduler: Any, steps: int | None, wide: bool, doubled: bool = False, schedule: Any = None, **step_args: Any
) -> np.ndarray:
    """Every sample along a trajectory of the PyTorch scheduler, (evaluations, …)."""
    with exact_roots():
        scheduler.set_timesteps(steps, **schedule or {})
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    first, noise = drawn(len(scheduler.timesteps), np.float64 if wide else np.float32)
    path: list[np.ndarray] = []
    with patched(scheduler, lambda: torch.from_numpy(noise[len(path)]), wide):
        sample = torch.from_numpy(first) * getattr(scheduler, "init_noise_sigma", 1)
        scaled = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
        for t in scheduler.timesteps:
            output = toy_model(scaled(sample, t), t.to(sample.dtype), doubled)
            sample = scheduler.step(output, t, sample, **step_args).prev_sample
            path.append(sample.numpy())
    return np.stack(path)


def flax_trajectory(
    scheduler: Any, steps: int | None, doubled: bool = False, scan: bool = False, schedule: Any = None, **step: Any
) -> np.ndarray:
    """The same of a Flax scheduler, op by op, or as one jitted `lax.scan` with everything traced."""
    state = scheduler.set_timesteps(scheduler.create_state(), steps, SHAPE, **schedule or {})
    first, noise = drawn(len(state.timesteps), scheduler.dtype)

    def body(carry: tuple, inputs: tuple) -> tuple:
        sample, state = carry
        t, noise = inputs
        output = toy_model(scheduler.scale_model_input(state, sample, t), t, doubled)
        carry = scheduler.step(state, output, t, sample, variance_noise=noise, **step)
        return tuple(carry), carry.prev_sample

    carry, inputs = (jnp.asarray(first) * state.init_noise_sigma, state), (state.timesteps, jnp.asarray(noise))
    if scan:
        whole = jax.jit(
            lambda carry, inputs: jax.lax.scan(body, carry, inputs)[1],
            compiler_options={"xla_cpu_use_fusion_emitters": True},  # as users compile it: the last digits depend on it
        )
        return np.asarray(whole(carry, inputs))
    path = []
    for one in zip(*inputs, strict=True):
        carry, sample = body(carry, one)
        path.append(np.asarray(sample))
    return np.stack(path)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of a trajectory over the largest value of its step."""
    axes = tuple(range(1, expected.ndim))
    scale = np.abs(expected).max(axis=axes)
    return float((np.abs(actual - expected).max(axis=axes) / scale).max())
