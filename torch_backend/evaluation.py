"""Modules in evaluation mode, around the weights that train or around a moving average of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flax_diffusion.core.spec.pipeline import Component
from torch_backend.modules import Modules, make
from torch_backend.names import file_name


@torch.no_grad()
def finished(name: str, component: Component, weights: Iterable[tuple[str, Tensor]]) -> Any:
    """Return a new module of a component on the host.

    Args:
        name: Name of the component.
        component: The component.
        weights: Its whole weights by portable name; those of other components are passed over.
    """
    module = make(component)
    targets = {f"{name}/{file_name(component.kind, inside)}": p for inside, p in module.named_parameters()}
    for full, value in weights:
        if full in targets:
            targets[full].copy_(value)
    return module


def evaluated(module: Any, average: Mapping[int, Tensor]) -> Any:
    """Copy a module that trains, in evaluation mode, around the same tensors or those of an average.

    Args:
        module: The module, which does not change.
        average: Tensors to take in place of parameters, by the id of the parameter.
    """
    tensors = [*module.parameters(), *module.buffers()]
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    shared |= {
        id(p): nn.Parameter(average[id(p)], requires_grad=False) for p in module.parameters() if id(p) in average
    }
    return copy.deepcopy(module, shared).eval()


@contextmanager
def on_device(modules: Modules, names: Iterable[str], device: torch.device) -> Iterator[None]:
    """Have components that wait on the host on the device for a while.

    Args:
        modules: The pipeline's modules.
        names: Names of these components.
        device: The device.
    """
    for name in names:
        modules.by_name[name].to(device)
    try:
        yield
    finally:
        for name in names:
            modules.by_name[name].to("cpu")
