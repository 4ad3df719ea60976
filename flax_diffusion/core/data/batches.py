"""Making of one training example from a record: pixels, timestep, noise, token ids, loss weight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from flax_diffusion.core.data.captions import TokenizePrompt
from flax_diffusion.core.data.extra import MakeExtra, latent_shape
from flax_diffusion.core.data.images.decoding import decode, size_of
from flax_diffusion.core.data.images.transforms import EightBit, ImageTransform, Placement, eight_bit, sized_name
from flax_diffusion.core.data.sources.source import PART_WEIGHTS, Record, Source
from flax_diffusion.core.errors import DataError
from flax_diffusion.core.objectives.noising import NoiseSpec
from flax_diffusion.core.randomness.streams import Stream, rngs_of

SIZE_NUMBERS = "time_ids"
"""Array of a batch with what SDXL's UNet is told of each picture's size; see `size_numbers`."""
CLASS_LABELS = "class_labels"
"""Array of a batch with the number of each picture's class, int32 (B,)."""


def size_numbers(original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return what SDXL's UNet is told of a picture's size, in pixels.

    Args:
        original: Height and width of the picture before it was resized.
        corner: Top and left of the part that was cut out, of the resized and mirrored picture.
        target: Height and width of that part.

    Returns:
        `time_ids`, float32 (6,), these numbers in this order.

    Reference:
        Podell et al., https://arxiv.org/abs/2307.01952, section 2.2; `add_time_ids` of Diffusers.
    """
    return {SIZE_NUMBERS: np.array([*original, *corner, *target], np.float32)}


Unscaled = Mapping[str, np.ndarray | EightBit]
"""Arrays of an example or of a batch by name, those of pictures perhaps still in 8 bits."""


class MakeExample(Protocol):
    """Function that makes one example's arrays. Its arguments alone decide the result, with all random numbers."""

    def __call__(
        self, source: Source, seed: int, epoch: int, index: int, size: tuple[int, int] | None = None
    ) -> Unscaled:
        """Return the arrays of one example, among them `example_index`; see `ExampleFn.unscaled`."""
        ...


def stacked(examples: Sequence[Unscaled]) -> dict[str, np.ndarray | EightBit]:
    """Return the arrays of several examples, or batches, as one, with an axis more in front.

    Args:
        examples: The examples, with arrays of the same names and shapes.
    """
    return {name: _stacked([example[name] for example in examples]) for name in examples[0]}


def _stacked(arrays: Sequence[np.ndarray | EightBit]) -> np.ndarray | EightBit:
    first = arrays[0]
    if isinstance(first, EightBit):
        return first._replace(pixels=_stacked([one.pixels for one in arrays if isinstance(one, EightBit)]))
    if len(arrays) == 1 and first.flags.writeable:  # one that is not is kept elsewhere, and for other steps too
        return first[None]
    return np.stack([one for one in arrays if isinstance(one, np.ndarray)])


def scaled(arrays: Unscaled) -> dict[str, np.ndarray]:
    """Return the arrays of an example or of a batch with all pictures in floating-point numbers.

    Args:
        arrays: The arrays by name.
    """
    return {name: one.scaled() if isinstance(one, EightBit) else one for name, one in arrays.items()}


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """Values that were computed once before training, so that examples need not compute them.

    Attributes:
        embeddings: What the text encoders make of every caption, by array of an example and by caption; None where
            each step encodes its captions.
        posteriors: Mean and log variance of each picture's latents by the `sized_name` of its record,
            (1 or 2, 2, c, h, w): those of the picture and, where it is flipped at random, of its mirror image; None
            where each step encodes its pictures.
        sizes: Width and height in pixels of each of these pictures by the same name, int32 (2,); None where they are
            read from the pictures.
    """

    embeddings: Mapping[str, Mapping[str, np.ndarray]] | None = None
    posteriors: Mapping[str, np.ndarray] | None = None
    sizes: Mapping[str, np.ndarray] | None = None


@dataclass(frozen=True)
class LabelDropout:
    """What the denoiser is told of the class of a picture, as `class_labels` int32 () in an example.

    Attributes:
        probability: Probability with which it is told the null class instead.
        null_class: Number of the class that stands for any; None where there is none.
    """

    probability: float = 0.0
    null_class: int | None = None

    def __post_init__(self) -> None:
        if self.probability and self.null_class is None:
            raise ValueError(f"labels are dropped with probability {self.probability}, and there is no null class")

    def __call__(self, record: Record, rng: Callable[[Stream], np.random.Generator]) -> dict[str, np.ndarray]:
        """Make the array.

        Args:
            record: The record, with its class.
            rng: Function that returns the example's generator of a stream.

        Raises:
            DataError: If it has no class.
        """
        if record.label is None:
            raise DataError(f"{record.name} has no class; give it one or remove it")
        dropped = self.probability and rng(Stream.DROPOUT_LABEL).random() < self.probability
        return {CLASS_LABELS: np.asarray(self.null_class if dropped else record.label, np.int32)}


@dataclass(frozen=True, kw_only=True)
class ExampleFn:
    """Maker of the examples of unconditional and of captioned training. Picklable.

    Attributes:
        transform: What happens to the pictures.
        noise: What is drawn for each example.
        tokenize: The captions' tokenizers; None for unconditional training.
        made: What was computed before training.
        proportion_empty_prompts: Probability with which a caption is replaced by the empty one.
        extra: Maker of the arrays of the example's second picture; None for no such arrays.
        told_sizes: Whether the denoiser is told the picture's size and the corner where it was cut.
        labels: What the denoiser is told of the picture's class; None for nothing.
    """

    transform: ImageTransform
    noise: NoiseSpec
    tokenize: TokenizePrompt | None = None
    made: Precomputed = field(default=Precomputed(), repr=False)
    proportion_empty_prompts: float = 0.0
    extra: MakeExtra | None = None
    told_sizes: bool = False
    labels: LabelDropout | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise ValueError(f"proportion_empty_prompts is {self.proportion_empty_prompts}; it must be in [0, 1]")

    def for_validation(self) -> "ExampleFn":
        """Return the maker of validation examples: nothing is mirrored, left out or disturbed on purpose."""
        return replace(
            self,
            transform=replace(self.transform, random_flip=False),
            noise=replace(self.noise, input_perturbation=0.0),
            proportion_empty_prompts=0.0,
            labels=self.labels and replace(self.labels, probability=0.0),
        )

    def __call__(
        self, source: Source, seed: int, epoch: int, index: int, size: tuple[int, int] | None = None
    ) -> dict[str, np.ndarray]:
        """Make one example, with its pictures in floating-point numbers.

        Args:
            source: The records.
            seed: Seed of the run.
            epoch: Number of the pass over the data, from 0.
            index: Index of the example in the source, from 0.
            size: Height and width of the pictures of its batch, in pixels; None for a square of the resolution.

        Returns:
            The arrays of `unscaled`, with `pixel_values` float32 (channels, H, W) in [-1, 1].

        Raises:
            DataError: If the picture cannot be decoded, or has no caption.
        """
        return scaled(self.unscaled(source, seed, epoch, index, size))

    def unscaled(
        self, source: Source, seed: int, epoch: int, index: int, size: tuple[int, int] | None = None
    ) -> dict[str, np.ndarray | EightBit]:
        """Make one example, with its pictures in 8 bits.

        Args:
            source: The records.
            seed: Seed of the run.
            epoch: Number of the pass over the data, from 0.
            index: Index of the example in the source, from 0.
            size: Height and width of the pictures of its batch, in pixels; None for a square of the resolution.

        Returns:
            `pixel_values` of (channels, H, W) in [-1, 1] once it is scaled or, where they were made before,
            `posterior` float32 (2, c, h, w), mean and log variance of the latents; what `NoiseSpec.draw` gives, with
            `loss_weights` times the record's own weight, and likewise the weights of parts of the loss,
            `<part>_loss_weights`; the token ids, such as `input_ids` int32 (L,), or
            what was made of them before, such as `text_embeddings` (L, D), unless unconditional; the arrays of
            `extra`; where sizes are told, those of `size_numbers`; where classes are told, `class_labels` int32 ();
            `example_index` int64 ().

        Raises:
            DataError: If the picture cannot be decoded, or has no caption or class where these are told.
        """
        rng = rngs_of(seed, epoch, index)
        transform, noise = self.transform, self.noise
        if size is not None:
            transform = replace(transform, size=size)
            noise = replace(noise, shape=latent_shape(noise.shape, transform))
        record = source[index]
        embeddings, posteriors = self.made.embeddings, self.made.posteriors
        place: Placement | None = None
        if record.posterior is not None:
            example: dict[str, np.ndarray | EightBit] = {"posterior": record.posterior[int(transform.flips(rng))]}
        elif posteriors is None:
            image = decode(record)
            place = transform.place(image.size, rng)
            pixels = transform.cut(image, place, channels=transform.channels, interpolation=transform.interpolation)
            example = {"pixel_values": eight_bit(pixels)}
        elif (name := sized_name(record.name, size)) in posteriors:
            example = {"posterior": posteriors[name][int(transform.flips(rng))]}
        else:
            raise DataError(f"{record.name} could not be read when its latents were made")
        if self.told_sizes or self.extra is not None:
            place = place or transform.place(self._size(record, size), rng)
            if self.told_sizes:
                width, height = place.original
                example |= size_numbers((height, width), place.crop_top_left, place.target)
            if self.extra is not None:
                example |= self.extra(record, transform, place, rng)
        drawn = noise.draw(rng)
        example |= drawn
        if embeddings is not None:
            caption = self.caption(record, rng)
            example |= {name: table[caption] for name, table in embeddings.items()}
        elif self.tokenize is not None:
            example |= self.tokenize(self.caption(record, rng))
        if self.labels is not None:
            example |= self.labels(record, rng)
        example["loss_weights"] = np.asarray(drawn["loss_weights"] * record.weight, np.float32)
        for part, weight in record.part_weights.items():
            example[part + PART_WEIGHTS] = np.asarray(drawn["loss_weights"] * weight, np.float32)
        example["example_index"] = np.asarray(index, np.int64)
        return example

    def _size(self, record: Record, bucket: tuple[int, int] | None) -> tuple[int, int]:
        """Return width and height of a record's picture; they need no read of it where they were kept."""
        if self.made.sizes is None:
            return size_of(record)
        width, height = self.made.sizes[sized_name(record.name, bucket)].tolist()
        return width, height

    def caption(self, record: Record, rng: Callable[[Stream], np.random.Generator]) -> str:
        """Return the caption that an example has: one of its record's, or the empty one.

        Args:
            record: The record.
            rng: Function that returns the example's generator of a stream.

        Raises:
            DataError: If it has no caption.
        """
        caption = record.caption
        if caption is None or caption == []:
            raise DataError(f"{record.name} has no caption; give it one or remove it")
        if self.proportion_empty_prompts and rng(Stream.DROPOUT_CAPTION).random() < self.proportion_empty_prompts:
            return ""
        if isinstance(caption, str):
            return caption
        return caption[int(rng(Stream.CAPTION).integers(len(caption)))]
