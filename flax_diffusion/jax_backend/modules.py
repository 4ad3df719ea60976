"""The Flax modules of a pipeline, and the few functions that training and sampling compose them with.

Shapes: B images, C channels, H W pixels, h w of what is denoised (pixels or latents), L tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from flax_diffusion.core.families.family import Role
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training
from flax_diffusion.core.spec.weight_files import in_memory
from flax_diffusion.core.typed import Checkpointing
from flax_diffusion.jax_backend.adapters import interceptor
from flax_diffusion.jax_backend.families.family import FAMILIES, Family, class_of
from flax_diffusion.jax_backend.optimizers.optimizer import Params
from flax_diffusion.models.outputs import FlaxDiagonalGaussianDistribution
from flax_diffusion.models.weights import from_tensors, to_torch, torch_shapes

COMPUTE_DTYPES = {"no": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


@dataclass(frozen=True, kw_only=True)
class Modules:
    """A pipeline's modules by component name. Static under jit.

    Attributes:
        spec: The pipeline.
        by_name: Its modules.
        mesh: Devices over which batches are split, which attention has to know to choose its kernel; None: any.
    """

    spec: PipelineSpec
    by_name: dict[str, Any]
    mesh: Mesh | None = None

    def encode_images(self, params: Params, pixels: jax.Array, noise: jax.Array | None) -> jax.Array:
        """Pixels (B,C,H,W) in -1..1 to scaled latents (B,C,h,w); pixels themselves where there is no VAE.

        Args:
            params: Weights of all components.
            pixels: The images.
            noise: Standard normal (B,C,h,w) that samples the posterior.
        """
        if self.spec.vae is None:
            return pixels
        assert noise is not None
        return self.sample_latents(self.posterior(params, pixels), noise)

    def sample_latents(self, posterior: FlaxDiagonalGaussianDistribution, noise: jax.Array) -> jax.Array:
        """Scaled latents (B,C,h,w), in float32 at least."""
        assert self.spec.vae is not None
        latents = posterior.sample_with(noise) * self.spec.vae["scaling_factor"]
        return latents.astype(jnp.promote_types(latents.dtype, jnp.float32))

    def posterior(self, params: Params, pixels: jax.Array) -> FlaxDiagonalGaussianDistribution:
        """The distribution of the latents of images, not scaled."""
        return self._apply(self.spec.vae_name, params, pixels, method="encode").latent_dist

    def decode_latents(self, params: Params, latents: jax.Array) -> jax.Array:
        """The inverse of `encode_images`: images (B,C,H,W) in about -1..1."""
        if self.spec.vae is None:
            return latents
        return self.decode(params, latents / self.spec.vae["scaling_factor"])

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Latents that are not scaled to images."""
        return self._apply(self.spec.vae_name, params, latents, method="decode").sample

    @property
    def family(self) -> Family:
        """What the pipeline's family computes."""
        return FAMILIES[self.spec.family.name]

    def condition(self, params: Params, batch: Mapping[str, jax.Array], dropout: jax.Array | None = None) -> Any:
        """Return what the denoiser is told beside sample and time; see `Family.condition`."""
        return self.family.condition(self, params, batch, dropout)

    def predict(
        self,
        params: Params,
        sample: jax.Array,
        timesteps: jax.Array,
        condition: Any = None,
        dropout: jax.Array | None = None,
    ) -> jax.Array:
        """Return the denoiser's prediction for noisy samples (B, C, h, w) at timesteps (B,)."""
        return self.family.predict(self, params, sample, timesteps, condition, dropout)

    def call(self, name: str, params: Params, dropout: jax.Array | None, *inputs: jax.Array) -> Any:
        """Call a model, with its adapters; what does not train has no dropout.

        Args:
            name: The component.
            params: Weights of all components.
            dropout: Key of the dropout masks; None in evaluation.
            inputs: Of the model.

        Returns:
            The model's outputs.
        """
        component = self.spec.components[name]
        train = dropout is not None and component.is_trained
        rngs = {"dropout": dropout} if train else None
        with (
            nn.intercept_methods(interceptor(component, train=train))
            if component.training is Training.ADAPTERS
            else nullcontext()
        ):
            return self._apply(name, params, *inputs, train=train, rngs=rngs)

    def _apply(self, name: str, params: Params, *inputs: jax.Array, **options: Any) -> Any:
        mesh: AbstractContextManager[Any] = nullcontext()
        if self.mesh is not None:
            mesh = jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        with mesh:
            return self.by_name[name].apply({"params": params[name]}, *inputs, **options)


def build_modules(
    spec: PipelineSpec,
    dtype: Any = jnp.float32,
    *,
    gradient_checkpointing: Checkpointing = False,
    mesh: Mesh | None = None,
) -> Modules:
    """Makes the modules of a pipeline; no weights yet.

    Args:
        spec: What to build.
        dtype: Compute precision. A VAE whose config says `force_upcast` (SDXL's) computes in float32 at least.
        gradient_checkpointing: What the backward pass computes again, of all that gradients pass through.
        mesh: Devices over which batches are split.

    Raises:
        ConfigError: For a config field that the Flax modules do not support.
    """
    wide = jnp.promote_types(dtype, jnp.float32)

    def make(component: Component) -> Any:
        options: dict[str, Any] = {"dtype": wide if component.config.get("force_upcast") else dtype}
        if component.is_trained or component.role is Role.DENOISER:
            options["gradient_checkpointing"] = gradient_checkpointing
        return class_of(component.kind).from_config(component.config, **options)

    by_name = {name: make(component) for name, component in spec.components.items()}
    return Modules(spec=spec, by_name=by_name, mesh=mesh)


def shapes(spec: PipelineSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of every model's parameters by PyTorch name; no weight is read."""
    return {name: torch_shapes(model.params_shape()) for name, model in build_modules(spec).by_name.items()}


def load_pretrained(component: Component) -> Params:
    """The float32 weights of a component, as NumPy arrays on the host: its files', with what is laid over them.

    Raises:
        WeightsError: If they do not fit.
    """
    model, overlay = class_of(component.kind), component.overlay
    source = f"{component.weights}/{component.subfolder or ''}"
    params: Params = {}
    if component.weights is not None:
        _, params = model.from_pretrained(
            component.weights, subfolder=component.subfolder, revision=component.revision, variant=component.variant
        )
    if overlay is None:
        return params
    merged = overlay.apply(dict(to_torch(params)), source)
    return from_tensors(in_memory(merged), model.from_config(component.config).params_shape(), source)
