"""An autoencoder's progress: pictures beside their reconstructions, and the scale of its latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flax_diffusion.core import hub
from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config import TrainConfig
from flax_diffusion.core.data.batches import ExampleFn
from flax_diffusion.core.data.sources import Source
from flax_diffusion.core.files import write_json
from flax_diffusion.core.tasks import AutoencoderConfig

SCALED_BY = 256
"""Pictures that the scale of the latents is measured on."""


@dataclass(frozen=True)
class Shown:
    """The first pictures of the dataset, as the model takes them."""

    pixels: np.ndarray = field(repr=False)  # float32 (N, C, H, W) in -1..1
    noise: np.ndarray = field(repr=False)  # float32 (N, c, h, w), samples the posterior
    in_grid: int  # of them, the first so many are looked at


def first_examples(source: Source, make_example: ExampleFn, config: TrainConfig) -> Shown | None:
    """The pictures that an autoencoder's progress is seen by; None for other tasks."""
    if not isinstance(config, AutoencoderConfig):
        return None
    count = min(len(source), max(SCALED_BY, config.eval_batch_size))
    examples = [make_example(source, config.seed, 0, index) for index in range(count)]
    pixels = np.stack([example["pixel_values"] for example in examples])
    noise = np.stack([example["latent_noise"] for example in examples])
    return Shown(pixels, noise, min(count, config.eval_batch_size))


def compare(backend: Backend, shown: Shown) -> np.ndarray:
    """Pictures and their reconstructions in turn, uint8 (2N, H, W, C)."""
    pixels = shown.pixels[: shown.in_grid]
    made = backend.decode(backend.encode(pixels, shown.noise[: shown.in_grid]))
    given = np.round((pixels / 2 + 0.5) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.stack([given, made], axis=1).reshape(-1, *given.shape[1:])


def write_scaling_factor(backend: Backend, shown: Shown, config: TrainConfig, folder: Path) -> None:
    """Writes into vae/config.json what brings the latents to unit variance, unless a config has said it.

    Reference: Rombach et al., https://arxiv.org/abs/2112.10752, section D.1.
    """
    assert isinstance(config, AutoencoderConfig)
    given = isinstance(config.vae, dict) and "scaling_factor" in config.vae
    if given or config.pretrained_model_name_or_path:
        return
    latents = backend.encode(shown.pixels, shown.noise)
    if backend.process_index == 0:
        path = folder / "vae" / "config.json"
        values = hub.read_json(path)
        write_json(path, values | {"scaling_factor": float(values["scaling_factor"] / latents.std())})
