"""An autoencoder's progress: pictures beside their reconstructions, and the scale of its latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flax_diffusion.core.backend import Backend
from flax_diffusion.core.config.options import TrainConfig
from flax_diffusion.core.data.batches import ExampleFn
from flax_diffusion.core.data.loader import Loader
from flax_diffusion.core.data.sources.source import Source
from flax_diffusion.core.io import model_files
from flax_diffusion.core.io.files import write_json
from flax_diffusion.core.spec.pipeline import PipelineSpec

SCALED_BY = 256
"""Pictures that the scale of the latents is measured on, where there are so many."""


@dataclass(frozen=True)
class Preview:
    """The first pictures of the dataset, in batches of `eval_batch_size`, read when they are looked at."""

    source: Source
    make_example: ExampleFn
    config: TrainConfig

    def batches(self, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Whole batches of at most `most` pictures in all, but at least one batch.

        Yields:
            Pixels (N, C, H, W) in -1..1, and noise (N, c, h, w) that samples the posterior.
        """
        size = min(self.config.eval_batch_size, len(self.source))
        loader = Loader(
            self.source,
            self.make_example,
            seed=self.config.seed,
            batch_size=size,
            num_steps=max(1, min(most, len(self.source)) // size),
            shuffle=False,
            skip_bad_images=self.config.skip_bad_images,
        )
        with loader:
            for batch in loader:
                yield batch["pixel_values"][0], batch["latent_noise"][0]


def compare(backend: Backend, preview: Preview) -> np.ndarray:
    """Pictures and their reconstructions in turn, uint8 (2N, H, W, C)."""
    pixels, noise = next(preview.batches(preview.config.eval_batch_size))
    made = backend.decode(backend.encode(pixels, noise))
    given = np.round((pixels / 2 + 0.5) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.stack([given, made], axis=1).reshape(-1, *given.shape[1:])


def write_scaling_factor(backend: Backend, preview: Preview, spec: PipelineSpec, folder: Path) -> None:
    """Writes into vae/config.json what brings the latents to unit variance, unless the autoencoder's config says it.

    Reference: Rombach et al., https://arxiv.org/abs/2112.10752, section D.1.
    """
    vae = spec.components["vae"]
    if "scaling_factor" in vae.config or vae.weights is not None:
        return
    deviation = np.concatenate([backend.encode(*batch) for batch in preview.batches(SCALED_BY)]).std()
    if backend.process_index == 0:
        path = folder / "vae" / "config.json"
        write_json(path, model_files.read_json(path) | {"scaling_factor": float(vae["scaling_factor"] / deviation)})
