"""NaN in the data, the loss or the gradient: the step and its examples are named, and nothing of it is kept."""

import json
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from faults.trials import BACKENDS
from proofs import proof
from tiny import ONE_BLOCK, RUN, UNET, losses

from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.checkpoints.folders import committed
from flax_diffusion.core.data.batches import ExampleFn
from flax_diffusion.core.errors import NonFiniteError
from flax_diffusion.jax_backend import losses as jax_losses
from torch_backend import losses as torch_losses

OPTIONS = RUN | {"max_train_steps": 8, "checkpointing_steps": 2, "use_ema": True, "validation_epochs": None}
OPTIONS["unet"] = UNET | ONE_BLOCK
MARK = 3.0  # the loss weight of the example that it happens to


@jax.custom_vjp
def nan_gradient(loss, happens):
    return loss


nan_gradient.defvjp(
    lambda loss, happens: (loss, happens), lambda happens, grad: (jnp.where(happens, jnp.nan, grad), None)
)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, happens):
        ctx.happens = happens
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.where(ctx.happens, torch.nan, grad), None


@pytest.fixture
def inject(monkeypatch):
    """NaN at a place of each backend, in the n-th example that is made; returns the indices of examples so far."""

    def at(place, number):
        made, real = [], ExampleFn.unscaled

        def example(self, source, seed, epoch, index, size=None):
            made.append(index)
            got = real(self, source, seed, epoch, index, size)
            if len(made) == number:
                if place == "data":
                    got["noise"] = np.full_like(got["noise"], np.nan)
                got["loss_weights"] = np.full_like(got["loss_weights"], MARK)
            return got

        monkeypatch.setattr(ExampleFn, "unscaled", example)
        monkeypatch.setattr("flax_diffusion.core.run.assembly.Loader", without_threads)
        monkeypatch.setattr("flax_diffusion.core.report.board.first_batch", lambda *given: [])  # which makes some too
        with_jax, with_torch = jax_losses.denoising_loss, torch_losses.denoising_loss

        def jax_loss(modules, params, batch, dropout):
            loss, happens = with_jax(modules, params, batch, dropout), (batch["loss_weights"] == MARK).any()
            return {
                "data": loss, "loss": jnp.where(happens, jnp.nan, loss), "gradient": nan_gradient(loss, happens),
            }[place]  # fmt: skip

        def torch_loss(modules, batch):
            loss, happens = with_torch(modules, batch), (batch["loss_weights"] == MARK).any()
            if place == "gradient":
                return NanGradient.apply(loss, happens)
            return torch.where(happens, torch.nan, loss) if place == "loss" else loss

        monkeypatch.setattr(jax_losses, "denoising_loss", jax_loss)
        monkeypatch.setattr(torch_losses, "denoising_loss", torch_loss)
        return made

    return at


def without_threads(*arguments, **options):
    """Examples are made in their order."""
    from flax_diffusion.core.data.loader import Loader

    return Loader(*arguments, **options, num_threads=0)


def train(backend, folder, **options):
    run = import_module(f"{backend}.train").train("unconditional", **OPTIONS | options, output_dir=str(folder))
    return run.output_dir


def all_finite(folder):
    return all(
        np.isfinite(array).all() for one in committed(folder) for array in portable.read(one)[0].values()
    ) and np.isfinite(losses(folder)).all()  # fmt: skip


def check(inject, tmp_path, backend, place, step):
    made = inject(place, (step - 1) * 8 + 5)
    with pytest.raises(NonFiniteError, match=rf"step {step} is not finite .*nonfinite-{step}\.json"):
        train(backend, tmp_path)
    said = json.loads((tmp_path / f"nonfinite-{step}.json").read_text())
    assert [one["index"] for one in said["examples"]] == made[(step - 1) * 8 : step * 8]
    last = (step - 1) // 2 * 2
    assert [one.name for one in committed(tmp_path)][-1:] == ([f"checkpoint-{last}"] if last else [])
    assert all_finite(tmp_path)
    assert f"{backend}.train --config {tmp_path / 'config.yaml'}" in said["repeat"]
    return made


@pytest.mark.parametrize("backend", ["torch_backend", proof("flax_diffusion")])
def test_nan_in_the_gradient(inject, tmp_path, backend):
    check(inject, tmp_path, backend, "gradient", 3)


@pytest.mark.acceptance
@pytest.mark.parametrize("step", [1, 4, 5])
@pytest.mark.parametrize("place", ["data", "loss", "gradient"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan(inject, tmp_path, backend, place, step, figure):
    check(inject, tmp_path, backend, place, step)
    figure(8, f"{backend}: NaN in the {place}: stopped, the step and its examples named, nothing of it on disk")


@pytest.mark.parametrize("backend", [BACKENDS[0], pytest.param(BACKENDS[1], marks=pytest.mark.acceptance)])
def test_a_step_passed_over_changes_nothing(inject, tmp_path, backend):
    """Weights, moments and average are those from before; only the step is counted."""
    inject("gradient", 2 * 8 + 5)
    folder = train(backend, tmp_path / "run", skip_nonfinite=1, checkpointing_steps=1, max_train_steps=4)
    two, three, four = (portable.read(folder / f"checkpoint-{step}")[0] for step in (2, 3, 4))
    for name, array in two.items():
        np.testing.assert_array_equal(three[name], array, err_msg=name)
    assert int(four["count"]) == int(two["count"]) + 1
    assert any((four[name] != array).any() for name, array in two.items() if name.startswith("params/"))
    assert all_finite(folder)
    assert len(losses(folder)) == 3


@pytest.mark.acceptance
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_batch_again(inject, tmp_path, backend, caplog):
    """By the command that the file names: the same examples, and with them the same NaN."""
    made = check(inject, tmp_path, backend, "data", 3)
    indices = made[16:24]
    del made[:]
    inject("data", 5)
    caplog.set_level("INFO")
    train(backend, tmp_path, resume_from_checkpoint="latest", repeat_step=3)
    assert "the batch of step 3, with the weights of step 2: loss nan" in caplog.text
    assert caplog.text.rstrip().endswith("; of " + ", ".join(f"digits[{index}]" for index in indices))
