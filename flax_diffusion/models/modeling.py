"""Base of all models: they are built from a config, initialised, loaded and saved, under upstream's names."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io import model_files, publishing
from flax_diffusion.core.io.files import write_json
from flax_diffusion.core.io.torch_names import from_torch_layout, torch_name, torch_shape
from flax_diffusion.core.randomness import initial_weights
from flax_diffusion.core.spec import weight_files
from flax_diffusion.core.typed import check_values
from flax_diffusion.models import weights
from flax_diffusion.models.casting import FlaxCasts
from flax_diffusion.models.pretrained import check_torch_format, take_loading_keywords, unknown_keyword

# Fields of every model that describe how to run it, not what it is; they are never saved.
RUN_FIELDS = ("parent", "name", "dtype", "param_dtype", "gradient_checkpointing")


@functools.lru_cache(maxsize=64)
def _params_shape(model: Any, widest: Any) -> dict[str, Any]:
    """Trace a model's initialisation, which takes seconds, for the shapes of its parameters.

    Args:
        model: The model, which its class and fields identify.
        widest: The widest dtype that JAX has now, float64 or float32.
    """
    inputs = model.init_inputs(model.config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs)["params"])


class Config(dict[str, Any]):
    """A model's configuration: a dict that JSON can hold, whose keys can also be read as attributes.

    Attributes:
        unsaved: Fields that can be read by name, and are not among the keys.
    """

    unsaved: Mapping[str, Any] = {}

    def __missing__(self, name: str) -> Any:
        return self.unsaved[name]

    def __getattr__(self, name: str) -> Any:
        if name in self or name in self.unsaved:
            return self[name]
        raise AttributeError(f"the config has no field {name!r}")


def freeze(value: Any) -> Any:
    """Turn lists into tuples, nested ones too: Linen fields must be hashable."""
    return tuple(freeze(item) for item in value) if isinstance(value, (list, tuple)) else value


def thaw(value: Any) -> Any:
    """Turn tuples into lists, nested ones too, as JSON has them."""
    return [thaw(item) for item in value] if isinstance(value, (list, tuple)) else value


class PretrainedModel(FlaxCasts):
    """Mixin for Linen modules whose fields are the config keys of a PyTorch class.

    Methods have the names and arguments of Diffusers 0.39.

    Attributes:
        torch_class: Name of the PyTorch class whose files the model reads and writes.
        former_classes: Names that the PyTorch class had in older files.
        weights_name: Base name of the weights file, without extension.
        ignored_keys: Config keys that describe the file, or a behaviour that the models here do not have.
        unsaved: Fields of Diffusers' Flax class that the PyTorch class has not; they are read and not saved.
        allowed: Config fields of which only some values are supported.
    """

    torch_class: ClassVar[str]
    former_classes: ClassVar[tuple[str, ...]] = ()
    weights_name: ClassVar[str] = "diffusion_pytorch_model"
    ignored_keys: ClassVar[frozenset[str]] = frozenset()
    unsaved: ClassVar[tuple[str, ...]] = ()
    allowed: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def __post_init__(self) -> None:
        for field in self.config_fields():
            object.__setattr__(self, field, freeze(getattr(self, field)))
        config = self.config
        checked = (*self.config_fields(), *self.unsaved, "gradient_checkpointing")
        check_values(type(self), {field: getattr(self, field) for field in checked})
        for field, values in self.allowed.items():
            if config[field] not in values:
                raise ConfigError(
                    f"{type(self).__name__} does not support {field}={config[field]!r}: choose one of "
                    + ", ".join(repr(value) for value in values)
                )
        self.check(config)
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]  (Linen's)

    @classmethod
    def config_fields(cls) -> list[str]:
        """Return the names of the fields that the config holds."""
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        return [field.name for field in fields if field.name not in (*RUN_FIELDS, *cls.unsaved)]

    @staticmethod
    def check(config: Config) -> None:
        """Raise ConfigError where fields contradict each other."""

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        raise NotImplementedError

    @property
    def config(self) -> Config:
        """Configuration with every field; those that are not saved can be read, and are not among its keys."""
        config = Config({name: thaw(getattr(self, name)) for name in self.config_fields()})
        config.unsaved = {name: thaw(getattr(self, name)) for name in self.unsaved}
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """Build the model that a configuration describes.

        Args:
            config: Content of a config.json; keys that start with an underscore are metadata.
            return_unused_kwargs: Also return the overrides that the model does not know, in place of an error.
            overrides: Fields that replace the config's, and `dtype`, `param_dtype`, `gradient_checkpointing`.

        Returns:
            The model; with `return_unused_kwargs` the model and a dictionary.

        Raises:
            ConfigError: If the model does not know a key or a value, or the config is of another class.
        """
        declared = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        if declared is not None and str(declared).removeprefix("Flax") not in (cls.torch_class, *cls.former_classes):
            raise ConfigError(f"the config is of a {declared}, not of a {cls.torch_class}: use the class it names")
        known = [*cls.config_fields(), *RUN_FIELDS[2:], *cls.unsaved]
        fields, unused = {}, {}
        for key, value in {**config, **overrides}.items():
            if key in known:
                fields[key] = value
            elif key.startswith("_") or key in cls.ignored_keys:
                continue
            elif return_unused_kwargs and key in overrides:
                unused[key] = value
            else:
                raise unknown_keyword(cls.__name__, key, value, known)
        model = cls(**fields)
        return (model, unused) if return_unused_kwargs else model

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        return_unused_kwargs: bool = False,
        **options: Any,
    ) -> Any:
        """Read the configuration of a saved model.

        Args:
            pretrained_model_name_or_path: Folder, or `owner/name` on the Hub.
            subfolder: Folder in it.
            revision: Branch, tag or commit on the Hub.
            return_unused_kwargs: Also return the options that do not say how to load, in place of an error.
            options: `cache_dir`, `force_download`, `local_files_only` and `token` of the Hub.

        Returns:
            Content of config.json; with `return_unused_kwargs` that and a dictionary.

        Raises:
            ConfigError: If an option is not known.
            WeightsError: If there is no configuration.
        """
        hub, _ = take_loading_keywords(cls.__name__, options)
        for name, value in {} if return_unused_kwargs else options.items():
            raise unknown_keyword(cls.__name__, name, value, ())
        folder = model_files.resolve(pretrained_model_name_or_path, subfolder, revision, ["config.json"], hub)
        config = model_files.read_json(folder / "config.json")
        return (config, options) if return_unused_kwargs else config

    def params_shape(self) -> dict[str, Any]:
        """Return the tree of the parameters' shapes and dtypes, without computing anything."""
        alone = {"parent": None, "dtype": jnp.float32, "gradient_checkpointing": False}  # which they do not depend on
        model = self.clone(**alone)  # pyright: ignore[reportAttributeAccessIssue]  (Linen's)
        return jax.tree.map(lambda leaf: leaf, _params_shape(model, jax.dtypes.canonicalize_dtype("float64")))

    def init_weights(self, rng: jax.Array | int) -> dict[str, Any]:
        """Return newly initialised parameters, distributed as `core.randomness.initial_weights` says for each class.

        Args:
            rng: JAX random key, or a seed. The weights are drawn on the host, which jitted code calls back.

        Returns:
            The parameter tree in `param_dtype`: NumPy arrays, JAX's under jit. A seed gives the same ones on every
            backend.
        """
        if isinstance(rng, Tracer):
            seed = jax.random.bits(rng, dtype="uint32")
            return jax.pure_callback(self._draw, self.params_shape(), seed, vmap_method="sequential")
        return self._draw(rng if isinstance(rng, int) else jax.random.bits(rng, dtype="uint32"))

    def _draw(self, seed: Any) -> dict[str, Any]:
        """Return the parameters of a seed as NumPy arrays."""
        flat: dict[tuple[str, ...], Any] = flatten_dict(self.params_shape())  # pyright: ignore[reportAssignmentType]
        params = {}
        for path, leaf in flat.items():
            shape = torch_shape(path, leaf.shape)
            values = initial_weights.draw(int(seed), self.torch_class, self.config, torch_name(path), shape)
            params[path] = np.array(from_torch_layout(path, values, values.ndim), leaf.dtype, order="C")
        return unflatten_dict(params)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        dtype: Any = jnp.float32,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        param_dtype: Any = None,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> tuple[Self, dict[str, Any]]:
        """Load a model and its weights from a folder or from the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: Folder, or `owner/name` on the Hub.
            dtype: Dtype of the computation.
            subfolder: Folder in it, such as "unet" in a pipeline folder.
            revision: Branch, tag or commit on the Hub.
            variant: Variant of the files, such as "fp16" for `….fp16.safetensors`.
            param_dtype: Dtype of the parameters; None for that of the file.
            config: Configuration to use in place of the folder's.
            options: Fields that replace the config's; `gradient_checkpointing`; and where files come from:
                `cache_dir`, `force_download`, `local_files_only`, `token`, `from_pt` and `use_safetensors`. The last
                two need not be given: files of PyTorch and of Flax are both read, and True allows only the former.

        Returns:
            The model, and its parameters as NumPy arrays.

        Raises:
            ConfigError: If the model does not support the config, or an option is not known.
            WeightsError: If files are missing or do not fit the config.
        """
        hub, torch_only = take_loading_keywords(cls.__name__, options)
        source = (pretrained_model_name_or_path, subfolder, revision)
        folder = weight_files.fetch(*source, cls.weights_name, variant, ["config.json"], hub)
        if torch_only:
            check_torch_format(folder, cls.weights_name, variant)
        config = model_files.read_json(folder / "config.json") if config is None else config
        model = cls.from_config(config, dtype=dtype, **options)
        return model, weights.load(folder, model.params_shape(), cls.weights_name, variant, param_dtype)

    def save_pretrained(
        self,
        save_directory: str | Path,
        params: Mapping[str, Any],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        *,
        max_shard_bytes: int = weights.MAX_SHARD_BYTES,
        repo_id: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> None:
        """Write config.json and safetensors that Diffusers or Transformers load.

        Args:
            save_directory: Folder to write to; made if it does not exist.
            params: Parameter tree, of any float dtype, which the file keeps.
            is_main_process: Write; False does nothing, for all processes of a run but one.
            push_to_hub: Also upload the folder to the Hub.
            max_shard_bytes: Limit of one file; larger models are split into several.
            repo_id: Repository on the Hub; None for the folder's name.
            token: Token of the Hub; None for the one of the log-in.
            private: Make a new repository private; None for the owner's default.
            create_pr: Open a pull request in place of a commit.
            commit_message: Message of the commit on the Hub.

        Raises:
            WeightsError: If the parameters do not fit the model, or the Hub refuses.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        self.save_files(folder, params, max_shard_bytes)
        if push_to_hub:
            publishing.push_folder(
                folder,
                repo_id or folder.resolve().name,
                token=token,
                private=private,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    def save_files(
        self, folder: Path, params: Mapping[str, Any], max_shard_bytes: int = weights.MAX_SHARD_BYTES
    ) -> None:
        """Write config.json and safetensors, as `save_pretrained` does, of a model that Diffusers may not have.

        Args:
            folder: Folder to write to; made if it does not exist.
            params: Parameter tree.
            max_shard_bytes: Limit of one file.

        Raises:
            WeightsError: If the parameters do not fit the model.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights.save(folder, params, self.params_shape(), self.weights_name, max_shard_bytes)
        write_json(folder / "config.json", self.saved_config(params))

    def save_config(self, save_directory: str | Path) -> None:
        """Write config.json alone.

        Args:
            save_directory: Folder to write to; made if it does not exist.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(save_directory) / "config.json")

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write the configuration to a file.

        Args:
            json_file_path: The file, in a folder that exists.
        """
        write_json(Path(json_file_path), {"_class_name": self.torch_class, **self.config})

    def to_json_string(self) -> str:
        """Return the content of config.json."""
        return json.dumps({"_class_name": self.torch_class, **self.config}, indent=2, sort_keys=True) + "\n"

    def saved_config(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of config.json for these parameters."""
        return {"_class_name": self.torch_class, **self.config}
