"""LoRA files as other programs write them: PEFT, Diffusers of 2023 to now, kohya, LyCORIS; made, not downloaded.

`make` writes each to a folder, from one set of random matrices, so that what a file adds is known.
"""

import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR = [f"{ATTENTION}.{name}" for name in ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0")]
MORE = [f"{ATTENTION}.{name}" for name in ("ff.net.0.proj", "ff.net.2")] + ["time_embedding.linear_1"]
ONE_BY_ONE = [f"down_blocks.0.attentions.0.{name}" for name in ("proj_in", "proj_out")]
CONVOLUTIONS = ["down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"]
TEXT = [f"text_model.encoder.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
TEXT_MLP = ["text_model.encoder.layers.0.mlp.fc1"]


@dataclass
class File:
    """One file: its tensors and header, and what is to come of it.

    Attributes:
        adds: Component and layer to (A, B, scale).
        refused: Words of the one line, where the file is refused; then `adds` is empty.
        by: What is to be equal to: Diffusers' `load_lora_weights`, its `load_lora_adapter` of the UNet, PEFT's
            `PeftModel`, or the formula alone where neither reads the file, or reads it otherwise than its program.
    """

    name: str
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    beside: dict | None = None  # adapter_config.json
    adds: dict[tuple[str, str], tuple[np.ndarray, np.ndarray, float]] = field(default_factory=dict)
    refused: str | None = None
    by: str = "diffusers"


def _matrices(shape, rank, seed):
    rng = np.random.default_rng(seed)
    up_shape = (shape[0], rank, *[1] * (len(shape) - 2))
    down = rng.standard_normal((rank, *shape[1:]), np.float32) / 4
    return down, rng.standard_normal(up_shape, np.float32) / 4


class Maker:
    """Makes files for a model.

    Args:
        shapes: Component to the shapes of its parameters.
    """

    def __init__(self, shapes):
        self.shapes = shapes

    def file(self, name, layers, spell, *, rank=2, alpha=None, dtype=np.float32, said=None, **rest):
        """A file of a LoRA.

        Args:
            name: Of the file.
            layers: (component, layer) of each.
            spell: From component and layer to the keys of A and B and, or None, of alpha.
            rank: Of all, or from a layer's name to its own.
            alpha: Likewise; written where `spell` has a key for it.
            said: A layer's alpha as it is written; by default a number without axes.
            dtype: Of the tensors.
            rest: Of the file.
        """
        made = File(name, **rest)
        for component, layer in layers:
            own = rank(layer) if callable(rank) else rank
            scale_by = alpha(layer) if callable(alpha) else alpha
            down, up = _matrices(self.shapes[component][f"{layer}.weight"], own, zlib.crc32(f"{name}{layer}".encode()))
            down, up = down.astype(dtype), up.astype(dtype)
            down_key, up_key, alpha_key = spell(component, layer)
            made.tensors[down_key], made.tensors[up_key] = down, up
            if alpha_key and scale_by is not None:
                made.tensors[alpha_key] = (said or np.asarray)(np.float32(scale_by))
            scale = 1.0 if scale_by is None else scale_by / own
            made.adds[component, layer] = (down.astype(np.float32), up.astype(np.float32), scale)
        return made


def write(made: File, folder: Path) -> Path:
    """Writes a file to a folder of its own; returns its path."""
    folder = folder / made.name
    folder.mkdir(parents=True)
    if made.beside is not None:
        (folder / "adapter_config.json").write_text(json.dumps(made.beside))
        path = folder / "adapter_model.safetensors"
    else:
        path = folder / "pytorch_lora_weights.safetensors"
    save_file(made.tensors, path, metadata=made.header)
    return path


def peft(component, layer):
    """Diffusers since 2024, and what is written here."""
    return f"{component}.{layer}.lora_A.weight", f"{component}.{layer}.lora_B.weight", None


def short_peft(component, layer):
    """The same from Transformers 5, where a text encoder's names have no `text_model.`."""
    return peft(component, layer.removeprefix("text_model."))


def bare_peft(component, layer):
    """PEFT's `save_pretrained` of one model."""
    return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight", None


def short_bare_peft(component, layer):
    """The same from Transformers 5."""
    return bare_peft(component, layer.removeprefix("text_model."))


def diffusers_2024(component, layer):
    """`lora.down` on the UNet, `lora_linear_layer.down` on the text encoder."""
    part = "lora_linear_layer" if component == "text_encoder" else "lora"
    return f"{component}.{layer}.{part}.down.weight", f"{component}.{layer}.{part}.up.weight", None


def diffusers_2023(component, layer):
    """Attention processors, and their names on the text encoder."""
    if component == "unet":
        layer = re.sub(r"\.(attn\d)\.(to_\w+)(\.0)?$", r".\1.processor.\2", layer)
    else:
        theirs = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
        parent, _, last = layer.rpartition(".")
        layer = f"{parent}.{theirs[last]}"
    return f"{component}.{layer}_lora.down.weight", f"{component}.{layer}_lora.up.weight", None


def first_diffusers(component, layer):
    """The first of all: a UNet's attention processors, and no component."""
    return (*(key.removeprefix("unet.") for key in diffusers_2023(component, layer)[:2]), None)


def kohya(component, layer, prefixes={"unet": "lora_unet", "text_encoder": "lora_te"}):  # noqa: B006
    """kohya's sd-scripts, and LyCORIS."""
    flat = f"{prefixes[component]}_{layer.replace('.', '_')}"
    return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"


def kohya_te1(component, layer):
    """The same with the numbered name of the first text encoder."""
    return kohya(component, layer, {"unet": "lora_unet", "text_encoder": "lora_te1"})


def short_kohya(component, layer):
    """The same from Transformers 5."""
    return kohya(component, layer.removeprefix("text_model."))


def header(**components):
    """PEFT's settings as Diffusers saves them."""
    flat = {f"{name}.{key}": value for name, values in components.items() for key, value in values.items()}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(flat)}
