"""The loss of a micro-batch as a module that holds what trains, so that DDP, FSDP and DeepSpeed can wrap it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_backend.losses import Batch, mean_losses
from torch_backend.modules import Modules

FSDP_UNITS = {"ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer"}
"""Classes of the modules that FSDP gathers one at a time."""


class Loss(nn.Module):
    """The loss of a task, as a module whose children are the modules that train.

    Args:
        modules: The pipeline's modules. Those that train become children of this module, the others do not.
    """

    def __init__(self, modules: Modules):
        super().__init__()
        self._modules_of = [modules]  # in a list, so that frozen modules are not registered as children
        for name, component in modules.spec.components.items():
            if component.is_trained:
                self.add_module(name, modules.by_name[name])
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present & FSDP_UNITS)  # where Accelerate looks for them

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the losses of a batch; see `mean_losses`."""
        return mean_losses(self._modules_of[0], batch)


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], params: dict[str, Tensor], decay: float) -> None:
    """Update the moving average in place, to ema − (1 − decay) · (ema − params).

    Args:
        ema: The average by parameter name.
        params: The weights by parameter name.
        decay: Decay of this step.
    """
    for name, average in ema.items():
        average.sub_((1.0 - decay) * (average - params[name]))
