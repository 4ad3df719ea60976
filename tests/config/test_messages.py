"""What goes wrong is one line, whichever backend and whatever the reason; from Python it is the same error."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from faults.trials import BACKENDS, FOLDERS
from tiny import ONE_BLOCK, RUN, UNET

from flax_diffusion.core import errors
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.errors import ConfigError, MemoryLimitError, UserError
from flax_diffusion.train import train


def too_much_for_jax(*arguments):
    return jax.jit(lambda: jnp.ones(2**46, jnp.float32))()


def too_much_for_pytorch(*arguments):
    return torch.ones(2**46)


def too_much_for_numpy(*arguments):
    return np.ones(2**46)


def too_much_for_cuda(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB")


@pytest.mark.parametrize("reason", [too_much_for_jax, too_much_for_pytorch, too_much_for_numpy, too_much_for_cuda])
def test_memory_that_runs_out_is_known_whoever_says_it(reason):
    with pytest.raises(Exception, match=r".") as caught:
        reason()
    assert errors.is_out_of_memory(caught.value)
    assert not errors.is_out_of_memory(OSError(28, "No space left on device"))
    assert not errors.is_out_of_memory(ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {},
            r"out of memory \(.*\): lower --train_batch_size 8 \(--grad.*\), add --mixed_precision bf16, add "
            r"--gradient_checkpointing minimal, add --use_8bit_adam, add --cache_latents, or divide .* `python -m tpu",
        ),
        (
            {"global_batch_size": 4, "mixed_precision": "bf16", "gradient_checkpointing": "minimal"},
            r"lower --global_batch_size 4 \(.*\), use --gradient_checkpointing without minimal, add --use_8bit_adam",
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_memory(tmp_path, monkeypatch, backend, options, says):
    module = importlib.import_module(f"{FOLDERS[backend]}.backend")
    owner, fails = {
        "flax_diffusion": ("JaxBackend", too_much_for_jax), "torch_backend": ("TorchBackend", too_much_for_cuda),
    }[backend]  # fmt: skip
    monkeypatch.setattr(getattr(module, owner), "train_step", fails)
    values = RUN | {"unet": UNET | ONE_BLOCK, "report_to": "none", "output_dir": str(tmp_path / "run")} | options
    with pytest.raises(MemoryLimitError, match=says) as caught:
        importlib.import_module(f"{backend}.train").train("unconditional", **values)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize("module", ["train", "generate"])
def test_pytorch_that_is_not_installed(tmp_path, module):
    """The command says how to install it."""
    blocker = f"import sys; sys.modules['torch'] = None; sys.argv = {['x', *_words(module, tmp_path)]!r}; "
    run = (
        f"from torch_backend.{module} import main; from flax_diffusion.core.cli.command_line import main_guard; "
        "main_guard(main)"
    )
    ended = subprocess.run([sys.executable, "-c", blocker + run], capture_output=True, text=True, cwd=tmp_path)
    said = ended.stderr.strip().splitlines()[-1]
    assert said == "error: torch is not installed: pip install -c constraints.txt 'flax-diffusion[torch]'"
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 2


def _words(module, folder):
    if module == "generate":
        return ["--model", str(folder)]
    return ["unconditional", "--dataset_name", "digits", "--resolution", "8", "--output_dir", str(folder / "run")]


def test_a_task_that_is_not(tmp_path):
    with pytest.raises(UserError, match="unknown task 'uncond'; did you mean 'unconditional'"):
        train("uncond", dataset_name="digits")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: unconditional\ndataset_name: digits\n")
    for words in (["--config", str(recipe), "autoencoder"], ["--config", str(recipe), "--seed", "1", "autoencoder"]):
        with pytest.raises(ConfigError, match=r"task.* autoencoder|unconditional and autoencoder"):
            command_line.parse_train(words, "train")
    recipe.write_text("dataset_name: digits\n")
    assert command_line.parse_train(["--config", str(recipe), "unconditional"], "train")[0] == "unconditional"


def test_help_without_a_task_names_no_defaults(capsys):
    with pytest.raises(SystemExit):
        command_line.parse_train(["--help"], "train")
    assert "(default:" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command_line.parse_train(["dreambooth", "--help"], "train")
    assert "(default: 5e-06)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        command_line.parse_train(["class_conditional", "--help"], "train")
    assert "--ema_decays FLOAT [FLOAT ...]" in capsys.readouterr().out
