"""Runs on large data that are killed: what resumes ends bit for bit as a run that nothing happened to."""

import random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from faults.test_killed import after, in_save
from faults.trials import BACKENDS, CONFIG, assert_same, ended, go_on, left, log_of, start
from PIL import Image
from run.test_streamed_runs import write_shards
from tiny import VAE

from torch_backend.backend import TorchBackend
from torch_backend.precompute import precompute
from torch_backend.train import train

STEPS = 24
RUN = CONFIG | {
    "dataset_name": None, "unet": None, "resolution": 16, "center_crop": True, "random_flip": True,
    "transformer": {"in_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8,
                    "dropout": 0.1},
    "max_train_samples": None, "max_train_steps": STEPS, "checkpointing_steps": 3, "train_batch_size": 4,
    "validation_num_inference_steps": 1, "ema_decays": [0.9, 0.99], "use_ema": False,
}  # fmt: skip


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """Options of runs that stream shards of pictures."""
    root = tmp_path_factory.mktemp("streamed")
    changes = {
        "train_data_dir": str(write_shards(root / "data")), "cache_dir": str(root / "cache"), "stream_shards": 2,
        "resolution": 8, "transformer": RUN["transformer"] | {"in_channels": 3},
    }  # fmt: skip
    return RUN | changes


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Options of runs on shards of latents, five pictures in each."""
    root = tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    AutoencoderKL(**VAE).save_pretrained(root / "vae")
    for number in range(23):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = root / "data" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    options = RUN | {"vae": str(root / "vae"), "latents_dir": str(root / "latents")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flax_diffusion.core.run.shards.latents.SHARD_BYTES", 5 * 4224)
        precompute("class_conditional", **options | {"train_data_dir": str(root / "data")})
    assert len(list((root / "latents").glob("*.array_record"))) == 5
    return options


@pytest.mark.parametrize("data", ["latents", "streamed"])
def test_killed_at_several_moments(request, tmp_path, monkeypatch, data):
    """In the first step, between saves, after a save and in a later epoch."""
    options = request.getfixturevalue(data) | {"max_train_steps": 12}
    expected = left(train("class_conditional", **options, output_dir=str(tmp_path / "whole")), 12)
    real, calls, last = TorchBackend.train_step, 0, 0

    def step(*arguments):
        nonlocal calls
        calls += 1
        if calls == last:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(TorchBackend, "train_step", step)
    for moment in (1, 2, 4, 7):
        calls, last = 0, moment
        with pytest.raises(Killed):
            train("class_conditional", **options, output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    calls, last = 0, 0
    folder = train("class_conditional", **options, output_dir=str(tmp_path / "run"), resume_from_checkpoint="latest")
    assert calls < 12
    assert_same(left(folder, 12), expected)


@pytest.mark.acceptance
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("data", ["latents", "streamed"])
def test_killed_twenty_times(request, tmp_path, backend, data, figure):
    """SIGKILL to runs, each up to five times, at random."""
    options = request.getfixturevalue(data) | {"task": "class_conditional"}
    assert ended(start(backend, tmp_path / "whole", **options)) == 0, log_of(tmp_path / "whole")
    expected, draw, killed = left(tmp_path / "whole", STEPS), random.Random(0), 0
    number = 0
    while killed < 20:
        number += 1
        folder = tmp_path / str(number)
        for _ in range(5):
            happens = draw.choice([(after, draw.uniform(0, 1.5)), (in_save, draw.randint(1, 6), draw.uniform(0, 0.8))])
            code = ended(start(backend, folder, happens, resume_from_checkpoint="latest", **options))
            assert code in (0, -9), log_of(folder)
            killed += code == -9
        go_on(backend, folder, **options)
        assert_same(left(folder, STEPS), expected)
    figure(1, f"{backend}: {killed} SIGKILLs to {number} runs on {data} data: bitwise the same in the end")
