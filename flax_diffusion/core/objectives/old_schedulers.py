"""What scheduler configs of older releases say, in the keys of today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DROPPED = frozenset({"tensor_format", "timestep_values"})  # of Diffusers 0.1; they change nothing


def with_present_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scheduler config of any release in the keys of today.

    Diffusers up to 0.10 said `predict_epsilon` for `prediction_type`. FlaxDPMSolverMultistepScheduler always ended at
    the noise level of timestep 0, which PyTorch's class does for `final_sigmas_type` "sigma_min" only.

    Args:
        config: Content of a scheduler_config.json.
    """
    values = {key: value for key, value in config.items() if key not in _DROPPED}
    if isinstance(predicts_epsilon := values.get("predict_epsilon"), bool):
        del values["predict_epsilon"]
        values = {"prediction_type": "epsilon" if predicts_epsilon else "sample"} | values
    if values.get("_class_name") == "FlaxDPMSolverMultistepScheduler":
        values = {"final_sigmas_type": "sigma_min"} | values
    return values
