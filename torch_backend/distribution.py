"""Placement of weights and moments: whole in every process, divided by FSDP, or divided and offloaded by DeepSpeed.

A `Placement` returns every parameter and its moments whole, and accepts them whole, so that checkpoints, exports and
moving averages do not depend on Accelerate's configuration.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, DistributedType
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from flax_diffusion.core.backend import MIN_LOSS_SCALE
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError

DDP_SUMS = {"fp32": DDPCommunicationHookType.NO, "bf16": DDPCommunicationHookType.BF16}
FSDP_SUMS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""How gradients are summed over processes, by --reduce_dtype. Without a hook, DDP sums in the dtype of the weights."""

Moments = dict[str, Tensor]
"""An optimizer's tensors of one parameter, by PyTorch's names: exp_avg and exp_avg_sq for AdamW."""


def make_accelerator(config: TrainConfig) -> Any:
    """Start Accelerate as its launcher's configuration says.

    Args:
        config: The run's options.

    Returns:
        The `Accelerator`.

    Raises:
        ConfigError: For a configuration that does not work here, or that this backend does not support.
    """
    try:
        accelerator: Any = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            kwargs_handlers=[DistributedDataParallelKwargs(comm_hook=DDP_SUMS[config.reduce_dtype])],
        )
    except (ImportError, KeyError, ValueError) as error:  # a package is missing, or a value is unknown
        reason = f"{error} is no value it knows" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ConfigError(
            f"Accelerate's configuration does not work here: {reason}; correct it in the file that accelerate launch "
            "reads, or run accelerate config"
        ) from error
    kind = accelerator.distributed_type
    if kind in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ConfigError(
            f"Accelerate is configured for {kind.value}: this backend has data-parallel processes, FSDP and DeepSpeed; "
            "on TPUs use python -m flax_diffusion.train"
        )
    if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP) and config.use_8bit_adam:
        raise ConfigError(f"--use_8bit_adam does not go with {kind.value}, which has its own optimizer: drop one")
    if kind == DistributedType.DEEPSPEED and config.optimizer != "adamw":
        raise ConfigError(
            f"--optimizer {config.optimizer} does not go with DeepSpeed, which has its own AdamW: drop it"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("FSDP of version 1: set fsdp_version: 2 in Accelerate's configuration")
    if kind == DistributedType.FSDP:
        set_fsdp_sums(accelerator.state.fsdp_plugin, config)
    if kind == DistributedType.DEEPSPEED:
        _set_up_deepspeed(accelerator, config)
    return accelerator


def set_fsdp_sums(plugin: Any, config: TrainConfig) -> None:
    """Set the precision in which FSDP sums gradients; Accelerate would take that of the computation.

    Args:
        plugin: Accelerate's settings of FSDP.
        config: The run's options.
    """
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=FSDP_SUMS[config.reduce_dtype])


def _set_up_deepspeed(accelerator: Any, config: TrainConfig) -> None:
    if config.use_ema:
        raise ConfigError(
            "--use_ema does not go with DeepSpeed, which keeps the float32 weights divided over the processes: drop "
            "it, or use FSDP"
        )
    if config.skip_nonfinite:
        raise ConfigError(
            f"--skip_nonfinite {config.skip_nonfinite} does not go with DeepSpeed, which takes the step by itself: "
            "drop it"
        )
    values = accelerator.state.deepspeed_plugin.deepspeed_config
    if values["zero_optimization"]["stage"] not in (1, 2):
        raise ConfigError(
            f"DeepSpeed ZeRO stage {values['zero_optimization']['stage']}: this backend has stages 1 and 2; for "
            "weights divided over the devices use FSDP"
        )
    if config.global_batch_size is None:
        micro = config.train_batch_size
    else:
        micro = config.global_batch_size // (config.gradient_accumulation_steps * accelerator.num_processes)
    values["train_micro_batch_size_per_gpu"] = micro
    values["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    values["gradient_clipping"] = config.max_grad_norm
    values["communication_data_type"] = config.reduce_dtype


class LossScale(NamedTuple):
    """The dynamic loss scale of fp16, and the number of steps since it last changed."""

    scale: float
    good_steps: int


class Placement(Protocol):
    """Reader and writer of whole tensors. Every process must call each method, in the same order."""

    def weight(self, parameter: Tensor) -> Tensor:
        """Return a parameter's whole weight, in float32 or the precision of the trained weights."""
        ...

    def moments(self, parameter: Tensor) -> Moments:
        """Return a parameter's whole moments; there are none before the first step."""
        ...

    def put(self, parameter: Tensor, weight: Tensor, moments: Moments, count: int) -> None:
        """Load a parameter's weight and moments.

        Args:
            parameter: The parameter.
            weight: Its whole weight.
            moments: Its whole moments.
            count: Number of updates that the moments have seen.
        """
        ...

    def loss_scale(self) -> LossScale | None:
        """Return the loss scale; None except under fp16."""
        ...

    def set_loss_scale(self, value: LossScale) -> None:
        """Set the loss scale."""
        ...

    def hold_loss_scale(self) -> None:
        """Keep the loss scale from getting smaller than `MIN_LOSS_SCALE`."""
        ...


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP divides; return any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_as(tensor: Tensor, value: Tensor) -> Tensor:
    """Place a value as another tensor is placed.

    Args:
        tensor: The other tensor.
        value: The whole value, which keeps its dtype.
    """
    value = value.to(tensor.device)
    if isinstance(tensor, DTensor):
        return distribute_tensor(value, tensor.device_mesh, tensor.placements)
    return value


class TorchPlacement:
    """Placement of a plain module, one under DDP, or one divided by FSDP, whose state PyTorch's optimizers keep."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None):
        self.optimizer, self.scaler = optimizer, scaler

    def weight(self, parameter: Tensor) -> Tensor:
        """Gather the weight."""
        return whole(parameter.detach())

    def moments(self, parameter: Tensor) -> Moments:
        """Gather the moments."""
        return {key: whole(value) for key, value in self.optimizer.state[parameter].items() if key != "step"}

    @torch.no_grad()
    def put(self, parameter: Tensor, weight: Tensor, moments: Moments, count: int) -> None:
        """Divide weight and moments as the parameter is divided."""
        parameter.copy_(divided_as(parameter, weight))
        own = type(self.optimizer).__module__.startswith("torch.")  # bitsandbytes counts in plain integers
        step = torch.tensor(float(count)) if own else count
        placed = {key: divided_as(parameter, value) for key, value in moments.items()}
        self.optimizer.state[parameter] = {"step": step} | placed

    def loss_scale(self) -> LossScale | None:
        """Read PyTorch's scaler."""
        if self.scaler is None:
            return None
        state = self.scaler.state_dict()
        return LossScale(state["scale"], state["_growth_tracker"])

    def set_loss_scale(self, value: LossScale) -> None:
        """Set PyTorch's scaler."""
        if self.scaler is not None:
            changed = {"scale": value.scale, "_growth_tracker": value.good_steps}
            self.scaler.load_state_dict(self.scaler.state_dict() | changed)

    def hold_loss_scale(self) -> None:
        """Raise the scaler's scale to the minimum where it fell below."""
        value = self.loss_scale()
        if value is not None and value.scale < MIN_LOSS_SCALE:
            self.set_loss_scale(value._replace(scale=MIN_LOSS_SCALE))


class DeepSpeedPlacement:
    """Placement of DeepSpeed's ZeRO stages 1 and 2: each process has a part of the float32 weights and moments."""

    def __init__(self, zero: Any):
        self.zero = zero

    def weight(self, parameter: Tensor) -> Tensor:
        """Gather the float32 weight, of which the parameter is a copy in the precision of the computation."""
        from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

        return safe_get_full_fp32_param(parameter)  # pyright: ignore[reportReturnType]

    def moments(self, parameter: Tensor) -> Moments:
        """Gather the moments."""
        from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

        if not self.zero.optimizer.state:
            return {}
        keys = ("exp_avg", "exp_avg_sq")
        return {key: safe_get_full_optimizer_state(parameter, key) for key in keys}  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def put(self, parameter: Tensor, weight: Tensor, moments: Moments, count: int) -> None:
        """Divide weight and moments over the processes, and set the copy in the precision of the computation."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state  # pyright: ignore[reportMissingImports]

        self._make_moments(count)
        safe_set_full_fp32_param(parameter, weight.to(parameter.device))
        for key, value in moments.items():
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        parameter.copy_(weight)

    def _make_moments(self, count: int) -> None:
        """Make the moments before the first step, where a resumed run needs them; DeepSpeed makes them in it."""
        base = self.zero.optimizer
        parts = [part for group in base.param_groups for part in group["params"]]
        for part in parts:
            state = base.state[part]
            if not state:
                state |= {"exp_avg": torch.zeros_like(part), "exp_avg_sq": torch.zeros_like(part)}
            own = isinstance(base, torch.optim.AdamW)  # DeepSpeed's Adam counts in plain integers
            state["step"] = torch.tensor(float(count)) if own else count
        self.zero._lazy_init_hp_params_optimizer_state()  # links them to the parameters; there is no public way

    def loss_scale(self) -> LossScale | None:
        """Read DeepSpeed's scaler."""
        scaler = self.zero.loss_scaler
        if not self.zero.dynamic_loss_scale:
            return None
        return LossScale(scaler.cur_scale, scaler.cur_iter - scaler.last_overflow_iter - 1)

    def set_loss_scale(self, value: LossScale) -> None:
        """Set DeepSpeed's scaler."""
        scaler = self.zero.loss_scaler
        scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = value.scale, value.good_steps, -1

    def hold_loss_scale(self) -> None:
        """Keep DeepSpeed from ending the process at its own minimum; the loop reports the failure instead."""
        if self.zero.dynamic_loss_scale:
            self.zero.loss_scaler.raise_error_at_min_scale = False
            self.zero.loss_scaler.min_scale = MIN_LOSS_SCALE


def placement_of(accelerator: Any, optimizer: Any) -> Placement:
    """Return the placement that fits what Accelerate has wrapped.

    Args:
        accelerator: The `Accelerator`.
        optimizer: The optimizer that it has wrapped.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedPlacement(optimizer.optimizer)
    return TorchPlacement(optimizer.optimizer, accelerator.scaler)
