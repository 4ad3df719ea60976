"""DreamBooth's examples: pictures of new things, each with its prompt, and pictures of their classes beside them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flax_diffusion.core.data.folders import open_folder
from flax_diffusion.core.data.sources import Record, Source
from flax_diffusion.core.errors import DataError, naming
from flax_diffusion.core.files import as_path, lies_in
from flax_diffusion.core.tasks import DreamBoothConfig, TextualInversionConfig


@dataclass(frozen=True)
class PromptedSource:
    """The pictures of several sources, one after the other, each source's with a prompt of its own."""

    sources: Sequence[Source]
    captions: Sequence[str | list[str]]  # of each source; one of a list is drawn for an example
    repeats: Sequence[int]  # times that each picture of a source stands in an epoch
    ends: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = (len(source) * times for source, times in zip(self.sources, self.repeats, strict=True))
        object.__setattr__(self, "ends", list(itertools.accumulate(sizes)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        part = bisect.bisect_right(self.ends, index)
        source = self.sources[part]
        place = index - (self.ends[part - 1] if part else 0)
        return replace(source[place % len(source)], caption=self.captions[part])


@dataclass(frozen=True)
class PairedSource:
    """Record 2i is of a new thing, record 2i + 1 of a class; the shorter side starts over.

    The loss is the mean over the first plus `prior_loss_weight` times the mean over the second. As weights in one mean
    over both, these are 2 and twice that.
    """

    instances: Source
    classes: Source
    prior_loss_weight: float

    def __len__(self) -> int:
        return 2 * max(len(self.instances), len(self.classes))

    def __getitem__(self, index: int) -> Record:
        pair, of_class = divmod(index, 2)
        if of_class:
            return replace(self.classes[pair % len(self.classes)], weight=2 * self.prior_loss_weight)
        return replace(self.instances[pair % len(self.instances)], weight=2.0)


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
    source = _open("--train_data_dir", config.train_data_dir)
    return PromptedSource([source], [templated_prompts(config)], [config.repeats])


def templated_prompts(config: TextualInversionConfig) -> list[str]:
    """All prompts that the new word stands in."""
    templates = config.prompt_templates or TEMPLATES[config.learnable_property]
    return [template.replace("{}", str(config.placeholder_token)) for template in templates]


def open_instances(config: DreamBoothConfig) -> PromptedSource:
    """The pictures of the new things.

    Raises:
        DataError: If a folder is missing or holds none, or lies in that of another thing.
    """
    concepts = config.all_concepts
    for one, other in itertools.permutations(concepts, 2):
        inner, outer = one.instance_data_dir, other.instance_data_dir
        if lies_in(inner, outer) and one.instance_prompt != other.instance_prompt:
            raise DataError(
                f"--instance_data_dir {inner} of '{one.instance_prompt}' lies in {outer} of '{other.instance_prompt}', "
                "whose pictures it would become; name folders apart from each other"
            )
    return PromptedSource(
        [
            _open(option, concept.instance_data_dir)
            for option, concept in zip(_options(config, "instance"), concepts, strict=True)
        ],
        [concept.instance_prompt for concept in concepts],
        [concept.repeats for concept in concepts],
    )


def _options(config: DreamBoothConfig, whose: str) -> list[str]:
    """What names the folder of each concept."""
    if not config.concepts:
        return [f"--{whose}_data_dir"]
    return [f"--concepts.{number}.{whose}_data_dir" for number in range(len(config.concepts))]


def _open(option: str, folder: str | None, most: int | None = None) -> Source:
    with naming(option):
        return open_folder(as_path(str(folder)), caption_column=None, max_samples=most)


def open_pairs(config: DreamBoothConfig, instances: PromptedSource) -> PairedSource:
    """The same with the pictures of their classes, of which each folder must hold enough by now."""
    concepts, most = config.all_concepts, config.num_class_images
    classes = PromptedSource(
        [_open(option, c.class_data_dir, most) for option, c in zip(_options(config, "class"), concepts, strict=True)],
        [str(concept.class_prompt) for concept in concepts],
        [concept.repeats for concept in concepts],
    )
    return PairedSource(instances, classes, config.prior_loss_weight)
