"""The class-conditional transformer over patches (DiT; SiT is the same network), which upstream never had in Flax."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.families.dit import FORMER_KEYS, OPTIONS, WITH_OPTIONS, check_config, chosen_options
from flax_diffusion.core.typed import Checkpointing, Count, Size
from flax_diffusion.models.dit_layers import (
    ADA_EPS,
    GATED,
    PLAIN,
    BlockConfig,
    DiTBlock,
    PatchEmbed,
    modulated,
    rotation,
    token_norm,
    unpatchified,
)
from flax_diffusion.models.layers import LayerConfig, dense
from flax_diffusion.models.modeling import Config, PretrainedModel
from flax_diffusion.models.outputs import FlaxTransformer2DModelOutput
from flax_diffusion.models.remat import checkpointed


class FlaxDiTTransformer2DModel(PretrainedModel, nn.Module):
    """Transformer from noisy latents, a timestep and a class to a prediction of the same height and width.

    Fields are the config keys of Diffusers' DiTTransformer2DModel, and:

    Args:
        qk_norm: Normalise queries and keys by their root mean square, head by head.
        rotary: Turn queries and keys by the row and column of their patch.
        rms_norm: Let all norms divide by the root mean square, and subtract no mean.
        dtype: Dtype of matrix products and convolutions.
        param_dtype: Dtype of newly initialised parameters.
        gradient_checkpointing: Recompute blocks in the backward pass, or parts of them ("minimal").

    Files have the embedder of time and class once for each block. The parameters have it once, in the first block.
    SwiGLU is Diffusers' own activation_fn "swiglu".

    Reference:
        Peebles and Xie, https://arxiv.org/abs/2212.09748; DiTTransformer2DModel of Diffusers (PyTorch). Ma et al.,
        https://arxiv.org/abs/2401.08740 (SiT). Options: Dehghani et al., https://arxiv.org/abs/2302.05442 (qk_norm),
        Su et al., https://arxiv.org/abs/2104.09864 (rotary), Zhang and Sennrich, https://arxiv.org/abs/1910.07467.
    """

    torch_class: ClassVar[str] = "DiTTransformer2DModel"
    former_classes: ClassVar[tuple[str, ...]] = ("Transformer2DModel",)
    ignored_keys: ClassVar[frozenset[str]] = FORMER_KEYS
    unsaved: ClassVar[tuple[str, ...]] = OPTIONS
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "norm_type": ("ada_norm_zero", WITH_OPTIONS),
        "activation_fn": (*PLAIN, *GATED),
    }

    num_attention_heads: Size = 16
    attention_head_dim: Size = 72
    in_channels: Size = 4
    out_channels: Size | None = None
    num_layers: Count = 28
    dropout: float = 0.0
    norm_num_groups: Size = 32
    attention_bias: bool = True
    sample_size: Size = 32
    patch_size: Size = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: Size = 1000
    upcast_attention: bool = False
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5
    qk_norm: bool = False
    rotary: bool = False
    rms_norm: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: Checkpointing = False

    @property
    def config(self) -> Config:
        """Configuration with every field of Diffusers' class, and those of ours that are on."""
        config = super().config
        on = [name for name in OPTIONS if config[name]]
        for name in on:
            config |= {name: True, "norm_type": WITH_OPTIONS}
        return config

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where fields contradict each other."""
        check_config(config)

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        sample = jnp.zeros((1, config.in_channels, config.patch_size, config.patch_size))
        return sample, jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32)

    @nn.compact
    def __call__(
        self,
        hidden_states: jax.Array,
        timesteps: jax.Array | float | int,
        class_labels: jax.Array,
        return_dict: bool = True,
        train: bool = False,
    ) -> FlaxTransformer2DModelOutput | tuple[jax.Array]:
        """Predict the noise, or what else the scheduler's prediction type names.

        Args:
            hidden_states: Noisy latents or images, (B, in_channels, H, W), H and W multiples of the patch size.
            timesteps: Timesteps, (B,), or one number for all.
            class_labels: Class indices, (B,); num_embeds_ada_norm stands for no class.
            return_dict: Return a dataclass; False returns a tuple.
            train: Apply dropout, with the random key "dropout".

        Returns:
            The prediction, (B, out_channels, H, W), in `dtype`. Where out_channels is twice in_channels, its second
            half is of the variance.

        Raises:
            ConfigError: If the size does not fit the patches.
        """
        patch, size = self.patch_size, hidden_states.shape[2:]
        if any(side % patch for side in size):
            raise ConfigError(
                f"samples of {size[0]}x{size[1]} do not fit this transformer: make height and width multiples of "
                f"{patch}, its patch_size"
            )
        config, deterministic = self._blocks(), not train
        base, grid = self.sample_size // patch, (size[0] // patch, size[1] // patch)
        turn = rotation(grid, base, self.attention_head_dim) if self.rotary else None
        x = jnp.transpose(hidden_states, (0, 2, 3, 1)).astype(self.dtype)
        x = PatchEmbed(config.width, patch, base, config.layers, name="pos_embed")(x)

        kind = checkpointed(DiTBlock, self.gradient_checkpointing, static_argnums=(4,))
        blocks = [kind(config, embeds=i == 0, name=f"transformer_blocks_{i}") for i in range(self.num_layers)]
        told = blocks[0].embed(jnp.broadcast_to(timesteps, hidden_states.shape[:1]), class_labels)
        for block in blocks:
            x = block(x, told, turn, deterministic)

        shift, scale = jnp.split(dense(2 * config.width, config.layers, "proj_out_1")(jax.nn.silu(told)), 2, axis=-1)
        x = modulated(token_norm(config, ADA_EPS, "norm_out")(x), scale, shift)
        channels = self.out_channels or self.in_channels
        x = unpatchified(dense(patch**2 * channels, config.layers, "proj_out_2")(x), grid, patch)
        return FlaxTransformer2DModelOutput(sample=x) if return_dict else (x,)

    def save_pretrained(
        self, save_directory: str | Path, params: Mapping[str, Any], *args: Any, **options: Any
    ) -> None:
        """Write config.json and safetensors that Diffusers loads; arguments and errors are those of the base class.

        Raises:
            ConfigError: If the model has an option that Diffusers' class has not.
        """
        if on := chosen_options(self.config):
            raise ConfigError(
                f"{', '.join(on)}: Diffusers' {self.torch_class} has no such option and would compute something else: "
                "keep the checkpoint or the pipeline of the run, which are read here"
            )
        super().save_pretrained(save_directory, params, *args, **options)

    def _blocks(self) -> BlockConfig:
        layers = LayerConfig(
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            dropout=self.dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        return BlockConfig(
            heads=self.num_attention_heads,
            head_dim=self.attention_head_dim,
            classes=self.num_embeds_ada_norm,
            layers=layers,
            act=self.activation_fn,
            attention_bias=self.attention_bias,
            affine=self.norm_elementwise_affine,
            rms_norm=self.rms_norm,
            qk_norm=self.qk_norm,
        )
