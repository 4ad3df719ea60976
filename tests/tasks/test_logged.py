"""What a step logs beside its loss: the loss's parts, the components' rates, and how well the device is used."""

import csv

import jax
import numpy as np
import pytest
from tiny import ONE_BLOCK, RUN, UNET, VAE, pictures, stable_diffusion

import flax_diffusion.jax_backend.backend as jax_backend
import torch_backend.measuring
from flax_diffusion.core.cli.command_line import merge
from flax_diffusion.core.run import assembly
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tracking.peaks import peak_flops
from flax_diffusion.core.tracking.tracker import Tracker
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.jax_backend.losses import mean_losses
from torch_backend.backend import TorchBackend

QUIET = {"report_to": "csv", "draw_samples": False, "resolution": 16, "train_batch_size": 2, "max_train_steps": 2}


def one_device(config, spec):
    return JaxBackend(config, spec, jax.devices()[:1])


BACKENDS = pytest.mark.parametrize("make_backend", [one_device, TorchBackend], ids=["JAX", "PyTorch"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture
def dreambooth(model, tmp_path):
    return QUIET | {
        "pretrained_model_name_or_path": str(model), "instance_prompt": "a photo of sks dog",
        "instance_data_dir": str(pictures(tmp_path / "new", 3)), "output_dir": str(tmp_path / "run"),
    }  # fmt: skip


def prior_preserving(dreambooth, tmp_path):
    return dreambooth | {
        "with_prior_preservation": True, "prior_loss_weight": 0.25, "class_prompt": "a photo of dog",
        "class_data_dir": str(pictures(tmp_path / "class", 4)), "num_class_images": 4, "snr_gamma": 5.0,
        "learning_rate": 1e-3,
    }  # fmt: skip


def logged(task, options, make_backend):
    """The rows of the run's steps.csv."""
    folder = fit(task_of(merge(task, {}, options, "test")), make_backend).output_dir
    with (folder / "logs/steps.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@BACKENDS
def test_the_losses_of_the_new_thing_and_of_its_class(dreambooth, tmp_path, make_backend):
    rows = logged("dreambooth", prior_preserving(dreambooth, tmp_path), make_backend)
    assert len(rows) == 2
    for row in rows:
        assert row["loss"] == pytest.approx(row["instance_loss"] + 0.25 * row["prior_loss"], rel=1e-5)
        assert row["instance_loss"] != pytest.approx(row["prior_loss"], rel=1e-3)


def test_each_is_the_mean_over_its_own_pictures(dreambooth, tmp_path):
    task = task_of(merge("dreambooth", {}, prior_preserving(dreambooth, tmp_path), "test"))
    source = task.open_source()
    spec = task.make_spec(source)
    backend = one_device(task.config, spec)
    backend.init_state()
    source = task.complete_source(source, backend)
    schedule = make_schedule(task.config, task.count_examples(source), 1)
    with assembly.make_loader(task, spec, source, schedule, num_steps=1) as loader:
        (batch,) = loader
    names = batch.keys() - {"example_index"}
    params = backend.frozen | backend.state.params
    compiled = jax.jit(lambda params, micro: mean_losses(backend.modules, params, micro, None))

    def losses(rows, factor):
        """Of some rows alone, whose weights are those of the objective times a factor."""
        micro = {name: batch[name][0][rows] for name in names if not name.endswith("_loss_weights")}
        micro["loss_weights"] = micro["loss_weights"] / factor
        return compiled(params, micro)

    found = compiled(params, {name: batch[name][0] for name in names})
    np.testing.assert_allclose(found["instance_loss"], losses(slice(0, None, 2), 2.0)["loss"], rtol=1e-5)
    np.testing.assert_allclose(found["prior_loss"], losses(slice(1, None, 2), 2 * 0.25)["loss"], rtol=1e-5)


@BACKENDS
def test_the_losses_of_an_autoencoder(tmp_path, make_backend):
    options = QUIET | {
        "train_data_dir": str(pictures(tmp_path / "data", 4)), "vae": VAE, "kl_scale": 0.01,
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    for row in logged("autoencoder", options, make_backend):
        assert row["loss"] == pytest.approx(row["reconstruction_loss"] + 0.01 * row["kl_loss"], rel=1e-5)
        assert min(row["reconstruction_loss"], row["kl_loss"]) > 0


def test_components_with_rates_of_their_own(dreambooth):
    own = {"train_text_encoder": True, "text_encoder_lr": 2e-4, "learning_rate": 1e-3, "lora_rank": 1}
    for row in logged("dreambooth", dreambooth | own | {"lr_scheduler": "constant"}, one_device):
        rates = {name: value for name, value in row.items() if name.startswith("learning_rate")}
        assert rates == pytest.approx(
            {"learning_rate": 1e-3, "learning_rate_unet": 1e-3, "learning_rate_text_encoder": 2e-4}
        )
        assert "prior_loss" not in row


def test_the_share_of_a_devices_peak(tmp_path, monkeypatch):
    """Both backends count about the same products: those of convolutions and of matrices, forwards and backwards."""
    peak, counted = 1e9, {}
    monkeypatch.setattr(jax_backend, "peak_flops", lambda device: peak)
    monkeypatch.setattr(torch_backend.measuring, "peak_flops", lambda device: peak)
    read = {kind: kind.read for kind in (JaxBackend, TorchBackend)}
    for kind in read:

        def keep(self, metrics, kind=kind):
            metrics = read[kind](self, metrics)
            counted.setdefault(kind, []).append(metrics["peak_seconds"] * peak)
            return metrics

        monkeypatch.setattr(kind, "read", keep)
    options = RUN | QUIET | {"unet": UNET, "resolution": 8, "gradient_accumulation_steps": 2}
    for number, make_backend in enumerate((one_device, TorchBackend)):
        rows = logged("unconditional", options | {"output_dir": str(tmp_path / str(number))}, make_backend)
        assert all(row["mfu"] > 0 and "peak_seconds" not in row for row in rows)
    of_jax, of_torch = counted[JaxBackend], counted[TorchBackend]
    assert len(of_jax) == len(of_torch) == 2
    assert of_jax[0] == of_jax[1]
    assert of_torch[0] == of_torch[1]
    # XLA leaves out the products with a convolution's padding, and counts what is no product too.
    assert 0.85 < of_jax[0] / of_torch[0] < 1.15


@pytest.mark.parametrize("costs", [None, {}])
def test_a_run_goes_on_where_xla_tells_no_flops(tmp_path, monkeypatch, costs):
    monkeypatch.setattr(jax_backend, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: costs)
    options = RUN | QUIET | {"unet": UNET | ONE_BLOCK, "resolution": 8, "output_dir": str(tmp_path / "run")}
    rows = logged("unconditional", options, one_device)
    assert len(rows) == 2
    assert "mfu" not in rows[0]


def test_the_wait_for_data_is_that_since_the_last_step(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flax_diffusion.core.tracking.tracker.time.perf_counter", lambda: now[0])
    seen = []

    class Board:
        def scalars(self, values, step):
            seen.append(values)

    tracker = Tracker(tmp_path, [Board()], first_step=0, total_steps=2, main=True)  # pyright: ignore[reportArgumentType]
    for wait in (0.5, 0.25):
        with tracker.waiting():
            now[0] += wait
        now[0] += 1.0
        tracker.step(1, {"loss": 1.0, "learning_rate": 1.0, "peak_seconds": 0.75}, 10)
    assert [values["train/data_wait_seconds"] for values in seen] == [0.5, 0.25]
    assert [values["train/mfu"] for values in seen] == [0.5, 0.6]
    assert [values["train/images_per_second"] for values in seen] == [10 / 1.5, 8.0]


def test_the_rate_is_that_of_the_steps(tmp_path, monkeypatch):
    """Before something else goes on, the steps under way are read at once; the next are read when three have ended."""
    now, seen = [0.0], []
    monkeypatch.setattr("flax_diffusion.core.tracking.tracker.time.perf_counter", lambda: now[0])

    class Board:
        def scalars(self, values, step):
            seen.append(values["train/images_per_second"])

    tracker = Tracker(tmp_path, [Board()], first_step=0, total_steps=40, main=True)  # pyright: ignore[reportArgumentType]
    now[0] += 50.0  # until the first step begins
    tracker.begin(compiles=True)
    spans = [9.0, *[1.0] * 17, 0.0, 0.0, "samples", 3.0, *[1.0] * 17]
    for step, span in enumerate(spans, 1):
        if span == "samples":
            with tracker.doing("drawing samples"):
                now[0] += 100.0
        else:
            now[0] += span
            tracker.step(step, {"loss": 1.0, "learning_rate": 1.0}, 10)
    assert seen[0] == 10 / 9
    assert seen[1:18] == [10.0] * 17
    assert all(9.0 <= rate <= 11.5 for rate in seen[18:])
    assert seen[-1] == 10.0


def test_peaks_of_chips():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA L40S") == 362e12
    for unknown in ("cpu", "TPU v9", "NVIDIA L400", "Tesla T4"):
        assert peak_flops(unknown) is None
