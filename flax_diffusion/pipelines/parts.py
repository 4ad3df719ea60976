"""The parts of a pipeline, as its folder names, loads and saves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax_diffusion import models, schedulers
from flax_diffusion.core.data.captions import load_tokenizer
from flax_diffusion.core.errors import WeightsError
from flax_diffusion.core.io import model_files
from flax_diffusion.models.pretrained import take_loading_keywords
from flax_diffusion.schedulers import FlaxScheduler

DIFFUSERS = {
    "AutoencoderKL": models.FlaxAutoencoderKL,
    "ControlNetModel": models.FlaxControlNetModel,
    "UNet2DConditionModel": models.FlaxUNet2DConditionModel,
}
"""Models in the manner of Diffusers, which keep no parameters, by their PyTorch class."""

TRANSFORMERS = {
    "CLIPTextModel": models.FlaxCLIPTextModel,
    "CLIPTextModelWithProjection": models.FlaxCLIPTextModelWithProjection,
    "StableDiffusionSafetyChecker": models.FlaxStableDiffusionSafetyChecker,
}
"""Models in the manner of Transformers, which may hold their parameters, by their PyTorch class."""

TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")


def load_part(name: str, path: str | Path, dtype: Any, source: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load a part of a pipeline.

    Args:
        name: Class that model_index.json names.
        path: The pipeline's folder, or its id on the Hub.
        dtype: Dtype of the computation of models of Diffusers.
        source: Subfolder, revision, variant, and where files come from.

    Returns:
        The part, and its parameters or its state; None for one that has none.

    Raises:
        WeightsError: If the class is not known.
    """
    kind = name.removeprefix("Flax")
    source = dict(source)
    if kind in DIFFUSERS:
        return DIFFUSERS[kind].from_pretrained(path, dtype, **source)
    if kind in TRANSFORMERS:
        return TRANSFORMERS[kind].from_pretrained(path, _do_init=False, **source)
    subfolder, revision = source.pop("subfolder"), source.pop("revision")
    source.pop("variant")
    hub, _ = take_loading_keywords(name, source)
    if kind in TOKENIZERS:
        return load_tokenizer(model_files.resolve(path, subfolder, revision, ["*.json", "*.txt"], hub)), None
    if kind in IMAGE_PROCESSORS:
        from transformers import CLIPImageProcessorPil

        return CLIPImageProcessorPil.from_pretrained(
            model_files.resolve(path, subfolder, revision, ["preprocessor_config.json"], hub)
        ), None
    if kind.endswith("Scheduler"):
        folder = model_files.resolve(path, subfolder, revision, ["scheduler_config.json"], hub)
        scheduler = schedulers.scheduler_from_config(folder)
        return scheduler, scheduler.create_state()
    known = [*DIFFUSERS, *TRANSFORMERS, *TOKENIZERS, *IMAGE_PROCESSORS]
    raise WeightsError(f"{path} has a {name}, which is not known: pass another part, or use one of {', '.join(known)}")


def save_part(part: Any, folder: Path, params: Any) -> None:
    """Save a part of a pipeline in PyTorch's format.

    Args:
        part: The part.
        folder: Folder to write to.
        params: Parameters of a model; not read for other parts.

    Raises:
        WeightsError: If a model has no parameters.
    """
    if isinstance(part, (*DIFFUSERS.values(), *TRANSFORMERS.values())):
        if params is None:
            raise WeightsError(f"params has no {folder.name}: give the parameters of every model of the pipeline")
        part.save_pretrained(folder, params=params)
    else:
        part.save_pretrained(folder)


def class_in_index(part: Any) -> list[Any]:
    """Return the library and the PyTorch class of a part, as model_index.json has them."""
    if part is None:
        return [None, None]
    for kind, own in DIFFUSERS.items():
        if isinstance(part, own):
            return ["diffusers", kind]
    for kind, own in TRANSFORMERS.items():
        if type(part) is own:
            return ["stable_diffusion" if kind == "StableDiffusionSafetyChecker" else "transformers", kind]
    if isinstance(part, FlaxScheduler):
        return ["diffusers", part.torch_class_name]
    name = type(part).__name__
    return ["transformers", "CLIPImageProcessor" if name in IMAGE_PROCESSORS else name]
