"""Outputs of the models that Transformers had in Flax: dataclasses that also read as its ordered dictionaries."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import flax.struct
import jax

from flax_diffusion.models.outputs import ModelOutput


class TransformersOutput(ModelOutput):
    """Base of the outputs: also a mapping of the fields that are not None, in their order.

    As upstream's, it is iterated over names, while a number indexes values: `output[0]` is the first one.
    """

    def keys(self) -> list[str]:
        """Return the names of the fields that are not None."""
        names = [field.name for field in fields(self)]  # pyright: ignore[reportArgumentType]
        return [name for name in names if getattr(self, name) is not None]

    def values(self) -> list[Any]:
        """Return the values that are not None."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Return names and values."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.keys()


@flax.struct.dataclass
class FlaxBaseModelOutput(TransformersOutput):
    """Output of an encoder without pooling.

    Attributes:
        last_hidden_state: Last hidden state, (B, L, hidden_size).
        hidden_states: Embeddings and every layer's output, each (B, L, hidden_size); or None.
        attentions: Every layer's attention weights, each (B, N, L, L); or None.
    """

    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxBaseModelOutputWithPooling(TransformersOutput):
    """Output of FlaxCLIPTextModel and FlaxCLIPVisionModel.

    Attributes:
        last_hidden_state: Last hidden state, (B, L, hidden_size); of text after the final layer norm.
        pooler_output: The last hidden state at the end-of-text token, or at the class token and normalised,
            (B, hidden_size).
        hidden_states: Embeddings and every layer's output before the final layer norm, each (B, L, hidden_size); or
            None.
        attentions: Every layer's attention weights, each (B, N, L, L); or None.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxCLIPTextModelOutput(TransformersOutput):
    """Output of FlaxCLIPTextModelWithProjection.

    Attributes:
        text_embeds: Projected pooled output, (B, projection_dim).
        last_hidden_state: Last hidden state after the final layer norm, (B, L, hidden_size).
        hidden_states: Embeddings and every layer's output before the final layer norm, each (B, L, hidden_size); or
            None.
        attentions: Every layer's attention weights, each (B, N, L, L); or None.
    """

    text_embeds: jax.Array
    last_hidden_state: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxCLIPOutput(TransformersOutput):
    """Output of FlaxCLIPModel.

    Attributes:
        logits_per_image: Scaled cosine similarity of every image and text, (images, texts).
        logits_per_text: Its transpose, (texts, images).
        text_embeds: Projected texts of length 1, (texts, projection_dim).
        image_embeds: Projected images of length 1, (images, projection_dim).
        text_model_output: Output of the text encoder.
        vision_model_output: Output of the vision encoder.
    """

    logits_per_image: jax.Array
    logits_per_text: jax.Array
    text_embeds: jax.Array
    image_embeds: jax.Array
    text_model_output: FlaxBaseModelOutputWithPooling
    vision_model_output: FlaxBaseModelOutputWithPooling

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values in field order, the encoders' outputs as tuples too."""
        encoders = (self.text_model_output.to_tuple(), self.vision_model_output.to_tuple())
        return (self.logits_per_image, self.logits_per_text, self.text_embeds, self.image_embeds, *encoders)
