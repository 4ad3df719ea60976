"""The loss of a micro-batch, as a module that holds what trains, so that DDP, FSDP and DeepSpeed can wrap it.

Shapes: B images per micro-batch in this process, C channels, H and W in pixels, h and w of what is denoised, L tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torch_backend.modules import Modules
from torch_backend.variational_bound import variational_bound

if TYPE_CHECKING:
    from jaxtyping import Float

Batch = dict[str, Tensor]

FSDP_UNITS = {"ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer"}
"""Classes of the modules that FSDP gathers one at a time."""


class Loss(nn.Module):
    """The loss of a task, as a module whose children are the modules that train.

    Args:
        modules: The pipeline's modules. Those that train become children of this module, the others do not.
    """

    def __init__(self, modules: Modules):
        super().__init__()
        self._modules_of = [modules]  # in a list, so that frozen modules are not registered as children
        for name, component in modules.spec.components.items():
            if component.is_trained:
                self.add_module(name, modules.by_name[name])
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(present & FSDP_UNITS)  # where Accelerate looks for them

    def forward(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch of the family's `loss`, or of `denoising_loss`, in float32 at least."""
        return loss_of(self._modules_of[0], batch)


def loss_of(modules: Modules, batch: Batch) -> Float[Tensor, ""]:
    """Return the loss of a micro-batch: that of the family, or `denoising_loss`."""
    return (modules.family.loss or denoising_loss)(modules, batch)


def denoising_loss(modules: Modules, batch: Batch) -> Float[Tensor, ""]:
    """Compute the weighted denoising loss; the twin of `flax_diffusion.jax_backend.train_step.denoising_loss`.

    Args:
        modules: The pipeline's modules.
        batch: Images as pixel_values (B, C, H, W) or as the posterior (B, 2, C, h, w) of their latents, noise
            (B, C, h, w), the fields of the objective's `Mixture`, each (B,), and where the pipeline needs them
            latent_noise (B, C, h, w), perturbation (B, C, h, w), and what its family conditions on.

    Returns:
        Σ_i w_i · (mean((prediction_i − target_i)²) + bound_i) / B, in float32 at least. There is a bound, that of
        `variational_bound`, only where a variance is trained.

    Reference:
        `core.objectives.objective`, for input, target and weight.
    """
    if "posterior" in batch:
        mean, logvar = batch["posterior"].unbind(dim=1)
        clean = modules.sample_latents(mean, (0.5 * logvar).exp(), batch["latent_noise"])
    else:
        clean = modules.encode_images(batch["pixel_values"], batch.get("latent_noise"))
    noise = batch["noise"]
    added = noise + batch["perturbation"] if "perturbation" in batch else noise
    noisy = _mixed(batch, "input", clean, added)
    output = modules.output(noisy, batch["timesteps"], modules.condition(batch))
    predicted, variance = output[:, : noisy.shape[1]], output[:, noisy.shape[1] :]
    target = _mixed(batch, "target", clean, noise)
    wide = torch.promote_types(predicted.dtype, torch.float32)
    difference = predicted.to(wide) - target.to(wide)
    error = difference.square().mean(dim=(1, 2, 3))
    if "variance_weights" in batch:
        error = error + variational_bound(batch, clean.to(wide), difference, variance.to(wide))
    return (error * batch["loss_weights"]).mean()


def _mixed(
    batch: Batch, what: str, clean: Float[Tensor, "B C h w"], noise: Float[Tensor, "B C h w"]
) -> Float[Tensor, "B C h w"]:
    """Return the model's input or target, (B, C, h, w): what_clean · clean + what_noise · noise."""
    of_clean, of_noise = (batch[f"{what}_{part}"][:, None, None, None] for part in ("clean", "noise"))
    return of_clean * clean + of_noise * noise


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], params: dict[str, Tensor], decay: float) -> None:
    """Update the moving average in place, to ema − (1 − decay) · (ema − params).

    Args:
        ema: The average by parameter name.
        params: The weights by parameter name.
        decay: Decay of this step.
    """
    for name, average in ema.items():
        average.sub_((1.0 - decay) * (average - params[name]))
