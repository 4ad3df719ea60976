"""Both backends train a transformer of classes alike: thirty steps in float64, by every objective."""

import pytest
from tiny import RUN

from flax_diffusion.core.cli.command_line import merge
from flax_diffusion.parity import compare, verdict

OBJECTIVES = {
    "epsilon": {"prediction_type": "epsilon"},
    "v_prediction": {"prediction_type": "v_prediction", "snr_gamma": 5.0},
    "learned_variance": {"variance_loss_weight": 0.001, "transformer": {"out_channels": 2}},
    "flow_matching": {"objective": "flow_matching", "weighting_scheme": "logit_normal"},
    "edm": {"objective": "edm"},
}
DIT = {"in_channels": 1, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


@pytest.mark.acceptance
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_thirty_steps_of_classes(objective):
    """With dropped labels and several averages."""
    values = RUN | {
        "unet": None, "transformer": DIT, "class_dropout_prob": 0.3, "ema_decays": [0.9, 0.999],
        "ema_sigma_rels": [0.1], "max_train_steps": 30, "report_to": "none", "validation_epochs": None,
    }  # fmt: skip
    values |= OBJECTIVES[objective]
    values["transformer"] = DIT | values["transformer"]
    config = merge("class_conditional", {}, values, "test")
    rows = list(compare(config, 30))
    equal, line = verdict(rows, "float64")
    print(f"\n{objective}: {line}")
    assert equal, line
    assert len(rows) == 30
    assert rows[-1].loss_jax != rows[0].loss_jax
