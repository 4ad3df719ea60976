"""Models that were trained by flow matching and by EDM: trained, opened and drawn from on both backends."""

import json

import diffusers
import numpy as np
import pytest
from proofs import proof
from tiny import ONE_BLOCK, RUN, UNET

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.generate import generate as jax_generate
from flax_diffusion.train import train as jax_train
from torch_backend.generate import generate as torch_generate
from torch_backend.train import train as torch_train


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("objective", ["flow_matching", proof("edm")])
def test_models_of_other_objectives(tmp_path, objective):
    """Trained, opened and drawn from on both backends: the same pictures, with their own sampler alone."""
    out = jax_train(
        "unconditional",
        **RUN | {"unet": UNET | ONE_BLOCK},
        objective=objective,
        report_to="none",
        draw_samples=False,
        output_dir=str(tmp_path / "run"),
    )
    saved = json.loads((out / "scheduler/scheduler_config.json").read_text())
    own = {"flow_matching": "FlowMatchEulerDiscreteScheduler", "edm": "EDMEulerScheduler"}[objective]
    assert saved["_class_name"] == own
    getattr(diffusers, own).from_pretrained(out / "scheduler")
    options = {"num_images": 3, "num_inference_steps": 4, "seed": 1}
    ours, theirs = jax_generate(out, **options), torch_generate(out, **options)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert ours.std() > 1
    mine, other = {"flow_matching": ("flow_match", "edm"), "edm": ("edm", "flow_match")}[objective]
    for same in (mine, "euler"):
        np.testing.assert_array_equal(jax_generate(out, scheduler=same, **options), ours)
    for name in {"flow_matching": ("heun", "dpm++", "sde"), "edm": ("heun", "dpm++")}[objective]:
        drawn = jax_generate(out, scheduler=name, **options)
        assert np.abs(drawn.astype(int) - torch_generate(out, scheduler=name, **options)).max() <= 1
        assert (drawn != ours).any()
    for generate, wrong in ((jax_generate, other), (torch_generate, "ddim")):
        with pytest.raises(ConfigError, match=f"--scheduler {wrong}: this model was trained by {objective}, which"):
            generate(out, scheduler=wrong, **options)


@pytest.mark.parametrize("train", [proof(jax_train), torch_train])
def test_another_objective_for_a_pretrained_model(tmp_path, train):
    """The new scheduler takes the place of the old one; the objective of the one that is there needs no saying."""
    base = jax_train("unconditional", **RUN, report_to="none", draw_samples=False, output_dir=str(tmp_path / "base"))
    more = {name: value for name, value in RUN.items() if name != "unet"} | {
        "max_train_steps": 1,
        "report_to": "none",
        "draw_samples": False,
    }
    options = {"pretrained_model_name_or_path": str(base), "objective": "flow_matching", "shift": 3.0}
    out = train("unconditional", **more, **options, output_dir=str(tmp_path / "flow"))
    values = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert values == {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    again = train("unconditional", **more, pretrained_model_name_or_path=str(out), output_dir=str(tmp_path / "again"))
    assert json.loads((again / "scheduler/scheduler_config.json").read_text()) == values


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"objective": "flowmatching"},
            "--objective 'flowmatching' is unknown; use one of ddpm, .*; did you mean 'flow_",
        ),
        (
            {"objective": "edm", "snr_gamma": 5.0},
            "--snr_gamma goes with --objective ddpm, and this model is trained by edm",
        ),
        (
            {"objective": "flow_matching", "noise_scheduler": {"_class_name": "DDIMScheduler"}},
            "--objective flow_matching with a --noise_scheduler of DDIMScheduler, whose models are trained by ddpm",
        ),
    ],
)
def test_mistakes_about_objectives(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        jax_train("unconditional", **RUN, **options, output_dir=str(tmp_path / "run"))
