"""The Flax modules of a pipeline, and the functions of them that training and sampling are composed of.

Shapes: B images, C channels, H and W in pixels, h and w of what is denoised (pixels or latents), L tokens, D text
features.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from flax_diffusion.core.families.family import Role
from flax_diffusion.core.objectives.objective import Objective
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training
from flax_diffusion.core.spec.weight_files import in_memory
from flax_diffusion.core.typed import Checkpointing
from flax_diffusion.jax_backend.adapters import interceptor
from flax_diffusion.jax_backend.exchange import BlockGather
from flax_diffusion.jax_backend.families.family import FAMILIES, Family, class_of
from flax_diffusion.jax_backend.optimizers.optimizer import Params
from flax_diffusion.models.outputs import FlaxDiagonalGaussianDistribution
from flax_diffusion.models.weights import from_tensors, to_torch, torch_shapes

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Key, Num

COMPUTE_DTYPES = {"no": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
"""Dtype of the computation, by --mixed_precision."""


@dataclass(frozen=True, kw_only=True)
class Modules:
    """A pipeline's modules by component name. Static under jit.

    Attributes:
        spec: The pipeline.
        by_name: The modules by component name.
        mesh: Devices over which batches are split. Attention chooses its kernel by them; None for any devices.
        block_gather: How layers gather their weights; None where the weights are whole, or jit's arrays.
        objective: What the denoiser learns, where that has a loss and samples of its own; else None.
    """

    spec: PipelineSpec
    by_name: dict[str, Any]
    mesh: Mesh | None = None
    block_gather: BlockGather | None = None
    objective: Objective | None = None

    def encode_images(
        self, params: Params, pixels: Float[Array, "B C H W"], noise: Float[Array, "B C h w"] | None
    ) -> Float[Array, "B C h w"]:
        """Encode images to scaled latents.

        Args:
            params: Weights of all components.
            pixels: The images, (B, C, H, W) in -1..1.
            noise: Standard normal noise (B, C, h, w) that samples the posterior; None where there is no autoencoder.

        Returns:
            The latents, (B, C, h, w); the pixels themselves where there is no autoencoder.
        """
        if self.spec.vae is None:
            return pixels
        assert noise is not None
        return self.sample_latents(self.posterior(params, pixels), noise)

    def sample_latents(
        self, posterior: FlaxDiagonalGaussianDistribution, noise: Float[Array, "B C h w"]
    ) -> Float[Array, "B C h w"]:
        """Sample a posterior with standard normal noise, to scaled latents (B, C, h, w), in float32 at least."""
        assert self.spec.vae is not None
        latents = posterior.sample_with(noise) * self.spec.vae["scaling_factor"]
        return latents.astype(jnp.promote_types(latents.dtype, jnp.float32))

    def posterior(self, params: Params, pixels: Float[Array, "B C H W"]) -> FlaxDiagonalGaussianDistribution:
        """Encode images (B, C, H, W) to the distribution of their latents (B, C, h, w), which are not scaled."""
        found = self._apply(self.spec.vae_name, params, pixels, method="encode").latent_dist
        mean, logvar = (jnp.transpose(moment, (0, 3, 1, 2)) for moment in (found.mean, found.logvar))
        return FlaxDiagonalGaussianDistribution.of(mean, logvar)

    def decode_latents(self, params: Params, latents: Float[Array, "B C h w"]) -> Float[Array, "B C H W"]:
        """Decode scaled latents (B, C, h, w) to images (B, C, H, W) in about -1..1: the inverse of `encode_images`."""
        if self.spec.vae is None:
            return latents
        return self.decode(params, latents / self.spec.vae["scaling_factor"])

    def decode(self, params: Params, latents: Float[Array, "B C h w"]) -> Float[Array, "B C H W"]:
        """Decode latents (B, C, h, w) that are not scaled to images (B, C, H, W)."""
        channels_last = jnp.transpose(latents, (0, 2, 3, 1))
        return self._apply(self.spec.vae_name, params, channels_last, method="decode").sample

    @property
    def family(self) -> Family:
        """Functions of the pipeline's family."""
        return FAMILIES[self.spec.family.name]

    def condition(self, params: Params, batch: Mapping[str, jax.Array], dropout: Key[Array, ""] | None = None) -> Any:
        """Return what the denoiser is told besides sample and time; see `Family.condition`."""
        return self.family.condition(self, params, batch, dropout)

    def predict(
        self,
        params: Params,
        sample: Float[Array, "B C h w"],
        timesteps: Num[Array, " B"],
        condition: Any = None,
        dropout: Key[Array, ""] | None = None,
    ) -> Float[Array, "B C h w"]:
        """Return the denoiser's prediction for noisy samples (B, C, h, w) at timesteps (B,)."""
        return self.output(params, sample, timesteps, condition, dropout)[:, : sample.shape[1]]

    def output(
        self,
        params: Params,
        sample: Float[Array, "B C h w"],
        timesteps: Num[Array, " B"],
        condition: Any = None,
        dropout: Key[Array, ""] | None = None,
    ) -> Float[Array, "B c h w"]:
        """Return the prediction, and behind it, where the denoiser learns one, the variance: (B, C or 2C, h, w)."""
        return self.family.predict(self, params, sample, timesteps, condition, dropout)

    def call(
        self, name: str, params: Params, dropout: Key[Array, ""] | None, *inputs: jax.Array, **options: Any
    ) -> Any:
        """Call a model with its adapters; a model that does not train has no dropout.

        Args:
            name: Name of the component.
            params: Weights of all components.
            dropout: Key of the dropout masks; None in evaluation.
            inputs: Inputs of the model.
            options: Further inputs by name.

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
            return self._apply(name, params, *inputs, train=train, rngs=rngs, **options)

    def layers_gather(self, path: tuple[str, ...]) -> bool:
        """Return whether the layers gather a weight, of the path that begins with the component's name."""
        return self.block_gather is not None and self.block_gather.gathers(path)

    def dtype_of(self, name: str) -> Any:
        """Return the dtype of a component's computation."""
        return self.by_name[name].dtype

    def _apply(self, name: str, params: Params, *inputs: jax.Array, **options: Any) -> Any:
        mesh: AbstractContextManager[Any] = nullcontext()
        if self.mesh is not None and jax.sharding.get_abstract_mesh().empty:  # it is not on one device's part already
            mesh = jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        gather = self.block_gather.layers_of(name, self.dtype_of(name)) if self.block_gather else nullcontext()
        with mesh, gather:
            return self.by_name[name].apply({"params": params[name]}, *inputs, **options)


def build_modules(
    spec: PipelineSpec,
    dtype: Any = jnp.float32,
    *,
    gradient_checkpointing: Checkpointing = False,
    mesh: Mesh | None = None,
    options: Any = None,
) -> Modules:
    """Make the modules of a pipeline, without weights.

    Args:
        spec: The pipeline.
        dtype: Dtype of the computation. A VAE whose config says `force_upcast` (SDXL's) computes in float32 at least.
        gradient_checkpointing: Activations that the backward pass computes again, in models that gradients go through.
        mesh: Devices over which batches are split; None for any.
        options: Options of a run, which have those of the objective; None for the objective's defaults.

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
    own = spec.objective if spec.scheduler and spec.objective.loss else None
    objective = own.from_scheduler(spec.scheduler, options or own.options()) if own else None
    return Modules(spec=spec, by_name=by_name, mesh=mesh, objective=objective)


def shapes(spec: PipelineSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of a pipeline's parameters by component and PyTorch name, without reading a weight."""
    return {name: torch_shapes(model.params_shape()) for name, model in build_modules(spec).by_name.items()}


def first_weights(modules: Modules, name: str, seed: int) -> Params:
    """Return the first weights of a new component: copies of another model's where it has the same, else drawn.

    Args:
        modules: The pipeline's modules.
        name: Name of the component.
        seed: Seed of the run.

    Returns:
        The weights as NumPy arrays on the host, float32.
    """
    drawn = modules.by_name[name].init_weights(seed)
    source = modules.spec.components[name].copied_from
    if source is None:
        return drawn
    known: dict[Any, Any] = flatten_dict(load_pretrained(source))
    new: dict[Any, Any] = flatten_dict(drawn)
    same = {path for path, leaf in new.items() if path in known and known[path].shape == leaf.shape}
    return unflatten_dict({path: known[path] if path in same else leaf for path, leaf in new.items()})


def load_pretrained(component: Component) -> Params:
    """Read the weights of a component from its files, and apply its overlay.

    Args:
        component: The component.

    Returns:
        The weights as NumPy arrays on the host, float32.

    Raises:
        WeightsError: If the weights do not fit the component's config.
    """
    model, overlay = class_of(component.kind), component.overlay
    source = f"{component.weights}/{component.subfolder or ''}"
    params: Params = {}
    if component.weights is not None:
        _, params = model.from_pretrained(
            component.weights,
            subfolder=component.subfolder,
            revision=component.revision,
            variant=component.variant,
            param_dtype=jnp.float32,
        )
    if overlay is None:
        return params
    merged = overlay.apply(dict(to_torch(params)), source)
    shapes = model.from_config(component.config).params_shape()
    return from_tensors(in_memory(merged), shapes, source, jnp.float32)
