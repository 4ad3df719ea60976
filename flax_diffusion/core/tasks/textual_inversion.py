"""A new word for what some pictures show: `train textual_inversion`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from flax_diffusion.core.config.options import Interpolation, TextConfig
from flax_diffusion.core.data.combined import PromptedSource, open_uncaptioned


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


_PICTURES = ("photo", "good photo", "close-up photo", "cropped photo", "bright photo", "dark photo", "rendering")
_WORKS = ("painting", "drawing", "picture", "rendering", "small painting", "large painting", "sketch")
TEMPLATES = {
    "object": [f"a {kind} of {article} {{}}" for kind in _PICTURES for article in ("a", "the", "one", "my")],
    "style": [f"{article} {kind} in the style of {{}}" for kind in _WORKS for article in ("a", "the")],
}
"""What textual inversion's pictures are called, by `learnable_property`."""


def open_templated(config: TextualInversionConfig) -> PromptedSource:
    """Textual inversion's pictures, each with all prompts that its word may stand in.

    Raises:
        DataError: If the folder is missing or holds none.
    """
    source = open_uncaptioned("--train_data_dir", config.train_data_dir)
    return PromptedSource([source], [templated_prompts(config)], [config.repeats])


def templated_prompts(config: TextualInversionConfig) -> list[str]:
    """All prompts that the new word stands in."""
    templates = config.prompt_templates or TEMPLATES[config.learnable_property]
    return [template.replace("{}", str(config.placeholder_token)) for template in templates]
