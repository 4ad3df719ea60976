"""The PyTorch modules of a pipeline, and the functions of them that training and sampling are composed of.

The twin of `flax_diffusion.jax_backend.modules`, function for function, with the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from flax_diffusion.core.backend import Described
from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.errors import ConfigError, WeightsError, nearest
from flax_diffusion.core.randomness import initial_weights
from flax_diffusion.core.spec import weight_files
from flax_diffusion.core.spec.pipeline import Component, PipelineSpec, Training
from torch_backend import adapters
from torch_backend.families.family import FAMILIES, Family, class_of
from torch_backend.names import file_name

if TYPE_CHECKING:
    from jaxtyping import Float, Num

COMPUTE_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtype of the computation, by --mixed_precision."""


@dataclass(frozen=True, kw_only=True)
class Modules:
    """A pipeline's modules by component name.

    Attributes:
        spec: The pipeline.
        by_name: The modules by component name.
    """

    spec: PipelineSpec
    by_name: dict[str, Any]

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.by_name[self.spec.vae_name]

    def encode_images(
        self, pixels: Float[Tensor, "B C H W"], noise: Float[Tensor, "B C h w"] | None
    ) -> Float[Tensor, "B C h w"]:
        """Encode images to scaled latents.

        Args:
            pixels: The images, (B, C, H, W) in -1..1.
            noise: Standard normal noise (B, C, h, w) that samples the posterior; None where there is no autoencoder.

        Returns:
            The latents, (B, C, h, w); the pixels themselves where there is no autoencoder.
        """
        if self.spec.vae is None:
            return pixels
        assert noise is not None
        with torch.no_grad():
            posterior = self.posterior(pixels)
            return self.sample_latents(posterior.mean, posterior.std, noise)

    def sample_latents(
        self, mean: Float[Tensor, "B C h w"], std: Float[Tensor, "B C h w"], noise: Float[Tensor, "B C h w"]
    ) -> Float[Tensor, "B C h w"]:
        """Sample a posterior with standard normal noise, to scaled latents (B, C, h, w), in float32 at least."""
        assert self.spec.vae is not None
        latents = (mean + std * noise) * self.spec.vae["scaling_factor"]
        return latents.to(torch.promote_types(latents.dtype, torch.float32))

    def posterior(self, pixels: Float[Tensor, "B C H W"]) -> Any:
        """Encode images (B, C, H, W) to the distribution of their latents, which are not scaled."""
        return self.vae.encode(pixels.to(self.vae.dtype)).latent_dist

    def decode_latents(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        """Decode scaled latents (B, C, h, w) to images (B, C, H, W) in about -1..1: the inverse of `encode_images`."""
        return latents if self.spec.vae is None else self.decode(latents / self.spec.vae["scaling_factor"])

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        """Decode latents (B, C, h, w) that are not scaled to images (B, C, H, W)."""
        return self.vae.decode(latents.to(self.vae.dtype)).sample

    @property
    def family(self) -> Family:
        """Functions of the pipeline's family."""
        return FAMILIES[self.spec.family.name]

    def condition(self, batch: Mapping[str, Tensor]) -> Any:
        """Return what the denoiser is told besides sample and time; see `Family.condition`."""
        return self.family.condition(self, batch)

    def predict(
        self, sample: Float[Tensor, "B C h w"], timesteps: Num[Tensor, " B"], condition: Any = None
    ) -> Float[Tensor, "B C h w"]:
        """Return the denoiser's prediction for noisy samples (B, C, h, w) at timesteps (B,)."""
        return self.output(sample, timesteps, condition)[:, : sample.shape[1]]

    def output(
        self, sample: Float[Tensor, "B C h w"], timesteps: Num[Tensor, " B"], condition: Any = None
    ) -> Float[Tensor, "B c h w"]:
        """Return the prediction, and behind it, where the denoiser learns one, the variance: (B, C or 2C, h, w)."""
        return self.family.predict(self, sample, timesteps, condition)


_MALFORMED = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, NameError, RuntimeError)
"""Errors of PyTorch's classes for configs whose values have a wrong type or size."""


def build_modules(
    spec: PipelineSpec, *, seed: int, frozen_dtype: torch.dtype, trained_dtype: torch.dtype, device: torch.device
) -> Modules:
    """Make the modules of a pipeline, with weights that are read, or drawn as on the JAX side.

    Args:
        spec: The pipeline.
        seed: Seed of weights that are drawn.
        frozen_dtype: Dtype of components whose own weights do not train. A VAE whose config says `force_upcast` has
            `trained_dtype`.
        trained_dtype: Dtype of the other components, and of adapters.
        device: Device of all modules.

    Raises:
        ConfigError: For a config that the PyTorch class does not take.
        WeightsError: For weights that do not fit.
    """
    by_name = {}
    for name, component in spec.components.items():
        module = load(component) if component.weights or component.overlay else _draw(component, seed)
        wide = component.training is Training.ALL or component.config.get("force_upcast")
        # PyTorch's own `to`, because Diffusers' warns about modules to keep in float32 even where there are none.
        nn.Module.to(module, device=device, dtype=trained_dtype if wide else frozen_dtype)
        if trained_dtype == torch.float64:
            _embed_in_float64(module)
        by_name[name] = module.train(component.is_trained).requires_grad_(component.training is Training.ALL)
        if component.training is Training.ADAPTERS:
            adapters.add(component, module, seed, trained_dtype)
    return Modules(spec=spec, by_name=by_name)


def _embed_in_float64(module: nn.Module) -> None:
    """Replace Diffusers' sinusoidal embeddings, wherever they are in a module."""
    for owner in module.modules():
        for name, layer in list(owner.named_children()):
            if isinstance(layer, Timesteps):
                setattr(owner, name, Float64Timesteps(layer))


class Float64Timesteps(nn.Module):
    """Sinusoidal embeddings in float64; Diffusers' `Timesteps` computes in float32 for any dtype of the model.

    Args:
        original: The `Timesteps` to replace, with its width, order and shift.

    Reference:
        Ho et al., https://arxiv.org/abs/2006.11239; Vaswani et al., https://arxiv.org/abs/1706.03762.
    """

    def __init__(self, original: Any):
        super().__init__()
        half = original.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float64) / (half - original.downscale_freq_shift)
        self.frequencies = torch.exp(-math.log(10000) * exponents)
        self.flip = original.flip_sin_to_cos
        self.odd = original.num_channels % 2

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps (B,), to (B, channels)."""
        angles = timesteps.double()[:, None] * self.frequencies.to(timesteps.device)
        parts = (angles.cos(), angles.sin()) if self.flip else (angles.sin(), angles.cos())
        return nn.functional.pad(torch.cat(parts, dim=1), (0, self.odd))


def load(component: Component) -> Any:
    """Read a component in float32 from safetensors or a Flax release's msgpack, and apply its overlay.

    Args:
        component: The component.

    Returns:
        Its module, on the CPU.

    Raises:
        WeightsError: If the weights do not fit; the message names every tensor that is missing, unexpected or of
            another shape.
    """
    with init_empty_weights(include_buffers=False):
        module = make(component)
    ours = {file_name(component.kind, name): name for name, _ in module.named_parameters()}
    arrays, source = _stored(component, ours) if component.weights else ({}, "what was trained")
    if component.overlay is not None:
        arrays = component.overlay.apply(arrays, source)
    problems = [f"missing {name}" for name in sorted(ours.keys() - arrays.keys())]
    problems += [f"unexpected {name}" for name in sorted(arrays.keys() - ours.keys())]
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    state = {}
    for name in sorted(ours.keys() & arrays.keys()):
        array, shape = arrays[name], shapes[ours[name]]
        if array.shape == (*shape, 1, 1) and len(shape) == 2:  # a 1 x 1 convolution may be linear here
            array = array[:, :, 0, 0]
        if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
            problems.append(f"{name} holds {array.dtype}, not floats")
        elif array.shape == shape:
            state[ours[name]] = torch.from_numpy(np.array(array, np.float32, order="C"))
        else:
            problems.append(f"misshapen {name} {array.shape} instead of {shape}")
    if problems:
        raise WeightsError(
            f"{source} does not fit the model's config, use the weights and the config of one model: "
            f"{'; '.join(problems)}"
        )
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(True)


def _stored(component: Component, known: Mapping[str, str]) -> tuple[portable.Arrays, str]:
    """Read the arrays of a component's files, by the names of `known` where they match one, and the file's name."""
    base = weight_files.base_name(component.kind)
    folder = weight_files.fetch(
        str(component.weights), component.subfolder, component.revision, base, component.variant
    )
    tensors, file = weight_files.read(folder, base, component.variant)
    stored = weight_files.match_names(tensors, known)
    return {name: tensors[key].array() for name, key in stored.items()}, str(file)


def shapes(spec: PipelineSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of a pipeline's parameters by component and name in files, without reading a weight."""
    found = {}
    for name, component in spec.components.items():
        with torch.device("meta"):
            module = make(component)
        found[name] = {file_name(component.kind, key): tuple(own.shape) for key, own in module.named_parameters()}
    return found


def make(component: Component) -> Any:
    """Make a module of a component's config, with PyTorch's own random weights.

    Args:
        component: The component.

    Raises:
        ConfigError: For a key that the class does not have, or values that do not go together.
    """
    kind, of_transformers = class_of(component.kind), component.model.library == "transformers"
    if of_transformers:
        # The latter two are in files of old releases.
        known = set(kind.config_class().to_dict()) | {"dropout", "torch_dtype"}
    else:
        known = set(kind._get_init_keys(kind)) - {"self"}  # as Diffusers reads its own configs
    for key in component.config:
        if key not in known:
            raise ConfigError(f"{component.kind} knows no config key '{key}'{nearest(key, known)}")
    try:
        if of_transformers:
            return kind(kind.config_class(**component.config))
        return kind(**component.config)
    except _MALFORMED as error:
        raise ConfigError(
            f"{component.kind}: PyTorch's class does not take its config ({error}); correct the values"
        ) from error


def _draw(component: Component, seed: int) -> Any:
    """Return a new module: copies of another model's weights where it has the same, else drawn ones."""
    module = make(component)
    config = module.config.to_dict() if component.model.library == "transformers" else dict(module.config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            file = file_name(component.kind, name)
            drawn = initial_weights.draw(seed, component.kind, config, file, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(drawn)))
        if component.copied_from is not None:
            known = dict(load(component.copied_from).named_parameters())
            for name, parameter in module.named_parameters():
                if name in known and known[name].shape == parameter.shape:
                    parameter.copy_(known[name])
    return module


def described(backend: Any) -> Described:
    """Return what a backend says of itself: its device, and the number of weights that do not train."""
    parameters = [p for module in backend.modules.by_name.values() for p in module.parameters()]
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    device: torch.device = backend.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Described(name, frozen, compiles=backend.config.torch_compile)
