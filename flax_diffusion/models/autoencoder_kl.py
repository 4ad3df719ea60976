"""The autoencoder of latent diffusion."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.typed import Checkpointing, Count, Size
from flax_diffusion.models.blocks import AttentionConfig, DownBlock, MidBlock, UpBlock
from flax_diffusion.models.layers import GroupNorm, LayerConfig, conv
from flax_diffusion.models.modeling import Config, PretrainedModel
from flax_diffusion.models.outputs import FlaxAutoencoderKLOutput, FlaxDecoderOutput, FlaxDiagonalGaussianDistribution
from flax_diffusion.models.unet_checks import TIMESTEP_ACTS, check_blocks


class Encoder(nn.Module):
    """Network from images to the parameters of the posterior, before `quant_conv`.

    Args:
        channels: Output channels of each block.
        layers: Residual blocks per block.
        out_channels: Output channels, twice the latent channels.
        attention: Whether the mid block attends.
        config: Layer config.
    """

    channels: tuple[int, ...]
    layers: int
    out_channels: int
    attention: bool
    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Map (B, H, W, C) to (B, H / f, W / f, out_channels) with f = 2^(blocks − 1)."""
        config = self.config
        x = conv(self.channels[0], config, "conv_in")(x)
        for i, channels in enumerate(self.channels):
            sampler = "conv" if i < len(self.channels) - 1 else None
            block = DownBlock(channels, self.layers, config, None, sampler, padding=0, name=f"down_blocks_{i}")
            x, _ = block(x, None, None, deterministic)
        x = _mid_block(self.channels[-1], self.attention, config)(x, None, None, deterministic)
        x = GroupNorm(config, config.eps, "silu", name="conv_norm_out")(x)
        return conv(self.out_channels, config, "conv_out")(x)


class Decoder(nn.Module):
    """Network from latents, after `post_quant_conv`, to images.

    Args:
        channels: Output channels of each of the encoder's blocks; they are walked in reverse.
        layers: Residual blocks per block, less one.
        out_channels: Image channels.
        attention: Whether the mid block attends.
        config: Layer config.
    """

    channels: tuple[int, ...]
    layers: int
    out_channels: int
    attention: bool
    config: LayerConfig

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Map (B, h, w, C) to (B, h·f, w·f, out_channels) with f = 2^(blocks − 1)."""
        config = self.config
        x = conv(self.channels[-1], config, "conv_in")(x)
        x = _mid_block(self.channels[-1], self.attention, config)(x, None, None, deterministic)
        for i, channels in enumerate(reversed(self.channels)):
            sampler = "conv" if i < len(self.channels) - 1 else None
            block = UpBlock(channels, self.layers + 1, config, None, sampler, name=f"up_blocks_{i}")
            x = block(x, None, None, None, deterministic)
        x = GroupNorm(config, config.eps, "silu", name="conv_norm_out")(x)
        return conv(self.out_channels, config, "conv_out")(x)


def _mid_block(channels: int, attention: bool, config: LayerConfig) -> MidBlock:
    """Return the mid block, whose attention has one head."""
    attn = AttentionConfig(kind="spatial", head_dim=channels, groups=config.groups) if attention else None
    return MidBlock(config, attn, name="mid_block")


class FlaxAutoencoderKL(PretrainedModel, nn.Module):
    """Autoencoder between images, (B, C, H, W), and latents with a Gaussian posterior, (B, h, w, C).

    Images have their channels first, the posterior has them last, and `decode` takes both, as in Diffusers' Flax.
    Fields are the config keys of Diffusers' AutoencoderKL and those below. scaling_factor, shift_factor, latents_mean,
    latents_std and force_upcast tell callers how to use the latents; `encode` and `decode` do not apply them, as
    upstream.

    Args:
        dtype: Dtype of matrix products and convolutions.
        param_dtype: Dtype of newly initialised parameters.
        gradient_checkpointing: Recompute residual and attention blocks in the backward pass, or parts ("minimal").

    Reference:
        AutoencoderKL of Diffusers (PyTorch); Rombach et al. 2022.
    """

    torch_class: ClassVar[str] = "AutoencoderKL"
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {"act_fn": TIMESTEP_ACTS}

    in_channels: Size = 3
    out_channels: Size = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[Size, ...] = (64,)
    layers_per_block: Count = 1
    act_fn: str = "silu"
    latent_channels: Size = 4
    norm_num_groups: Size = 32
    sample_size: Any = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    gradient_checkpointing: Checkpointing = False

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where fields contradict each other."""
        check_blocks(config, ("DownEncoderBlock2D",), ("UpDecoderBlock2D",))

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        size = 2 ** (len(config.block_out_channels) - 1)
        return (jnp.zeros((1, config.in_channels, size, size)),)

    def setup(self) -> None:
        """Create the submodules."""
        config = LayerConfig(
            groups=self.norm_num_groups,
            eps=1e-6,
            act=self.act_fn,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            checkpointing=self.gradient_checkpointing,
        )
        shared = (self.block_out_channels, self.layers_per_block)
        attention, width = self.mid_block_add_attention, 2 * self.latent_channels
        self.encoder = Encoder(*shared, width, attention, config)
        self.decoder = Decoder(*shared, self.out_channels, attention, config)
        if self.use_quant_conv:
            self.quant_conv = conv(width, config, None, kernel=1)
        if self.use_post_quant_conv:
            self.post_quant_conv = conv(self.latent_channels, config, None, kernel=1)

    def encode(
        self, sample: jax.Array, deterministic: bool = True, return_dict: bool = True
    ) -> FlaxAutoencoderKLOutput | tuple[FlaxDiagonalGaussianDistribution]:
        """Encode images to a distribution over latents.

        Args:
            sample: Images in [-1, 1], (B, in_channels, H, W), H and W multiples of 2^(blocks − 1).
            deterministic: Apply no dropout, of which the autoencoder has none.
            return_dict: Return a dataclass; False returns a tuple.

        Returns:
            The posterior; its tensors are (B, h, w, latent_channels), channels last, without the scaling factor.

        Raises:
            ConfigError: If the images have another number of channels.
        """
        if sample.shape[1] != self.in_channels:
            raise ConfigError(f"images must be (B, {self.in_channels}, H, W): got shape {sample.shape}")
        x = jnp.transpose(sample, (0, 2, 3, 1)).astype(self.dtype)
        x = self.encoder(x, deterministic)
        posterior = FlaxDiagonalGaussianDistribution(self.quant_conv(x) if self.use_quant_conv else x)
        return FlaxAutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, latents: jax.Array, deterministic: bool = True, return_dict: bool = True
    ) -> FlaxDecoderOutput | tuple[jax.Array]:
        """Decode latents to images.

        Args:
            latents: Latents, already divided by the scaling factor, (B, h, w, latent_channels) or
                (B, latent_channels, h, w). Where both would fit, they are taken as channels last.
            deterministic: Apply no dropout, of which the autoencoder has none.
            return_dict: Return a dataclass; False returns a tuple.

        Returns:
            Images, about in [-1, 1], (B, out_channels, H, W).

        Raises:
            ConfigError: If the latents have another number of channels.
        """
        channels = self.latent_channels
        if latents.shape[-1] != channels:
            if latents.shape[1] != channels:
                raise ConfigError(
                    f"latents must be (B, h, w, {channels}) or (B, {channels}, h, w): got shape {latents.shape}"
                )
            latents = jnp.transpose(latents, (0, 2, 3, 1))
        x = latents.astype(self.dtype)
        x = self.post_quant_conv(x) if self.use_post_quant_conv else x
        x = jnp.transpose(self.decoder(x, deterministic), (0, 3, 1, 2))
        return FlaxDecoderOutput(sample=x) if return_dict else (x,)

    def __call__(
        self, sample: jax.Array, sample_posterior: bool = False, deterministic: bool = True, return_dict: bool = True
    ) -> FlaxDecoderOutput | tuple[jax.Array]:
        """Encode and decode.

        Args:
            sample: Images in [-1, 1], (B, in_channels, H, W).
            sample_posterior: Sample the latents with the random key "gaussian"; else take their mean.
            deterministic: Apply no dropout, of which the autoencoder has none.
            return_dict: Return a dataclass; False returns a tuple.

        Returns:
            Reconstructed images, (B, out_channels, H, W).
        """
        posterior = self.encode(sample, deterministic, return_dict=False)[0]
        latents = posterior.sample(self.make_rng("gaussian")) if sample_posterior else posterior.mode()
        return self.decode(latents, deterministic, return_dict)
