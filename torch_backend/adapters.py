"""LoRA, with PEFT, and new tokens in PyTorch. The twin of `flax_diffusion.jax_backend.adapters`."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from flax_diffusion.core.spec import adapters
from flax_diffusion.core.spec.pipeline import Component


class ExtendedEmbedding(nn.Module):
    """An embedding table followed by rows of new tokens; only these rows train.

    Args:
        known: The table.
        rows: First values of the rows, (new tokens, features).
        first: Id of the first new token.
    """

    def __init__(self, known: nn.Embedding, rows: Tensor, first: int):
        super().__init__()
        self.known, self.first = known, first
        self.new_rows = nn.Parameter(rows)

    @property
    def weight(self) -> Tensor:
        """Weight of the table, whose dtype Transformers reads."""
        return self.known.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the rows of token ids.

        Args:
            ids: Token ids, (…).

        Returns:
            The rows, (…, features).
        """
        new = ids >= self.first
        rows = self.new_rows[(ids - self.first).clamp(min=0)]
        known = self.known(ids.masked_fill(new, 0))
        return torch.where(new[..., None], rows.to(known.dtype), known)


def add(component: Component, module: Any, seed: int, dtype: torch.dtype) -> None:
    """Add a component's adapters to its module, with the same first values as on the JAX side.

    Args:
        component: The component, with its LoRA or new tokens.
        module: The module of the component, whose own weights do not train.
        seed: Seed of the run.
        dtype: Dtype of the adapters.

    Raises:
        ConfigError: If a LoRA does not fit the model.
    """
    from torch_backend.names import file_name

    by_name = {file_name(component.kind, name): p for name, p in module.named_parameters()}
    lora, new_tokens = component.lora, component.new_tokens
    if lora is not None:
        shapes = {name: tuple(parameter.shape) for name, parameter in by_name.items()}
        arrays = adapters.draw_lora(lora, shapes, component.kind, seed)
        alpha: Any = lora.alpha  # PEFT documents integers, but accepts any number
        # PEFT's own function: the models' `add_adapter` refuses versions of PEFT that are new enough for this.
        inject_adapter_in_model(
            LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)),
            module,
        )
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.from_numpy(arrays[file_name(component.kind, name)]).to(parameter.device, dtype)
    if new_tokens is not None:
        table = module.get_input_embeddings()
        arrays = adapters.draw_rows(new_tokens, table.weight.detach().float().cpu().numpy())
        rows = torch.from_numpy(arrays[adapters.NEW_ROWS]).to(table.weight.device, dtype)
        module.set_input_embeddings(ExtendedEmbedding(table, rows, new_tokens.first))
