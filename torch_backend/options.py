"""What PyTorch has and JAX has not: memory and speed options, each checked before any long work."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flax_diffusion.core.backend import refuse
from flax_diffusion.core.config import TrainConfig
from flax_diffusion.core.errors import ConfigError
from torch_backend.modules import Modules

JAX_ONLY = {
    "data_parallelism": "start several processes with `accelerate launch -m torch_backend.train` or torchrun",
    "fsdp_parallelism": "the PyTorch side keeps the whole state in every process; sharding it is not here yet",
}
"""Options of `python -m flax_diffusion.train`, and what to use here."""

CUDA_ONLY = ("enable_xformers_memory_efficient_attention", "allow_tf32")


def check(config: TrainConfig) -> None:
    """Refuses what this backend, this machine or this installation does not have.

    Raises:
        ConfigError: Naming the option and the fix.
    """
    refuse(config, JAX_ONLY, "JAX")
    if config.use_8bit_adam:
        raise ConfigError("--use_8bit_adam: not here yet, neither on PyTorch nor on JAX: drop the option")
    if config.enable_xformers_memory_efficient_attention and importlib.util.find_spec("xformers") is None:
        raise ConfigError(
            "--enable_xformers_memory_efficient_attention: needs the package xformers, which is not installed: pip "
            "install xformers, or drop the option, PyTorch's own attention is as lean"
        )
    if not torch.cuda.is_available():
        for name in CUDA_ONLY:
            if getattr(config, name):
                raise ConfigError(f"--{name}: needs a CUDA device, and there is none: drop the option")
        if config.mixed_precision == "fp16":
            raise ConfigError("--mixed_precision fp16: PyTorch needs a CUDA device for it: use bf16 or no")


def check_distribution(accelerator: Any) -> None:
    """Refuses launchers that shard the state, which this backend cannot save or average yet.

    Raises:
        ConfigError: Naming the kind of distribution.
    """
    kind = str(accelerator.distributed_type).removeprefix("DistributedType.")
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"):
        raise ConfigError(f"Accelerate is configured for {kind}: not here yet; use plain data-parallel processes")


def set_globals(config: TrainConfig) -> None:
    """Sets the options that are PyTorch's globals."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32


def apply(config: TrainConfig, modules: Modules) -> None:
    """Sets up the trained models, before Accelerate wraps them."""
    for name, component in modules.spec.components.items():
        module = modules.by_name[name]
        if config.enable_xformers_memory_efficient_attention and name == "unet":
            module.enable_xformers_memory_efficient_attention()
        if config.channels_last and name != "text_encoder":
            module.to(memory_format=torch.channels_last)
        if component.train and config.gradient_checkpointing:
            if name == "text_encoder":
                module.gradient_checkpointing_enable()
            else:
                module.enable_gradient_checkpointing()
        if component.train and config.torch_compile:
            module.compile()


def make_optimizer(config: TrainConfig, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """AdamW; the learning rate is set at every step."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
