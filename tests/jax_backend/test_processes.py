"""Two processes of four devices each, which meet as the hosts of a pod do: the same run as one process."""

import json

import jax
import numpy as np
import pytest
from hosts import together
from PIL import Image
from tiny import ONE_BLOCK, RUN, UNET, losses, pictures, stable_diffusion

from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.jax_backend import processes
from flax_diffusion.jax_backend.processes import connect
from flax_diffusion.train import train


def judged(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check(request, folder, task, options, changes):
    """Runs it in one process on one device and in two on eight, and compares all that they leave."""
    one = train(task, **options | changes | {"fsdp_parallelism": 1, "output_dir": str(folder / "one")}).output_dir
    two = folder / "two"
    codes, logs = together(request, folder, 2, options | changes | {"task": task, "output_dir": str(two)})
    assert codes == [0, 0], logs
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    for ours, theirs in zip(judged(two), judged(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    samples = sorted(path.name for path in (one / "samples").iterdir())
    assert sorted(path.name for path in (two / "samples").iterdir()) == samples
    for name in samples:
        ours, theirs = (np.asarray(Image.open(run / "samples" / name), np.int16) for run in (two, one))
        assert abs(ours - theirs).max() <= 1, name
    ours, theirs = (portable.read(run / f"checkpoint-{options['max_train_steps']}")[0] for run in (two, one))
    assert ours.keys() == theirs.keys()
    for kind in ("params", "ema", "mu"):
        # One by one, moments of what has no gradient are noise over noise.
        off, size = (
            np.sqrt(sum(np.square(one).sum() for one in several))
            for several in zip(
                *((ours[name] - array, array) for name, array in theirs.items() if name.startswith(f"{kind}/")),
                strict=True,
            )
        )
        assert off < 1e-4 * size, kind


def test_two_processes_equal_one(request, tmp_path):
    options = RUN | {"global_batch_size": 8, "max_train_steps": 3, "use_ema": True, "unet": UNET | ONE_BLOCK}
    options |= {"validation_split": 0.25, "validation_loss_steps": 2}
    check(request, tmp_path, "unconditional", options, {"fsdp_parallelism": 8})
    assert [row["step"] for row in judged(tmp_path / "two")] == [2, 3]


@pytest.mark.acceptance
@pytest.mark.parametrize(
    "changes",
    [
        {"fsdp_parallelism": 8, "train_text_encoder": True},
        {"fsdp_parallelism": 2, "cache_latents": True, "pre_compute_text_embeddings": True},
        {"lora_rank": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["divided", "precomputed", "lora"],
)
def test_of_latents(request, tmp_path, changes):
    options = {
        "pretrained_model_name_or_path": str(stable_diffusion(tmp_path / "base")),
        "train_data_dir": str(pictures(tmp_path / "data", 19)), "resolution": 16, "center_crop": True,
        "random_flip": True, "global_batch_size": 16, "learning_rate": 1e-3, "lr_warmup_steps": 0, "use_ema": True,
        "max_train_steps": 4, "checkpointing_steps": 2, "validation_prompts": ["a dog"], "validation_steps": 3,
        "eval_batch_size": 3, "validation_num_inference_steps": 2,
    }  # fmt: skip
    check(request, tmp_path, "text_to_image", options, changes)


@pytest.mark.acceptance
def test_a_run_in_two_processes_goes_on_in_one(request, tmp_path):
    options = RUN | {"global_batch_size": 8, "checkpointing_steps": 3, "output_dir": str(tmp_path / "run")}
    codes, logs = together(request, tmp_path, 2, options | {"task": "unconditional", "max_train_steps": 3})
    assert codes == [0, 0], logs
    whole = train("unconditional", **options | {"output_dir": str(tmp_path / "whole")}).output_dir
    run = train("unconditional", **options, resume_from_checkpoint="latest").output_dir
    np.testing.assert_allclose(losses(run)[-3:], losses(whole)[-3:], rtol=1e-5)


@pytest.mark.acceptance
def test_folders_that_are_not_the_same_on_all_hosts(request, tmp_path):
    own = [str(tmp_path / "host" / str(index)) for index in range(2)]
    values = RUN | {"task": "unconditional", "global_batch_size": 8}
    codes, logs = together(request, tmp_path, 2, values, output_dir=own)
    assert codes == [2, 2], logs
    for log, folder in zip(logs, own, strict=True):
        assert f"--output_dir {folder}: is not the same folder on all 2 hosts; name one that they share" in log


@pytest.mark.parametrize("error", [ValueError("coordinator_address should be defined."), RuntimeError("too late")])
def test_hosts_that_do_not_meet(monkeypatch, error):
    """A machine alone goes on: one with libtpu and no TPU, or where JAX is in use already. One of several does not."""

    def refuse(**options):
        raise error

    monkeypatch.setattr(processes, "find_spec", lambda _: True)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    connect()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match=f"the 4 hosts of this slice cannot connect to each other: {error}"):
        connect()


def test_variables_that_do_not_say_all(monkeypatch):
    monkeypatch.setenv("JAX_HEARTBEAT_TIMEOUT_SECONDS", "soon")
    with pytest.raises(ConfigError, match="JAX_HEARTBEAT_TIMEOUT_SECONDS is 'soon': give whole seconds"):
        connect()
    monkeypatch.delenv("JAX_HEARTBEAT_TIMEOUT_SECONDS")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES is '': set JAX_NUM_PROCESSES, and in each process its"):
        connect()
