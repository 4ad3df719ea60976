"""Conversion of file formats: `python -m flax_diffusion.convert --model DIR [--lora FILE] … --output_dir OUT`.

It reads a pipeline in safetensors or Flax msgpack, takes the weights of a training checkpoint or of a single file of
the original Stable Diffusion, merges LoRA, and adds the words of textual inversion. It writes a pipeline in either
format, or a single file. It also converts LoRA files between PEFT's names and kohya's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from flax_diffusion.core.checkpoints import folders
from flax_diffusion.core.checkpoints.portable import Arrays
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.config import pushing
from flax_diffusion.core.drawing.models import open_model
from flax_diffusion.core.errors import CheckpointError, ConfigError, WeightsError
from flax_diffusion.core.io import publishing
from flax_diffusion.core.io.files import as_path, is_local, local_copy
from flax_diffusion.core.spec import adapters, cards, single_file, writing
from flax_diffusion.core.spec.merging import checkpoint_arrays, header_of, read_lora, with_adapters
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec
from flax_diffusion.core.spec.weight_files import in_memory

log = logging.getLogger(__name__)


class ConvertOptions(BaseModel):
    """Options of `convert`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    model: str = Field(
        description="Folder or Hub id of a Diffusers pipeline, in safetensors or Flax msgpack. Or a run of LoRA or "
        "textual inversion, or a checkpoint in a run."
    )
    output_dir: str = Field(description="Folder to write to, which must be empty or new.")
    checkpoint: str | None = Field(
        None,
        description="Weights to put into the pipeline: the folder of a training checkpoint, whose averages are taken "
        "if it has any, or a single-file checkpoint (.safetensors) of Stable Diffusion 1 or 2.",
    )
    lora: list[str] = Field(
        [],
        description="LoRA files to merge, each as PATH or PATH:STRENGTH. They have PEFT's names, Diffusers' older ones "
        "or kohya's.",
    )
    lora_scale: FiniteFloat = Field(1.0, description="Strength of all LoRA files, which multiplies each one's own.")
    embeddings: list[str] = Field(
        [], description="Files of textual inversion to add, each as PATH or PATH:WORD. WORD is the one for prompts."
    )
    format: Literal["diffusers", "flax", "single_file", "peft", "kohya"] = Field(
        "diffusers",
        description="diffusers: a pipeline in safetensors. flax: a pipeline in msgpack. single_file: one file with the "
        "original names. peft, kohya: no pipeline, but the one --lora file with these names.",
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="Dtype of the written weights.")
    revision: str | None = Field(None, description="Branch, tag or commit of the Hub id.")
    variant: str | None = Field(None, description="Variant of the weight files, such as fp16.")
    push_to_hub: pushing.PushToHub = False
    hub_model_id: pushing.HubModelId = None
    hub_private_repo: pushing.HubPrivateRepo = None
    hub_token: pushing.HubToken = None

    @model_validator(mode="after")
    def _check(self) -> ConvertOptions:
        pushing.check(self)
        if self.format in ("peft", "kohya") and (len(self.lora) != 1 or self.checkpoint or self.embeddings):
            raise ValueError(f"--format {self.format} writes one LoRA file anew: give one --lora and nothing to merge")
        return self


def convert(model: str | Path, output_dir: str | Path, **options: Any) -> Path:
    """Convert a model, as the command line does.

    Args:
        model: Folder or Hub id of a pipeline.
        output_dir: Folder to write to.
        options: Values of the command line's flags, by name.

    Returns:
        The output folder.

    Raises:
        UserError: For input that cannot be used; its message is one line with the fix.
    """
    values = {"model": str(model), "output_dir": str(output_dir)} | options
    return _convert(command_line.build(ConvertOptions, values, "convert"))


def _convert(options: ConvertOptions) -> Path:
    out = as_path(options.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--output_dir {out}: is there already; name an empty or a new folder")
    repository = _repository(options, out) if options.push_to_hub else None
    spec = _write_converted(options, out)
    if repository is not None:
        _push(options, spec, out, repository)
    return out


def _repository(options: ConvertOptions, out: Path) -> str:
    """Make the repository to push to, before anything is converted, and return it with its owner."""
    if not is_local(out):
        raise ConfigError(f"--push_to_hub: --output_dir {out} is in an object store; name a folder on this machine")
    name, token = options.hub_model_id or out.absolute().name, pushing.token_of(options)
    try:
        return publishing.check_repository(name, token=token, private=options.hub_private_repo)
    except publishing.PushError as error:
        later = "; drop --push_to_hub, and push later" if error.passing else ""
        raise ConfigError(f"--push_to_hub: {error}{later}") from error


def _push(options: ConvertOptions, spec: PipelineSpec, out: Path, repository: str) -> None:
    """Write the model card, and push the folder.

    Raises:
        WeightsError: If that fails; the message holds the command that pushes it.
    """
    facts = cards.Facts(title=repository.rpartition("/")[2], made="converted", base=options.model)
    cards.write(out, spec, facts, repository)
    token, private = pushing.token_of(options), options.hub_private_repo
    try:
        publishing.push_folder(out, repository, token=token, private=private, ignore_patterns=publishing.HIDDEN)
    except publishing.PushError as error:
        command = publishing.upload_command(out, repository, private=private, ignore_patterns=publishing.HIDDEN)
        why = publishing.reason(error, token)
        raise WeightsError(
            f"{out} is written, and not pushed to {repository} ({why}); push it by: {command}"
        ) from error


def _write_converted(options: ConvertOptions, out: Path) -> PipelineSpec:
    """Write the converted model, and return its pipeline."""
    checkpoint = _checkpoint(options.checkpoint)
    base = open_model(options.model, shapes, options.revision, options.variant)
    if options.format in ("peft", "kohya"):
        found, strength = read_lora(options.lora[0], shapes(base), base.kohya_names)
        scale = strength * options.lora_scale
        scaled = {
            name: {layer: replace(own, alpha=own.alpha * scale) for layer, own in layers.items()}
            for name, layers in found.items()
        }
        header = header_of(options.lora[0], base, options.format)
        adapters.save_lora(out / adapters.LORA_FILE, scaled, options.format, base.kohya_names, header)
        return base
    spec = with_adapters(base, shapes, options.lora, options.lora_scale, options.embeddings)
    if checkpoint is not None and not checkpoint.is_dir():
        weights = read_all(checkpoint, base)
    else:
        weights = {name: read_weights(replace(part, overlay=None)) for name, part in spec.components.items()}
        if checkpoint is not None:
            put_checkpoint(checkpoint, weights)
    for name, part in spec.components.items():
        if part.overlay is not None:
            weights[name] = part.overlay.apply(weights[name], options.model)
    _write(spec, weights, options, out)
    return spec


def _checkpoint(name: str | None) -> Path | None:
    """Return what --checkpoint names: the folder of a training checkpoint, or a local copy of a single file.

    Raises:
        CheckpointError: If it is neither; for a run, the message names its checkpoints.
    """
    if name is None:
        return None
    path = as_path(name)
    if not path.exists():
        raise CheckpointError(f"--checkpoint {path}: there is no such file or folder: check the path")
    if not path.is_dir():
        return local_copy(path.parent, (path.name,)) / path.name
    if not (path / folders.MANIFEST).exists():
        names = [folder.name for folder in folders.committed(path)]
        if names:
            raise CheckpointError(f"--checkpoint {path}: is a run; name one of its checkpoints: {', '.join(names)}")
        raise CheckpointError(
            f"--checkpoint {path}: is no checkpoint, it has no {folders.MANIFEST}: name a folder such as "
            "RUN/checkpoint-500 or a .safetensors file; the folder of a pipeline goes to --model"
        )
    return path


def shapes(spec: PipelineSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of a pipeline's parameters by component and PyTorch name; only this imports JAX."""
    from flax_diffusion.jax_backend import modules

    return modules.shapes(spec)


def read_weights(component: Component) -> Arrays:
    """Read a component's weights, float32 by PyTorch name, in PyTorch's layout."""
    from flax_diffusion.jax_backend.modules import load_pretrained
    from flax_diffusion.models.weights import to_torch

    if component.weights is None:  # a model that was made from scratch is wholly in the checkpoint
        return {}
    return dict(to_torch(load_pretrained(component)))


def read_all(file: Path, spec: PipelineSpec) -> dict[str, Arrays]:
    """Read every component's weights from a single file.

    Args:
        file: The single file.
        spec: A pipeline of the same architecture, whose own autoencoder or text encoder is read if the file lacks it.

    Returns:
        Weights by component and PyTorch name, float32.

    Raises:
        WeightsError: If it is no such file, or does not fit.
    """
    from flax_diffusion.jax_backend.modules import build_modules
    from flax_diffusion.models.weights import from_tensors, to_torch

    models = build_modules(spec).by_name
    found = single_file.read_single_file(file, spec, {name: list(own) for name, own in shapes(spec).items()})
    lacking = [name for name in spec.components if name not in found]
    for name in lacking:
        log.warning("%s holds no %s: that of --model is taken", file, name)
    trees = {
        name: from_tensors(in_memory(own), models[name].params_shape(), str(file), np.float32)
        for name, own in found.items()
    }
    own = {name: read_weights(spec.components[name]) for name in lacking}
    return own | {name: dict(to_torch(tree)) for name, tree in trees.items()}


def put_checkpoint(folder: Path, weights: dict[str, Arrays]) -> None:
    """Replace a pipeline's weights by the trained ones of a checkpoint of either backend.

    Args:
        folder: The checkpoint.
        weights: Weights by component and PyTorch name, which are changed.

    Raises:
        CheckpointError: If the folder is no checkpoint, or its files have changed since they were written.
        WeightsError: If the checkpoint is of another architecture, or holds adapters.
    """
    for component, arrays in checkpoint_arrays(folder).items():
        for name, array in arrays.items():
            if name.endswith((".lora_A.weight", ".lora_B.weight", ".new_rows")):
                raise WeightsError(
                    f"{folder} holds adapters: give it by --model, or its file by --lora or --embeddings"
                )
            have = weights.get(component, {}).get(name)
            if have is None or have.shape != array.shape:
                theirs = "nothing" if have is None else f"shape {have.shape}"
                raise WeightsError(
                    f"{folder} is of another model: {component}/{name} is {array.shape} there, the pipeline "
                    f"has {theirs}"
                )
            weights[component][name] = array


def _write(spec: PipelineSpec, weights: dict[str, Arrays], options: ConvertOptions, out: Path) -> None:
    """Write a whole pipeline, or its weights as a single file."""
    from flax.serialization import msgpack_serialize
    from ml_dtypes import bfloat16

    from flax_diffusion.core.io.files import replacing, write_json, written_folder
    from flax_diffusion.jax_backend.modules import build_modules
    from flax_diffusion.models.weights import from_tensors

    dtype = {"float32": np.float32, "float16": np.float16, "bfloat16": bfloat16}[options.dtype]
    if options.format == "single_file":
        cast = {name: {key: array.astype(dtype) for key, array in own.items()} for name, own in weights.items()}
        single_file.write_single_file(out / single_file.SINGLE_FILE, spec, cast)
        return
    modules = build_modules(spec)
    for name, own in weights.items():
        model = modules.by_name[name]
        tree = from_tensors(in_memory(own), model.params_shape(), options.model, np.float32)
        tree = _cast(tree, dtype)
        if options.format == "diffusers":
            with written_folder(out / name) as local:
                model.save_pretrained(local, tree)
            continue
        library = spec.components[name].model.library
        file = "flax_model.msgpack" if library == "transformers" else "diffusion_flax_model.msgpack"
        with replacing(out / name / file) as partial:
            partial.write_bytes(msgpack_serialize(tree))
        write_json(out / name / "config.json", model.saved_config(tree))
    writing.write_index(spec, out)


def _cast(tree: dict[str, Any], dtype: Any) -> dict[str, Any]:
    return {key: _cast(value, dtype) if isinstance(value, dict) else value.astype(dtype) for key, value in tree.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line, with the words of `argv`, or of this process for None."""
    parser = command_line.Parser(prog="python -m flax_diffusion.convert", description=__doc__)
    command_line.add_fields(parser, ConvertOptions)
    options = command_line.build(ConvertOptions, parser.parse(sys.argv[1:] if argv is None else argv), "command line")
    pushed = ", and pushed to the Hub" if options.push_to_hub else ""
    sys.stderr.write(f"written to {_convert(options)}{pushed}\n")


if __name__ == "__main__":
    command_line.main_guard(main)
