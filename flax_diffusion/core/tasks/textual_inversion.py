"""Training of a new word for what some pictures show: `train textual_inversion`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from flax_diffusion.core.config.defaults import with_defaults
from flax_diffusion.core.config.options import Reads
from flax_diffusion.core.data.combined import CombinedSource, Folder, folders_of, open_uncaptioned
from flax_diffusion.core.data.sources.given import open_examples
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.errors import ConfigError, naming
from flax_diffusion.core.families.family import Role
from flax_diffusion.core.spec.adapters import NewTokens
from flax_diffusion.core.spec.new_words import add_word
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training
from flax_diffusion.core.tasks.common.dataset import ValidationConfig, is_given, joined
from flax_diffusion.core.tasks.common.text import OutputName, TextConfig, TextTask
from flax_diffusion.core.tasks.task import TASKS

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger(__name__)


@with_defaults(
    resize_mode="stretch",
    random_flip=True,
    image_interpolation_mode="bicubic",
    max_train_steps=5000,
    output_dir="text-inversion-model",
)
class TextualInversionConfig(ValidationConfig, TextConfig):
    """A new word for a thing or a style, without other changes: `train textual_inversion`."""

    train_data_dir: Annotated[str | None, Reads.DATA_FOLDERS] = Field(
        None, description="Folder of pictures of the new thing, or several such as photos:100,drawings:20."
    )
    placeholder_token: str | None = Field(None, description="The new word in lower case, such as <cat-toy>.")
    initializer_token: str | None = Field(None, description="Known word of one token to start from, such as toy.")
    num_vectors: int = Field(1, ge=1, description="Number of tokens that the new word stands for.")
    learnable_property: Literal["object", "style"] = Field("object", description="Kind of thing in the prompts.")
    prompt_templates: list[str] = Field(
        [], description="Prompts in place of those of learnable_property, each with {} for the new word."
    )
    repeats: int = Field(
        100, ge=1, description="Times that each picture occurs in an epoch, of a folder that does not say it."
    )
    checkpoint_models: bool = Field(True, description="Write learned_embeds.safetensors to each checkpoint too.")
    output_name: OutputName = None

    _join = field_validator("train_data_dir", mode="before")(joined)

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
        self.check_has_word(self.validation_prompts)
        return self

    def check_has_word(self, prompts: Iterable[str]) -> None:
        """Raise ValueError for a prompt to draw without the new word.

        Args:
            prompts: The prompts.
        """
        for prompt in prompts:
            if str(self.placeholder_token).lower() not in prompt.lower():
                raise ValueError(f"validation prompt '{prompt}' lacks the new word {self.placeholder_token}: put it in")


_PICTURES = ("photo", "good photo", "close-up photo", "cropped photo", "bright photo", "dark photo", "rendering")
_WORKS = ("painting", "drawing", "picture", "rendering", "small painting", "large painting", "sketch")
TEMPLATES = {
    "object": [f"a {kind} of {article} {{}}" for kind in _PICTURES for article in ("a", "the", "one", "my")],
    "style": [f"{article} {kind} in the style of {{}}" for kind in _WORKS for article in ("a", "the")],
}
"""Prompts for textual inversion's pictures, by `learnable_property`."""


class TextualInversionTask(TextTask[TextualInversionConfig]):
    """Training of the rows of a new word in the embedding table."""

    name = "textual_inversion"
    config_class = TextualInversionConfig
    data_options = ("train_data_dir",)

    def __init__(self, config: TextualInversionConfig):
        super().__init__(config)
        self.adapters_name = config.output_name

    @classmethod
    def stand_ins(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return options that name data, for a plan, which reads none."""
        return {"train_data_dir": "."}

    def open_source(self) -> Source:
        """Open the pictures, each with all prompts that the word may stand in.

        Raises:
            ConfigError: If --repeats would say nothing.
            DataError: If a folder is missing or holds none.
        """
        config, option = self.config, "--train_data_dir"
        if is_given(config.train_data_dir, self.examples):
            assert self.examples is not None
            workers = config.dataloader_num_workers
            pictures = open_examples(self.examples, caption_column=None, num_workers=workers)
            return CombinedSource([pictures], [self.templated_prompts], [config.repeats])
        with naming(option):
            folders = folders_of(str(config.train_data_dir))
        if all(one.repeats for one in folders) and config.repeats != type(config).model_fields["repeats"].default:
            raise ConfigError(f"--repeats {config.repeats}: all folders of {option} have their own; drop one of both")
        return self._prompted(option, folders, config.repeats)

    def open_validation(self, source: Source) -> Source | None:
        """Open the pictures for validation, if there are any, each with all prompts that the word may stand in."""
        option, text = "--validation_data_dir", self.config.validation_data_dir
        if text is None:
            return None
        with naming(option):
            return self._prompted(option, folders_of(text), 1)

    def _prompted(self, option: str, folders: list[Folder], repeats: int) -> CombinedSource:
        return CombinedSource(
            [open_uncaptioned(option, one.name) for one in folders],
            [self.templated_prompts] * len(folders),
            [one.repeats or repeats for one in folders],
        )

    @property
    def templated_prompts(self) -> list[str]:
        """All prompts with the new word."""
        templates = self.config.prompt_templates or TEMPLATES[self.config.learnable_property]
        return [template.replace("{}", str(self.config.placeholder_token)) for template in templates]

    def trained_prompts(self, source: Source) -> list[str]:
        """Return the first prompt with the new word."""
        return self.templated_prompts[:1]

    @property
    def prompts(self) -> dict[str, list[str]]:
        """Prompts among the options, by option."""
        return {"prompt_templates": self.templated_prompts} | super().prompts

    def make_spec(self, source: Source) -> PipelineSpec:
        """Read the configs of the pipeline to train, and check that the new word fits into every prompt."""
        given = str(self.config.placeholder_token)
        if given != given.lower():
            log.info("--placeholder_token %s: the tokenizer reads small letters; the word is %s", given, given.lower())
        drawn = [prompt.prompt for prompt in self.validation_prompts]
        try:
            self.config.check_has_word(drawn)
        except ValueError as error:
            raise ConfigError(f"--validation_prompts_file {self.config.validation_prompts_file}: {error}") from error
        spec = super().make_spec(source)
        _check_new_word(spec, [*self.templated_prompts, *drawn])
        return spec

    def adapted(self, part: Component, tokenizer: CLIPTokenizer | None) -> Component:
        """Return a model of which only the new word's rows train."""
        if tokenizer is not None:
            return replace(part, training=Training.ADAPTERS, new_tokens=self._add_tokens(tokenizer))
        return replace(part, training=Training.NOTHING)

    def _add_tokens(self, tokenizer: CLIPTokenizer) -> NewTokens:
        """Add the tokens to the tokenizer: the new word, then the word with a number."""
        # In lower case, as the tokenizer reads prompts: of a word with capitals Diffusers finds only one vector.
        word, start = str(self.config.placeholder_token).lower(), str(self.config.initializer_token)
        initializer = tokenizer.encode(start, add_special_tokens=False)
        if len(initializer) != 1:
            raise ConfigError(
                f"--initializer_token {start}: is {len(initializer)} tokens of this tokenizer, must be one; a shorter, "
                "more common word usually is"
            )
        first, tokens = add_word(tokenizer, word, self.config.num_vectors, "--placeholder_token", "choose another word")
        return NewTokens(placeholder=word, tokens=tokens, first=first, initializer=int(initializer[0]))


TASKS.register(TextualInversionTask.name, TextualInversionTask)


def _check_new_word(spec: PipelineSpec, prompts: Iterable[str]) -> None:
    """Raise ConfigError unless all tokens of the word fit into every prompt, for every text encoder."""
    tokenize = spec.tokenize
    assert tokenize is not None
    for encoder, tokenized in zip(spec.names_of(Role.TEXT_ENCODER), tokenize.by_array.values(), strict=True):
        new = spec.components[encoder].new_tokens
        assert new is not None
        ids = range(new.first, new.first + len(new.tokens))
        for prompt in prompts:
            if not np.isin(ids, tokenized(prompt)).all():
                raise ConfigError(
                    f"prompt '{prompt}': is cut off before the end of {new.placeholder}, at the {tokenized.length} "
                    "tokens that the text encoder takes: shorten it (--prompt_templates), or lower --num_vectors"
                )
