"""What trains when the model itself does not: LoRA beside linear layers, and rows of new tokens.

Adapters are plain arrays by PyTorch's names, in PyTorch's layout; both backends put them beside the frozen weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core import hub
from flax_diffusion.core.data.noise import Stream, example_rng
from flax_diffusion.core.errors import ConfigError, WeightsError, nearest
from flax_diffusion.core.initial import name_number
from flax_diffusion.core.portable import Arrays
from flax_diffusion.core.untrusted import parse_json

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""What the Diffusers scripts adapt."""

TOKEN_EMBEDDING = "text_model.embeddings.token_embedding"
NEW_ROWS = f"{TOKEN_EMBEDDING}.new_rows"
LORA_FILE, EMBEDDINGS_FILE = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: y = W·x + (alpha / rank)·B·A·dropout(x).

    Reference: Hu et al., https://arxiv.org/abs/2106.09685.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...]  # last parts of the names of the layers to adapt

    @property
    def scale(self) -> float:
        """Of the adapter's part."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Rows of new tokens behind a text encoder's embedding table.

    Reference: Gal et al., https://arxiv.org/abs/2208.01618.
    """

    placeholder: str  # the token that stands for the new thing in prompts
    tokens: tuple[str, ...]  # what the tokenizer makes of it
    first: int  # id of the first; the others follow
    initializer: int  # id of the token whose row they start from

    def expand(self, prompt: str) -> str:
        """A prompt with the placeholder spelt as its tokens."""
        return prompt.replace(self.placeholder, " ".join(self.tokens))


def lora_layers(lora: Lora, shapes: Mapping[str, tuple[int, ...]], model: str) -> dict[str, tuple[int, int]]:
    """The linear layers that a LoRA adapts.

    Args:
        lora: Names them by the last parts of their names.
        shapes: Of the model's parameters, by PyTorch name.
        model: Its name, for messages.

    Returns:
        Name of each layer and its (out, in).

    Raises:
        ConfigError: If a target matches nothing, or no linear layer, or the rank is over a matrix's size.
    """
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    found: dict[str, tuple[int, int]] = {}
    for target in lora.targets:
        matches = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not matches:
            known = {name.rsplit(".", 1)[-1] for name, shape in layers.items() if len(shape) == 2}
            raise ConfigError(f"LoRA target '{target}' matches no layer of {model}{nearest(target, known)}")
        for name in matches:
            shape = layers[name]
            if len(shape) != 2:
                raise ConfigError(
                    f"LoRA target '{target}' matches {name} of {model}, whose weight is {shape}: LoRA adapts linear "
                    "layers only"
                )
            if lora.rank > min(shape):
                raise ConfigError(
                    f"--lora_rank {lora.rank} is over the size of {name} of {model}, {shape[0]} x {shape[1]}: give "
                    f"{min(shape)} or less"
                )
            found[name] = (shape[0], shape[1])
    return found


def draw_lora(lora: Lora, shapes: Mapping[str, tuple[int, ...]], kind: str, seed: int) -> Arrays:
    """First values of a model's LoRA: A normal with standard deviation 1 / rank, B zero.

    Args:
        lora: What to adapt.
        shapes: Of the model's parameters, by PyTorch name.
        kind: Its PyTorch class.
        seed: Of the run.

    Returns:
        `….lora_A.weight` (rank, in) and `….lora_B.weight` (out, rank), float32.

    Reference: `init_lora_weights="gaussian"` of PEFT.
    """
    arrays = {}
    for name, (rows, columns) in lora_layers(lora, shapes, kind).items():
        rng = example_rng(seed, Stream.WEIGHTS, 0, name_number(kind, f"{name}.lora_A.weight"))
        normal = rng.standard_normal((lora.rank, columns), np.float32)
        arrays[f"{name}.lora_A.weight"] = normal / np.float32(lora.rank)
        arrays[f"{name}.lora_B.weight"] = np.zeros((rows, lora.rank), np.float32)
    return arrays


def draw_rows(tokens: NewTokens, table: np.ndarray) -> Arrays:
    """First values of new rows, (new tokens, features): the initializer's row of the embedding table."""
    return {NEW_ROWS: np.repeat(table[tokens.initializer][None], len(tokens.tokens), axis=0).astype(np.float32)}


def save_lora(path: Path, models: Mapping[str, tuple[Lora, Arrays]], form: str = "peft") -> None:
    """Writes LoRA weights that Diffusers' `load_lora_weights` reads.

    Args:
        path: The safetensors file.
        models: Component ("unet", "text_encoder") to its LoRA and arrays.
        form: "peft" (`unet.….lora_A.weight`) or "kohya" (`lora_unet_….lora_down.weight`, with alpha).
    """
    arrays: Arrays = {}
    metadata: dict[str, Any] = {}
    for model, (lora, own) in models.items():
        if form == "kohya":
            arrays |= _to_kohya(model, lora, own)
            continue
        arrays |= {f"{model}.{name}": value for name, value in own.items()}
        values = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": sorted(lora.targets)}
        metadata |= {f"{model}.{key}": value for key, value in values.items()}
    extra = {"lora_adapter_metadata": json.dumps(metadata, sort_keys=True)} if metadata else {}
    hub.write_safetensors(path, arrays, extra)


KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te"}


def _to_kohya(model: str, lora: Lora, arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for name, value in arrays.items():
        layer, part, _ = name.rsplit(".", 2)
        flat = f"{KOHYA[model]}_{layer.replace('.', '_')}"
        out[f"{flat}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value
        out[f"{flat}.alpha"] = np.asarray(lora.alpha, np.float32)
    return out


# The two spellings of each matrix: PEFT's, old Diffusers' on the UNet, old Diffusers' on the text encoder, kohya's.
_DOWN = (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight", ".lora_down.weight")
_UP = (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight", ".lora_up.weight")


def read_lora(path: Path, layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Arrays]:
    """Reads what LoRA weights add to a model's.

    Args:
        path: As of `read_lora_pairs`.
        layers: Likewise.

    Returns:
        Component to, by the name of each adapted weight, (alpha / rank)·B·A, float32 of its shape.
    """
    deltas: dict[str, Arrays] = {}
    for model, (lora, arrays) in read_lora_pairs(path, layers).items():
        deltas[model] = {}
        for key, down in arrays.items():
            if key.endswith(".lora_A.weight"):
                name = f"{key.removesuffix('.lora_A.weight')}.weight"
                up = arrays[key.replace(".lora_A.", ".lora_B.")]
                delta = up.reshape(len(up), -1) @ down.reshape(len(down), -1) * np.float32(lora.scale)
                deltas[model][name] = delta.reshape(layers[model][name])
    return deltas


def read_lora_pairs(path: Path, layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, tuple[Lora, Arrays]]:
    """Reads LoRA weights in PEFT's, Diffusers' older or kohya's format.

    Args:
        path: The safetensors file, or the folder that holds it.
        layers: Component to its parameters' shapes by PyTorch name; kohya's names are looked up among them.

    Returns:
        Component to its LoRA and its arrays by PEFT's names, float32.

    Raises:
        WeightsError: If a layer or its shape is not the model's, half a pair is missing, or ranks differ.
    """
    path = path / LORA_FILE if path.is_dir() else path
    stored = {name: tensor.array().astype(np.float32) for name, tensor in hub.read_safetensors(path).items()}
    alphas = _adapter_metadata(path)
    flat = {
        f"{KOHYA[model]}_{name.removesuffix('.weight').replace('.', '_')}": f"{model}.{name.removesuffix('.weight')}"
        for model, names in layers.items()
        if model in KOHYA
        for name in names
        if name.endswith(".weight")
    }
    found: dict[str, Arrays] = {}
    scales: dict[str, set[tuple[int, float]]] = {}
    problems = []
    for key, down in stored.items():
        suffix = next((suffix for suffix in _DOWN if key.endswith(suffix)), None)
        if suffix is None:
            if not key.endswith((*_UP, ".alpha")):
                problems.append(f"{key} is no part of a LoRA")
            continue
        layer = key.removesuffix(suffix)
        up = stored.get(layer + _UP[_DOWN.index(suffix)])
        model, _, name = flat.get(layer, layer).partition(".")
        shape = layers.get(model, {}).get(f"{name}.weight")
        if up is None:
            problems.append(f"{key} has no second half")
        elif shape is None:
            problems.append(f"{layer} is no layer of the model")
        elif (len(up), math.prod(down.shape[1:])) != (shape[0], math.prod(shape[1:])):
            problems.append(f"{layer} is {len(up)} x {math.prod(down.shape[1:])}, the model's is {shape}")
        else:
            alpha: Any = stored.get(f"{layer}.alpha", alphas.get(f"{model}.lora_alpha", len(down)))
            scales.setdefault(model, set()).add((len(down), float(alpha)))
            found.setdefault(model, {})[f"{name}.lora_A.weight"] = down
            found[model][f"{name}.lora_B.weight"] = up
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise WeightsError(f"{path} does not fit the model: {'; '.join(problems[:5])}{more}")
    if not found:
        raise WeightsError(f"{path} holds no LoRA weights")
    pairs = {}
    for model, own in found.items():
        if len(scales[model]) > 1:
            raise WeightsError(f"{path}: the layers of {model} have several ranks or alphas; one is what is read here")
        ((rank, alpha),) = scales[model]
        targets = sorted({name.rsplit(".", 2)[0] for name in own})
        pairs[model] = (Lora(rank=rank, alpha=alpha, targets=tuple(targets)), own)
    return pairs


def _adapter_metadata(path: Path) -> dict[str, Any]:
    """PEFT's settings in the header of a LoRA file; none in older files."""
    saved = hub.safetensors_metadata(path).get("lora_adapter_metadata", "{}")
    try:
        values = parse_json(saved)
    except ValueError as error:
        raise WeightsError(f"{path}: lora_adapter_metadata in its header is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: lora_adapter_metadata in its header is {saved[:40]}, must be a JSON object")
    return values


def tokens_of(word: str, count: int) -> tuple[str, ...]:
    """The tokens of a new word of several vectors, as Diffusers names them: the word, then the word with a number."""
    return (word, *(f"{word}_{number}" for number in range(1, count)))


def save_embeddings(path: Path, tokens: NewTokens, rows: np.ndarray) -> None:
    """Writes the rows of new tokens as Diffusers' `load_textual_inversion` reads them."""
    hub.write_safetensors(path, {tokens.placeholder: rows})
