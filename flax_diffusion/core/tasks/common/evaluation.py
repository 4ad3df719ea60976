"""Options that judge the model's pictures during training, as `evaluate` judges those of a finished model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flax_diffusion.core.config.options import Reads, TrainConfig

PREFIX = "evaluate_"
"""Start of the options' names; the rest is the name of an option of `evaluate`."""
EVERY = "evaluate_steps"


class EvaluationConfig(TrainConfig):
    """Options of tasks whose pictures can be judged while they train."""

    evaluate_steps: int | None = Field(
        None, ge=1, description="Draw pictures and judge them every so many steps, and at the end. None: never."
    )
    evaluate_metrics: list[str] = Field(["fid"], description="Metrics: fid, is, kid, precision, recall.")
    evaluate_features: Literal["inception", "pixels"] = Field(
        "inception", description="What is compared: features of the Inception network, or the pixels of small pictures."
    )
    evaluate_inception: Annotated[str | None, Reads.MODEL] = Field(
        None, description="Weights of the Inception network, a local file, as of evaluate."
    )
    evaluate_reference: Annotated[str | None, Reads.DATA] = Field(
        None, description="Real pictures to compare with, or an npz file of their statistics, as of evaluate."
    )
    evaluate_num_images: int = Field(10_000, ge=2, description="Pictures to draw, in all, for each scale of guidance.")
    evaluate_num_inference_steps: int = Field(50, ge=1, description="Denoising steps of these pictures.")
    evaluate_batch_size: int = Field(64, ge=1, description="Pictures that are drawn and judged at a time.")

    @model_validator(mode="after")
    def _check_evaluation(self) -> EvaluationConfig:
        if self.evaluate_steps is None:
            given = [name for name in sorted(self.model_fields_set) if name.startswith(PREFIX) and name != EVERY]
            changed = [name for name in given if getattr(self, name) != type(self).model_fields[name].default]
            if changed:
                raise ValueError(f"--{changed[0]} goes with --{EVERY}: add it, or drop the former")
        return self


def evaluation_options(config: EvaluationConfig, **more: Any) -> dict[str, Any] | None:
    """Return what a run evaluates, by option of `evaluate`; None for nothing.

    Args:
        config: The run's options.
        more: Further options of `evaluate`.
    """
    if config.evaluate_steps is None:
        return None
    names = [name for name in type(config).model_fields if name.startswith(PREFIX) and name != EVERY]
    return {name.removeprefix(PREFIX): getattr(config, name) for name in names} | more | {"seed": config.seed}
