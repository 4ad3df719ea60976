"""How long a step takes on this machine's CPU, beside PyTorch's and 0.39's.

Run on idle cores: python -m pytest -m peers -s tests/peers/test_step_time.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import yaml

pytestmark = pytest.mark.peers
ROUNDS, STEPS = 10, 4
OWN = ("XLA_FLAGS", "OMP_NUM_THREADS", "PYTHONPATH")
"""What the tests set for themselves."""
TEXT = {
    "task": "text_to_image",
    "options": {
        "dataset_name": "digits", "resolution": 16, "train_batch_size": 16, "max_train_steps": 1, "vae": None,
        "train_text_encoder": True,  # of 30,000 weights: one that is new must train
        "unet": {
            "in_channels": 1, "out_channels": 1, "layers_per_block": 2, "block_out_channels": [64, 128],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8, "cross_attention_dim": 16,
        },
        "text_encoder": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": 8,
        },
    },
}  # fmt: skip


@pytest.fixture
def times(request, tmp_path, reference_python):
    """A function that returns the median times of a step by side; the sides take turns."""

    def measured(run, sides):
        path = tmp_path / "run.json"
        path.write_text(json.dumps(run))
        bare = {name: value for name, value in os.environ.items() if name not in OWN}
        own = bare | {"PYTHONPATH": str(request.config.rootpath)}
        started = {}
        for side in sides:
            python, environment = (reference_python, bare) if side == "0.39" else (sys.executable, own)
            command = [python, Path(__file__).with_name("step_time.py"), side, path]
            started[side] = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )

        def answer(process):
            return next(line for line in iter(process.stdout.readline, "") if line[:1].isdigit() or line == "ready\n")

        try:
            assert [answer(process) for process in started.values()] == ["ready\n"] * len(sides)
            found = {side: [] for side in sides}
            for _ in range(ROUNDS):
                for side, process in started.items():
                    process.stdin.write(f"{STEPS}\n")
                    process.stdin.flush()
                    found[side].append(float(answer(process)))
        finally:
            for process in started.values():
                process.kill()
                process.communicate()
        return {side: median(values) for side, values in found.items()}

    return measured


def test_a_unet_of_text(times, figure):
    found = times(TEXT, ("flax_diffusion", "torch_backend", "0.39"))
    said = ", ".join(f"{side} {1e3 * seconds:.0f} ms" for side, seconds in found.items())
    figure("step", f"UNet of text, 16 images of 16 pixels: {said}")
    # Most of it is convolutions of 64 and 128 channels, which are slower in XLA.
    assert found["flax_diffusion"] <= 1.25 * found["torch_backend"]
    assert found["flax_diffusion"] <= 0.85 * found["0.39"]


def test_the_unet_of_the_digits(request, times, figure):
    recipe = yaml.safe_load((request.config.rootpath / "configs/digits_unconditional.yaml").read_text())
    task = recipe.pop("task")
    found = times({"task": task, "options": recipe}, ("flax_diffusion", "torch_backend"))
    said = ", ".join(f"{side} {1e3 * seconds:.0f} ms" for side, seconds in found.items())
    figure("step", f"UNet of the digits, 64 images of 8 pixels: {said}")
    assert found["flax_diffusion"] <= found["torch_backend"]
