"""What the folder of a pipeline or of a model says that it is."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_diffusion.core.errors import WeightsError, naming, shown
from flax_diffusion.core.families.family import FAMILIES, Family, family_of
from flax_diffusion.core.io import model_files
from flax_diffusion.core.objectives.old_schedulers import with_present_keys

if TYPE_CHECKING:
    from flax_diffusion.core.spec.pipeline import Component

log = logging.getLogger(__name__)

FLAX_ONLY_KEYS = frozenset({"split_head_dim", "use_memory_efficient_attention"})
"""Config keys of the Flax releases' UNets: how they computed attention, with one result whatever the value."""
CLASS_NAMES = "id2label"
"""Entry of model_index.json with the names of classes by number."""
_LISTED_AS = "_listed_as"


def model_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a config.json says of the model itself, without notes of the program that wrote it."""
    left_out = FLAX_ONLY_KEYS
    models = [model for family in FAMILIES.values() for model in family.models.values()]
    former = {name: model for model in models for name in model.former_names}
    if (model := former.get(str(values.get("_class_name")))) is not None:
        left_out = left_out.union(model.former_keys)
    if values.get("_class_name") == "FlaxControlNetModel":
        left_out |= {"sample_size", "dropout"}  # which PyTorch's class has not
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in left_out}


def read_scheduler(folder: Path) -> dict[str, Any]:
    """Read the scheduler_config.json of any release, and put what it says into the keys of today.

    Args:
        folder: Local folder of the scheduler.

    Returns:
        The config, of the same class.

    Raises:
        WeightsError: If there is no such file.
    """
    values = model_files.read_json(folder / "scheduler_config.json")
    return with_present_keys(values)


def read_index(source: str, revision: str | None = None) -> dict[str, Any]:
    """Read a pipeline's model_index.json; an empty mapping where it has none.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.

    Returns:
        The index, with the kind that is known here as its class: `FlaxStableDiffusionPipeline` and the pipelines that
        change images are made of the parts of a StableDiffusionPipeline. `listed_as` still knows the class in the file.
    """
    folder = model_files.resolve(source, None, revision, allow_patterns=["model_index.json", "config.json"])
    if not (folder / "model_index.json").is_file():
        return {}
    index = model_files.read_json(folder / "model_index.json")
    kind = str(index.get("_class_name")).removeprefix("Flax")
    same = {other: own for family in FAMILIES.values() for other, own in family.same_parts.items()}
    return index | {"_class_name": same.get(kind, kind), _LISTED_AS: kind}


def listed_as(index: dict[str, Any]) -> str:
    """Return the class of PyTorch's pipelines that an index was written for, if all its models are read here."""
    return index["_class_name"] if _models_left_out(index) else index[_LISTED_AS]


def _models_left_out(index: dict[str, Any]) -> list[str]:
    """Return the names of models, such as a ControlNet, that a pipeline of a known kind has beside its parts."""
    kind = index["_class_name"]
    pipeline = family_of(kind).pipelines[kind]
    known = {*pipeline.parts, *pipeline.tokenizers, *pipeline.index, *pipeline.settings, "scheduler"}
    return [name for name, value in index.items() if isinstance(value, list) and any(value) and name not in known]


def settings(index: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a pipeline that its index has."""
    known = family_of(index["_class_name"]).pipelines[index["_class_name"]].settings
    return {name: index[name] for name in known if name in index}


def classes(index: Mapping[str, Any], denoiser: Component) -> tuple[str, ...]:
    """Return the names of the classes that a pipeline's denoiser is told.

    Args:
        index: Its model_index.json.
        denoiser: The model.

    Returns:
        The names by number, with the number for a class without a name; empty where it is told no class.

    Raises:
        WeightsError: If there are names of classes that the model does not have.

    Reference:
        `id2label` of Diffusers' DiTPipeline.
    """
    table = family_of(index["_class_name"]).class_table
    rows = None if table is None else table.rows(denoiser)
    if table is None or rows is None:
        return ()
    named = index.get(CLASS_NAMES) or {}
    has_null = not table.counts_null or len(named) == rows - 1
    numbers = [str(number) for number in range(rows - has_null)]
    wrong = [number for number in named if number not in numbers] if isinstance(named, dict) else [shown(named)]
    if wrong:
        raise WeightsError(
            f"model_index.json: {CLASS_NAMES} has {wrong[0]}, and the model has {len(numbers)} classes: it must map "
            f"numbers from 0 to {len(numbers) - 1} to names"
        )
    return tuple(str(named.get(number, number)) for number in numbers)


def has_part(index: dict[str, Any], name: str) -> bool:
    """Whether an index names a class for a part, which an empty pair does not."""
    return index.get(name) not in (None, [None, None])


def check_kind(source: str, revision: str | None, families: Collection[Family]) -> dict[str, Any]:
    """Refuse a source that is no pipeline of the right kind. A folder of parts without an index is not refused.

    Models beside the parts of such a pipeline are left out, with a warning.

    Args:
        source: Folder or Hub id.
        revision: Branch, tag or commit of a Hub id.
        families: Those that have the right ones.

    Returns:
        The index; empty where the folder has none.

    Raises:
        WeightsError: If it is of another kind, or a model by itself.
    """
    index = read_index(source, revision)
    if index and not any(index["_class_name"] in family.pipelines for family in families):
        raise WeightsError(f"{source} is a {index['_class_name']}: {_fix(families)}")
    if index:
        with naming(source):
            family_of(index["_class_name"]).check_index(index)
    for name in _models_left_out(index) if index else ():
        log.warning("%s: its %r is left out, the rest is used as a %s", source, name, index["_class_name"])
    if not index:
        lone = (
            model_files.resolve(source, None, revision, allow_patterns=["model_index.json", "config.json"])
            / "config.json"
        )
        if lone.is_file():
            values = model_files.read_json(lone)
            found = values.get("_class_name") or " ".join(map(str, values.get("architectures") or ["model"]))
            raise WeightsError(f"{source} is a {found} by itself, not a pipeline: {_fix(families)}")
    return index


def _fix(families: Collection[Family]) -> str:
    titles = [family.title for family in families if family.title]
    kinds = [kind for family in families for kind in family.pipelines]
    return f"use {' or '.join(titles) if len(titles) == len(families) else 'one of ' + ', '.join(kinds)}"
