"""Whole runs on the PyTorch backend: what they leave, several processes, refusals."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml
from tiny import RUN, TEXT_RUN, losses, pictures, stable_diffusion
from torch.utils.flop_counter import FlopCounterMode

from flax_diffusion.core.cli.command_line import merge
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.train import train as train_with_jax
from torch_backend.backend import TorchBackend
from torch_backend.generate import main as generate_main
from torch_backend.train import train

CONFIG = RUN | {
    "use_ema": True, "gradient_accumulation_steps": 2, "validation_epochs": None, "save_model_epochs": None,
    "unet": RUN["unet"] | {"dropout": 0.1}, "report_to": "none", "max_train_steps": 8,
}  # fmt: skip


def run(folder, **options):
    made = []

    def make(config, spec):
        made.append(TorchBackend(config, spec))
        return made[-1]

    fit(task_of(UnconditionalConfig(output_dir=str(folder), **CONFIG | options)), make)
    return made[-1].state_arrays()


def test_text_to_image_leaves_a_pipeline(tmp_path):
    from diffusers import StableDiffusionPipeline

    out = train("text_to_image", **TEXT_RUN, output_dir=str(tmp_path / "run"), mixed_precision="bf16")
    assert yaml.safe_load((out / "config.yaml").read_text())["mixed_precision"] == "bf16"
    assert (out / "samples/00000006.png").is_file()
    pipe = StableDiffusionPipeline.from_pretrained(out, vae=None)
    assert str(pipe.unet.dtype) == "torch.float32"
    generate_main([
        "--model", str(out), "--prompt", "a handwritten two", "--num_images", "2", "--num_inference_steps", "2",
        "--output_dir", str(tmp_path / "images"),
    ])  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["00000.png", "00001.png", "grid.png"]


@pytest.mark.acceptance
def test_the_same_command_starts_from_the_same_weights(tmp_path):
    from flax_diffusion.models import FlaxUNet2DModel

    options = RUN | {"max_train_steps": 1}  # the first rate of a warm-up is 0, so nothing moves
    folders = [train(kind, **options, output_dir=str(tmp_path / name)) for kind, name in (("unconditional", "torch"),)]
    folders.append(train_with_jax("unconditional", **options, output_dir=str(tmp_path / "jax")))
    ours, theirs = (FlaxUNet2DModel.from_pretrained(folder, subfolder="unet")[1] for folder in folders)
    import jax

    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def in_two_processes(request, folder, task, values):
    recipe = folder / "run.yaml"
    recipe.write_text(json.dumps({"task": task} | values))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "torch_backend.train", "--config", str(recipe), "--output_dir", str(folder / "two")]
    subprocess.run(command, check=True, env=environment, cwd=request.config.rootpath)
    return folder / "two"


def test_two_processes_equal_one(request, tmp_path):
    values = RUN | {"train_batch_size": 16, "use_ema": True}
    one = train("unconditional", **values, output_dir=str(tmp_path / "one"))
    two = in_two_processes(request, tmp_path, "unconditional", values | {"train_batch_size": 8})
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-6)
    assert (two / "checkpoint-6/state.safetensors").is_file()


@pytest.mark.acceptance
def test_two_processes_compute_latents_together(request, tmp_path):
    values = {
        "pretrained_model_name_or_path": str(stable_diffusion(tmp_path / "base")),
        "train_data_dir": str(pictures(tmp_path / "data", 7)), "resolution": 16, "center_crop": True,
        "random_flip": True, "cache_latents": True, "pre_compute_text_embeddings": True, "train_batch_size": 4,
        "max_train_steps": 6, "learning_rate": 1e-3, "lr_warmup_steps": 0,
    }  # fmt: skip
    one = train("text_to_image", **values, output_dir=str(tmp_path / "one"))
    two = in_two_processes(request, tmp_path, "text_to_image", values | {"train_batch_size": 2})
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"fsdp_parallelism": 2, "fsdp_gather": "block"},
            "--fsdp_gather: only the JAX backend has it; use accelerate launch .*fsdp.yaml, which always gathers",
        ),
        ({"fsdp_parallelism": 2}, "--fsdp_parallelism: only the JAX backend has it; use accelerate launch"),
        ({"data_parallelism": 1}, "--data_parallelism: only the JAX backend has it; start several processes"),
        ({"enable_xformers_memory_efficient_attention": True}, "--enable_xformers_memory_efficient_attention: needs"),
        ({"allow_tf32": True}, "--allow_tf32: needs a CUDA device"),
        ({"reduce_dtype": "bf16"}, "--reduce_dtype bf16: PyTorch sums so on CUDA devices only"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16: PyTorch needs a CUDA device for it: use bf16"),
        ({"output_dir": "gs://bucket/run"}, "^--output_dir gs://bucket/run: only the JAX backend writes to object"),
        ({"unet": RUN["unet"] | {"block_out_chanels": [8]}}, "block_out_chanels.*block_out_channels"),
        (
            {"unet": RUN["unet"] | {"block_out_channels": [8]}},
            r"^UNet2DModel: PyTorch's class does not take its config \(Must provide .*\[8\].*\); correct the values$",
        ),
        ({"unet": RUN["unet"] | {"time_embedding_type": "x"}}, "^UNet2DModel: PyTorch's class does not take its"),
    ],
)
def test_what_this_backend_or_machine_lacks(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        train("unconditional", **RUN | {"output_dir": str(tmp_path / "run")} | options)
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize(
    "name", ["enable_xformers_memory_efficient_attention", "allow_tf32", "channels_last", "torch_compile"]
)
def test_what_the_jax_side_lacks(tmp_path, name):
    with pytest.raises(ConfigError, match=f"--{name}: only the PyTorch backend has it; "):
        train_with_jax("unconditional", **RUN, **{name: True}, output_dir=str(tmp_path))


def test_speed_options_change_no_number(tmp_path):
    options = {"max_train_steps": 3, "unet": RUN["unet"]}
    plain = run(tmp_path / "a", **options)
    other = run(tmp_path / "b", **options, channels_last=True, gradient_checkpointing=True, set_grads_to_none=True)
    for name, array in plain.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-4, atol=2e-5, err_msg=name)


def test_minimal_checkpointing_repeats_no_product(tmp_path):
    options = TEXT_RUN | {"max_train_steps": 2, "validation_epochs": None, "lr_warmup_steps": 0}
    work, ends = [], []
    for how in (False, "minimal", True):
        with FlopCounterMode(display=False) as counter:
            out = train("text_to_image", **options, gradient_checkpointing=how, output_dir=str(tmp_path / str(how)))
        work.append(counter.get_total_flops())
        ends.append(losses(out))
    assert work[0] == work[1] < work[2]
    np.testing.assert_allclose(ends[1:], [ends[0]] * 2, rtol=1e-6)


@pytest.mark.acceptance
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # PyTorch's own compiler calls it
def test_compiling_changes_no_number(tmp_path):
    folders = [
        train("unconditional", **RUN, torch_compile=compiled, output_dir=str(tmp_path / str(compiled)))
        for compiled in (False, True)
    ]
    np.testing.assert_allclose(losses(folders[1]), losses(folders[0]), rtol=1e-4)


def test_every_recipe_is_taken_by_both(request):
    for recipe in (request.config.rootpath / "configs").glob("*.yaml"):
        values = yaml.safe_load(recipe.read_text())
        task = values.pop("task")
        folder = "instance_data_dir" if task == "dreambooth" else "train_data_dir"
        extra = {} if "dataset_name" in values else {folder: "pictures"}
        assert merge(task, values, extra, recipe.name).output_dir
