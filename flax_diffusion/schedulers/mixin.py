"""Base class of all schedulers: typed fields, their checks, and the calls that read and write configurations."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, overload

import jax
import jax.numpy as jnp
import numpy as np

from flax_diffusion.core.errors import ConfigError, nearest
from flax_diffusion.core.io.hub_options import HUB_KEYWORDS, take_hub_options
from flax_diffusion.core.io.publishing import push_folder
from flax_diffusion.core.objectives import noise_schedule
from flax_diffusion.core.objectives.old_schedulers import with_present_keys
from flax_diffusion.core.typed import Size, check_values
from flax_diffusion.schedulers.config import (
    CONFIG_NAME,
    KEYS_OF_OTHER_SCHEDULERS,
    SchedulerConfig,
    config_file,
    read_config,
)

_WITHOUT_EFFECT = ("output_loading_info", "user_agent")
"""Keywords that loading a configuration takes in Diffusers too, where they change nothing that it returns."""


class FlaxKarrasDiffusionSchedulers(Enum):
    """Schedulers that can stand in for each other on the same configuration; for type annotations."""

    FlaxDDIMScheduler = 1
    FlaxDDPMScheduler = 2
    FlaxPNDMScheduler = 3
    FlaxLMSDiscreteScheduler = 4
    FlaxDPMSolverMultistepScheduler = 5
    FlaxEulerDiscreteScheduler = 6


class FlaxSchedulerMixin:
    """Base class of all schedulers, which are frozen dataclasses.

    Fields that Diffusers' Flax class has come first, in its order, and may be given by position; the others have names
    only. Every field but `dtype` is a key of the configuration.

    Attributes:
        dtype: Dtype of the tables, float32 or float64. Samples in half precision are computed in float32.
    """

    dtype: Any

    torch_class_name: ClassVar[str]
    # Values that Diffusers replaces when it converts another class's configuration.
    replaced_values: ClassVar[Mapping[str, Mapping[str, str | None]]] = {}
    config_name: ClassVar[str] = CONFIG_NAME
    ignore_for_config: ClassVar[list[str]] = ["dtype"]
    has_state: ClassVar[bool] = True
    has_compatibles: ClassVar[bool] = True
    _compatibles: ClassVar[list[str]] = []

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Remember which fields were given: for the others, a conversion takes the new class's defaults."""
        self = super().__new__(cls)
        fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]  # every scheduler is a dataclass
        names = [field.name for field in fields]
        for name in given:
            if name not in names:
                raise ConfigError(f"{cls.__name__} has no field {name!r}: correct or remove it{nearest(name, names)}")
        positional = [field.name for field in fields if not field.kw_only]
        object.__setattr__(self, "_given", frozenset([*given, *positional[: len(args)]]))
        return self

    def __post_init__(self) -> None:
        for name in self.field_names():  # NumPy's and JAX's scalars stand for Python's
            value = getattr(self, name)
            if isinstance(value, (np.generic, np.ndarray, jax.Array)) and value.ndim == 0:
                object.__setattr__(self, name, value.item())
        check_values(type(self), {name: getattr(self, name) for name in self.field_names()})
        if self.dtype not in (jnp.float32, jnp.float64):
            raise ConfigError(
                f"dtype is {jnp.dtype(self.dtype).name}; scheduler tables need float32 or float64 (samples may be "
                "bfloat16)"
            )
        if self.dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
            raise ConfigError("dtype is float64 but JAX's 64-bit mode is off; set JAX_ENABLE_X64=1 or use float32")
        self._check_combination()

    def _check_combination(self) -> None:
        """Raise ConfigError where two fields contradict each other."""

    def create_state(self) -> Any:
        """Return the state before `set_timesteps`; each scheduler has its own class."""
        raise NotImplementedError

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of the configuration keys, which are all fields but `dtype`."""
        if not dataclasses.is_dataclass(cls):
            return ()
        return tuple(field.name for field in dataclasses.fields(cls) if field.name != "dtype")

    @property
    def config(self) -> SchedulerConfig:
        """Configuration with Diffusers' keys, and as there with `_class_name` and `_use_default_values`."""
        values = {name: getattr(self, name) for name in self.field_names()}
        not_given = [name for name in values if name not in getattr(self, "_given")]  # noqa: B009
        return SchedulerConfig({"_class_name": self.torch_class_name, **values, "_use_default_values": not_given})

    @property
    def compatibles(self) -> list[type[FlaxSchedulerMixin]]:
        """Scheduler classes that take this one's configuration, itself included."""
        return self._get_compatibles()

    @classmethod
    def _get_compatibles(cls) -> list[type[FlaxSchedulerMixin]]:
        package = importlib.import_module("flax_diffusion.schedulers")
        return [getattr(package, name) for name in dict.fromkeys([cls.__name__, *cls._compatibles])]

    @overload
    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | str | Path, return_unused_kwargs: Literal[False] = False, **kwargs: Any
    ) -> Self: ...

    @overload
    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | str | Path, return_unused_kwargs: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | str | Path, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Return the scheduler that a configuration describes.

        Args:
            config: Content of a `scheduler_config.json`, or the `.config` of any scheduler, or where it is saved. Keys
                that belong to other scheduler classes are dropped, and so are keys that the other class filled with its
                own defaults.
            return_unused_kwargs: Return a second value: the keywords and keys that the class has no use for.
            kwargs: Fields that replace those of the configuration, and `dtype`.

        Returns:
            The scheduler.

        Raises:
            ConfigError: If no scheduler has a key, this class does not support a value, or it has no such keyword.

        Reference:
            `ConfigMixin.from_config` of Diffusers, which drops the same keys, and unknown ones as well.
        """
        if isinstance(config, (str, Path)):
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        assert isinstance(config, Mapping)
        hidden = ["_class_name"] if type(config) is SchedulerConfig else []
        config = with_present_keys(config)
        defaulted = config.get("_use_default_values", ())
        given = {key: value for key, value in config.items() if not key.startswith("_") and key not in defaulted}
        given = cls.present_values(given)
        own = set(cls.field_names())
        known = own | KEYS_OF_OTHER_SCHEDULERS | _keys_of_all(FlaxSchedulerMixin)
        for key in given:
            if key not in known:
                raise ConfigError(
                    f"{cls.torch_class_name} config: unknown key {key!r}, correct or remove it"
                    f"{nearest(key, sorted(own))}"
                )
        replaced = cls.replaced_values
        kept: dict[str, Any] = {}
        for key in own & set(given):
            value = given[key]
            kept[key] = replaced.get(key, {}).get(value, value) if isinstance(value, str) else value
        own.add("dtype")
        kept |= {key: value for key, value in kwargs.items() if key in own}
        unused = {key: value for key, value in kwargs.items() if key not in own}
        if return_unused_kwargs:
            used = {*kept, *defaulted, *hidden, "_use_default_values"}
            return cls(**kept), unused | {key: value for key, value in config.items() if key not in used}
        for key in unused:
            raise ConfigError(
                f"{cls.__name__} has no keyword {key!r}: correct or remove it"
                f"{nearest(key, [*sorted(own), *HUB_KEYWORDS, 'subfolder', 'revision', 'return_unused_kwargs'])}"
            )
        return cls(**kept)

    @classmethod
    def present_values(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return the keys of a configuration with what its release took for granted and the class asks for today."""
        return given

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | Path,
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return a saved configuration.

        Args:
            pretrained_model_name_or_path: Folder, `scheduler_config.json` or Hub id.
            return_unused_kwargs: Return, after it, the keywords that loading has no use for.
            return_commit_hash: Return, last, the commit of a file from the Hub, or None.
            kwargs: `subfolder`, "scheduler" in a pipeline; `revision`, a branch, tag or commit of a Hub id; and for the
                Hub `cache_dir`, `force_download`, `proxies`, `local_files_only` and `token`.

        Returns:
            The mapping in the file; a tuple where more is asked for.

        Raises:
            ConfigError: See `read_config`; and for an unknown keyword, unless it is to be returned.
        """
        where = {key: kwargs.pop(key) for key in ("subfolder", "revision") if key in kwargs}
        where["hub"] = take_hub_options(f"{cls.__name__}.load_config", kwargs)
        rest = {key: value for key, value in kwargs.items() if key not in _WITHOUT_EFFECT}
        if rest and not return_unused_kwargs:
            key = next(iter(rest))
            known = ["subfolder", "revision", *HUB_KEYWORDS]
            raise ConfigError(f"load_config has no keyword {key!r}: correct or remove it{nearest(key, known)}")
        outputs: list[Any] = [read_config(pretrained_model_name_or_path, **where)]
        if return_unused_kwargs:
            outputs.append(rest)
        if return_commit_hash:
            file = config_file(pretrained_model_name_or_path, **where)
            commit = re.search(r"/snapshots/([0-9a-f]{40})/", file.as_posix())
            outputs.append(commit and commit[1])
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Return the scheduler of a saved configuration and its first state.

        Args:
            pretrained_model_name_or_path: Folder, `scheduler_config.json` or Hub id.
            subfolder: Folder inside it, "scheduler" in a pipeline.
            return_unused_kwargs: Return a third value: the keywords and keys that the class has no use for.
            kwargs: Fields that replace those of the configuration, `dtype`, and the keywords of `load_config`.

        Returns:
            The scheduler and its state before `set_timesteps`.

        Raises:
            ConfigError: See `load_config` and `from_config`.
        """
        config, kwargs = cls.load_config(
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, **kwargs
        )
        if return_unused_kwargs:
            scheduler, unused = cls.from_config(config, return_unused_kwargs=True, **kwargs)
            return scheduler, scheduler.create_state(), unused
        scheduler = cls.from_config(config, **kwargs)
        return scheduler, scheduler.create_state()

    def to_json_string(self) -> str:
        """Return the content of `scheduler_config.json`."""
        values = {key: value for key, value in self.config.items() if key != "_use_default_values"}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write the content of `scheduler_config.json` to a file.

        Args:
            json_file_path: The file, in a folder that exists.
        """
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `scheduler_config.json`, which Diffusers' PyTorch class reads.

        Args:
            save_directory: Folder to write to; made if it does not exist.
            push_to_hub: Put the file on the Hub as well.
            kwargs: For the Hub: `repo_id`, by default the folder's name, and the keywords of the method `push_to_hub`.

        Raises:
            ConfigError: If the folder is a file, or there are keywords without `push_to_hub`.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ConfigError(f"{folder} is a file; name a folder to save the scheduler in")
        if kwargs and not push_to_hub:
            raise ConfigError(f"{', '.join(kwargs)} is for the Hub: add push_to_hub=True or leave it out")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / CONFIG_NAME)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `scheduler_config.json`; for arguments and errors see `save_config`."""
        self.save_config(save_directory, push_to_hub, **kwargs)

    def push_to_hub(self, repo_id: str, commit_message: str | None = None, **kwargs: Any) -> str:
        """Put `scheduler_config.json` in a repository on the Hub and return the address of the commit.

        Args:
            repo_id: Name of the repository, which is made if it does not exist; without an owner, the user's own.
            commit_message: Message of the commit.
            kwargs: `private`, `token`, `create_pr` and `subfolder`.

        Raises:
            ConfigError: For another keyword.
        """
        known = ["private", "token", "create_pr", "subfolder"]
        for key in kwargs:
            if key not in known:
                raise ConfigError(f"push_to_hub has no keyword {key!r}: correct or remove it{nearest(key, known)}")
        where, message = kwargs.pop("subfolder", None), commit_message or "Upload scheduler"
        with tempfile.TemporaryDirectory() as folder:
            self.save_config(folder)
            return push_folder(Path(folder), repo_id, commit_message=message, path_in_repo=where, **kwargs)


@dataclasses.dataclass(frozen=True)
class BetaScheduleConfig(FlaxSchedulerMixin):
    """Fields of all schedulers of models that were trained with a schedule of β.

    Args:
        num_train_timesteps: Number T of timesteps that the model was trained with.
        beta_start: First β.
        beta_end: Last β.
        beta_schedule: Name of the noise schedule.
        trained_betas: The T values of β themselves, in place of a named schedule.
    """

    num_train_timesteps: Size = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | None = None

    # Schedulers that divide by ᾱ keep it above 0 at zero terminal SNR.
    smallest_alpha_cumprod: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(np.asarray(self.trained_betas, float).tolist()))
        super().__post_init__()
        self.numpy_alphas_cumprod()  # an impossible noise schedule is an error here, not at the first use

    def __len__(self) -> int:
        return self.num_train_timesteps

    def numpy_alphas_cumprod(self) -> noise_schedule.Table:
        """Return ᾱ of every training timestep, float32 (T,), computed from the configuration."""
        alpha_bar = noise_schedule.alphas_cumprod_from_config(self.config)
        if self.config.get("rescale_betas_zero_snr", False):
            alpha_bar[-1] = self.smallest_alpha_cumprod
        return alpha_bar


def _keys_of_all(base: type[FlaxSchedulerMixin]) -> set[str]:
    own = set(base.field_names())
    return own.union(*(_keys_of_all(sub) for sub in base.__subclasses__()))
