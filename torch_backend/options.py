"""What PyTorch has and JAX has not: memory and speed options, each checked before any long work."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flax_diffusion.core.backend import refuse
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.family import Role
from flax_diffusion.core.io.files import as_path, is_local
from torch_backend.modules import Modules

JAX_ONLY = {
    "data_parallelism": "start several processes with `accelerate launch -m torch_backend.train` or torchrun",
    "offload_optimizer": "use accelerate launch --config_file configs/accelerate/deepspeed_zero2_offload.yaml",
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
    """Refuses what this backend, this machine or this installation does not have.

    Raises:
        ConfigError: Naming the option and the fix.
    """
    refuse(config, JAX_ONLY, "JAX")
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
        if config.mixed_precision == "fp16":
            raise ConfigError("--mixed_precision fp16: PyTorch needs a CUDA device for it: use bf16 or no")


def set_globals(config: TrainConfig) -> None:
    """Sets the options that are PyTorch's globals."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32


def apply(config: TrainConfig, modules: Modules) -> None:
    """Sets up the trained models, before Accelerate wraps them."""
    for name, component in modules.spec.components.items():
        module = modules.by_name[name]
        if config.enable_xformers_memory_efficient_attention and component.role is Role.DENOISER:
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


def make_optimizer(
    config: TrainConfig, parameters: Iterable[tuple[str, Tensor]], rate_factors: Mapping[str, float]
) -> torch.optim.Optimizer:
    """AdamW, with 8-bit moments where asked for; the learning rate is set at every step.

    Args:
        config: The run's options.
        parameters: By name, which begins with that of the component.
        rate_factors: Of the learning rate of each component.
    """
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in parameters:
        groups.setdefault(rate_factors[name.partition(".")[0]], []).append(parameter)
    kind: Any = torch.optim.AdamW
    if config.use_8bit_adam:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit  # pyright: ignore[reportPrivateImportUsage]
    return kind(
        [{"params": group, "rate_factor": factor} for factor, group in groups.items()],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
