"""`--evaluate_steps`: the metrics of pictures that a run draws while it trains."""

import importlib
import json

import numpy as np
import pytest
from tiny import ONE_BLOCK, RUN

from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.evaluate import evaluate
from flax_diffusion.generate import generate

BACKENDS = ("flax_diffusion", "torch_backend")
DIT = {"in_channels": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 4}
SMALL = RUN | {
    "unet": RUN["unet"] | ONE_BLOCK, "report_to": "none", "validation_epochs": None, "max_train_steps": 3,
    "use_ema": True,
}  # fmt: skip
JUDGED = {
    "evaluate_steps": 2, "evaluate_features": "pixels", "evaluate_reference": "digits", "evaluate_num_images": 10,
    "evaluate_num_inference_steps": 2,
}  # fmt: skip


def trained(folder, backend="torch_backend", task="unconditional", **options):
    start = importlib.import_module(f"{backend}.train").train
    given = {name: value for name, value in (SMALL | options).items() if value is not ...}
    return start(task, **given, output_dir=str(folder))


def values(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_values_are_those_of_evaluate(tmp_path, backend):
    """Every two steps and at the end, with the average; and the weights are those of a run that is not judged."""
    run = trained(tmp_path / "run", backend, **JUDGED)
    found = values(run)
    assert [(row["step"], sorted(row)) for row in found] == [(2, ["fid", "step"]), (3, ["fid", "step"])]
    assert found[0]["fid"] != found[1]["fid"]
    judged = evaluate(
        model=str(run), features="pixels", reference="digits", num_images=10, num_inference_steps=2, seed=0
    )
    assert found[1]["fid"] == pytest.approx(judged[0]["fid"], rel=1e-3)
    plain = trained(tmp_path / "plain", backend)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (plain / weights).read_bytes()
    trained(tmp_path / "run", backend, **JUDGED, resume_from_checkpoint="latest")
    assert values(run) == found


def test_several_scales_of_guidance(tmp_path):
    """Of equal shares of all classes; without guidance the value is that of the pictures of `generate`."""
    changes = {"unet": ..., "transformer": DIT, "evaluate_guidance_scale": [1, 3], "validation_class_labels": ["zero"]}
    changes |= {"objective": "flow_matching", "learning_rate": 0.01, "lr_warmup_steps": 0, "evaluate_steps": 9}
    run = trained(tmp_path / "run", task="class_conditional", **JUDGED | changes)
    (row,) = values(run)
    assert sorted(row) == ["fid_cfg1", "fid_cfg3", "step"]
    assert row["fid_cfg1"] != row["fid_cfg3"]
    options = {"num_images": 1, "num_inference_steps": 2, "guidance_scale": 1.0, "seed": 0}
    drawn = generate(run, class_label=["all"], **options)
    from flax_diffusion.core.data.sources.opening import open_source
    from flax_diffusion.core.metrics.distances import frechet_distance
    from flax_diffusion.core.metrics.statistics import Moments

    source = open_source(dataset_name="digits")
    real = np.stack([np.asarray(source[index].image) for index in range(len(source))])
    ours, theirs = (Moments.of(pictures.reshape(len(pictures), -1) / 255) for pictures in (drawn, real))
    expected = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
    assert row["fid_cfg1"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluate_steps": ...}, "--evaluate_features goes with --evaluate_steps: add it, or drop the former"),
        ({"evaluate_reference": ...}, "--evaluate_metrics fid compares with real pictures: give them by --eval"),
        ({"evaluate_metrics": ["fidd"]}, "--evaluate_metrics 'fidd' is unknown; use one of fid"),
        ({"evaluate_metrics": ["kid"]}, "--evaluate_num_images 10: --evaluate_metrics kid needs 1000 pictures"),
        ({"evaluate_features": ...}, "--evaluate_features inception needs --evaluate_inception FILE"),
        (
            {"evaluate_features": "inception", "evaluate_inception": "weights.pth"},
            "--evaluate_features inception: only the JAX backend has the network: use pixels",
        ),
        ({"evaluate_reference": "nowhere"}, "--evaluate_reference"),
    ],
)
def test_what_is_refused_before_the_first_step(tmp_path, changes, says):
    given = {name: value for name, value in (JUDGED | changes).items() if value is not ...}
    with pytest.raises((ConfigError, DataError), match=says):
        trained(tmp_path / "run", **given)
    assert not (tmp_path / "run/checkpoint-3").exists()
