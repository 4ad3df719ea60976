"""Where weights and moments live: whole in every process, divided by FSDP, or divided and off the device by DeepSpeed.

A `Placement` gives every parameter and its moments whole, and takes them whole, so that checkpoints, exports and
moving averages do not depend on how Accelerate was configured.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from flax_diffusion.core.backend import MIN_LOSS_SCALE
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError

Moments = dict[str, Tensor]
"""An optimizer's arrays of one parameter, by PyTorch's names: exp_avg and exp_avg_sq of AdamW."""


def make_accelerator(config: TrainConfig) -> Any:
    """Starts Accelerate as its launcher's configuration says.

    Raises:
        ConfigError: For a configuration that does not work here, or that this backend does not have.
    """
    try:
        accelerator: Any = Accelerator(
            mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.gradient_accumulation_steps
        )
    except (ImportError, KeyError, ValueError) as error:  # a package that is missing, values that it does not know
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
    if kind == DistributedType.DEEPSPEED:
        _set_up_deepspeed(accelerator, config)
    return accelerator


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


class LossScale(NamedTuple):
    """The dynamic loss scale of fp16, and the steps since it last changed."""

    scale: float
    good_steps: int


class Placement(Protocol):
    """Reads and writes whole tensors; every process must call each method, in the same order."""

    def weight(self, parameter: Tensor) -> Tensor:
        """Returns the weight in float32, or the precision that trains."""
        ...

    def moments(self, parameter: Tensor) -> Moments:
        """Returns the moments; none before the first step."""
        ...

    def put(self, parameter: Tensor, weight: Tensor, moments: Moments, count: int) -> None:
        """Takes over a weight, its moments, and the number of updates that they have seen."""
        ...

    def loss_scale(self) -> LossScale | None:
        """Returns the loss scale; None but under fp16."""
        ...

    def set_loss_scale(self, value: LossScale) -> None:
        """Goes on from a loss scale."""
        ...

    def hold_loss_scale(self) -> None:
        """Lets the loss scale get no smaller than `MIN_LOSS_SCALE`."""
        ...


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor that FSDP divides; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_as(tensor: Tensor, value: Tensor) -> Tensor:
    """Places a whole value, of its own dtype, as a tensor is placed."""
    value = value.to(tensor.device)
    if isinstance(tensor, DTensor):
        return distribute_tensor(value, tensor.device_mesh, tensor.placements)
    return value


class TorchPlacement:
    """Of a plain module, one under DDP, or one divided by FSDP: PyTorch's own optimizers keep the state."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None):
        self.optimizer, self.scaler = optimizer, scaler

    def weight(self, parameter: Tensor) -> Tensor:
        """Gathers the weight."""
        return whole(parameter.detach())

    def moments(self, parameter: Tensor) -> Moments:
        """Gathers the moments."""
        return {key: whole(value) for key, value in self.optimizer.state[parameter].items() if key != "step"}

    @torch.no_grad()
    def put(self, parameter: Tensor, weight: Tensor, moments: Moments, count: int) -> None:
        """Divides them as the parameter is divided."""
        parameter.copy_(divided_as(parameter, weight))
        own = type(self.optimizer).__module__.startswith("torch.")  # bitsandbytes counts in plain integers
        step = torch.tensor(float(count)) if own else count
        placed = {key: divided_as(parameter, value) for key, value in moments.items()}
        self.optimizer.state[parameter] = {"step": step} | placed

    def loss_scale(self) -> LossScale | None:
        """Reads PyTorch's scaler."""
        if self.scaler is None:
            return None
        state = self.scaler.state_dict()
        return LossScale(state["scale"], state["_growth_tracker"])

    def set_loss_scale(self, value: LossScale) -> None:
        """Sets PyTorch's scaler."""
        if self.scaler is not None:
            changed = {"scale": value.scale, "_growth_tracker": value.good_steps}
            self.scaler.load_state_dict(self.scaler.state_dict() | changed)

    def hold_loss_scale(self) -> None:
        """Raises the scaler's scale again where it fell below."""
        value = self.loss_scale()
        if value is not None and value.scale < MIN_LOSS_SCALE:
            self.set_loss_scale(value._replace(scale=MIN_LOSS_SCALE))


class DeepSpeedPlacement:
    """Of DeepSpeed's ZeRO stages 1 and 2: each process keeps a part of the float32 weights and of the moments."""

    def __init__(self, zero: Any):
        self.zero = zero

    def weight(self, parameter: Tensor) -> Tensor:
        """Gathers the float32 weight of which the parameter is a copy in the compute precision."""
        from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

        return safe_get_full_fp32_param(parameter)  # pyright: ignore[reportReturnType]

    def moments(self, parameter: Tensor) -> Moments:
        """Gathers the moments."""
        from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

        if not self.zero.optimizer.state:
            return {}
        keys = ("exp_avg", "exp_avg_sq")
        return {key: safe_get_full_optimizer_state(parameter, key) for key in keys}  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def put(self, parameter: Tensor, weight: Tensor, moments: Moments, count: int) -> None:
        """Divides them over the processes; the copy in the compute precision follows."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state  # pyright: ignore[reportMissingImports]

        self._make_moments(count)
        safe_set_full_fp32_param(parameter, weight.to(parameter.device))
        for key, value in moments.items():
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        parameter.copy_(weight)

    def _make_moments(self, count: int) -> None:
        """DeepSpeed makes the moments in its first step; a run that resumes needs them before."""
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
        """Reads DeepSpeed's scaler."""
        scaler = self.zero.loss_scaler
        if not self.zero.dynamic_loss_scale:
            return None
        return LossScale(scaler.cur_scale, scaler.cur_iter - scaler.last_overflow_iter - 1)

    def set_loss_scale(self, value: LossScale) -> None:
        """Sets DeepSpeed's scaler."""
        scaler = self.zero.loss_scaler
        scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = value.scale, value.good_steps, -1

    def hold_loss_scale(self) -> None:
        """Keeps DeepSpeed from ending the process where its own minimum is reached: the loop says what happened."""
        if self.zero.dynamic_loss_scale:
            self.zero.loss_scaler.raise_error_at_min_scale = False
            self.zero.loss_scaler.min_scale = MIN_LOSS_SCALE


def placement_of(accelerator: Any, optimizer: Any) -> Placement:
    """The placement of what Accelerate has wrapped."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedPlacement(optimizer.optimizer)
    return TorchPlacement(optimizer.optimizer, accelerator.scaler)
