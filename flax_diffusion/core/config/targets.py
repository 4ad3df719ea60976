"""The layers that LoRA adapts where none are named."""

from __future__ import annotations

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""What the Diffusers scripts adapt."""
