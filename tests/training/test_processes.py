"""Two processes of four devices each, which meet as the hosts of a pod do: the same run as one process."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from tiny import losses, pictures, stable_diffusion

from flax_diffusion.core import portable
from flax_diffusion.train import train


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return {
        "pretrained_model_name_or_path": str(stable_diffusion(folder / "base")),
        "train_data_dir": str(pictures(folder / "data", 19)), "resolution": 16, "center_crop": True,
        "random_flip": True, "global_batch_size": 16, "learning_rate": 1e-3, "lr_warmup_steps": 0,
        "use_ema": True, "max_train_steps": 4,
        "checkpointing_steps": 2, "validation_prompts": ["a dog"], "validation_steps": 3, "eval_batch_size": 3,
        "validation_num_inference_steps": 2,
    }  # fmt: skip


def together(request, folder, count, values, **own):
    """Starts the command in several processes; each may have options of its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    started = []
    for index in range(count):
        recipe = folder / f"{index}.yaml"
        recipe.write_text(json.dumps(values | {name: several[index] for name, several in own.items()}))
        meeting = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
        command = [sys.executable, "-m", "flax_diffusion.train", "--config", str(recipe)]
        environment = os.environ | meeting | {"XLA_FLAGS": flags}
        with (folder / f"{index}.log").open("w") as log:
            started.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=request.config.rootpath)
            )
    codes = [process.wait() for process in started]
    return codes, [(folder / f"{index}.log").read_text() for index in range(count)]


@pytest.mark.parametrize(
    "changes",
    [
        {"fsdp_parallelism": 8},
        {"fsdp_parallelism": 2, "cache_latents": True, "pre_compute_text_embeddings": True},
        {"lora_rank": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["divided", "precomputed", "lora"],
)
def test_two_processes_equal_one(request, options, tmp_path, changes):
    alone = options | changes | {"fsdp_parallelism": 1}
    one = train("text_to_image", **alone, output_dir=str(tmp_path / "one"))
    two = tmp_path / "two"
    codes, logs = together(request, tmp_path, 2, options | changes | {"task": "text_to_image", "output_dir": str(two)})
    assert codes == [0, 0], logs
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    np.testing.assert_array_equal(
        (two / "samples/00000003.png").read_bytes(), (one / "samples/00000003.png").read_bytes()
    )
    ours, theirs = (portable.read(folder / "checkpoint-4")[0] for folder in (two, one))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=1e-3, atol=1e-5, err_msg=name)
