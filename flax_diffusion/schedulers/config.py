"""Diffusers' `scheduler_config.json`: reading it, values by key and by attribute, and keys of older releases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.hub_options import DEFAULT_HUB, HubOptions
from flax_diffusion.core.io.untrusted import parse_json, read_text

CONFIG_NAME = "scheduler_config.json"

KEYS_OF_OTHER_SCHEDULERS = frozenset({
    # Diffusers 0.1
    "tensor_format", "timestep_values",
    # until 0.14
    "set_alpha_to_zero",
    # PyTorch schedulers without a class here
    "alpha_cum_end", "alpha_cum_start", "beta_max", "beta_min", "clip_denoised", "corrector_order", "disable_corrector",
    "eta", "gamma_cum_end", "gamma_cum_start", "noise_sampler_seed", "num_vec_classes", "original_inference_steps",
    "predict_x0", "predictor_order", "s", "scale_factors", "scaler", "sigma_schedule", "snr_shift_scale", "solver_p",
    "tau_func", "timestep_scaling", "upscale_mode",
})  # fmt: skip
"""Keys that a configuration may hold and that no class here has."""


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


def read_config(
    path_or_hub_id: str | Path, subfolder: str | None = None, revision: str | None = None, hub: HubOptions = DEFAULT_HUB
) -> dict[str, Any]:
    """Return the configuration in a folder, a `.json` file or a Hub repository.

    Args:
        path_or_hub_id: The file, the folder that holds `scheduler_config.json`, or a Hub id.
        subfolder: Folder inside it, such as "scheduler" in a pipeline.
        revision: Branch, tag or commit of a Hub id.
        hub: How files come from the Hub.

    Returns:
        The mapping in the file.

    Raises:
        ConfigError: If there is no such file, or it holds no JSON mapping.
    """
    path = config_file(path_or_hub_id, subfolder, revision, hub)
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); restore or rewrite it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}; a scheduler config is a JSON object")
    return values


def config_file(
    path_or_hub_id: str | Path, subfolder: str | None = None, revision: str | None = None, hub: HubOptions = DEFAULT_HUB
) -> Path:
    """Return the file that `read_config` reads; for arguments and errors see there."""
    path = Path(path_or_hub_id)
    if path.is_file():
        return path
    if path.is_dir():  # as in Diffusers, a file in the folder itself stands in for a missing one of the subfolder
        places = [path / (subfolder or "") / CONFIG_NAME, path / CONFIG_NAME]
        path = places[0] if places[0].is_file() or not places[1].is_file() else places[1]
    else:
        path = Path(model_files.resolve(path_or_hub_id, subfolder, revision, [CONFIG_NAME], hub)) / CONFIG_NAME
    if not path.is_file():
        raise ConfigError(f"no {CONFIG_NAME} in {path.parent}; give the scheduler's folder (subfolder='scheduler'?)")
    return path


def with_present_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with today's keys in place of those of older releases.

    `predict_epsilon` said until Diffusers 0.10 whether a model predicts the noise or x0.
    """
    values = dict(config)
    if values.pop("predict_epsilon", True) is False:
        values.setdefault("prediction_type", "sample")
    return values
