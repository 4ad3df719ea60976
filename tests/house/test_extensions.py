"""A package beside the project adds an option, objective, family, task and optimizer; no file changes here."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file
from xla_flags import QUICK

from flax_diffusion.core import registry
from flax_diffusion.core.errors import ConfigError

CORE = '''
from dataclasses import dataclass, replace
import numpy as np
from pydantic import BaseModel, Field
from flax_diffusion.core.families.ddpm import UNET_2D
from flax_diffusion.core.families.family import FAMILIES, Family, PipelineClass
from flax_diffusion.core.objectives.objective import OBJECTIVES, Mixture, Objective
from flax_diffusion.core.tasks.common.dataset import DatasetConfig, open_dataset
from flax_diffusion.core.tasks.common.diffusion import DiffusionConfig, DiffusionTask
from flax_diffusion.core.tasks.parts import from_scratch
from flax_diffusion.core.tasks.task import TASKS


class NoOptions(BaseModel):
    pass


@dataclass(frozen=True)
class Circle(Objective):
    dtype: object = np.float32
    name, options, schedulers = "circle", NoOptions, ("DDPMScheduler",)

    @classmethod
    def scheduler(cls, options):
        return {"_class_name": "DDPMScheduler"}

    @classmethod
    def changed(cls, scheduler, options):
        return dict(scheduler)

    @classmethod
    def prediction(cls, scheduler):
        return "circle"

    @classmethod
    def from_scheduler(cls, scheduler, options, dtype=np.float32, *, conditional=False):
        return cls(dtype)

    def draw(self, rng):
        angle = rng.random() * np.pi / 2
        numbers = (1000 * angle, np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle), 1)
        return Mixture(*(np.asarray(number, self.dtype) for number in numbers))


OBJECTIVES.register("circle", Circle)
FAMILIES.register("toy", Family(name="toy", pipelines={"ToyPipeline": PipelineClass(parts={"net": UNET_2D})}))


class ToyConfig(DiffusionConfig, DatasetConfig):
    """A toy."""

    toy_brightness: float = Field(1.0, description="Factor of the noise.")


class ToyTask(DiffusionTask[ToyConfig]):
    name, config_class = "toy", ToyConfig

    def open_source(self):
        return open_dataset(self.config)

    def make_spec(self, source):
        return self.pipeline("ToyPipeline", {"net": from_scratch(self.config.unet, "--unet", UNET_2D)})

    reopen_spec = make_spec

    def noise(self, spec, dtype):
        return replace(super().noise(spec, dtype), noise_offset=self.config.toy_brightness)


TASKS.register("toy", ToyTask)
'''
JAX = """
from typing import NamedTuple
import jax.numpy as jnp
import optax
from flax_diffusion.jax_backend.families.family import FAMILIES, Family
from flax_diffusion.jax_backend.optimizers.optimizer import OPTIMIZERS, Optimizer
from flax_diffusion.models import FlaxUNet2DModel


def predict(modules, params, sample, timesteps, condition=None, dropout=None):
    return modules.call("net", params, dropout, sample, timesteps)[0]


class Steps(NamedTuple):
    count: object


def scale(config):
    return optax.GradientTransformation(
        lambda params: Steps(jnp.int32(0)), lambda grads, state, params=None: (grads, Steps(state.count + 1))
    )


FAMILIES.register("toy", Family(classes={"UNet2DModel": FlaxUNet2DModel}, predict=predict))
OPTIMIZERS.register("toy", Optimizer(scale=scale))
"""
TORCH = """
import torch
from diffusers import UNet2DModel
from torch_backend.families.family import FAMILIES, Family
from torch_backend.optimizers import OPTIMIZERS, Optimizer


def predict(modules, sample, timesteps, condition=None):
    return modules.by_name["net"](sample, timesteps).sample


FAMILIES.register("toy", Family(classes={"UNet2DModel": UNet2DModel}, predict=predict))
OPTIMIZERS.register(
    "toy", Optimizer(make=lambda config, groups: torch.optim.SGD(groups, lr=config.learning_rate), state=lambda _: {})
)
"""
UNET = (
    '{"in_channels": 1, "out_channels": 1, "block_out_channels": [8], "down_block_types": ["DownBlock2D"],'
    '"up_block_types": ["UpBlock2D"], "norm_num_groups": 4, "layers_per_block": 1}'
)
FLAGS = [
    "--dataset_name", "digits", "--resolution", "8", "--unet", UNET, "--objective", "circle", "--optimizer", "toy",
    "--toy_brightness", "0.5", "--train_batch_size", "4", "--max_train_samples", "16", "--learning_rate", "0.1",
    "--lr_warmup_steps", "0", "--validation_num_inference_steps", "1", "--eval_batch_size", "1", "--report_to", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder for PYTHONPATH in which the package toy_package is as good as installed."""
    site = tmp_path_factory.mktemp("site")
    package, about = site / "toy_package", site / "toy_package-1.0.dist-info"
    package.mkdir()
    about.mkdir()
    for name, text in {"__init__": "", "core": CORE, "jax_side": JAX, "torch_side": TORCH}.items():
        (package / f"{name}.py").write_text(text)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    groups = {"core": "core", "jax_backend": "jax_side", "torch_backend": "torch_side"}
    (about / "entry_points.txt").write_text(
        "".join(f"[flax_diffusion.{group}]\ntoy = toy_package.{module}\n" for group, module in groups.items())
    )
    return site


def run(request, toy, backend, *flags):
    paths = [str(toy), str(request.config.rootpath)]
    environment = os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-m", f"{backend}.train", "toy", *FLAGS, *flags], check=False, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip


@pytest.mark.acceptance
def test_a_toy_of_each_trains_on_both_backends(request, toy, tmp_path):
    weights = {}
    for backend in ("flax_diffusion", "torch_backend"):
        out = tmp_path / backend
        done = run(request, toy, backend, "--output_dir", str(out), "--max_train_steps", "3")
        assert done.returncode == 0, done.stderr
        assert "model       ToyPipeline: " in done.stderr
        assert "pictures    16\n" in done.stderr
        weights[backend] = load_file(out / "net/diffusion_pytorch_model.safetensors")
    for name, array in weights["flax_diffusion"].items():
        np.testing.assert_allclose(weights["torch_backend"][name], array, atol=1e-5, err_msg=name)
    more = [
        "--output_dir",
        str(tmp_path / "flax_diffusion"),
        "--max_train_steps",
        "4",
        "--resume_from_checkpoint",
        "latest",
    ]
    done = run(request, toy, "torch_backend", *more)
    assert done.returncode == 0, done.stderr
    assert "steps       4 to 4, of" in done.stderr


def test_the_toy_is_checked_as_what_is_here(request, toy, tmp_path):
    done = run(request, toy, "flax_diffusion", "--output_dir", str(tmp_path), "--toy_brightnes", "1")
    assert done.returncode == 2
    assert "did you mean '--toy_brightness'?" in done.stderr
    done = run(request, toy, "flax_diffusion", "--output_dir", str(tmp_path), "--optimizer", "toi")
    said = "error: --optimizer 'toi' is unknown; use one of adamw, toy; did you mean 'toy'?"
    assert done.stderr.splitlines()[-1] == said


def test_a_package_that_cannot_be_imported_is_named(toy, monkeypatch):
    (toy / "toy_package/core.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(str(toy))
    with pytest.raises(
        ConfigError, match=r"toy-package adds toy_package\.core to flax_diffusion\.core, .*no_such_module"
    ):
        registry.load_extensions.__wrapped__("flax_diffusion.core")
    (toy / "toy_package/core.py").write_text(CORE)


def test_two_members_of_one_name():
    members = registry.Registry("task", [], "flax_diffusion.none")
    members.register("a", 1)
    with pytest.raises(ValueError, match="there are two tasks of the name a: rename one"):
        members.register("a", 2)


def test_a_table_that_could_not_be_filled_is_not_taken_for_whole(monkeypatch):
    def broken(group):
        raise ConfigError("a package is broken")

    members = registry.Registry("task", [], "flax_diffusion.none")
    members.register("a", 1)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "load_extensions", broken)
        for _ in range(2):
            with pytest.raises(ConfigError, match="is broken"):
                list(members)
    assert list(members) == ["a"]
