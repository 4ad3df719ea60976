"""Options that save memory: 8-bit moments, FSDP and DeepSpeed, each resumed exactly and held to the plain run."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from test_torch_run import run
from tiny import RUN, losses, pictures, stable_diffusion
from torch.distributed.fsdp import MixedPrecisionPolicy

from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.errors import CheckpointError, ConfigError
from flax_diffusion.core.tasks.task import TASKS
from flax_diffusion.parity import NO_GRADIENT
from torch_backend import distribution
from torch_backend.train import train

WIDE = RUN["unet"] | {"block_out_channels": [8, 64]}  # its largest parameters are long enough for 8-bit moments


def test_8bit_adam_resumes_bitwise(tmp_path):
    options = {"use_8bit_adam": True, "unet": WIDE, "use_ema": False}
    whole = run(tmp_path / "whole", checkpointing_steps=3, **options)
    assert {array.dtype for name, array in whole.items() if name.startswith("state1/")} == {
        np.dtype(np.uint8),
        np.dtype(np.float32),
    }
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "part/checkpoint-3")
    resumed = run(tmp_path / "part", resume_from_checkpoint="latest", **options)
    assert set(resumed) == set(whole)
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array, err_msg=name)
    with pytest.raises(CheckpointError, match=r"checkpoint-8 is of another model or optimizer: mu/.* is missing there"):
        run(tmp_path / "part", resume_from_checkpoint="latest", **options | {"use_8bit_adam": False})


def test_8bit_adam_trains_as_adam_does(tmp_path):
    plain = train("unconditional", **RUN | {"unet": WIDE}, output_dir=str(tmp_path / "plain"))
    eight = train("unconditional", **RUN | {"unet": WIDE, "use_8bit_adam": True}, output_dir=str(tmp_path / "eight"))
    np.testing.assert_allclose(losses(eight), losses(plain), rtol=2e-2)
    assert losses(eight)[-1] != losses(plain)[-1]


FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # fmt: skip


def launch_fsdp(request, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(request.config.rootpath / "tests/torch_backend/fsdp_on_cpu.py")
    path = {"PYTHONPATH": str(request.config.rootpath), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, script, *words], check=True, env=os.environ | FSDP | path)


def launch_deepspeed(request, *words):
    pytest.importorskip("deepspeed")
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    config = str(request.config.rootpath / "configs/accelerate/deepspeed_zero2_offload.yaml")
    command = [*launcher, "--config_file", config, "-m", "torch_backend.train", *words]
    subprocess.run(command, check=True, cwd=request.config.rootpath)


@pytest.mark.acceptance
@pytest.mark.parametrize(
    ("launch", "processes", "use_ema"),
    [(launch_fsdp, 2, True), (launch_deepspeed, 1, False)],
    ids=["fsdp", "deepspeed"],
)
def test_divided_state(request, tmp_path, launch, processes, use_ema):
    """FSDP and DeepSpeed take the steps of a plain run, resume exactly, and hand over to a plain run."""
    values = RUN | {
        "task": "unconditional", "use_ema": use_ema, "gradient_accumulation_steps": 2, "checkpointing_steps": 3,
        "validation_epochs": None, "save_model_epochs": None, "global_batch_size": 32,
    }  # fmt: skip
    recipe = tmp_path / "run.yaml"
    recipe.write_text(json.dumps(values))
    del values["task"]
    plain = train("unconditional", **values, output_dir=str(tmp_path / "plain"))
    launch(request, "--config", str(recipe), "--output_dir", str(tmp_path / "whole"))
    np.testing.assert_allclose(losses(tmp_path / "whole"), losses(plain), rtol=1e-5)
    whole = portable.read(tmp_path / "whole/checkpoint-6")[0]
    ours = portable.read(plain / "checkpoint-6")[0]
    assert set(whole) == set(ours)
    for name, array in ours.items():
        if not NO_GRADIENT.search(name):
            np.testing.assert_allclose(whole[name], array, rtol=1e-3, atol=1e-5, err_msg=name)

    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "part/checkpoint-3")
    resume = ("--resume_from_checkpoint", "latest")
    launch(request, "--config", str(recipe), "--output_dir", str(tmp_path / "part"), *resume)
    for name, array in portable.read(tmp_path / "part/checkpoint-6")[0].items():
        np.testing.assert_array_equal(array, whole[name], err_msg=name)

    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "moved/checkpoint-3")
    moved = train("unconditional", **values, output_dir=str(tmp_path / "moved"), resume_from_checkpoint="latest")
    np.testing.assert_allclose(losses(moved), losses(plain)[3:], rtol=1e-5)


class Configured:
    """What Accelerate says of itself under a launcher's configuration that cannot start here."""

    num_processes = 2

    def __init__(self, kind, fsdp2=True, stage=2):
        self.distributed_type, self.is_fsdp2 = kind, fsdp2
        self.values = {"zero_optimization": {"stage": stage}}
        plugin = SimpleNamespace(deepspeed_config=self.values)
        fsdp = SimpleNamespace(mixed_precision_policy=None)
        self.state = SimpleNamespace(deepspeed_plugin=plugin, fsdp_plugin=fsdp)


@pytest.mark.parametrize(
    ("accelerator", "options", "says"),
    [
        (Configured(DistributedType.XLA), {}, "on TPUs use python -m flax_diffusion.train"),
        (Configured(DistributedType.FSDP), {"use_8bit_adam": True}, "--use_8bit_adam does not go with FSDP"),
        (Configured(DistributedType.FSDP, fsdp2=False), {}, "FSDP of version 1: set fsdp_version: 2"),
        (Configured(DistributedType.DEEPSPEED), {"use_ema": True}, "--use_ema does not go with DeepSpeed"),
        (Configured(DistributedType.DEEPSPEED), {"skip_nonfinite": 3}, "--skip_nonfinite 3 does not go with DeepS"),
        (Configured(DistributedType.DEEPSPEED, stage=3), {}, "DeepSpeed ZeRO stage 3: .* 1 and 2; .* use FSDP"),
    ],
)
def test_configurations_that_do_not_go_together(monkeypatch, accelerator, options, says):
    monkeypatch.setattr(distribution, "Accelerator", lambda **_: accelerator)
    config = TASKS["unconditional"].config_class(**RUN | {"use_ema": False} | options, output_dir="unused")
    with pytest.raises(ConfigError, match=says):
        distribution.make_accelerator(config)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_adapters_are_not_divided(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(distribution, "Accelerator", lambda **_: Configured(kind))
    options = {"pretrained_model_name_or_path": str(stable_diffusion(tmp_path / "base")), "resolution": 16}
    options |= {"train_data_dir": str(pictures(tmp_path / "data")), "lora_rank": 2, "output_dir": str(tmp_path / "run")}
    says = f"^LoRA and textual inversion do not go with {kind.value}: .* use accelerate launch --multi_gpu -m"
    with pytest.raises(ConfigError, match=says):
        train("text_to_image", **options)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ACCELERATE_DYNAMO_BACKEND": "bogus"}, "'BOGUS' is not a valid DynamoBackend"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "PARTS"}, "'PARTS' is no value it knows"),
    ],
)
def test_values_that_accelerate_does_not_know(monkeypatch, variables, says):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = TASKS["unconditional"].config_class(**RUN, output_dir="unused")
    where = "Accelerate's configuration does not work here: "
    with pytest.raises(ConfigError, match=f"^{where}{says}; correct it in the file that accelerate launch reads, or"):
        distribution.make_accelerator(config)


@pytest.mark.parametrize(("options", "micro"), [({}, 8), ({"global_batch_size": 48}, 6)])
def test_deepspeed_takes_the_batch_of_the_run(monkeypatch, options, micro):
    accelerator = Configured(DistributedType.DEEPSPEED)
    monkeypatch.setattr(distribution, "Accelerator", lambda **_: accelerator)
    values = RUN | {"use_ema": False, "train_batch_size": 8, "gradient_accumulation_steps": 4} | options
    distribution.make_accelerator(TASKS["unconditional"].config_class(**values, output_dir="unused"))
    assert accelerator.values["train_micro_batch_size_per_gpu"] == micro
    assert accelerator.values["gradient_accumulation_steps"] == 4
    assert accelerator.values["communication_data_type"] == "fp32"


@pytest.mark.parametrize(("asked", "kind"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_fsdp_sums_gradients_in_the_precision_asked_for(asked, kind):
    """Under mixed precision Accelerate would sum them in the precision of the computation."""
    computed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    plugin = SimpleNamespace(mixed_precision_policy=computed)
    config = TASKS["unconditional"].config_class(**RUN, reduce_dtype=asked, output_dir="unused")
    distribution.set_fsdp_sums(plugin, config)
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=kind)


@pytest.mark.acceptance
def test_accelerate_configured_for_a_package_that_is_missing(request, tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(json.dumps(RUN | {"task": "unconditional", "output_dir": str(tmp_path / "run")}))
    code = (
        "import sys; sys.modules['deepspeed'] = None;"
        "from flax_diffusion.core.cli.command_line import main_guard; "
        "from torch_backend.train import main; main_guard(main)"
    )
    command = [sys.executable, "-c", code, "--config", str(recipe)]
    environment = os.environ | {"ACCELERATE_USE_DEEPSPEED": "true"}
    ran = subprocess.run(command, env=environment, cwd=request.config.rootpath, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "Accelerate's configuration does not work here: DeepSpeed is not installed" in ran.stderr.splitlines()[-1]
