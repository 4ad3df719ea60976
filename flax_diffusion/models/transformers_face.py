"""The face of Transformers' Flax models: an object that holds a Linen module, its configuration and its parameters."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_diffusion.core.errors import ConfigError, WeightsError, nearest, shown
from flax_diffusion.core.io import model_files, publishing
from flax_diffusion.core.io.files import write_json
from flax_diffusion.core.spec import weight_files
from flax_diffusion.models import transformers_files
from flax_diffusion.models.casting import FlaxCasts
from flax_diffusion.models.modeling import PretrainedModel
from flax_diffusion.models.pretrained import KEYWORDS, check_torch_format, take_loading_keywords
from flax_diffusion.models.transformers_config import (
    DEFAULTS,
    ConfigMapping,
    as_config,
    as_mapping,
    complete,
    without_common_keys,
)

Params = dict[str, Any] | FrozenDict[str, Any]

CONSTRUCTOR = ("input_shape", "seed", "gradient_checkpointing")
LOADING = ("dtype", "config", "subfolder", "revision", "variant", "ignore_mismatched_sizes", "_do_init")


class FlaxPreTrainedModel(FlaxCasts):
    """A Linen module with its configuration and parameters, called as a function.

    Attributes:
        module_class: The Linen module.
        main_input_name: Name of the first argument of a call.
        model_types: The `model_type` of the configs that are taken.
        config_part: Entry of a whole CLIP model's config that is this model's; None where there is none.
        other_parts: Starts of the names in a weights file that are other models' and not read.
        renamed: Patterns of names in files and their replacements, in order.

    Args:
        config: A config of Transformers, or a mapping such as the content of a config.json.
        input_shape: Shape of the inputs that `init_weights` is given; None for the smallest.
        seed: Seed of the first parameters.
        dtype: Dtype of the computation.
        _do_init: Whether the model draws and holds parameters; else they are passed to every call.
        gradient_checkpointing: Recompute layers in the backward pass, or parts ("minimal").
        unknown: Taken for the error alone.

    Raises:
        ConfigError: If the config is of another model, or a keyword is unknown.

    Reference:
        FlaxPreTrainedModel of Transformers 4.57.
    """

    module_class: ClassVar[type[PretrainedModel]]
    main_input_name: ClassVar[str] = "input_ids"
    base_model_prefix: ClassVar[str] = ""
    model_types: ClassVar[tuple[str, ...]] = ()
    config_part: ClassVar[str | None] = None
    other_parts: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[tuple[tuple[re.Pattern[str], str], ...]] = ()

    def __init__(
        self,
        config: Any,
        input_shape: Any = None,
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        *,
        gradient_checkpointing: Any = False,
        **unknown: Any,
    ):
        _refuse(type(self).__name__, unknown, {*CONSTRUCTOR, "config", "dtype", "_do_init"})
        self._config = self.own_config(config)
        self._checkpointing = gradient_checkpointing
        self._built: tuple[dict[str, Any], Any, dict[str, Any]] | None = None
        self.dtype = dtype
        if isinstance(self._config, ConfigMapping):
            complete(self._config, self.module.config)
        self.key = jax.random.PRNGKey(seed)
        self._is_initialized = _do_init
        self.input_shape = self.default_shape() if input_shape is None else input_shape
        self._params: dict[str, Any] = self.init_weights(self.key, self.input_shape) if _do_init else {}

    @property
    def framework(self) -> str:
        """Always "flax"."""
        return "flax"

    @property
    def config(self) -> Any:
        """The configuration: the object that was given, else a `ConfigMapping`. What is set in it counts."""
        return self._config

    @property
    def module(self) -> Any:
        """The Linen module that the configuration describes at present."""
        return self._build()[1]

    @property
    def params_shape_tree(self) -> dict[str, Any]:
        """Tree of the parameters' shapes and dtypes."""
        return self._build()[2]

    @property
    def required_params(self) -> set[tuple[str, ...]]:
        """Paths of all parameters in their tree."""
        return set(flatten_dict(self.params_shape_tree))  # pyright: ignore[reportReturnType]

    def _build(self) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """Return the module's settings, the module and its parameters' shapes, made anew if the config has changed."""
        settings = self.settings_of(as_mapping(self._config))
        settings |= {"dtype": self.dtype, "gradient_checkpointing": self._checkpointing}
        if self._built is None or self._built[0] != settings:
            module = self.module_class.from_config(settings)
            self._built = settings, module, module.params_shape()
        return self._built

    @classmethod
    def settings_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the module's fields of a configuration.

        Args:
            config: Content of this model's config.json.

        Raises:
            ConfigError: If it is of another model.
        """
        kind = config.get("model_type") or None
        if kind is not None and kind not in cls.model_types:
            raise ConfigError(
                f"{cls.__name__} takes a config of model_type {' or '.join(cls.model_types)}, this one is of {kind}: "
                "use the class of that model"
            )
        return without_common_keys(config, cls.module_class.config_fields())

    @classmethod
    def own_config(cls, config: Any) -> Any:
        """Return this model's configuration from its own, or from that of a whole model that it is part of.

        Args:
            config: A config of Transformers, or a mapping such as the content of a config.json.
        """
        config = as_config(config)
        if cls.config_part is None or getattr(config, "model_type", None) != "clip":
            return config
        return as_config(getattr(config, cls.config_part, {}))

    def default_shape(self) -> Any:
        """Return the shape of the smallest inputs."""
        return (1, 1)

    def init_inputs(self, input_shape: Any) -> tuple[Any, ...]:
        """Return the module's inputs of a shape, abstract: values do not matter to new parameters."""
        return (jax.ShapeDtypeStruct(tuple(input_shape), jnp.int32),)

    def init_weights(self, rng: jax.Array, input_shape: Any = None, params: Params | None = None) -> dict[str, Any]:
        """Draw parameters.

        Args:
            rng: JAX random key.
            input_shape: Shape of the inputs; None for the model's `input_shape`.
            params: Parameters to complete; None draws all of them.

        Returns:
            The parameter tree, float32.
        """
        params_key, dropout_key = jax.random.split(rng)
        inputs = self.init_inputs(self.input_shape if input_shape is None else input_shape)
        keys = {"params": params_key, "dropout": dropout_key}
        drawn = self.module.lazy_init(keys, *inputs)["params"]
        if params is None:
            return drawn
        whole: Any = {**flatten_dict(drawn), **flatten_dict(unfreeze(params))}  # pyright: ignore
        return unflatten_dict(whole)

    @property
    def params(self) -> dict[str, Any]:
        """The parameters.

        Raises:
            WeightsError: If the model was made with `_do_init=False`, or is given parameters that are not its own.
        """
        self._must_hold()
        return self._params

    @params.setter
    def params(self, params: Params) -> None:
        self._must_hold()
        params = unfreeze(params)
        self.check_params(params, replicated=_devices_of(params, self.params_shape_tree))
        self._params = params  # pyright: ignore[reportAttributeAccessIssue]

    def _must_hold(self) -> None:
        if not self._is_initialized:
            raise WeightsError(
                f"this {type(self).__name__} holds no parameters, it was made with _do_init=False: make them by "
                "init_weights or from_pretrained, and pass them to every call as params"
            )

    def check_params(self, params: Params, replicated: tuple[int, ...] = ()) -> None:
        """Raise WeightsError unless a tree has the names and shapes of this model's parameters.

        Args:
            params: The tree.
            replicated: Axes that all parameters have before their own.
        """
        ours: dict[tuple[str, ...], Any] = flatten_dict(self.params_shape_tree)  # pyright: ignore
        given: dict[tuple[str, ...], Any] = flatten_dict(params)  # pyright: ignore
        problems = [f"{'/'.join(path)} is missing" for path in ours if path not in given]
        problems += [f"{'/'.join(map(str, path))} is unknown" for path in given if path not in ours]
        problems += [
            f"{'/'.join(path)} has shape {np.shape(given[path])} instead of {(*replicated, *leaf.shape)}"
            for path, leaf in ours.items()
            if path in given and np.shape(given[path]) != (*replicated, *leaf.shape)
        ]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise WeightsError(
                f"the parameters are not of this {type(self).__name__}, give those of its config: "
                + "; ".join(problems[:3])
                + more
            )

    def apply(self, params: Params | None, *args: Any, dropout_rng: Any = None, **options: Any) -> Any:
        """Apply the module.

        Args:
            params: Parameters; None for the model's own.
            args: Inputs of the module.
            dropout_rng: Key of the dropout masks.
            options: Keyword arguments of the module, or of `flax.linen.Module.apply`.

        Returns:
            What the module returns.
        """
        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        params = self.params if params is None else params
        return self.module.apply({"params": params}, *args, rngs=rngs, **options)

    def outputs(self, **asked: bool | None) -> dict[str, bool]:
        """Return what a call is to return: as its arguments say, or where they are None, as the config does."""
        config = self._config
        return {
            name: bool(getattr(config, name, DEFAULTS[name])) if value is None else value
            for name, value in asked.items()
        }

    def enable_gradient_checkpointing(self) -> None:
        """Recompute layers in the backward pass instead of keeping their activations."""
        self._checkpointing = True

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: Any = jnp.float32,
        *,
        config: Any = None,
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        ignore_mismatched_sizes: bool = False,
        _do_init: bool = True,
        **options: Any,
    ) -> Any:
        """Load a model from a folder or from the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: Folder, or `owner/name` on the Hub.
            dtype: Dtype of the computation; parameters keep the file's.
            config: Configuration to use instead of the folder's, or the folder or file that holds it.
            subfolder: Folder in it, such as "text_encoder" in a pipeline folder.
            revision: Branch, tag or commit on the Hub.
            variant: Variant of the files, such as "fp16" for `….fp16.safetensors`.
            ignore_mismatched_sizes: Draw those parameters anew whose shape in the file is not the model's.
            _do_init: Whether the model holds its parameters.
            options: Arguments of the constructor; fields of the config, which they replace; and where files come from:
                `cache_dir`, `force_download`, `local_files_only`, `token`, `from_pt` and `use_safetensors`. The last
                two need not be given: files of PyTorch and of Flax are both read, and True allows only the former.

        Returns:
            The model; with `_do_init=False` the model and its parameters, in the host's memory.

        Raises:
            ConfigError: If the config is of another model, or a keyword is unknown.
            WeightsError: If files are missing or do not fit the config.
        """
        hub, torch_only = take_loading_keywords(cls.__name__, options)
        made = {name: options.pop(name) for name in CONSTRUCTOR if name in options}
        fields = {*cls.module_class.config_fields(), *DEFAULTS}
        unknown = {name: value for name, value in options.items() if name not in fields}
        _refuse(f"{cls.__name__}.from_pretrained", unknown, {*KEYWORDS, *CONSTRUCTOR, *LOADING, *fields})
        base = transformers_files.BASE
        folder = weight_files.fetch(
            pretrained_model_name_or_path, subfolder or None, revision, base, variant, ["config.json"], hub
        )
        if torch_only:
            check_torch_format(folder, base, variant)
        if config is None or isinstance(config, str | Path):
            config = model_files.read_json(_config_file(folder if config is None else Path(config)))
        config = copy.deepcopy(cls.own_config(config))
        for name, value in options.items():
            setattr(config, name, value)
        model = cls(config, dtype=dtype, _do_init=False, **made)
        params = model._read(folder, variant, ignore_mismatched_sizes)
        if not _do_init:
            return model, jax.device_put(params, jax.local_devices(backend="cpu")[0])
        model._is_initialized = True
        model.params = jax.tree.map(jnp.asarray, params)
        return model

    def _read(self, folder: Path, variant: str | None, redraw: bool) -> dict[str, Any]:
        """Return the parameters that a folder holds, those of other shapes drawn anew if allowed."""
        tensors, source = weight_files.read(folder, transformers_files.BASE, variant)
        tensors = transformers_files.own_tensors(
            tensors, self.params_shape_tree, renamed=self.renamed, other_parts=self.other_parts
        )
        params, misfits = transformers_files.fit(tensors, self.params_shape_tree, source, allow_misfits=redraw)
        if not misfits:
            return params
        drawn: dict[tuple[str, ...], Any] = flatten_dict(self.init_weights(self.key))  # pyright: ignore
        return unflatten_dict({**flatten_dict(params), **{path: drawn[path] for path in misfits}})  # pyright: ignore

    def save_pretrained(
        self,
        save_directory: str | Path,
        params: Params | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "10GB",
        token: str | bool | None = None,
        safe_serialization: bool = True,
        *,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
    ) -> None:
        """Write config.json and weights that Transformers loads.

        Args:
            save_directory: Folder to write to; made if it does not exist.
            params: Parameters, of any float dtypes, which the file keeps; None for the model's own.
            push_to_hub: Also upload the folder to the Hugging Face Hub.
            max_shard_size: Limit of one file, in bytes or such as "10GB"; larger models are split into several.
            token: Token of the Hub; None for the one that is logged in.
            safe_serialization: Write safetensors with PyTorch's names; False writes the msgpack of a Flax release.
            repo_id: `owner/name` on the Hub; None for the folder's name.
            commit_message: Message of the upload.
            private: Whether a new repository is private.

        Raises:
            WeightsError: If the parameters are not those of the model.
        """
        params = self.params if params is None else unfreeze(params)
        self.check_params(params)
        folder = Path(save_directory)
        limit = transformers_files.size_in_bytes(max_shard_size)
        transformers_files.save(folder, params, self.params_shape_tree, limit, safetensors=safe_serialization)
        write_json(folder / "config.json", self.module.saved_config(params))
        if push_to_hub:
            publishing.push_folder(
                folder, repo_id or folder.resolve().name, token=token, private=private, commit_message=commit_message
            )


def _refuse(where: str, unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ConfigError for the first of the unknown keywords, if there is one."""
    for name, value in unknown.items():
        raise ConfigError(
            f"{where} knows no keyword {name!r} (value {shown(value)}): correct or remove it{nearest(name, known)}"
        )


def _devices_of(params: Params, shapes: Any) -> tuple[int, ...]:
    """Return the axis of devices that `flax.jax_utils.replicate` gives to every parameter, (D,), or ()."""
    ranks = {path: len(leaf.shape) for path, leaf in flatten_dict(shapes).items()}  # pyright: ignore
    given: dict[Any, Any] = flatten_dict(params)  # pyright: ignore
    for path, leaf in given.items():
        if path in ranks:
            return tuple(np.shape(leaf)[:1]) if np.ndim(leaf) == ranks[path] + 1 else ()
    return ()


def _config_file(path: Path) -> Path:
    return path if path.suffix == ".json" else path / "config.json"
