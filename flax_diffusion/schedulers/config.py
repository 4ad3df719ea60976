"""Scheduler configuration: typed fields, their checks, and Diffusers' `scheduler_config.json` both ways."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from flax_diffusion.core.errors import ConfigError, nearest
from flax_diffusion.core.io.untrusted import parse_json, read_text
from flax_diffusion.core.objectives import noise_schedule
from flax_diffusion.core.typed import Size, check_values

CONFIG_NAME = "scheduler_config.json"

# Keys that a configuration may hold from PyTorch schedulers without a Flax class, and two from Diffusers 0.1.
_KEYS_OF_OTHER_SCHEDULERS = frozenset({
    "disable_corrector", "noise_sampler_seed", "original_inference_steps", "predict_x0", "rho", "shift_terminal",
    "sigma_data", "sigma_schedule", "solver_p", "tensor_format", "timestep_scaling", "timestep_values",
})  # fmt: skip


class SchedulerConfig(Mapping[str, Any]):
    """Read-only configuration of a scheduler, whose values are read by key or by attribute."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_values" or name not in self._values:
            raise AttributeError(f"the scheduler config has no {name!r}; it has {', '.join(self.__dict__['_values'])}")
        return self._values[name]

    def __repr__(self) -> str:
        return f"SchedulerConfig({self._values})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlaxSchedulerConfig:
    """Fields of every scheduler class, and how configurations are read, checked and written.

    Args:
        num_train_timesteps: Number T of timesteps that the model was trained with.
        dtype: Dtype of the tables, float32 or float64. Samples in half precision are computed in float32.
    """

    num_train_timesteps: Size = 1000
    dtype: Any = jnp.float32

    torch_class_name: ClassVar[str]
    # Values that Diffusers replaces when it converts another class's configuration.
    replaced_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Remember which fields were given: for the others, a conversion takes the new class's defaults."""
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self

    def __post_init__(self) -> None:
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

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of the configuration keys, which are all fields but `dtype`."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name != "dtype")

    @property
    def config(self) -> SchedulerConfig:
        """Configuration with Diffusers' keys, and as there with `_class_name` and `_use_default_values`."""
        values = {name: getattr(self, name) for name in self.field_names()}
        not_given = [name for name in values if name not in getattr(self, "_given")]  # noqa: B009
        return SchedulerConfig({"_class_name": self.torch_class_name, **values, "_use_default_values": not_given})

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: Any = jnp.float32) -> Self:
        """Return the scheduler that a configuration describes.

        Args:
            config: Content of a `scheduler_config.json`, or the `.config` of any scheduler. Keys that belong to other
                scheduler classes are dropped, and so are keys that the other class filled with its own defaults.
            dtype: Dtype of the tables, float32 or float64.

        Returns:
            The scheduler.

        Raises:
            ConfigError: If no scheduler has a key, or this class does not support a value.

        Reference:
            `ConfigMixin.from_config` of Diffusers, which drops the same keys, and unknown ones as well.
        """
        defaulted = config.get("_use_default_values", ())
        given = {key: value for key, value in config.items() if not key.startswith("_") and key not in defaulted}
        own = set(cls.field_names())
        known = own | _KEYS_OF_OTHER_SCHEDULERS | _keys_of_all(FlaxSchedulerConfig)
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
        return cls(**kept, dtype=dtype)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `scheduler_config.json`, which Diffusers' PyTorch class reads.

        Args:
            save_directory: Folder to write to; made if it does not exist.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = {key: value for key, value in self.config.items() if key != "_use_default_values"}
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BetaScheduleConfig(FlaxSchedulerConfig):
    """Fields of all schedulers of models that were trained with a schedule of β.

    Args:
        beta_start: First β.
        beta_end: Last β.
        trained_betas: The T values of β themselves, in place of a named schedule.
        steps_offset: Number added to the timesteps of "leading" spacing.
    """

    beta_start: float = 0.0001
    beta_end: float = 0.02
    trained_betas: Sequence[float] | None = None
    steps_offset: int = 0

    # Schedulers that divide by ᾱ keep it above 0 at zero terminal SNR.
    smallest_alpha_cumprod: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(np.asarray(self.trained_betas, float).tolist()))
        super().__post_init__()
        self.numpy_alphas_cumprod()  # an impossible noise schedule is an error here, not at the first use

    def numpy_alphas_cumprod(self) -> noise_schedule.Table:
        """Return ᾱ of every training timestep, float32 (T,), computed from the configuration."""
        alpha_bar = noise_schedule.alphas_cumprod_from_config(self.config)
        if self.config.get("rescale_betas_zero_snr", False):
            alpha_bar[-1] = self.smallest_alpha_cumprod
        return alpha_bar


def read_config(
    path_or_hub_id: str | Path, subfolder: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Return the configuration in a folder, a `.json` file or a Hub repository.

    Args:
        path_or_hub_id: The file, the folder that holds `scheduler_config.json`, or a Hub id.
        subfolder: Folder inside it, such as "scheduler" in a pipeline.
        revision: Branch, tag or commit of a Hub id.

    Returns:
        The mapping in the file.

    Raises:
        ConfigError: If there is no such file, or it holds no JSON mapping.
    """
    path = Path(path_or_hub_id)
    if not path.is_file():
        if not path.is_dir():
            from flax_diffusion.core.io import model_files

            path = Path(model_files.resolve(path_or_hub_id, subfolder, revision, [CONFIG_NAME]))
        elif subfolder:
            path = path / subfolder
        path = path / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"no {CONFIG_NAME} in {path.parent}; give the scheduler's folder (subfolder='scheduler'?)")
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); restore or rewrite it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a scheduler config is a JSON object")
    return values


def _keys_of_all(base: type[FlaxSchedulerConfig]) -> set[str]:
    own = set(base.field_names())
    return own.union(*(_keys_of_all(sub) for sub in base.__subclasses__()))
