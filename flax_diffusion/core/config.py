"""The typed configuration of a run, one frozen class a task.

Fields are named as the flags of the Diffusers training scripts, so that their commands keep working, and a YAML
file holds the same names. `core.cli` fills these classes from file and flags; the rules that join fields stand in the
class that has the fields, in its `_check…`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

PredictionType = Literal["epsilon", "v_prediction", "sample"]
LrScheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant"
]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


def _also(*names: str) -> AliasChoices:
    """Other spellings of a field: the first name is ours, the rest are those of other Diffusers scripts."""
    return AliasChoices(*names)


class TrainConfig(BaseModel):
    """What every task shares; the tasks below change defaults and add what only they need."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    # Model
    pretrained_model_name_or_path: str | None = Field(
        None, description="Folder or Hub id of a Diffusers pipeline to start from. None: from scratch."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of that Hub id.")
    variant: str | None = Field(None, description="Variant of its weight files, e.g. fp16.")
    unet: dict[str, Any] | str | None = Field(
        None,
        validation_alias=_also("unet", "model_config_name_or_path"),
        description="From scratch: the UNet's Diffusers config, as a mapping, or the folder or .json file of one.",
    )
    vae: str | None = Field(None, description="Folder or Hub id of an AutoencoderKL. None: train on pixels.")
    noise_scheduler: dict[str, Any] | None = Field(
        None, description="Diffusers scheduler config. None: the pretrained pipeline's, or DDPM with ddpm_* below."
    )
    ddpm_num_steps: int = Field(1000, ge=1, description="Training timesteps, when the scheduler is ours to choose.")
    ddpm_beta_schedule: str = Field("linear", description="Beta schedule, when the scheduler is ours to choose.")

    # Data
    resolution: int = Field(64, ge=1, description="Height and width of the training images, in pixels.")
    resize_mode: Literal["crop", "stretch"] = Field(
        "crop", description="crop: scale the short side, then crop. stretch: scale both sides to the resolution."
    )
    center_crop: bool = Field(False, description="Crop the centre instead of a random place.")
    random_flip: bool = Field(False, description="Mirror each image left to right with probability one half.")
    image_interpolation_mode: Interpolation = Field("bilinear", description="Filter that resizes.")
    dataloader_num_workers: int = Field(0, ge=0, description="Processes that decode images. 0: threads.")
    skip_bad_images: bool = Field(False, description="Count unreadable images and go on, instead of stopping.")

    # Batch and devices
    train_batch_size: int = Field(16, ge=1, description="Images a device in one forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes an optimizer step.")
    global_batch_size: int | None = Field(
        None, ge=1, description="Images an optimizer step over all devices. Overrides train_batch_size."
    )
    data_parallelism: int = Field(-1, description="Size of the mesh's data axis. -1: all devices left over.")
    fsdp_parallelism: int = Field(1, ge=1, description="Size of the mesh's fsdp axis, which shards the state.")

    # Length
    num_train_epochs: int = Field(
        100, ge=1, validation_alias=_also("num_train_epochs", "num_epochs"), description="Passes over the data."
    )
    max_train_steps: int | None = Field(None, ge=1, description="Optimizer steps. Overrides num_train_epochs.")

    # Optimizer
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    scale_lr: bool = Field(False, description="Multiply the rate by accumulation x batch a device x devices.")
    lr_scheduler: LrScheduler = Field("constant", description="Shape of the rate over the run.")
    lr_warmup_steps: int = Field(500, ge=0, description="Optimizer steps of linear warm-up.")
    lr_num_cycles: int = Field(1, ge=1, description="Restarts of cosine_with_restarts.")
    lr_power: float = Field(1.0, gt=0, description="Exponent of polynomial.")
    lr_step_rules: str | None = Field(None, description="piecewise_constant: '1:10,0.1:20,0.01' (factor:until step).")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment.")
    adam_weight_decay: float = Field(1e-2, ge=0, description="AdamW's decoupled weight decay.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0, description="Global gradient norm to clip to.")

    # Moving average
    use_ema: bool = Field(False, description="Keep a moving average of the weights; samples and exports use it.")
    ema_max_decay: float = Field(0.9999, ge=0, lt=1, description="Largest decay of the average.")
    ema_warmup: bool = Field(False, description="Decay 1-(1+n/inv_gamma)^-power instead of (1+n)/(10+n).")
    ema_inv_gamma: float = Field(1.0, gt=0, description="inv_gamma of the warm-up rule.")
    ema_power: float = Field(0.75, gt=0, description="power of the warm-up rule.")

    # Precision and memory
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Compute precision. Weights stay float32; fp16 scales the loss."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")

    # What only PyTorch has, most of it on CUDA; the JAX side says what to use instead
    use_8bit_adam: bool = Field(False, description="PyTorch: AdamW with 8-bit moments, by bitsandbytes.")
    enable_xformers_memory_efficient_attention: bool = Field(
        False, description="PyTorch: attention by xformers instead of PyTorch's own."
    )
    set_grads_to_none: bool = Field(False, description="PyTorch: free gradients between steps instead of zeroing them.")
    allow_tf32: bool = Field(False, description="PyTorch: TF32 matrix products on Ampere and newer.")
    channels_last: bool = Field(False, description="PyTorch: NHWC convolutions, faster on tensor cores.")
    torch_compile: bool = Field(False, description="PyTorch: compile the trained models.")

    # Loss
    prediction_type: PredictionType | None = Field(
        None, description="What the UNet predicts. None: what the scheduler's config says."
    )
    snr_gamma: float | None = Field(None, gt=0, description="Min-SNR loss weights; 5 is the paper's choice.")
    noise_offset: float = Field(0.0, ge=0, description="Strength of the offset added to each channel's noise.")
    input_perturbation: float = Field(0.0, ge=0, description="Strength of extra noise on the input; 0.1 is usual.")

    # Samples during training
    validation_epochs: int | None = Field(
        5,
        ge=1,
        validation_alias=_also("validation_epochs", "save_images_epochs"),
        description="Sample a grid every so many epochs, and at the end. None: only at the end.",
    )
    validation_steps: int | None = Field(None, ge=1, description="Sample every so many steps instead.")
    eval_batch_size: int = Field(16, ge=1, description="Images in the grid (a prompt).")
    validation_num_inference_steps: int = Field(
        50,
        ge=1,
        validation_alias=_also("validation_num_inference_steps", "ddpm_num_inference_steps"),
        description="Denoising steps of those samples.",
    )

    # Output
    output_dir: str = Field("ddpm-model-64", description="Folder of the run.")
    overwrite_output_dir: bool = Field(False, description="Delete an earlier run in that folder first.")
    save_model_epochs: int | None = Field(
        None, ge=1, description="Write the pipeline every so many epochs. None: only at the end."
    )
    checkpointing_steps: int = Field(500, ge=1, description="Optimizer steps between checkpoints.")
    checkpoint_models: bool = Field(
        False, description="Each checkpoint also holds the trained models, in Diffusers' format."
    )
    checkpoints_total_limit: int | None = Field(None, ge=1, description="Checkpoints to keep. None: all.")
    resume_from_checkpoint: str | None = Field(None, description="`latest`, or the name of one: checkpoint-1500.")
    report_to: Literal["tensorboard", "none"] = Field(
        "tensorboard", validation_alias=_also("report_to", "logger"), description="Where metrics and grids go."
    )
    logging_dir: str = Field("logs", description="TensorBoard's folder inside output_dir.")
    seed: int = Field(0, ge=0, lt=2**32, description="Of the weights, data order, noise and samples.")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        """Every rule that joins two fields. A ValueError's text is the error line."""
        if self.pretrained_model_name_or_path and self.unet is not None:
            raise ValueError("--unet is for training from scratch: drop it or --pretrained_model_name_or_path")
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            raise ValueError("--lr_scheduler piecewise_constant needs --lr_step_rules, e.g. '1:1000,0.1:2000,0.01'")
        if self.lr_scheduler != "piecewise_constant" and self.lr_step_rules:
            raise ValueError(f"--lr_step_rules goes with piecewise_constant, not {self.lr_scheduler}: drop one")
        if self.data_parallelism != -1 and self.data_parallelism < 1:
            raise ValueError(f"--data_parallelism {self.data_parallelism}: give a size from 1, or -1 for what is left")
        if self.scale_lr and self.global_batch_size:
            raise ValueError("--scale_lr multiplies by the batch a device: drop it or --global_batch_size")
        return self


class DatasetConfig(TrainConfig):
    """Of the tasks that train on a dataset."""

    dataset_name: str | None = Field(None, description="Hub dataset id, or the built-in `digits`.")
    dataset_config_name: str | None = Field(None, description="Configuration of that dataset.")
    train_data_dir: str | None = Field(
        None, description="Folder of images (metadata.jsonl/.csv, .txt captions or none) or of .parquet files."
    )
    image_column: str = Field("image", description="Column that holds the images.")
    max_train_samples: int | None = Field(None, ge=1, description="Use only the first so many examples.")
    cache_dir: str | None = Field(None, description="Where Hub downloads are kept.")

    @model_validator(mode="after")
    def _check_data(self) -> DatasetConfig:
        if not self.dataset_name and not self.train_data_dir:
            raise ValueError("no data: give --dataset_name (a Hub id or `digits`) or --train_data_dir (a folder)")
        if self.dataset_name and self.dataset_name != "imagefolder" and self.train_data_dir:
            raise ValueError("--dataset_name and --train_data_dir exclude each other: drop one")
        return self


class TextConfig(TrainConfig):
    """Of the tasks whose images follow a text."""

    vae: str | None = Field(
        "pretrained", description="`pretrained`: the pipeline's own; else a folder or Hub id. None: train on pixels."
    )
    tokenizer_name: str | None = Field(
        None, description="Folder or Hub id of a CLIP tokenizer. None: the pipeline's, or one made from the captions."
    )
    train_text_encoder: bool = Field(False, description="Train the text encoder too.")
    resolution: int = Field(512, ge=1, description="Height and width of the training images, in pixels.")
    validation_prompts: list[str] = Field(
        [],
        validation_alias=_also("validation_prompts", "validation_prompt"),
        description="Prompts to sample during training.",
    )
    validation_guidance_scale: float = Field(7.5, ge=0, description="Classifier-free guidance of those samples.")
    eval_batch_size: int = Field(
        4,
        ge=1,
        validation_alias=_also("eval_batch_size", "num_validation_images"),
        description="Images in the grid (a prompt).",
    )


class UnconditionalConfig(DatasetConfig):
    """Images from noise alone: `train unconditional`."""

    lr_scheduler: LrScheduler = Field("cosine", description="Shape of the rate over the run.")
    adam_beta1: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the first moment.")
    adam_weight_decay: float = Field(1e-6, ge=0, description="AdamW's decoupled weight decay.")
    ema_warmup: bool = Field(True, description="Decay 1-(1+n/inv_gamma)^-power instead of (1+n)/(10+n).")
    validation_epochs: int | None = Field(
        10,
        ge=1,
        validation_alias=_also("validation_epochs", "save_images_epochs"),
        description="Sample a grid every so many epochs, and at the end. None: only at the end.",
    )
    validation_num_inference_steps: int = Field(
        1000,
        ge=1,
        validation_alias=_also("validation_num_inference_steps", "ddpm_num_inference_steps"),
        description="Denoising steps of those samples.",
    )
    save_model_epochs: int | None = Field(10, ge=1, description="Write the pipeline every so many epochs.")


class TextToImageConfig(TextConfig, DatasetConfig):
    """Images from captions: `train text_to_image`. Fine-tunes Stable Diffusion 1.x and 2.x, or starts from scratch."""

    text_encoder: dict[str, Any] | str | None = Field(
        None, description="From scratch: the CLIP text config, as a mapping or the folder or .json file that holds it."
    )
    caption_column: str = Field("text", description="Column that holds the captions.")
    proportion_empty_prompts: float = Field(
        0.0, ge=0, le=1, description="Share of captions replaced by the empty one, which guidance needs."
    )
    image_interpolation_mode: Interpolation = Field("lanczos", description="Filter that resizes.")
    output_dir: str = Field("sd-model-finetuned", description="Folder of the run.")

    @model_validator(mode="after")
    def _check_text(self) -> TextToImageConfig:
        scratch = self.pretrained_model_name_or_path is None
        if scratch and (self.unet is None or self.text_encoder is None):
            raise ValueError(
                "nothing to train: give --pretrained_model_name_or_path, or --unet and --text_encoder to start from "
                "scratch"
            )
        if scratch and self.vae == "pretrained":
            raise ValueError("--vae pretrained needs --pretrained_model_name_or_path: give a VAE's folder, or null")
        if scratch and not self.train_text_encoder:
            raise ValueError("a text encoder made from scratch must train: add --train_text_encoder")
        if not scratch and self.text_encoder is not None:
            raise ValueError("--text_encoder is for training from scratch: drop it or --pretrained_model_name_or_path")
        return self


class Concept(BaseModel):
    """One new thing for DreamBooth to learn, and the class that it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instance_data_dir: str  # folder of pictures of the new thing
    instance_prompt: str  # "a photo of sks dog"
    class_data_dir: str | None = None  # folder of pictures of its class; what is missing is drawn
    class_prompt: str | None = None  # "a photo of dog"
    repeats: Annotated[int, Field(ge=1)] = 1  # times each picture stands in an epoch


class DreamBoothConfig(TextConfig):
    """A new thing from a handful of its pictures: `train dreambooth`."""

    instance_data_dir: str | None = Field(None, description="Folder of pictures of the new thing.")
    instance_prompt: str | None = Field(None, description="Prompt that names it, such as 'a photo of sks dog'.")
    with_prior_preservation: bool = Field(False, description="Keep what its class looks like, by pictures of it.")
    class_data_dir: str | None = Field(None, description="Folder of pictures of the class; filled up as needed.")
    class_prompt: str | None = Field(None, description="Prompt that names the class, such as 'a photo of dog'.")
    num_class_images: int = Field(100, ge=1, description="Pictures of each class; the model draws those missing.")
    prior_loss_weight: float = Field(1.0, ge=0, description="Weight of the class pictures' loss.")
    sample_batch_size: int = Field(4, ge=1, description="Class pictures a device draws at a time.")
    concepts: list[Concept] = Field(
        [], description="Several concepts at once: a list of mappings with the five options of one, and repeats."
    )
    train_batch_size: int = Field(
        4, ge=1, description="Images of the new thing a device in one forward pass; as many of the class go with them."
    )
    num_train_epochs: int = Field(1, ge=1, description="Passes over the data.")
    learning_rate: float = Field(5e-6, gt=0, description="Peak learning rate.")
    validation_steps: int | None = Field(100, ge=1, description="Sample every so many steps.")
    checkpoint_models: bool = Field(
        True, description="Each checkpoint also holds the trained models, in Diffusers' format."
    )
    output_dir: str = Field("dreambooth-model", description="Folder of the run.")

    @property
    def all_concepts(self) -> list[Concept]:
        """The concepts, whichever way they were given."""
        if self.concepts:
            return self.concepts
        return [
            Concept(
                instance_data_dir=str(self.instance_data_dir),
                instance_prompt=str(self.instance_prompt),
                class_data_dir=self.class_data_dir,
                class_prompt=self.class_prompt,
            )
        ]

    @model_validator(mode="after")
    def _check_concepts(self) -> DreamBoothConfig:
        if self.pretrained_model_name_or_path is None:
            raise ValueError("dreambooth starts from a model: give --pretrained_model_name_or_path")
        single = {
            "instance_data_dir": self.instance_data_dir,
            "instance_prompt": self.instance_prompt,
            "class_data_dir": self.class_data_dir,
            "class_prompt": self.class_prompt,
        }
        given = [name for name, value in single.items() if value is not None]
        if self.concepts and given:
            raise ValueError(f"--{given[0]} and concepts exclude each other: put it into the list, or drop the list")
        if not self.concepts:
            for name in ("instance_data_dir", "instance_prompt"):
                if not single[name]:
                    raise ValueError(f"dreambooth needs --{name}, or a list of concepts")
        for concept in self.all_concepts:
            missing = [name for name in ("class_data_dir", "class_prompt") if not getattr(concept, name)]
            if self.with_prior_preservation and missing:
                raise ValueError(f"--with_prior_preservation needs --{missing[0]} for '{concept.instance_prompt}'")
            if not self.with_prior_preservation and len(missing) < 2:
                raise ValueError(
                    f"--class_data_dir and --class_prompt go with --with_prior_preservation: add it, or drop them for "
                    f"'{concept.instance_prompt}'"
                )
            if concept.class_prompt == concept.instance_prompt:
                raise ValueError(
                    f"'{concept.instance_prompt}' names both the new thing and its class: put a rare word into "
                    "--instance_prompt, as in 'a photo of sks dog'"
                )
        return self


TASKS: dict[str, type[TrainConfig]] = {
    "unconditional": UnconditionalConfig,
    "text_to_image": TextToImageConfig,
    "dreambooth": DreamBoothConfig,
}
