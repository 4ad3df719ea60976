"""The twin of `FlaxDiTTransformer2DModel`: Diffusers' blocks around one embedder of time and class, with our options.

Axes in shapes: B batch, L tokens, N heads, D channels per head, C channels of a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, ModelMixin  # pyright: ignore[reportPrivateImportUsage]  (made at run time)
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn
from torch.nn import functional

from flax_diffusion.core.families.dit import OPTIONS, WITH_OPTIONS, check_config
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import write_json
from flax_diffusion.core.spec import weight_files
from torch_backend.names import file_name

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Num

ADA_EPS = QK_EPS = 1e-6
"""Added to the variance before a scale and shift of time and class, and of queries and keys."""
MAX_PERIOD = 10000

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles by which queries and keys turn, each (L, D / 2)."""


class SharedAdaLayerNormZero(AdaLayerNormZero):
    """Diffusers' norm of a block's input, which is given the embedding of time and class where it takes the time."""

    def forward(self, x: Tensor, told: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:  # pyright: ignore
        """Normalise tokens (B, L, C) with an embedding (B, C); returns what Diffusers' class does."""
        return super().forward(x, emb=told)


class RotaryAttention:
    """Attention processor of Diffusers' `Attention` that turns queries and keys by the places of their patches."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        turn: Rotation | None = None,
    ) -> Tensor:
        """Map tokens (B, L, C) to the same shape.

        Args:
            attn: The `Attention` with the layers.
            hidden_states: The tokens.
            encoder_hidden_states: None; the tokens attend to themselves.
            attention_mask: None; there is none.
            turn: The angles.
        """
        q, k, v = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        assert turn is not None
        out = functional.scaled_dot_product_attention(_rotate(q, turn), _rotate(k, turn), v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2).to(hidden_states.dtype)))


def _rotate(x: Float[Tensor, "B N L D"], turn: Rotation) -> Float[Tensor, "B N L D"]:
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = (part.to(wide) for part in turn)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rotation(grid: tuple[int, int], base: int, head_dim: int, device: torch.device) -> Rotation:
    """Return the angles by which queries and keys turn; the twin of `flax_diffusion.models.dit_layers.rotation`.

    Args:
        grid: Patches in height and width.
        base: Patches a side of a picture of the size that the model trained at.
        head_dim: Channels per head, a multiple of 4.
        device: Where they are needed.
    """
    rows, columns = (torch.arange(count, dtype=torch.float32) / (count / base) for count in grid)
    places = torch.meshgrid(rows, columns, indexing="ij")
    count = head_dim // 4
    frequencies = 1.0 / MAX_PERIOD ** (torch.arange(count, dtype=torch.float64) / count)
    angles = torch.cat([place.flatten().double()[:, None] * frequencies for place in places], dim=1)
    return angles.cos().to(device), angles.sin().to(device)


class DiTTransformer2DModel(ModelMixin, ConfigMixin):
    """Diffusers' class of this name, with one embedder of time and class for all blocks, and with our options.

    Labels are dropped in the batch: Diffusers' `LabelEmbedding` would drop more of them at random in training.

    Fields are Diffusers' config keys, and qk_norm, rotary and rms_norm of `FlaxDiTTransformer2DModel`.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        rotary: bool = False,
        rms_norm: bool = False,
    ):
        super().__init__()
        if norm_type not in ("ada_norm_zero", WITH_OPTIONS):
            raise ValueError(f"norm_type {norm_type!r} is not 'ada_norm_zero'")
        check_config(self.config)
        width = num_attention_heads * attention_head_dim
        self.patch_size, self.out_channels = patch_size, out_channels or in_channels
        self.head_dim, self.rotary, self.gradient_checkpointing = attention_head_dim, rotary, False
        self.pos_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width)
        self.emb = CombinedTimestepLabelEmbeddings(num_embeds_ada_norm, width)
        self.emb.class_embedder.dropout_prob = 0.0  # the row of no class stays
        blocks = []
        for _ in range(num_layers):
            block: Any = BasicTransformerBlock(
                width,
                num_attention_heads,
                attention_head_dim,
                dropout=dropout,
                activation_fn=activation_fn,
                num_embeds_ada_norm=1,
                attention_bias=attention_bias,
                upcast_attention=upcast_attention,
                norm_type="ada_norm_zero",
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            norm: Any = SharedAdaLayerNormZero(width)
            block.norm1 = norm
            if rms_norm:
                norm.norm = nn.RMSNorm(width, ADA_EPS, elementwise_affine=False)
                block.norm3 = nn.RMSNorm(width, norm_eps, elementwise_affine=norm_elementwise_affine)
            if qk_norm:
                block.attn1.norm_q = nn.RMSNorm(attention_head_dim, QK_EPS)
                block.attn1.norm_k = nn.RMSNorm(attention_head_dim, QK_EPS)
            if rotary:
                block.attn1.set_processor(RotaryAttention())
            blocks.append(block)
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = (nn.RMSNorm if rms_norm else nn.LayerNorm)(width, ADA_EPS, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, patch_size**2 * self.out_channels)

    def forward(
        self,
        hidden_states: Float[Tensor, "B C H W"],
        timestep: Num[Tensor, " B"],
        class_labels: Int[Tensor, " B"],
        return_dict: bool = True,
    ) -> Any:
        """Predict the noise, or what else the scheduler's prediction type names.

        Args:
            hidden_states: Noisy latents or images, (B, in_channels, H, W), H and W multiples of the patch size.
            timestep: Timesteps, (B,).
            class_labels: Class indices, (B,); num_embeds_ada_norm stands for no class.
            return_dict: Return a dataclass; False returns a tuple.

        Returns:
            The prediction, (B, out_channels, H, W).
        """
        patch = self.patch_size
        height, width = (side // patch for side in hidden_states.shape[2:])
        told = self.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
        options: dict[str, Any] = {}
        if self.rotary:
            base = self.pos_embed.base_size
            options["turn"] = rotation((height, width), base, self.head_dim, hidden_states.device)
        x = self.pos_embed(hidden_states)
        checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
        recompute: Any = self._gradient_checkpointing_func if checkpointed else None
        for block in self.transformer_blocks:
            inputs = (x, None, None, None, told, options)
            x = block(*inputs) if recompute is None else recompute(block, *inputs)
        shift, scale = self.proj_out_1(functional.silu(told)).chunk(2, dim=1)
        x = self.norm_out(x) * (1 + scale[:, None]) + shift[:, None]
        x = self.proj_out_2(x).reshape(-1, height, width, patch, patch, self.out_channels)
        x = torch.einsum("nhwpqc->nchpwq", x).reshape(-1, self.out_channels, height * patch, width * patch)
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    def save_pretrained(self, save_directory: str | Path, *, safe_serialization: bool = True) -> None:  # pyright: ignore
        """Write config.json and safetensors in which each block has its copy of the embedder, as Diffusers' class has.

        Where an option of ours is on, Diffusers' class refuses the config.

        Args:
            save_directory: Folder to write to; made if it does not exist.
            safe_serialization: Write safetensors; nothing else is written.

        Raises:
            ValueError: If pickled weights are asked for.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for pickled weights, which are not written: leave it out")
        folder, kind = Path(save_directory), type(self).__name__
        folder.mkdir(parents=True, exist_ok=True)
        config = {key: value for key, value in self.config.items() if not key.startswith("_") and key not in OPTIONS}
        on = {name: True for name in OPTIONS if self.config[name]}
        config |= {"norm_type": WITH_OPTIONS, **on} if on else {"norm_type": "ada_norm_zero"}
        arrays = ((file_name(kind, name), own.detach().cpu().numpy()) for name, own in self.named_parameters())
        file = f"{weight_files.base_name(kind)}.safetensors"
        model_files.write_safetensors(folder / file, dict(weight_files.with_copies(arrays)))
        write_json(folder / "config.json", {"_class_name": kind, **config})
