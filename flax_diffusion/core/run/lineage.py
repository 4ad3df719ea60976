"""Comparison of a resumed run with its checkpoint: what must be the same, and which options have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from flax_diffusion.core.config.options import ONCE, SECRETS, SINGLE_AVERAGE, TrainConfig
from flax_diffusion.core.data.captions import Tokenize
from flax_diffusion.core.data.images.transforms import ImageTransform, shown_size
from flax_diffusion.core.data.sources.source import Source, description_of
from flax_diffusion.core.errors import CheckpointError, DataError, shown
from flax_diffusion.core.families.family import Role
from flax_diffusion.core.spec import weight_files
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training

_LOCATION_OPTIONS = ("output_dir", "logging_dir")
"""Options that say where a run is stored, not what it is."""

_MEANING = {
    "data": "its pictures, their captions or their classes",
    "base": "the weights of the model that it adapts",
    "lora": "its LoRA",
    "new_tokens": "its new word",
    "averages": "its moving averages",
}


def identity(task: str, config: TrainConfig, spec: PipelineSpec, source: Source, num_examples: int) -> dict[str, Any]:
    """Return what the batches and the meaning of the trained weights depend on.

    Args:
        task: Name of the task.
        config: Options of the run.
        spec: The models that it trains.
        source: Its examples, without those that models draw.
        num_examples: Examples per epoch.

    Returns:
        A JSON object, which is saved with each checkpoint.
    """
    made: dict[str, Any] = {"task": task}
    parts = spec.components
    if spec.trains_adapters:
        loras = {name: part.lora for name, part in parts.items() if part.lora is not None}
        made["lora"] = {
            name: {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)}
            for name, lora in loras.items()
        }
        words = {name: part.new_tokens for name, part in parts.items() if part.new_tokens is not None}
        made["new_tokens"] = {
            name: {"tokens": list(word.tokens), "initializer": word.initializer} for name, word in words.items()
        }
    if any(parts[name].training is not Training.ALL for name in spec.names_of(Role.DENOISER)):
        # What trains has a meaning only beside the weights that stay as they are.
        frozen = {name: part for name, part in parts.items() if part.training is not Training.ALL}
        made["base"] = {name: weights_digest(part) for name, part in frozen.items() if part.weights is not None}
    if spec.autoencoder_loss is None:
        made["prediction_type"] = spec.prediction_type
        if spec.objective_name is not None:
            made["objective"] = spec.objective_name
    if config.averages not in ([], [SINGLE_AVERAGE]):
        made["averages"] = config.averages
    return made | {"num_examples": num_examples, "seed": config.seed, "data": data_digest(source)}


def data_digest(source: Source) -> str:
    """Return a fingerprint of a dataset: a checksum of the names, captions and classes of up to 64 examples.

    Of examples that Python gives it takes the pictures in too, as these have no names. Two datasets of the same size
    are told apart by it.
    """
    digest, describe = hashlib.sha256(), description_of(source)
    for index in np.linspace(0, len(source) - 1, min(len(source), 64)).astype(int).tolist():
        try:
            record = describe(index)
            digest.update(repr((PurePosixPath(record.name).name, record.caption)).encode())
            if record.label is not None:
                digest.update(repr(record.label).encode())
            if record.extra is not None:
                digest.update(repr(PurePosixPath(record.extra.name).name).encode())
            digest.update(record.content.encode())
        except DataError:
            digest.update(b"unreadable")
    return digest.hexdigest()[:16]


def weights_digest(component: Component) -> str:
    """Return a fingerprint of a model's weights: a checksum of parts of its weight files, wherever these are stored."""
    assert component.weights is not None
    base = weight_files.base_name(component.kind)
    where = (component.weights, component.subfolder, component.revision)
    folder = weight_files.fetch(*where, base, component.variant)
    digest = hashlib.sha256()
    for file in weight_files.files_of(folder, base, component.variant):
        size = file.stat().st_size
        with file.open("rb") as stream:
            for place in np.linspace(0, max(0, size - 4096), 64).astype(np.int64).tolist():
                stream.seek(place)
                digest.update(stream.read(4096))
        digest.update(str(size).encode())
    return digest.hexdigest()[:16]


def posteriors_key(
    spec: PipelineSpec, config: TrainConfig, transform: ImageTransform, buckets: Sequence[tuple[int, int]] = ()
) -> dict[str, Any]:
    """Return what the posteriors of a picture's latents depend on beside the picture, as JSON.

    Args:
        spec: The pipeline.
        config: The run's options.
        transform: What happens to the picture; nothing of it is drawn at random but the flip.
        buckets: Heights and widths that pictures are divided over, in pixels; none for squares.
    """
    # Where a side is stretched nothing is cut off, so that the place of the crop makes no difference.
    picture = asdict(replace(transform, center_crop=True))
    if buckets:
        picture["bucket_resolutions"] = [shown_size(size) for size in buckets]
    return {
        "picture": picture,
        "autoencoder": _model_key(spec.components[spec.vae_name], config.seed),
        "precision": config.mixed_precision,
    }


def embeddings_key(spec: PipelineSpec, config: TrainConfig, dtype: str) -> dict[str, Any]:
    """Return what the embeddings of a prompt depend on beside the prompt, as JSON.

    Args:
        spec: The pipeline.
        config: The run's options.
        dtype: Dtype in which they are stored.
    """
    tokenize = spec.tokenize
    words = {} if tokenize is None else {name: _tokenizer_digest(own) for name, own in tokenize.by_array.items()}
    return {
        "family": spec.family.name,
        "text encoders": {
            name: _model_key(spec.components[name], config.seed) for name in spec.names_of(Role.TEXT_ENCODER)
        },
        "tokenizers": words,
        "precision": config.mixed_precision,
        "stored": dtype,
    }


def _tokenizer_digest(tokenize: Tokenize) -> str:
    settings = [getattr(tokenize, one.name) for one in fields(tokenize) if one.name != "tokenizer"]
    return hashlib.sha256(repr([tokenize.tokenizer.to_str(), *settings]).encode()).hexdigest()[:16]


def _model_key(component: Component, seed: int) -> dict[str, Any]:
    assert component.overlay is None, f"a {component.kind} whose weights are not those of its files"
    weights = f"drawn with seed {seed}" if component.weights is None else weights_digest(component)
    return {"class": component.kind, "config": component.config, "weights": weights}


def check(metadata: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Refuse to resume if the next batch, or the meaning of the weights, would differ from the first run's.

    Args:
        metadata: Metadata of the checkpoint; values that older checkpoints lack are not compared.
        now: `identity` of this run.
        name: Name of the checkpoint, for messages.

    Raises:
        CheckpointError: If they differ; the message names the first difference.
    """
    for key, value in now.items():
        was = metadata.get(key, value)
        if was != value:
            inner, was, value = _first_difference(key, was, value)
            meaning = f" ({_MEANING[key]} changed)" if key in _MEANING else ""
            raise CheckpointError(
                f"{name} was made with {inner} {shown(was)}, this run has {shown(value)}{meaning}: resume with the "
                "same, or start a new run in another --output_dir"
            )


def _first_difference(key: str, was: Any, value: Any) -> tuple[str, Any, Any]:
    while isinstance(was, dict) and isinstance(value, dict):
        key_of = next(one for one in (*value, *was) if was.get(one) != value.get(one))
        key, was, value = f"{key} {key_of}", was.get(key_of), value.get(key_of)
    return key, was, value


def changes(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """List the options that have changed since a run was started, such as "learning_rate 0.1 → 0.2".

    Args:
        saved: Values of the run's config.yaml.
        config: Options with which the run resumes.
    """
    now = recipe_values(config)
    return [
        f"{name} {shown(saved[name])} → {shown(value)}"
        for name, value in now.items()
        if name in saved and saved[name] != value and name not in _LOCATION_OPTIONS
    ]


def recipe_values(config: TrainConfig) -> dict[str, Any]:
    """Return the options that reproduce a run: all except those that hold for one start only, and secrets."""
    return config.model_dump(mode="json", exclude={*ONCE, *SECRETS})
