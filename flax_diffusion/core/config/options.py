"""Options that every task has; a task's own options are in the task's file.

Options have the names of the flags of the Diffusers training scripts, so that their commands keep working, and a YAML
file has the same names. `cli.command_line` fills these classes from file and flags. The rules between options are in
the `_check…` of the class that has these options.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from flax_diffusion.core.config import profiling, pushing
from flax_diffusion.core.errors import SECRET
from flax_diffusion.core.typed import Checkpointing

LrScheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant"
]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

CONFIG_FILE = "config.yaml"
"""File in a run's folder that holds its options."""

ONCE = ("overwrite_output_dir", "resume_from_checkpoint", "repeat_step", "quiet", "log_level")
"""Options that hold for one start of a run. The run's config.yaml, which reproduces the run, leaves them out."""
SECRETS = ("hub_token",)
"""Options that no file keeps."""


EXAMPLES = "<examples of train()>"
"""What an option that names data holds where `train` is given examples in Python, which no option can name."""

SINGLE_AVERAGE = "ema"
"""Name of the moving average of `use_ema` alone, whose weights have no further name in checkpoints."""

MAX_SIGMA_REL = 12**-0.5
"""Relative width of the power-function average of exponent 0, the mean of all weights so far."""


class Reads(Enum):
    """Mark of an option that names an input of the run, which may be a folder or a file on this machine."""

    MODEL = "a model, or a part of one"
    DATA = "data, or their name"
    DATA_FOLDER = "a folder of data, there or not"
    DATA_FOLDERS = "folders of data as `data.combined.folders_of` reads them, there or not"


def named_inputs(options: BaseModel) -> Iterator[tuple[str, Reads, str]]:
    """Yield name, mark and value of each option that names an input of the run, also inside lists of mappings.

    Examples that Python gives have no name, and are left out.
    """
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        marks = [mark for mark in field.metadata if isinstance(mark, Reads)]
        if marks and isinstance(value, str) and value != EXAMPLES:
            yield name, marks[0], value
        for inner in value if isinstance(value, list) else ():
            if isinstance(inner, BaseModel):
                yield from named_inputs(inner)


def also(*names: str) -> AliasChoices:
    """Return the spellings of a field: first its own name, then those of other Diffusers scripts."""
    return AliasChoices(*names)


def average_of(sigma_rel: float) -> str:
    """Return the name of the power-function average of a relative width."""
    return f"ema_sigma_rel_{sigma_rel}"


class TrainConfig(BaseModel):
    """Options that all tasks share. A task changes defaults, and adds its own options."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    # Model
    pretrained_model_name_or_path: Annotated[str | None, Reads.MODEL] = Field(
        None, description="Folder or Hub id of a Diffusers pipeline to start from. None: from scratch."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of that Hub id.")
    variant: str | None = Field(None, description="Variant of the weight files, such as fp16.")

    # Data
    resolution: int = Field(64, ge=1, description="Height and width of the training images, in pixels.")
    bucket_resolutions: list[str] = Field(
        [],
        description="Sizes to train at, each picture at the one of the nearest shape: auto, or width x height such as "
        "1152x896. None: squares of the resolution.",
    )
    resize_mode: Literal["crop", "stretch"] = Field(
        "crop", description="crop: scale the short side, then crop. stretch: scale both sides to the resolution."
    )
    center_crop: bool = Field(False, description="Crop the centre instead of a random place.")
    random_flip: bool = Field(False, description="Mirror each image left to right with probability one half.")
    image_interpolation_mode: Interpolation = Field("bilinear", description="Filter that resizes.")
    dataloader_num_workers: int = Field(
        0,
        ge=0,
        description="Number of processes that decode images. 0: threads do. Latents that were cached need none.",
    )
    skip_bad_images: bool = Field(False, description="Count unreadable images and go on, instead of stopping.")

    # Batch and devices
    train_batch_size: int = Field(16, ge=1, description="Images per device in one forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    global_batch_size: int | None = Field(
        None, ge=1, description="Images per optimizer step over all devices. Overrides train_batch_size."
    )
    data_parallelism: int = Field(-1, description="JAX: size of the mesh's data axis. -1: all remaining devices.")
    fsdp_parallelism: int = Field(1, ge=1, description="JAX: size of the mesh's fsdp axis, which shards the state.")
    fsdp_gather: Literal["step", "block"] = Field(
        "step",
        description="JAX: when devices gather the weights that fsdp divides. step: once, all of them. block: each "
        "layer's when it computes, which needs less memory and more exchanges.",
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision in which gradients are summed over devices."
    )

    # Length
    num_train_epochs: int = Field(
        100, ge=1, validation_alias=also("num_train_epochs", "num_epochs"), description="Passes over the data."
    )
    max_train_steps: int | None = Field(None, ge=1, description="Optimizer steps. Overrides num_train_epochs.")

    # Optimizer
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    scale_lr: bool = Field(False, description="Multiply the rate by accumulation x batch per device x devices.")
    lr_scheduler: LrScheduler = Field("constant", description="Shape of the rate over the run.")
    lr_warmup_steps: int = Field(500, ge=0, description="Optimizer steps of linear warm-up.")
    lr_num_cycles: int = Field(1, ge=1, description="Restarts of cosine_with_restarts.")
    lr_power: float = Field(1.0, gt=0, description="Exponent of polynomial.")
    lr_step_rules: str | None = Field(
        None,
        description="Rules of piecewise_constant: '1:10,0.1:20,0.01' is factor 1 before step 10, 0.1 before step 20, "
        "and 0.01 from there on.",
    )
    optimizer: str = Field("adamw", description="Optimizer: adamw, or one that an installed package adds.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment.")
    adam_weight_decay: float = Field(1e-2, ge=0, description="AdamW's decoupled weight decay.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0, description="Global gradient norm to clip to.")

    # Moving average
    use_ema: bool = Field(False, description="Keep a moving average of the weights. Samples and exports use it.")
    ema_max_decay: float = Field(0.9999, ge=0, lt=1, description="Largest decay of the average.")
    ema_warmup: bool = Field(False, description="Use the decay 1-(1+n/inv_gamma)^-power instead of (1+n)/(10+n).")
    ema_inv_gamma: float = Field(1.0, gt=0, description="inv_gamma of the warm-up rule.")
    ema_power: float = Field(0.75, gt=0, description="power of the warm-up rule.")
    ema_decays: list[float] = Field(
        [],
        description="Keep a moving average of each of these largest decays, in place of the one of ema_max_decay. "
        "Previews draw with the first, which is the result; ema/DECAY/ in the run's folder holds each other one.",
    )
    ema_sigma_rels: list[float] = Field(
        [],
        description="Keep a power-function average of each of these relative widths (EDM2), after those of ema_decays.",
    )
    ema_snapshot_steps: int | None = Field(
        None,
        ge=1,
        description="Keep the power-function averages every so many steps and at the end, in 16 bits, for `python -m "
        "flax_diffusion.post_hoc_ema`.",
    )

    # Precision and memory
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Precision of the computation. Weights stay float32. fp16 scales the loss."
    )
    gradient_checkpointing: Checkpointing = Field(
        False,
        description="Compute activations again in the backward pass. minimal: all except those of matrix products, "
        "convolutions and attention.",
    )

    use_8bit_adam: bool = Field(
        False,
        description="Keep AdamW's moments in 8 bits. On PyTorch they are those of bitsandbytes, which rounds "
        "differently.",
    )

    offload_optimizer: bool = Field(
        False, description="JAX: keep the moments in the host's memory. They are copied to the device in each step."
    )

    # Options that only PyTorch has, most of them on CUDA; the JAX side says what to use instead
    enable_xformers_memory_efficient_attention: bool = Field(
        False, description="PyTorch: use the attention of xformers instead of PyTorch's own."
    )
    set_grads_to_none: bool = Field(
        False, description="PyTorch: free the gradients between steps, instead of zeroing them."
    )
    allow_tf32: bool = Field(False, description="PyTorch: use TF32 in matrix products, on Ampere and newer.")
    channels_last: bool = Field(False, description="PyTorch: use NHWC convolutions, faster on tensor cores.")
    torch_compile: bool = Field(False, description="PyTorch: compile the trained models.")

    # Samples during training
    draw_samples: bool = Field(True, description="Draw pictures during training and at its end.")
    validation_epochs: int | None = Field(
        5,
        ge=1,
        validation_alias=also("validation_epochs", "save_images_epochs"),
        description="Draw a grid every so many epochs, and at the end. None: only at the end.",
    )
    validation_steps: int | None = Field(None, ge=1, description="Draw a grid every so many steps instead.")
    eval_batch_size: int = Field(
        16,
        ge=1,
        validation_alias=also("eval_batch_size", "num_validation_images"),
        description="Images in the grid (per prompt).",
    )

    # Loss on pictures that do not train
    validation_split: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the pictures of the training data that are kept out of training, to compute the loss on.",
    )
    validation_loss_steps: int | None = Field(
        None,
        ge=1,
        description="Compute the loss on the validation pictures every so many steps, and at the end. None: only at "
        "the end.",
    )
    max_validation_samples: int | None = Field(
        None, ge=1, description="Use only the first so many of the validation pictures."
    )

    # Output
    output_dir: str = Field("ddpm-model-64", description="Folder of the run.")
    overwrite_output_dir: bool = Field(
        False,
        description="Replace an earlier run in that folder, which is deleted once this one has saved a checkpoint.",
    )
    save_model_epochs: int | None = Field(
        None, ge=1, description="Write the pipeline every so many epochs. None: only at the end."
    )
    checkpointing_steps: int = Field(500, ge=1, description="Optimizer steps between checkpoints.")
    checkpoint_models: bool = Field(
        False, description="Write the trained models to each checkpoint too, in Diffusers' format."
    )
    checkpoints_total_limit: int | None = Field(None, ge=1, description="Number of checkpoints to keep. None: all.")
    resume_from_checkpoint: str | None = Field(
        None, description="Checkpoint to resume from: `latest` or one such as checkpoint-1500."
    )
    skip_nonfinite: int = Field(
        0,
        ge=0,
        description="Number of steps that may be skipped because their loss or gradient is not finite. One more stops "
        "the run.",
    )
    repeat_step: int | None = Field(
        None, ge=1, description="Compute the batch of this step once with the resumed weights, print its loss, and end."
    )
    report_to: list[Literal["tensorboard", "wandb", "csv", "all", "none"]] = Field(
        ["tensorboard"],
        min_length=1,
        validation_alias=also("report_to", "logger"),
        description="Where to write metrics and grids; several at once, all that are installed, or none, nor a page.",
    )
    profile_steps: profiling.ProfileSteps = None
    tracker_project_name: str = Field("flax-diffusion", min_length=1, description="Project in Weights & Biases.")
    logging_dir: str = Field("logs", description="Folder of metrics inside output_dir.")
    quiet: bool = Field(False, description="Say nothing but warnings, errors and the last line; show no bar.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info",
        description="Least level of the lines that are said. debug: also how long each "
        "part takes, and what the libraries say.",
    )
    push_to_hub: pushing.PushToHub = False
    hub_model_id: pushing.HubModelId = None
    hub_private_repo: pushing.HubPrivateRepo = None
    hub_token: pushing.HubToken = None
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, data order, noise and samples.")

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_as_yaml_reads_it(cls, value: Any) -> Any:
        return "no" if value is False or value in ("false", "off") else value

    @property
    def averages(self) -> list[str]:
        """Names of the moving averages, the main one first; empty without averages."""
        named = [f"ema_{decay}" for decay in self.ema_decays]
        named += [average_of(sigma_rel) for sigma_rel in self.ema_sigma_rels]
        return named or [SINGLE_AVERAGE] * self.use_ema

    @model_validator(mode="after")
    def _check_boards(self) -> TrainConfig:
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"--report_to {' '.join(self.report_to)}: none goes with no other; drop it or the others")
        return self

    @model_validator(mode="after")
    def _check_averages(self) -> TrainConfig:
        for name, values, limit in (
            ("ema_decays", self.ema_decays, 1.0),
            ("ema_sigma_rels", self.ema_sigma_rels, MAX_SIGMA_REL),
        ):
            for value in values:
                if not 0 < value < limit:
                    raise ValueError(
                        f"--{name} {value}: must be greater than 0 and less than {limit:.4g}: give another"
                    )
                if values.count(value) > 1:
                    raise ValueError(f"--{name} {value} is there {values.count(value)} times: give it once")
        named, largest = self.ema_decays or self.ema_sigma_rels, type(self).model_fields["ema_max_decay"].default
        if named and self.ema_max_decay != largest:
            raise ValueError(
                f"--ema_max_decay {self.ema_max_decay} is the decay of --use_ema alone: put it among --ema_decays"
            )
        if self.ema_snapshot_steps and not self.ema_sigma_rels:
            raise ValueError(
                "--ema_snapshot_steps keeps power-function averages: add --ema_sigma_rels, such as 0.05 0.1"
            )
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> TrainConfig:
        own = "validation_data_dir" in type(self).model_fields  # which not every task has
        folder = getattr(self, "validation_data_dir", None)
        if folder is not None and self.validation_split:
            raise ValueError("--validation_data_dir and --validation_split exclude each other: drop one")
        for name in ("validation_loss_steps", "max_validation_samples"):
            if getattr(self, name) is not None and not (folder or self.validation_split):
                raise ValueError(
                    f"--{name} is of pictures that do not train: add --validation_split, such as 0.05"
                    + (", or --validation_data_dir" if own else "")
                )
        return self

    @model_validator(mode="after")
    def _check_buckets(self) -> TrainConfig:
        if self.bucket_resolutions and self.resize_mode == "stretch":
            raise ValueError(
                "--bucket_resolutions keeps the shape of pictures, and --resize_mode stretch does not: drop one, or "
                "give --resize_mode crop"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        """Check the rules between options that every task has. A ValueError's text is the error line."""
        for name, value in self:
            if SECRET.search(str(value)):  # a run's config.yaml is there for others to read
                raise ValueError(f"--{name} holds a password or token: log in instead, by `hf auth login` for the Hub")
        if not self.output_dir.strip():
            raise ValueError("--output_dir is empty: name the run's folder")
        pushing.check(self)
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            raise ValueError("--lr_scheduler piecewise_constant needs --lr_step_rules, e.g. '1:1000,0.1:2000,0.01'")
        if self.lr_scheduler != "piecewise_constant" and self.lr_step_rules:
            raise ValueError(f"--lr_step_rules goes with piecewise_constant, not {self.lr_scheduler}: drop one")
        if self.data_parallelism != -1 and self.data_parallelism < 1:
            raise ValueError(f"--data_parallelism {self.data_parallelism}: give a size from 1, or -1 for what is left")
        if self.fsdp_gather == "block" and self.fsdp_parallelism == 1:
            raise ValueError(
                "--fsdp_gather block goes with weights that are divided: add --fsdp_parallelism, or drop it"
            )
        if self.repeat_step is not None and self.resume_from_checkpoint is None:
            raise ValueError("--repeat_step computes with the weights of a checkpoint: add --resume_from_checkpoint")
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise ValueError(f"--use_8bit_adam goes with --optimizer adamw, not {self.optimizer}: drop one")
        if self.scale_lr and self.global_batch_size:
            raise ValueError("--scale_lr multiplies by the batch a device: drop it or --global_batch_size")
        return self
