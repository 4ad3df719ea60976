"""The half of the conditional UNet that a ControlNet has, too: its down blocks and its mid block."""

from dataclasses import replace
from typing import Any

from flax_diffusion.core.typed import Checkpointing
from flax_diffusion.models.blocks import DOWN_BLOCKS, AttentionConfig, DownBlock, MidBlock, block_layer_config
from flax_diffusion.models.layers import LayerConfig


def per_block(value: Any, blocks: int) -> tuple[Any, ...]:
    """Return one entry per block, from one value for all blocks or from a tuple with an entry for each."""
    return value if isinstance(value, tuple) else (value,) * blocks


class UNetEncoder:
    """Mixin of models that have the conditional UNet's fields; the layers belong to the calling module."""

    act_fn: str
    attention_head_dim: Any
    block_out_channels: tuple[int, ...]
    cross_attention_norm: str | None
    down_block_types: tuple[str, ...]
    downsample_padding: int
    dropout: float
    dtype: Any
    dual_cross_attention: bool
    gradient_checkpointing: Checkpointing
    layers_per_block: Any
    mid_block_only_cross_attention: bool | None
    mid_block_scale_factor: float
    mid_block_type: str | None
    norm_eps: float
    norm_num_groups: int
    num_attention_heads: Any
    only_cross_attention: Any
    param_dtype: Any
    resnet_out_scale_factor: float
    resnet_skip_time_act: bool
    resnet_time_scale_shift: str
    transformer_layers_per_block: Any
    use_linear_projection: bool

    def _layers(self) -> LayerConfig:
        return LayerConfig(
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            act=self.act_fn,
            dropout=self.dropout,
            time_scale_shift=self.resnet_time_scale_shift == "scale_shift",
            skip_time_act=self.resnet_skip_time_act,
            output_scale=self.resnet_out_scale_factor,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            checkpointing=self.gradient_checkpointing,
        )

    def _attention(
        self, kind: Any, *, block: int, depths: tuple[int, ...], only_cross: bool, head_dim: int
    ) -> AttentionConfig | None:
        """Return the config of a block's attention; `block` is the down block whose number of heads it takes."""
        if kind is None:
            return None
        return AttentionConfig(
            kind=kind,
            heads=per_block(self.num_attention_heads or self.attention_head_dim, len(self.block_out_channels))[block],
            head_dim=head_dim,
            depths=depths,
            groups=self.norm_num_groups,
            linear_projection=self.use_linear_projection,
            only_cross=only_cross,
            dual=self.dual_cross_attention,
            cross_norm=self.cross_attention_norm == "group_norm",
        )

    def _down_block(self, index: int, layers: LayerConfig) -> DownBlock:
        blocks = len(self.block_out_channels)
        kind, sampler = DOWN_BLOCKS[self.down_block_types[index]]
        channels = self.block_out_channels[index]
        number = per_block(self.layers_per_block, blocks)[index]
        attention = self._attention(
            kind,
            block=index,
            depths=per_block(per_block(self.transformer_layers_per_block, blocks)[index], number),
            only_cross=per_block(self.only_cross_attention, blocks)[index],
            head_dim=per_block(self.attention_head_dim, blocks)[index],
        )
        return DownBlock(
            features=channels,
            layers=number,
            config=block_layer_config(layers, self.down_block_types[index]),
            attention=attention,
            downsampler=None if index == blocks - 1 else sampler or "conv",
            padding=self.downsample_padding,
            name=f"down_blocks_{index}",
        )

    def _mid_block(self) -> MidBlock:
        blocks = len(self.block_out_channels)
        simple = self.mid_block_type == "UNetMidBlock2DSimpleCrossAttn"
        kind = {"UNetMidBlock2DCrossAttn": "cross", "UNetMidBlock2D": None}.get(str(self.mid_block_type), "added_kv")
        only_cross = self.mid_block_only_cross_attention
        if only_cross is None:
            only_cross = self.only_cross_attention is True  # a list does not reach the mid block
        attention = self._attention(
            kind,
            block=blocks - 1,
            depths=per_block(per_block(self.transformer_layers_per_block, blocks)[-1], 1),
            only_cross=simple and only_cross,  # UNetMidBlock2DCrossAttn always holds self-attention
            head_dim=per_block(self.attention_head_dim, blocks)[-1],
        )
        config = replace(
            self._layers(), output_scale=self.mid_block_scale_factor, skip_time_act=simple and self.resnet_skip_time_act
        )
        # Upstream's UNetMidBlock2D is a single residual block here.
        return MidBlock(config, attention, layers=0 if kind is None else 1, name="mid_block")
