"""Single-file checkpoints, which hold a whole pipeline under the names of the original Stable Diffusion code.

Such a file holds only weights. Configs and tokenizer are those of a pipeline folder of the same architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from flax_diffusion.core.checkpoints.portable import Arrays
from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.families.family import FAMILIES, Role, SingleFileLayout
from flax_diffusion.core.io import model_files
from flax_diffusion.core.spec.pipeline import PipelineSpec

SINGLE_FILE = "model.safetensors"
_PROJECTION = "text_projection.weight"
"""A matrix that OpenCLIP has the other way round, and not as a layer."""
_QKV = re.compile(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)")


def read_single_file(path: Path, spec: PipelineSpec, names: Mapping[str, list[str]]) -> dict[str, Arrays]:
    """Read the weights of every model of a pipeline.

    Args:
        path: The safetensors file. Tensors of no model (moving averages, the noise schedule) are ignored.
        spec: A pipeline of the same architecture.
        names: PyTorch names of the parameters, by component.

    Returns:
        Weights by component and PyTorch name, as they are in the file: an autoencoder's attention has 1 x 1
        convolutions in place of linear layers. Names that the file lacks are missing, and so is an autoencoder or a
        text encoder of which it holds nothing.

    Raises:
        WeightsError: If it is no such file.
        ConfigError: If there are no such files for this kind of pipeline.
    """
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: is not safetensors; what is pickled can run code: convert it to safetensors first")
    stored = model_files.read_safetensors(path)
    layouts = [family.single_file for family in FAMILIES.values() if family.single_file is not None]
    starts = tuple(prefix for layout in layouts for prefix in layout.prefixes.values())
    if not any(key.startswith(starts) for key in stored):
        raise WeightsError(f"{path} is no single-file checkpoint of Stable Diffusion: no name starts as one of its")
    layout = _layout(spec)
    for start, what in layout.refused.items():
        if any(key.startswith(start) for key in stored):
            raise WeightsError(f"{path} is {what}")
    open_clip = {name for name, start in layout.open_clip.items() if any(key.startswith(start) for key in stored)}
    found: dict[str, Arrays] = {}
    for component, renamed in layout.renamers(spec, open_clip).items():
        prefix, role = layout.prefixes[component], spec.components[component].role
        if role is not Role.DENOISER and not any(key.startswith(prefix) for key in stored):
            continue
        found[component] = {}
        for name in names[component]:
            qkv = _QKV.fullmatch(name) if component in open_clip else None
            key = prefix + renamed(f"{qkv[1]}.in_proj_{qkv[3]}" if qkv else name)
            if key not in stored:  # Transformers 5 leaves a level out
                key = key.replace("transformer.text_model.", "transformer.", 1)
            if key in stored:
                array = stored[key].array()
                array = array.T if component in open_clip and name == _PROJECTION else array
                found[component][name] = np.split(array, 3)["qkv".index(qkv[2])] if qkv else array
    return found


def write_single_file(path: Path, spec: PipelineSpec, weights: Mapping[str, Arrays]) -> None:
    """Write the weights of a pipeline to one file.

    Args:
        path: The safetensors file.
        spec: The pipeline. A text encoder with `gelu`, where that may be, is written as OpenCLIP's, any other as
            OpenAI's.
        weights: Weights by component and PyTorch name.

    Raises:
        ConfigError: If there are no such files for this kind of pipeline.
    """
    out: Arrays = {}
    layout = _layout(spec)
    open_clip = {name for name in layout.open_clip if spec.components[name]["hidden_act"] == "gelu"}
    for component, renamed in layout.renamers(spec, open_clip).items():
        role = spec.components[component].role
        theirs = component in open_clip
        for name, array in _join_qkv(weights[component]) if theirs else weights[component].items():
            if theirs and name == _PROJECTION:
                array = np.ascontiguousarray(array.T)
            if role is Role.AUTOENCODER and ".attentions." in name and array.ndim == 2:
                array = array[:, :, None, None]
            out[layout.prefixes[component] + renamed(name)] = array
    model_files.write_safetensors(path, out)


def _join_qkv(weights: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """Yield weights with queries, keys and values joined, as OpenCLIP's attention has one matrix for all three."""
    for name, array in weights.items():
        qkv = _QKV.fullmatch(name)
        if qkv is None:
            yield name, array
        elif qkv[2] == "q":
            parts = [weights[f"{qkv[1]}.{part}_proj.{qkv[3]}"] for part in "qkv"]
            yield f"{qkv[1]}.in_proj_{qkv[3]}", np.concatenate(parts)


def _layout(spec: PipelineSpec) -> SingleFileLayout:
    layout = spec.family.single_file
    if layout is None or spec.vae is None:
        raise ConfigError(f"single files hold a Stable Diffusion pipeline with an autoencoder, this is a {spec.kind}")
    return layout
