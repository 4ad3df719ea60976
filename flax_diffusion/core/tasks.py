"""The tasks: each one's options, over what it shares with the others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flax_diffusion.core.config import (
    DatasetConfig,
    DiffusionConfig,
    Interpolation,
    LoraConfig,
    LrScheduler,
    TextConfig,
    TrainConfig,
    also,
)


class UnconditionalConfig(DiffusionConfig, DatasetConfig):
    """Images from noise alone: `train unconditional`."""

    lr_scheduler: LrScheduler = Field("cosine", description="Shape of the rate over the run.")
    adam_beta1: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the first moment.")
    adam_weight_decay: float = Field(1e-6, ge=0, description="AdamW's decoupled weight decay.")
    ema_warmup: bool = Field(True, description="Decay 1-(1+n/inv_gamma)^-power instead of (1+n)/(10+n).")
    validation_epochs: int | None = Field(
        10,
        ge=1,
        validation_alias=also("validation_epochs", "save_images_epochs"),
        description="Sample a grid every so many epochs, and at the end. None: only at the end.",
    )
    validation_num_inference_steps: int = Field(
        1000,
        ge=1,
        validation_alias=also("validation_num_inference_steps", "ddpm_num_inference_steps"),
        description="Denoising steps of those samples.",
    )
    save_model_epochs: int | None = Field(10, ge=1, description="Write the pipeline every so many epochs.")


class TextToImageConfig(LoraConfig, DatasetConfig):
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


class DreamBoothConfig(LoraConfig):
    """A new thing from a handful of its pictures: `train dreambooth`."""

    instance_data_dir: str | None = Field(None, description="Folder of pictures of the new thing.")
    instance_prompt: str | None = Field(None, description="Prompt that names it, such as 'a photo of sks dog'.")
    with_prior_preservation: bool = Field(False, description="Keep what its class looks like, by pictures of it.")
    class_data_dir: str | None = Field(None, description="Folder of pictures of the class; filled up as needed.")
    class_prompt: str | None = Field(None, description="Prompt that names the class, such as 'a photo of dog'.")
    num_class_images: int = Field(100, ge=1, description="Pictures of each class; the model draws those missing.")
    prior_loss_weight: float = Field(1.0, ge=0, description="Weight of the class pictures' loss.")
    sample_batch_size: int = Field(4, ge=1, description="Class pictures a device draws at a time.")
    class_num_inference_steps: int = Field(50, ge=1, description="Denoising steps of the class pictures.")
    class_guidance_scale: float = Field(7.5, ge=0, description="Classifier-free guidance of the class pictures.")
    concepts: list[Concept] = Field(
        [], description="Several concepts at once: a list of mappings with the five options of one, and repeats."
    )
    train_batch_size: int = Field(
        4, ge=1, description="Images of the new thing a device in one forward pass; as many of the class go with them."
    )
    num_train_epochs: int = Field(1, ge=1, description="Passes over the data.")
    learning_rate: float = Field(5e-6, gt=0, description="Peak learning rate; 5e-4 where LoRA trains.")
    validation_steps: int | None = Field(100, ge=1, description="Sample every so many steps.")
    checkpoint_models: bool = Field(
        True, description="Each checkpoint also holds the trained models, in Diffusers' format."
    )
    output_dir: str = Field("dreambooth-model", description="Folder of the run.")

    @model_validator(mode="before")
    @classmethod
    def _rate_of_lora(cls, values: Any) -> Any:
        if isinstance(values, dict) and any(values.get(name) is not None for name in ("lora_rank", "rank")):
            return {"learning_rate": 5e-4} | values
        return values

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


class TextualInversionConfig(TextConfig):
    """A new word for a thing or a style, and nothing else: `train textual_inversion`."""

    train_data_dir: str | None = Field(None, description="Folder of pictures of the new thing.")
    placeholder_token: str | None = Field(None, description="The new word, such as <cat-toy>; in small letters.")
    initializer_token: str | None = Field(None, description="Known word of one token to start from, such as toy.")
    num_vectors: int = Field(1, ge=1, description="Tokens that the new word stands for.")
    learnable_property: Literal["object", "style"] = Field("object", description="What the prompts say it is.")
    prompt_templates: list[str] = Field(
        [], description="Prompts in place of those of learnable_property, each with {} for the new word."
    )
    repeats: int = Field(100, ge=1, description="Times each picture stands in an epoch.")
    resize_mode: Literal["crop", "stretch"] = Field(
        "stretch", description="crop: scale the short side, then crop. stretch: scale both sides to the resolution."
    )
    random_flip: bool = Field(True, description="Mirror each image left to right with probability one half.")
    image_interpolation_mode: Interpolation = Field("bicubic", description="Filter that resizes.")
    max_train_steps: int | None = Field(5000, ge=1, description="Optimizer steps. Overrides num_train_epochs.")
    checkpoint_models: bool = Field(True, description="Each checkpoint also holds learned_embeds.safetensors.")
    output_dir: str = Field("text-inversion-model", description="Folder of the run.")

    @model_validator(mode="after")
    def _check_word(self) -> TextualInversionConfig:
        for name in ("pretrained_model_name_or_path", "train_data_dir", "placeholder_token", "initializer_token"):
            if not getattr(self, name):
                raise ValueError(f"textual_inversion needs --{name}")
        word = str(self.placeholder_token)
        if word.split() != [word]:
            near = "-".join(word.split()) or "toy"
            raise ValueError(f"--placeholder_token '{word}' holds spaces, must be one word, such as <{near}>")
        for template in self.prompt_templates:
            if template.count("{}") != 1:
                raise ValueError(f"prompt template '{template}': put {{}} into it once, where the new word belongs")
        for prompt in self.validation_prompts:
            if str(self.placeholder_token).lower() not in prompt.lower():
                raise ValueError(f"validation prompt '{prompt}' lacks the new word {self.placeholder_token}: put it in")
        return self


class AutoencoderConfig(DatasetConfig):
    """Images to latents and back: `train autoencoder`. The result is the --vae of the other tasks."""

    vae: dict[str, Any] | str | None = Field(
        None, description="From scratch: the AutoencoderKL config, as a mapping or the folder or .json file of one."
    )
    rec_loss: Literal["l1", "l2"] = Field("l2", description="Reconstruction: absolute or squared error.")
    kl_scale: float = Field(1e-6, ge=0, description="Weight of the posterior's divergence from a normal one.")
    eval_batch_size: int = Field(16, ge=1, description="Pictures in the grid, each beside its reconstruction.")
    output_dir: str = Field("autoencoder-model", description="Folder of the run.")

    @model_validator(mode="after")
    def _check_autoencoder(self) -> AutoencoderConfig:
        if (self.vae is None) == (self.pretrained_model_name_or_path is None):
            raise ValueError(
                "give one of --vae, the config of an AutoencoderKL to make, and --pretrained_model_name_or_path, a "
                "pipeline whose vae to go on with"
            )
        return self


TASKS: dict[str, type[TrainConfig]] = {
    "unconditional": UnconditionalConfig,
    "text_to_image": TextToImageConfig,
    "dreambooth": DreamBoothConfig,
    "textual_inversion": TextualInversionConfig,
    "autoencoder": AutoencoderConfig,
}
