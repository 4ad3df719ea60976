"""Reader of LoRA files of any program: PEFT, Diffusers since 2023, kohya and LyCORIS' LoCon.

Other kinds of weights in such files (DoRA, LoHa, …) are refused with an error that names the kind.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_diffusion.core.errors import WeightsError, shown
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.untrusted import parse_json
from flax_diffusion.core.spec.adapters import LORA_FILE, KohyaNames, LoraLayer

log = logging.getLogger(__name__)

Layers = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Shapes of a model's parameters, by component and PyTorch name."""

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA_FILES = (LORA_FILE, PEFT_FILE)
"""Names that a LoRA file may have in its folder."""

# Name endings of the two matrices: in PEFT, in Diffusers of 2024, of early 2023, for its text encoder, and in kohya.
_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)
_DOWN = dict(_PAIRS)
_MID, _ALPHA = ".lora_mid.weight", ".alpha"

_KINDS = (
    (r"\.dora_scale$|\.lora_magnitude_vector\b", "DoRA"),
    (r"\.hada_(w[12]|t[12])", "LoHa"),
    (r"\.lokr_(w[12]|t[12])", "LoKr"),
    (r"\.ia3_l\b|\.on_input$", "(IA)³"),
    (r"\.oft_(blocks|diag|R)\b", "OFT"),
    (r"\.boft_[Rs]\b", "BOFT"),
    (r"\.(a1|a2|b1|b2|bm)\.weight$|\.glora_", "GLoRA"),
    (r"\.lora_E\b", "AdaLoRA"),
    (r"\.vera_lambda_", "VeRA"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "differences of whole weights"),
    (r"\.bias_(indices|values|size)$|\.lora_B\.(default\.)?bias$|\.lora_up\.bias$", "LoRA with biases"),
    (r"\.lora_embedding_[AB]\b", "LoRA of an embedding table"),
    (r"^bundle_emb\.|string_to_param|^emb_params$", "new words of textual inversion"),
    (r"^lora_controlnet$", "a Control-LoRA"),
)
_OTHER_KINDS = tuple((re.compile(pattern), name) for pattern, name in _KINDS)

# Keys of PEFT's LoraConfig that say where adapters are or how they were trained, but do not change what they add.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_HONOURED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_DEFAULTS: dict[str, Any] = {"bias": "none", "peft_type": "LORA"}
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that keep the base weights


def read_lora_layers(path: Path, layers: Layers, kohya: KohyaNames) -> dict[str, dict[str, LoraLayer]]:
    """Read what a LoRA file adds to a model.

    Args:
        path: The safetensors file, or the folder that holds it.
        layers: Shapes of the model's parameters.
        kohya: Kohya's names of the layers.

    Returns:
        The two matrices and the alpha of each adapted layer, by component and layer name.

    Raises:
        WeightsError: If the file does not exist, is of another kind, belongs to another model, or has settings that are
            not supported.
    """
    path = model_files.weights_file(path, "--lora", LORA_FILES)
    stored = model_files.read_safetensors(path)
    _refuse_other_kinds(path, stored, kohya)
    if not any(key.endswith(tuple(_DOWN)) for key in stored):
        raise WeightsError(f"{path} holds no LoRA weights: name the file that does")
    settings = _settings(path)
    names = _Names(layers, kohya)
    found: dict[str, dict[str, LoraLayer]] = {}
    unknown_layers, problems = [], []
    used = set()
    for key in stored:
        suffix = next((suffix for suffix in _DOWN if key.endswith(suffix)), None)
        if suffix is None:
            continue
        raw = key.removesuffix(suffix)
        keys = {"down": key, "up": raw + _DOWN[suffix], "mid": raw + _MID, "alpha": raw + _ALPHA}
        used |= set(keys.values())
        model, layer = names.find(raw)
        if keys["up"] not in stored:
            problems.append(f"{key} has no second matrix")
        elif layer is None:
            unknown_layers.append(raw)
        elif layer in found.get(model, {}):
            problems.append(f"{raw} is there twice")
        else:
            own = {part: stored[name].array().astype(np.float32) for part, name in keys.items() if name in stored}
            problem = _misfit(own, layers[model][f"{layer}.weight"])
            if problem:
                problems.append(f"{raw} {problem}")
                continue
            down, rank = _with_middle(own), len(own["up"][0])
            alpha = settings.alpha(model, layer, rank)
            alpha = float(own["alpha"].reshape(-1)[0]) if "alpha" in own else alpha
            found.setdefault(model, {})[layer] = LoraLayer(down=down, up=own["up"], alpha=alpha)
    settings.warn_of_missing(found)
    problems += [f"{key} is no part of a LoRA" for key in stored if key not in used]
    if unknown_layers:
        problems.insert(
            0, f"{unknown_layers[0]} is no layer of the model{_and_more(len(unknown_layers) - 1, 'such layer')}"
        )
    if problems:
        raise WeightsError(
            f"{path} does not fit the model: {'; '.join(problems[:5])}{_and_more(len(problems) - 5, 'problem')}: give "
            "the model that it was trained on by --model"
        )
    return found


def _and_more(count: int, what: str) -> str:
    return f", and {count} more {what}{'s' if count > 1 else ''}" if count > 0 else ""


def _refuse_other_kinds(path: Path, stored: Mapping[str, Any], kohya: KohyaNames) -> None:
    for start, what in kohya.refused.items():
        if any(key.startswith(start) for key in stored):
            raise WeightsError(f"{path} holds {what}")
    for pattern, kind in _OTHER_KINDS:
        count = sum(1 for key in stored if pattern.search(key))
        if count:
            raise WeightsError(
                f"{path} holds {kind} ({count} of its {len(stored)} tensors), and only plain LoRA is supported: merge "
                "it into its model with the program that made it, and give that model by --model"
            )


def _misfit(own: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> str | None:
    """Return what is wrong with a layer's tensors, for a weight of this shape; None if nothing is."""
    down, up, mid = own["down"], own["up"], own.get("mid")
    first = down if mid is None else mid  # its rows match the columns of the matrix B
    fits = min(down.ndim, up.ndim) >= 2 and math.prod(up.shape[2:]) == 1 and up.shape[1] == len(first) > 0
    if mid is not None:
        fits = fits and mid.ndim == 4 and mid.shape[1] == len(down) and math.prod(down.shape[2:]) == 1
    if not fits:
        sizes = ", ".join(str(part.shape) for part in (down, mid, up) if part is not None)
        return f"has matrices of shapes {sizes}, which do not fit together"
    kernel = first.shape[2:]
    same_kernel = (
        kernel == shape[2:] or math.prod(kernel) == math.prod(shape[2:]) == 1
    )  # a linear layer or a 1 x 1 convolution
    if (len(up), down.shape[1]) != shape[:2] or not same_kernel:
        size = f"{len(up)} x {down.shape[1]}" + (f" with {' x '.join(map(str, kernel))} pixels" if kernel else "")
        return f"is {size}, the model's is {shape}"
    alpha = own.get("alpha", np.ones(1))
    if alpha.size != 1 or not np.isfinite(alpha).all():
        return f"has the alpha {shown(alpha.tolist())}, must be one finite number"
    return None


def _with_middle(own: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the first matrix, float32 (rank, in, …); if a LoCon has three, the product of the first two."""
    down, mid = own["down"], own.get("mid")
    if mid is None:
        return down
    return np.einsum("rshw,si->rihw", mid, down.reshape(len(down), -1))


class _Names:
    """Look-up of the model's layers by the names in files.

    Args:
        layers: Shapes of the model's parameters.
        kohya: Kohya's names of the layers.
    """

    def __init__(self, layers: Layers, kohya: KohyaNames):
        self.known = {
            model: {name.removesuffix(".weight") for name in own if name.endswith(".weight")}
            for model, own in layers.items()
        }
        self.flat: dict[str, tuple[str, str]] = {}
        for model in kohya.prefixes.keys() & self.known.keys():
            for name in self.known[model]:
                self.flat |= dict.fromkeys(kohya.spellings(model, name), (model, name))

    def find(self, raw: str) -> tuple[str, str | None]:
        """Return the component and the name of a layer; the name is None if the model has no such layer."""
        raw = raw.removeprefix("base_model.model.").replace(".processor.", ".")
        flat = self.flat.get(raw) or self.flat.get(re.sub("^lora_te1_", "lora_te_", raw))
        if flat is not None:
            return flat
        model, _, inside = raw.partition(".")
        owners = (
            {model: inside} if model in self.known else dict.fromkeys(self.known, raw)
        )  # PEFT's names have no component
        for owner, name in owners.items():
            for spelling in _spellings(name):
                if spelling in self.known[owner]:
                    return owner, spelling
        return model, None


_OF_TEXT_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""Names that Diffusers of early 2023 gives to the layers of a text encoder, and the model's names."""


def _spellings(name: str) -> Iterator[str]:
    """Yield the names that a layer of a file may have in the model."""
    yield name
    parent, _, last = name.rpartition(".")
    if last == "to_out":
        yield f"{name}.0"
    for spelling in (name, f"{parent}.{_OF_TEXT_ENCODER.get(last, last)}"):
        yield spelling
        yield f"text_model.{spelling}"


@dataclass(frozen=True)
class _Settings:
    """PEFT's settings of a LoRA by component; the key "" stands for all components. Empty if the file has none."""

    path: Path
    by_model: Mapping[str, Mapping[str, Any]]

    def alpha(self, model: str, layer: str, rank: int) -> float:
        """Return the alpha of a layer, such that the layer's scale is alpha / rank."""
        own = self.by_model.get(model, self.by_model.get("", {}))
        if not own:
            return float(rank)
        stated = self._of_layer(own, "rank_pattern", layer, own.get("r", 8))
        if stated != rank:
            raise WeightsError(
                f"{self.path}: its header says rank {stated} for {model}.{layer}, which is of rank {rank}: save the "
                "file again"
            )
        alpha = float(self._of_layer(own, "alpha_pattern", layer, own.get("lora_alpha", 8)))
        return alpha * math.sqrt(rank) if own.get("use_rslora") else alpha

    def warn_of_missing(self, found: Mapping[str, Mapping[str, LoraLayer]]) -> None:
        """Warn of components without settings: Diffusers saves settings only for the models that the caller names."""
        for model in found.keys() - self.by_model.keys() if self.by_model and "" not in self.by_model else ():
            log.warning("%s: its header has no settings for %s; each alpha is taken to be the rank", self.path, model)

    def _of_layer(self, own: Mapping[str, Any], pattern: str, layer: str, default: float) -> float:
        """Return a layer's number from the first pattern that matches the end of its name, or the default."""
        for key, value in own.get(pattern, {}).items():
            whole, wanted = key.startswith("^"), key.removeprefix("^")
            for name in {layer, layer.removeprefix("text_model.")}:
                if name == wanted or (not whole and name.endswith(f".{wanted}")):
                    return value
        return default


def _settings(path: Path) -> _Settings:
    """Read the settings in the header of a LoRA file or, for one of PEFT's own, in the file next to it."""
    saved = model_files.safetensors_metadata(path).get("lora_adapter_metadata")
    where = f"{path}: lora_adapter_metadata in its header"
    if saved is None and path.name == PEFT_FILE and path.with_name(PEFT_CONFIG).is_file():
        by_model = {"": model_files.read_json(path.with_name(PEFT_CONFIG))}
        where = str(path.with_name(PEFT_CONFIG))
    elif saved is None:
        by_model = {}
    else:
        try:
            values = parse_json(saved)
        except ValueError as error:
            raise WeightsError(f"{where} is not JSON ({error}): save the file again") from error
        if not isinstance(values, dict):
            raise WeightsError(f"{where} is {shown(saved)}, must be a JSON object: save the file again")
        by_model = {}
        for key, value in values.items():
            model, _, name = key.partition(".")
            by_model.setdefault(model, {})[name] = value
    for own in by_model.values():
        _check_settings(own, where)
    return _Settings(path, by_model)


def _check_settings(own: Mapping[str, Any], where: str) -> None:
    """Refuse values of wrong types, and settings that would change what the file adds.

    Raises:
        WeightsError: If a setting is refused.
    """
    for name, value in own.items():
        if name in ("r", "lora_alpha"):
            good = _is_number(value) and (name != "r" or (isinstance(value, int) and value > 0))
        elif name in ("rank_pattern", "alpha_pattern"):
            good = isinstance(value, dict) and all(map(_is_number, value.values()))
            odd = [key for key in value if not re.fullmatch(r"\^?[\w.]+", key)] if good else []
            if odd:
                raise WeightsError(
                    f"{where} has the {name} {shown(odd[0])}, a regular expression, and only names of layers are "
                    "supported: save it with names"
                )
        elif name == "use_rslora":
            good = isinstance(value, bool)
        elif name in _HARMLESS:
            good = True
        elif name == "use_dora" and value:
            raise WeightsError(
                f"{where} says DoRA, and only plain LoRA is supported: merge it into its model with the program that "
                "made it, and give that model by --model"
            )
        elif name == "init_lora_weights":
            good = value in _PLAIN_INITS
        else:
            good = not value or value == _DEFAULTS.get(name)
        if not good:
            raise WeightsError(
                f"{where} sets {name} to {shown(value)}, which is not supported: merge it into its model with the "
                "program that made it, and give that model by --model"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
