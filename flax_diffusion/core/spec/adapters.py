"""Adapters, which train while the model's own weights do not: LoRA beside linear layers, and rows of new tokens.

Adapters are plain arrays by PyTorch's names, in PyTorch's layout. Both backends put them beside the frozen weights.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_diffusion.core.checkpoints.portable import Arrays
from flax_diffusion.core.errors import ConfigError, WeightsError, nearest
from flax_diffusion.core.io import model_files
from flax_diffusion.core.randomness.initial_weights import name_number
from flax_diffusion.core.randomness.streams import Stream, example_rng

TOKEN_EMBEDDING = "text_model.embeddings.token_embedding"
WORD = "placeholder_token"
"""Key in the header of a file whose rows are not named by their word."""
NEW_ROWS = f"{TOKEN_EMBEDDING}.new_rows"
LORA_FILE, EMBEDDINGS_FILE = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
"""Names of the files that Diffusers looks for in a folder."""


class FileNames(NamedTuple):
    """Names of the files of adapters in a folder."""

    lora: str = LORA_FILE
    embeddings: str = EMBEDDINGS_FILE


def file_names(name: str | None) -> FileNames:
    """Return the names of the files of adapters, of which a run writes one.

    Args:
        name: Name that the user gives to it, without extension; None for the usual ones.
    """
    return FileNames() if name is None else FileNames(f"{name}.safetensors", f"{name}.safetensors")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: y = W·x + (alpha / rank)·B·A·dropout(x).

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Strength; see the formula.
        dropout: Probability with which an input is dropped.
        targets: Last parts of the names of the layers to adapt.

    Reference:
        Hu et al., https://arxiv.org/abs/2106.09685.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor on B·A."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """New tokens, whose rows follow those of a text encoder's embedding table.

    Attributes:
        placeholder: The word that stands for the new thing in prompts.
        tokens: The tokens that the tokenizer turns the word into.
        first: Id of the first token; the others follow it.
        initializer: Id of the known token whose row they start from.

    Reference:
        Gal et al., https://arxiv.org/abs/2208.01618.
    """

    placeholder: str
    tokens: tuple[str, ...]
    first: int
    initializer: int


def lora_layers(lora: Lora, shapes: Mapping[str, tuple[int, ...]], model: str) -> dict[str, tuple[int, int]]:
    """Find the linear layers that a LoRA adapts.

    Args:
        lora: The LoRA, with the last parts of the layers' names.
        shapes: Shapes of the model's parameters, by PyTorch name.
        model: The model's name, for messages.

    Returns:
        The shape (out, in) of each layer, by name.

    Raises:
        ConfigError: If a target matches no layer, or one that is not linear, or if the rank is larger than a matrix.
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
    """Draw the first values of a model's LoRA: A is normal with standard deviation 1 / rank, B is zero.

    Args:
        lora: The LoRA.
        shapes: Shapes of the model's parameters, by PyTorch name.
        kind: Name of the model's PyTorch class.
        seed: Seed of the run.

    Returns:
        `….lora_A.weight`, float32 (rank, in), and `….lora_B.weight`, float32 (out, rank).

    Reference:
        `init_lora_weights="gaussian"` of PEFT.
    """
    arrays = {}
    for name, (rows, columns) in lora_layers(lora, shapes, kind).items():
        rng = example_rng(seed, Stream.WEIGHTS, 0, name_number(kind, f"{name}.lora_A.weight"))
        normal = rng.standard_normal((lora.rank, columns), np.float32)
        arrays[f"{name}.lora_A.weight"] = normal / np.float32(lora.rank)
        arrays[f"{name}.lora_B.weight"] = np.zeros((rows, lora.rank), np.float32)
    return arrays


def draw_rows(tokens: NewTokens, table: np.ndarray) -> Arrays:
    """Return the first values of new tokens' rows, which are copies of the initializer's row.

    Args:
        tokens: The new tokens.
        table: The embedding table, (tokens, features).

    Returns:
        The rows, float32 (new tokens, features), by their name.
    """
    return {NEW_ROWS: np.repeat(table[tokens.initializer][None], len(tokens.tokens), axis=0).astype(np.float32)}


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """The matrices of a LoRA in one layer, to whose weight it adds (alpha / rank)·B·A.

    Attributes:
        down: A, (rank, in) or, for a convolution, (rank, in, height, width).
        up: B, (out, rank), which may have further axes of length 1.
        alpha: Strength; see the formula.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return len(self.down)

    def added(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return what the LoRA adds to the layer's weight, float32 of the weight's shape."""
        product = self.up.reshape(len(self.up), -1) @ self.down.reshape(len(self.down), -1)
        return (product * np.float32(self.alpha / self.rank)).reshape(shape)


def trained_layers(lora: Lora, arrays: Mapping[str, np.ndarray]) -> dict[str, LoraLayer]:
    """Return the layers of a LoRA that was trained here.

    Args:
        lora: The LoRA, with its alpha.
        arrays: The trained arrays by PEFT's names, such as `….lora_A.weight`.

    Returns:
        The matrices by layer name.
    """
    return {
        (layer := name.removesuffix(".lora_A.weight")): LoraLayer(
            down=down, up=arrays[f"{layer}.lora_B.weight"], alpha=lora.alpha
        )
        for name, down in arrays.items()
        if name.endswith(".lora_A.weight")
    }


@dataclass(frozen=True)
class KohyaNames:
    """Names of a pipeline's layers in LoRA files of kohya's form.

    Attributes:
        prefixes: Start of the names, by component.
        renamed: From PyTorch's name of a parameter to that of the original code, by component whose layers have the
            latter.
        refused: Starts of names in files for other models, of any form, and the error's text for each.
    """

    prefixes: Mapping[str, str]
    renamed: Mapping[str, Callable[[str], str]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, component: str, layer: str) -> str:
        """Return the name of a layer, as kohya's program writes it."""
        if component in self.renamed:
            layer = self.renamed[component](f"{layer}.weight").removesuffix(".weight")
        return self._flat(component, layer)

    def spellings(self, component: str, layer: str) -> set[str]:
        """Return the names that programs with files of this form give to a layer."""
        names = {layer, layer.removeprefix("text_model.")}
        return {self(component, layer), *(self._flat(component, name) for name in names)}

    def _flat(self, component: str, layer: str) -> str:
        return f"{self.prefixes[component]}_{layer.replace('.', '_')}"


def save_lora(
    path: Path,
    models: Mapping[str, Mapping[str, LoraLayer]],
    form: str,
    kohya: KohyaNames,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write LoRA weights that Diffusers' `load_lora_weights` reads.

    Args:
        path: The safetensors file.
        models: The matrices by component and layer name.
        form: "peft" (`unet.….lora_A.weight`) or "kohya" (`lora_unet_….lora_down.weight`, with alpha).
        kohya: Kohya's names.
        header: What the file says of itself; None for nothing.
    """
    arrays: Arrays = {}
    metadata: dict[str, Any] = {}
    for model, layers in models.items():
        for name, layer in layers.items():
            if form == "kohya":
                flat = kohya(model, name)
                arrays[f"{flat}.lora_down.weight"], arrays[f"{flat}.lora_up.weight"] = layer.down, layer.up
                arrays[f"{flat}.alpha"] = np.asarray(layer.alpha, np.float32)
            else:
                arrays[f"{model}.{name}.lora_A.weight"] = layer.down
                arrays[f"{model}.{name}.lora_B.weight"] = layer.up
        if form == "peft":
            metadata |= {f"{model}.{key}": value for key, value in _peft_settings(layers).items()}
    settings = {"lora_adapter_metadata": json.dumps(metadata, sort_keys=True)} if metadata else {}
    model_files.write_safetensors(path, arrays, dict(header or {}) | settings)


def _peft_settings(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """Return the arguments of PEFT's LoraConfig: the most common rank and alpha, and the layers that have others.

    In memory, Transformers 5 names a text encoder's layers without `text_model.`, and PEFT matches the end of a name.
    """
    layers = {name.removeprefix("text_model."): layer for name, layer in layers.items()}
    rank, alpha = Counter((layer.rank, layer.alpha) for layer in layers.values()).most_common(1)[0][0]
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(layers)}
    ranks = {name: layer.rank for name, layer in layers.items() if layer.rank != rank}
    alphas = {name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha}
    return settings | {key: own for key, own in (("rank_pattern", ranks), ("alpha_pattern", alphas)) if own}


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """Differences between a model and its weight files.

    Attributes:
        replaced: Weights by PyTorch name that replace those of the files.
        loras: LoRAs to merge, each as its matrices by layer name and its strength.
        rows: Rows of new tokens, (new tokens, features); None for none.
        first: Id of the first new token.
        widened: Input channels by name of a layer's weight that has fewer in the files; those that are new are zero.
    """

    replaced: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    loras: tuple[tuple[Mapping[str, LoraLayer], float], ...] = field(default=(), repr=False)
    rows: np.ndarray | None = field(default=None, repr=False)
    first: int = 0
    widened: Mapping[str, int] = field(default_factory=dict)

    def apply(self, weights: Mapping[str, np.ndarray], source: str) -> Arrays:
        """Return a model's weights with these differences.

        Args:
            weights: Weights of the files, float32 by PyTorch name, in PyTorch's layout.
            source: Where the weights are from, for messages.

        Returns:
            The changed weights, by PyTorch name.

        Raises:
            WeightsError: If the weights are those of another model.
        """
        merged = {**weights, **self.replaced}
        for name, channels in self.widened.items():
            weight = merged[name]
            more = np.zeros((weight.shape[0], channels - weight.shape[1], *weight.shape[2:]), weight.dtype)
            merged[name] = np.concatenate([weight, more], axis=1)
        for layers, strength in self.loras:
            for layer, lora in layers.items():
                name = f"{layer}.weight"
                weight = merged.get(name)
                if weight is None or weight.size != len(lora.up) * math.prod(lora.down.shape[1:]):
                    raise WeightsError(f"{source}: has no {name} of the size that the LoRA has: use its own model")
                merged[name] = weight + np.float32(strength) * lora.added(weight.shape)
        if self.rows is not None:
            name = f"{TOKEN_EMBEDDING}.weight"
            if len(merged[name]) < self.first or merged[name].shape[1] != self.rows.shape[1]:
                raise WeightsError(
                    f"{source}: its embedding table is {merged[name].shape}, and the new words are of "
                    f"{self.rows.shape[1]} features behind {self.first} others: use the model that learnt them"
                )
            merged[name] = np.concatenate([merged[name][: self.first], self.rows])
        return merged


def tokens_of(word: str, count: int) -> tuple[str, ...]:
    """Return the tokens of a new word, as Diffusers names them: the word, then the word with a number.

    Args:
        word: The new word.
        count: Number of its tokens.
    """
    return (word, *(f"{word}_{number}" for number in range(1, count)))


def save_embeddings(path: Path, word: str, rows: Mapping[str, np.ndarray], keys: Mapping[str, str]) -> None:
    """Write the rows of a new word as Diffusers' `load_textual_inversion` reads them.

    Args:
        path: The safetensors file.
        word: The word.
        rows: Its rows by text encoder, (new tokens, features) each.
        keys: Names of the rows in the file by text encoder; empty for the word itself, where there is one encoder.
    """
    arrays = {keys.get(encoder, word): array for encoder, array in rows.items()}
    model_files.write_safetensors(path, arrays, {WORD: word} if keys else {})
