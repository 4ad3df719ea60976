"""What PyTorch has and JAX has not: memory and speed options, each checked before any long work."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flax_diffusion.core.backend import check_optimizer, refuse
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.family import Role
from flax_diffusion.core.io.files import as_path, is_local
from torch_backend.modules import Modules
from torch_backend.optimizers import OPTIMIZERS

JAX_ONLY = {
    "data_parallelism": "start several processes with `accelerate launch -m torch_backend.train` or torchrun",
    "offload_optimizer": "use accelerate launch --config_file configs/accelerate/deepspeed_zero2_offload.yaml",
    "fsdp_gather": "use accelerate launch --config_file configs/accelerate/fsdp.yaml, which always gathers blocks",
    "fsdp_parallelism": "use accelerate launch --config_file configs/accelerate/fsdp.yaml -m torch_backend.train",
}
"""Options of `python -m flax_diffusion.train`, and what to use here."""

CUDA_ONLY = ("enable_xformers_memory_efficient_attention", "allow_tf32")

PACKAGES = {
    "use_8bit_adam": ("bitsandbytes", "drop the option"),
    "enable_xformers_memory_efficient_attention": (
        "xformers",
        "drop the option, PyTorch's own attention needs as little memory",
    ),
}
"""Options that another package brings: its name, and what to do without."""

_ATEN = torch.ops.aten
KEPT = [
    *(_ATEN.mm.default, _ATEN.addmm.default, _ATEN.convolution.default),
    *(getattr(_ATEN, f"_scaled_dot_product_{kind}").default for kind in (
        "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention",
    )),
]  # fmt: skip
"""Operations that `--gradient_checkpointing minimal` does not compute again: those that take long."""


def check(config: TrainConfig) -> None:
    """Refuse what this backend, this machine or this installation does not have.

    Raises:
        ConfigError: Naming the option and the fix.
    """
    refuse(config, JAX_ONLY, "JAX")
    check_optimizer(config, OPTIMIZERS)
    if not is_local(as_path(config.output_dir)):
        raise ConfigError(
            f"--output_dir {config.output_dir}: only the JAX backend writes to object stores; name a folder of "
            "this machine, or mount the bucket as one"
        )
    for name, (package, instead) in PACKAGES.items():
        if getattr(config, name) and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"--{name}: needs the package {package}, which is not installed: pip install {package}, or {instead}"
            )
    if not torch.cuda.is_available():
        for name in CUDA_ONLY:
            if getattr(config, name):
                raise ConfigError(f"--{name}: needs a CUDA device, and there is none: drop the option")
        if config.reduce_dtype == "bf16":
            raise ConfigError("--reduce_dtype bf16: PyTorch sums so on CUDA devices only, and there is none: drop it")
        if config.mixed_precision == "fp16":
            raise ConfigError("--mixed_precision fp16: PyTorch needs a CUDA device for it: use bf16 or no")


def set_globals(config: TrainConfig) -> None:
    """Set the options that are PyTorch's globals."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32


def apply(config: TrainConfig, modules: Modules) -> None:
    """Set up the trained models, before Accelerate wraps them."""
    for name, component in modules.spec.components.items():
        module = modules.by_name[name]
        if config.enable_xformers_memory_efficient_attention and component.role in (Role.DENOISER, Role.CONTROL):
            module.enable_xformers_memory_efficient_attention()
        if config.channels_last and component.role is not Role.TEXT_ENCODER:
            module.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing and (component.is_trained or component.role is Role.DENOISER):
            how: dict[str, Any] = {"use_reentrant": False}
            if config.gradient_checkpointing == "minimal":
                how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, KEPT)
            if component.model.library == "transformers":
                module.activation_checkpointing_enable(how)
            else:
                module.enable_gradient_checkpointing(functools.partial(checkpoint, **how))
        if component.is_trained and config.torch_compile:
            module.compile()
