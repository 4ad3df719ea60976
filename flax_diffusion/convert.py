"""Between file formats: `python -m flax_diffusion.convert --model DIR [--lora FILE] … --output_dir OUT`.

Reads a pipeline in safetensors or Flax msgpack; puts in the weights of a training checkpoint or of a single file of
the original Stable Diffusion, merges LoRA, adds the words of textual inversion; writes a pipeline in either format, or
a single file. LoRA files change between PEFT's names and kohya's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from flax_diffusion.core import adapters, cli, hub, pipeline, portable, single_file
from flax_diffusion.core.checkpoints import MANIFEST, committed, require_whole
from flax_diffusion.core.errors import CheckpointError, ConfigError, WeightsError
from flax_diffusion.core.pipeline import Component, PipelineSpec
from flax_diffusion.core.portable import Arrays
from flax_diffusion.core.weight_files import in_memory

log = logging.getLogger(__name__)


class ConvertOptions(BaseModel):
    """Options of `convert`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="Folder or Hub id of a Diffusers pipeline, in safetensors or Flax msgpack.")
    output_dir: str = Field(description="Folder to write to; must be empty or new.")
    checkpoint: str | None = Field(
        None,
        description="Whose weights go into the pipeline: a training checkpoint's folder, averages if it has them, or a "
        "single-file checkpoint (.safetensors) of Stable Diffusion 1 or 2.",
    )
    lora: list[str] = Field([], description="LoRA files to merge: PEFT's names, Diffusers' older ones or kohya's.")
    lora_scale: float = Field(1.0, description="Strength of the merged LoRA.")
    embeddings: list[str] = Field([], description="learned_embeds.safetensors of textual inversion, to add.")
    format: Literal["diffusers", "flax", "single_file", "peft", "kohya"] = Field(
        "diffusers",
        description="diffusers: safetensors. flax: msgpack. single_file: all in one, by the original names. peft, "
        "kohya: not a pipeline but the one --lora file anew.",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="Of the weights written.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id.")
    variant: str | None = Field(None, description="Variant of its weight files, e.g. fp16.")

    @model_validator(mode="after")
    def _check(self) -> ConvertOptions:
        if self.format in ("peft", "kohya") and (len(self.lora) != 1 or self.checkpoint or self.embeddings):
            raise ValueError(f"--format {self.format} writes one LoRA file anew: give one --lora and nothing to merge")
        return self


def convert(model: str | Path, output_dir: str | Path, **options: Any) -> Path:
    """Converts, as the command line does.

    Args:
        model: Folder or Hub id of a pipeline.
        output_dir: Folder to write to.
        options: Any flag of the command line, by the same name.

    Returns:
        The output folder.

    Raises:
        UserError: For input that cannot be used; its text is one line with the fix.
    """
    values = {"model": str(model), "output_dir": str(output_dir)} | options
    return _convert(cli.build(ConvertOptions, values, "convert"))


def _convert(options: ConvertOptions) -> Path:
    out = Path(options.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--output_dir {out}: is there already; name an empty or a new folder")
    spec = pipeline.open_pipeline(options.model, options.revision, options.variant)
    if options.format in ("peft", "kohya"):
        adapters.save_lora(
            out / adapters.LORA_FILE, adapters.read_lora_pairs(Path(options.lora[0]), _shapes(spec)), options.format
        )
        return out
    given = None if options.checkpoint is None else _checked_checkpoint(Path(options.checkpoint))
    if given is not None and given.is_file():
        weights = read_all(given, spec)
    else:
        weights = {name: read_weights(component) for name, component in spec.components.items()}
        if given is not None:
            put_checkpoint(given, weights)
    for file in options.lora:
        merge_lora(Path(file), spec, weights, options.lora_scale)
    for file in options.embeddings:
        spec = add_embeddings(Path(file), spec, weights)
    _write(spec, weights, options, out)
    return out


def _checked_checkpoint(path: Path) -> Path:
    """Refuses what is neither a file nor a checkpoint's folder.

    Raises:
        CheckpointError: Naming the checkpoints of a run, if it is the folder of one.
    """
    if not path.exists():
        raise CheckpointError(f"--checkpoint {path}: there is no such file or folder: check the path")
    if path.is_dir() and not (path / MANIFEST).exists():
        names = [folder.name for folder in committed(path)]
        if names:
            raise CheckpointError(f"--checkpoint {path}: is a run; name one of its checkpoints: {', '.join(names)}")
        raise CheckpointError(
            f"--checkpoint {path}: is no checkpoint, it has no {MANIFEST}: name a folder such as RUN/checkpoint-500 or "
            "a .safetensors file; the folder of a pipeline goes to --model"
        )
    return path


def read_weights(component: Component) -> Arrays:
    """A component's float32 weights by PyTorch name, in PyTorch's layout."""
    from flax_diffusion.modules import load_pretrained
    from flax_diffusion.weights import to_torch

    return dict(to_torch(load_pretrained(component)))


def read_all(file: Path, spec: PipelineSpec) -> dict[str, Arrays]:
    """Every component's float32 weights, from a single file, for a pipeline of its architecture.

    An autoencoder or a text encoder that the file lacks is the pipeline's own.

    Raises:
        WeightsError: If it is no such file, or does not fit.
    """
    from flax_diffusion.modules import build_modules
    from flax_diffusion.weights import from_tensors, to_torch

    models = build_modules(spec).by_name
    found = single_file.read_single_file(file, spec, {name: list(own) for name, own in _shapes(spec).items()})
    lacking = [name for name in spec.components if name not in found]
    for name in lacking:
        log.warning("%s holds no %s: that of --model is taken", file, name)
    trees = {name: from_tensors(in_memory(own), models[name].params_shape(), str(file)) for name, own in found.items()}
    own = {name: read_weights(spec.components[name]) for name in lacking}
    return own | {name: dict(to_torch(tree)) for name, tree in trees.items()}


def put_checkpoint(folder: Path, weights: dict[str, Arrays]) -> None:
    """Puts the trained weights of a checkpoint of either backend in place of a pipeline's.

    Raises:
        CheckpointError: If it is no checkpoint, or its files are not those that were written.
        WeightsError: If it is of another architecture, or of adapters.
    """
    require_whole(folder)
    arrays, _ = portable.read(folder)
    kind = "ema" if any(name.startswith("ema/") for name in arrays) else "params"
    for name, array in arrays.items():
        if not name.startswith(f"{kind}/"):
            continue
        _, component, inside = name.split("/", 2)
        if inside.endswith((".lora_A.weight", ".lora_B.weight", ".new_rows")):
            raise WeightsError(f"{folder} holds adapters: give its file by --lora or --embeddings instead")
        have = weights.get(component, {}).get(inside)
        if have is None or have.shape != array.shape:
            theirs = "nothing" if have is None else f"shape {have.shape}"
            raise WeightsError(
                f"{folder} is of another model: {component}/{inside} is {array.shape} there, the pipeline has {theirs}"
            )
        weights[component][inside] = array


def merge_lora(path: Path, spec: PipelineSpec, weights: dict[str, Arrays], scale: float) -> None:
    """Adds scale · (alpha / rank)·B·A to the weights that a LoRA adapts.

    Raises:
        WeightsError: If it does not fit the model.
    """
    for component, own in adapters.read_lora(path, _shapes(spec)).items():
        for name, delta in own.items():
            weights[component][name] = weights[component][name] + np.float32(scale) * delta


def add_embeddings(path: Path, spec: PipelineSpec, weights: dict[str, Arrays]) -> PipelineSpec:
    """Adds the words of textual inversion to the tokenizer and to the text encoder's table.

    Returns:
        The pipeline with the larger vocabulary.

    Raises:
        WeightsError: If the pipeline has no words, has these already, or is of another width.
    """
    path = path / adapters.EMBEDDINGS_FILE if path.is_dir() else path
    encoder, tokenizer = spec.text_encoder, spec.tokenizer
    if encoder is None or tokenizer is None:
        raise WeightsError(f"{path}: a {spec.kind} takes no prompts, so no new words")
    name = f"{adapters.TOKEN_EMBEDDING}.weight"
    for word, tensor in hub.read_safetensors(path).items():
        rows = np.atleast_2d(tensor.array().astype(np.float32))
        table = weights["text_encoder"][name]
        if rows.shape[1] != table.shape[1]:
            raise WeightsError(
                f"{path}: '{word}' has {rows.shape[1]} features, this text encoder {table.shape[1]}: it was learnt for "
                "another model"
            )
        first = len(tokenizer)
        tokens = adapters.tokens_of(word, len(rows))
        if tokenizer.add_tokens(list(tokens)) != len(tokens):
            raise WeightsError(f"{path}: '{word}' is in the tokenizer's vocabulary already")
        weights["text_encoder"][name] = np.concatenate([table[:first], rows])
        encoder = replace(encoder, config=encoder.config | {"vocab_size": first + len(rows)})
    return replace(spec, components=spec.components | {"text_encoder": encoder})


def _shapes(spec: PipelineSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """Of every model's parameters, by PyTorch name; no weight is read."""
    from flax_diffusion.modules import build_modules
    from flax_diffusion.weights import torch_shapes

    return {name: torch_shapes(model.params_shape()) for name, model in build_modules(spec).by_name.items()}


def _write(spec: PipelineSpec, weights: dict[str, Arrays], options: ConvertOptions, out: Path) -> None:
    """Writes a whole pipeline, or its weights as a single file."""
    from flax.serialization import msgpack_serialize
    from ml_dtypes import bfloat16

    from flax_diffusion.core.files import replacing, write_json
    from flax_diffusion.modules import build_modules
    from flax_diffusion.weights import from_tensors

    dtype = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}[options.dtype]
    if options.format == "single_file":
        cast = {name: {key: array.astype(dtype) for key, array in own.items()} for name, own in weights.items()}
        single_file.write_single_file(out / single_file.SINGLE_FILE, spec, cast)
        return
    modules = build_modules(spec)
    for name, own in weights.items():
        model = modules.by_name[name]
        tree = from_tensors(in_memory(own), model.params_shape(), options.model)
        tree = _cast(tree, dtype)
        if options.format == "diffusers":
            model.save_pretrained(out / name, tree)
            continue
        file = "flax_model.msgpack" if spec.components[name].kind.startswith("CLIP") else "diffusion_flax_model.msgpack"
        with replacing(out / name / file) as partial:
            partial.write_bytes(msgpack_serialize(tree))
        write_json(out / name / "config.json", model.saved_config(tree))
    pipeline.write_index(spec, out)


def _cast(tree: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return {key: _cast(value, dtype) if isinstance(value, dict) else value.astype(dtype) for key, value in tree.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = cli.Parser(prog="python -m flax_diffusion.convert", description=__doc__)
    cli.add_fields(parser, ConvertOptions)
    options = cli.build(ConvertOptions, parser.parse(sys.argv[1:] if argv is None else argv), "command line")
    sys.stderr.write(f"written to {_convert(options)}\n")


if __name__ == "__main__":
    cli.main_guard(main)
