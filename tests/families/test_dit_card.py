"""The model card of a transformer of flow matching: its lines draw, with plain Diffusers, what `generate` draws."""

import re

import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from proofs import proof
from tiny import RUN, VAE

from flax_diffusion.core.drawing.options import options_of
from flax_diffusion.core.randomness.streams import sampling_noise
from flax_diffusion.jax_backend import drawing
from flax_diffusion.jax_backend.sharding import make_mesh
from flax_diffusion.train import train
from torch_backend.sampling import HostNoise

DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}


def run(folder, **options):
    given = RUN | {"unet": None, "max_train_steps": 2, "report_to": "none", "validation_guidance_scale": 1.0}
    return train("class_conditional", **given | options, output_dir=str(folder))


def floats(folder, labels, shape, steps):
    """What `generate` draws of one picture a class, before it is rounded to bytes, (N, C, H, W)."""
    options = {"class_label": labels, "num_inference_steps": steps, "guidance_scale": 1.0, "seed": 5}
    config = options_of(folder, options)
    mesh: Mesh = make_mesh(1, 1)
    pipeline = drawing.open_pipeline(config, drawing.open_spec(config, [config]), mesh)
    pipeline.sampler._finish = pipeline.sampler.modules.decode_latents
    return np.concatenate([*drawing.pictures(pipeline, config)])


@pytest.mark.parametrize("latent", [False, proof(True)])
def test_its_lines_draw_what_generate_draws(tmp_path, latent):
    from diffusers import AutoencoderKL

    options = {"transformer": DIT | {"in_channels": 1}}
    if latent:
        torch.manual_seed(0)
        AutoencoderKL(in_channels=1, out_channels=1, **VAE).save_pretrained(tmp_path / "vae")
        options = {"transformer": DIT | {"in_channels": 4}, "vae": str(tmp_path / "vae"), "resolution": 16}
    folder = run(tmp_path / "run", objective="flow_matching", shift=2.0, **options)
    text = (folder / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    shape = (4, 8, 8) if latent else (1, 8, 8)
    names: dict = {"folder": str(folder)}
    with HostNoise(lambda: torch.from_numpy(sampling_noise(5, np.arange(4), 0, shape))):
        exec(lines, names)  # noqa: S102
    expected = floats(folder, ["0", "1", "2", "3"], shape, 50)
    assert names["x"].shape == expected.shape
    assert np.abs(names["x"].numpy() - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_who_has_none(tmp_path):
    """Noise is predicted as DiTPipeline wants it; options that Diffusers lacks would draw something else."""
    for number, options in enumerate(({"objective": "ddpm"}, {"objective": "flow_matching", "qk_norm": True})):
        qk_norm = {"qk_norm": True} if options.pop("qk_norm", False) else {}
        folder = run(tmp_path / str(number), transformer=DIT | {"in_channels": 1} | qk_norm, **options)
        assert not (folder / "README.md").exists()


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/README.md").write_text("mine")
    folder = run(tmp_path / "run", objective="flow_matching", transformer=DIT | {"in_channels": 1})
    assert (folder / "README.md").read_text() == "mine"
