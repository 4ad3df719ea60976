import warnings

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.run.schedule.rates import ema_decays, learning_rate_schedule
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig


def config(**options):
    return UnconditionalConfig(dataset_name="digits", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler": "constant"},
        {"lr_scheduler": "constant_with_warmup"},
        {"lr_scheduler": "linear"},
        {"lr_scheduler": "cosine"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 0},
        {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3},
        {"lr_scheduler": "polynomial", "lr_power": 2.0},
        {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:10,0.1:20,0.01:30,0.005"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_schedules_equal_diffusers(options):
    options = {"lr_warmup_steps": 7} | options
    ours = learning_rate_schedule(config(**options), 50, 3e-4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = get_scheduler(
        options["lr_scheduler"],
        optimizer,
        step_rules=options.get("lr_step_rules"),
        num_warmup_steps=options["lr_warmup_steps"],
        num_training_steps=50,
        num_cycles=options.get("lr_num_cycles", 1),
        power=options.get("lr_power", 1.0),
    )
    for step in range(60):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18), step
        optimizer.step()
        theirs.step()


def test_bad_rules_are_named():
    with pytest.raises(ConfigError, match="--lr_step_rules '1:x,2'"):
        learning_rate_schedule(config(lr_scheduler="piecewise_constant", lr_step_rules="1:x,2"), 10, 1e-4)
    with pytest.raises(ConfigError, match="polynomial schedule ends at 1e-07"):
        learning_rate_schedule(config(lr_scheduler="polynomial"), 10, 1e-8)


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_decay_equals_diffusers(warmup):
    options = config(use_ema=True, ema_warmup=warmup, ema_inv_gamma=2.0, ema_power=0.6, ema_max_decay=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = EMAModel(
            [torch.nn.Parameter(torch.zeros(1))], decay=0.9, use_ema_warmup=warmup, inv_gamma=2.0, power=0.6
        )
    for step in range(200):
        assert ema_decays(options, step)["ema"] == pytest.approx(theirs.get_decay(step + 1), abs=1e-15), step
