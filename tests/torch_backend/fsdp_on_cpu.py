"""Runs `torch_backend.train` under FSDP over Gloo: Accelerate offers FSDP on accelerators only.

Started by torch.distributed.run with Accelerate's FSDP variables set.
"""

from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from flax_diffusion.core.cli.command_line import main_guard
from torch_backend.train import main


def _backend(*_: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def _on_cpu(self: PartialState) -> None:
    self.device = torch.device("cpu")


if __name__ == "__main__":
    PartialState._prepare_backend = _backend  # type: ignore[method-assign]
    PartialState.set_device = _on_cpu  # type: ignore[method-assign]
    main_guard(main)
