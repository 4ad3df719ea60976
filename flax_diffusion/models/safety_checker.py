"""Stable Diffusion's safety checker, which compares images with concepts: the Linen module, and Diffusers' class of it.

Axes in shapes: B batch, C channels, D features.
"""

import re
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_diffusion.models.clip import CLIPBase, FlaxCLIPPreTrainedModel
from flax_diffusion.models.clip_vision import FlaxCLIPVisionModule, channels_last
from flax_diffusion.models.modeling import Config
from flax_diffusion.models.transformers_face import Params

CONCEPTS, SPECIAL_CONCEPTS = 17, 3
SPECIAL_ADJUSTMENT = 0.01
"""What an image with a special concept adds to its scores, so that the other thresholds are lower."""


def cosine_similarity(x: jax.Array, y: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Return the cosine similarities (B, K) of rows x (B, D) and y (K, D), whose norms are `eps` at least."""
    x, y = (rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), eps) for rows in (x, y))
    return x @ y.T


class FlaxStableDiffusionSafetyCheckerModule(CLIPBase):
    """CLIP's vision encoder, its projection, and the embeddings and thresholds of concepts.

    Fields are the config keys of Transformers' CLIPConfig, and:

    Args:
        dtype: Dtype of the projection.
        param_dtype: Dtype of newly initialised parameters.
        gradient_checkpointing: Recompute encoder layers in the backward pass, or parts ("minimal").

    Reference:
        StableDiffusionSafetyChecker of Diffusers (PyTorch).
    """

    torch_class: ClassVar[str] = "StableDiffusionSafetyChecker"

    @staticmethod
    def init_inputs(config: Config) -> tuple[Any, ...]:
        """Return the smallest inputs that reach every parameter."""
        return (CLIPBase.init_inputs(config)[1],)

    @nn.compact
    def __call__(self, clip_input: jax.Array) -> jax.Array:
        """Return which of the normalised images (B, H, W, C) show a concept, booleans (B,)."""
        # As upstream, the encoder computes in float32 whatever the dtype: scores are compared at three digits.
        wide = jnp.promote_types(self.dtype, jnp.float32)
        dtypes = {"dtype": wide, "param_dtype": self.param_dtype}
        vision = FlaxCLIPVisionModule(**self.vision_config, **dtypes, name="vision_model")
        pooled: jax.Array = vision(clip_input)[1]
        project = nn.Dense(
            self.projection_dim,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="visual_projection",
        )
        embeds = project(pooled)
        special = cosine_similarity(embeds, self._ones("special_care_embeds", SPECIAL_CONCEPTS))
        scores = cosine_similarity(embeds, self._ones("concept_embeds", CONCEPTS))
        special = jnp.round(special - self._ones("special_care_embeds_weights", SPECIAL_CONCEPTS, vector=True), 3)
        lower = SPECIAL_ADJUSTMENT * jnp.any(special > 0, axis=1, keepdims=True)
        scores = scores - self._ones("concept_embeds_weights", CONCEPTS, vector=True) + lower
        return jnp.any(jnp.round(scores, 3) > 0, axis=1)

    def _ones(self, name: str, rows: int, *, vector: bool = False) -> jax.Array:
        """Return a parameter of ones: (rows,), or (rows, projection_dim)."""
        shape = (rows,) if vector else (rows, self.projection_dim)
        return self.param(name, nn.initializers.ones, shape, self.param_dtype)


class FlaxStableDiffusionSafetyChecker(FlaxCLIPPreTrainedModel):
    """Stable Diffusion's safety checker. Its `input_shape` is (1, H, W, C).

    Reference:
        FlaxStableDiffusionSafetyChecker of Diffusers 0.39.
    """

    module_class = FlaxStableDiffusionSafetyCheckerModule
    main_input_name = "clip_input"
    renamed = (  # Transformers 5 leaves out the second start
        (re.compile(r"^vision_model\.(?!vision_model\.)"), "vision_model.vision_model."),
    )

    def default_shape(self) -> Any:
        """Return the shape of one image."""
        return super().default_shape()[1]

    def init_inputs(self, input_shape: Any) -> tuple[Any, ...]:
        """Return the module's inputs of a shape, abstract: values do not matter to new parameters."""
        return (jax.ShapeDtypeStruct(tuple(input_shape), jnp.float32),)

    def __call__(self, clip_input: Any, params: Params | None = None) -> jax.Array:
        """Return which images show a concept, booleans (B,).

        Args:
            clip_input: Normalised images, (B, C, H, W).
            params: Parameters; None for the model's own.
        """
        return self.apply(params, channels_last(clip_input, self.dtype))
