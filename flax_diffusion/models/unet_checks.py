"""Checks of a config's block lists, for the UNets and the autoencoder."""

from collections.abc import Iterable

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.models.modeling import Config

TIMESTEP_ACTS = ("silu", "swish", "mish", "gelu", "relu")


def check_blocks(config: Config, down_types: Iterable[str], up_types: Iterable[str] | None = None) -> None:
    """Raise ConfigError for block types that the model does not support, or for lists of different lengths.

    Args:
        config: The model's configuration.
        down_types: Names that `down_block_types` may hold.
        up_types: Names that `up_block_types` may hold; None for a model without up blocks.
    """
    allowed = {"down_block_types": down_types}
    if up_types is not None:
        allowed["up_block_types"] = up_types
    for field, types in allowed.items():
        for name in config[field]:
            if name not in types:
                raise ConfigError(f"{name!r} in {field} is not supported: choose from " + ", ".join(types))
    blocks = len(config.block_out_channels)
    if not blocks:
        raise ConfigError("block_out_channels is empty: give each block its channels")
    for field in allowed:
        if len(config[field]) != blocks:
            raise ConfigError(
                f"{field} has {len(config[field])} entries and block_out_channels {blocks}: make them equally long"
            )
    groups = config.norm_num_groups
    if any(channels % groups for channels in config.block_out_channels):
        raise ConfigError(
            f"norm_num_groups={groups!r} must divide every entry of block_out_channels={config.block_out_channels}"
        )


def check_lengths(config: Config, fields: Iterable[str]) -> None:
    """Raise ConfigError for per-block lists whose length is not the number of blocks.

    Args:
        config: The model's configuration.
        fields: Names of the fields that may hold one entry per block.
    """
    blocks = len(config.block_out_channels)
    for field in fields:
        if isinstance(config[field], list) and len(config[field]) != blocks:
            raise ConfigError(
                f"{field}={config[field]} has {len(config[field])} entries: give one number, or one for each of "
                f"the {blocks} blocks"
            )
