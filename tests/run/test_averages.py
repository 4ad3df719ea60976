"""Several moving averages: their decays, both backends, resuming, what is written, and choices after training."""

import errno
import importlib
import json
import re
import shutil

import jax
import numpy as np
import pytest
from diffusers import DDPMPipeline, StableDiffusionPipeline
from recorder import Idle
from safetensors.numpy import load_file
from tiny import ONE_BLOCK, RUN, pictures, stable_diffusion

from flax_diffusion.core.checkpoints import portable, snapshots
from flax_diffusion.core.checkpoints.power_ema import combination, decay_of, exponent_of
from flax_diffusion.core.cli.command_line import merge
from flax_diffusion.core.errors import CheckpointError, ConfigError, UserError
from flax_diffusion.core.io.model_files import safetensors_metadata
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.run.saving import Saver
from flax_diffusion.core.run.schedule.rates import ema_decays
from flax_diffusion.core.spec.merging import checkpoint_arrays
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.generate import generate
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.jax_backend.sharding import partition_of
from flax_diffusion.parity import compare, verdict
from flax_diffusion.post_hoc_ema import main, post_hoc_ema
from torch_backend.backend import TorchBackend
from tpu.compiled import bytes_per_device

BACKENDS = {"flax_diffusion": JaxBackend, "torch_backend": TorchBackend}
SEVERAL = {"ema_decays": [0.2, 0.9], "ema_sigma_rels": [0.05, 0.1]}
NAMES = ["ema_0.2", "ema_0.9", "ema_sigma_rel_0.05", "ema_sigma_rel_0.1"]
SMALL = RUN | {"unet": RUN["unet"] | ONE_BLOCK, "report_to": "none", "validation_epochs": None, "ema_warmup": False}
SMALL |= {"draw_samples": False}


def config(**options):
    return merge("unconditional", {}, SMALL | options, "test")


# The numbers


@pytest.mark.parametrize(("sigma_rel", "published"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_of_the_paper(sigma_rel, published):
    gamma = exponent_of(sigma_rel)
    assert round(gamma, 2) == published
    assert np.sqrt(gamma + 1) / (gamma + 2) / np.sqrt(gamma + 3) == pytest.approx(sigma_rel, rel=1e-14)


def test_each_average_has_its_decay():
    options = config(**SEVERAL)
    assert options.averages == NAMES == [*ema_decays(options, 0)]
    assert {*ema_decays(options, 0).values()} == {0.0}
    assert list(ema_decays(options, 100).values()) == [0.2, 0.9, decay_of(exponent_of(0.05), 101),
                                                       decay_of(exponent_of(0.1), 101)]  # fmt: skip
    assert ema_decays(options, 20)["ema_0.9"] == 21 / 30
    warm = ema_decays(config(**SEVERAL | {"ema_warmup": True}), 20)
    assert (warm["ema_0.2"], warm["ema_0.9"]) == (0.2, 1 - 21**-0.75)


def test_a_single_average_is_what_it_was():
    for options, expected in (({}, {}), ({"use_ema": True}, {"ema": 11 / 20})):
        assert ema_decays(config(**options), 10) == expected
    assert config(use_ema=True, ema_decays=[0.9]).averages == ["ema_0.9"]


def test_decays_make_the_profile_of_the_paper():
    """What each step weighs at the end is the integral of the power function over that step."""
    gamma, steps = exponent_of(0.1), 50
    weighs = np.zeros(steps)
    for step in range(1, steps + 1):
        decay = decay_of(gamma, step)
        weighs *= decay
        weighs[step - 1] = 1 - decay
    np.testing.assert_allclose(weighs, np.diff((np.arange(steps + 1) / steps) ** (gamma + 1)), rtol=1e-12, atol=1e-16)


def tracked(values, sigma_rel):
    """The average after each step."""
    gamma, average, kept = exponent_of(sigma_rel), values[0], []
    for step, value in enumerate(values, start=1):
        average = value + decay_of(gamma, step) * (average - value)
        kept.append(average)
    return np.array(kept)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.06, 0.075, 0.1, 0.13])
def test_an_average_of_snapshots_is_the_one_that_is_tracked(sigma_rel):
    """Of smooth and of noisy sequences; the error is at most the distance of the profiles times their size."""
    steps, rng = 4000, np.random.default_rng(0)
    time = np.arange(1, steps + 1) / steps
    sequences = [np.ones(steps), time, np.exp(-5 * time), np.cumsum(rng.standard_normal(steps)) / np.sqrt(steps)]
    kept = [(width, step) for step in range(125, steps + 1, 125) for width in (0.05, 0.1)]
    for step in (steps, 3000):
        known = [one for one in kept if one[1] <= step]
        factors, distance = combination(known, sigma_rel, step)
        assert distance < 3e-3
        for values in sequences:
            by_width = {width: tracked(values, width) for width in (0.05, 0.1)}
            made = sum(factor * by_width[width][at - 1] for factor, (width, at) in zip(factors, known, strict=True))
            assert made == pytest.approx(tracked(values, sigma_rel)[step - 1], abs=2e-3)


def test_a_kept_average_is_its_own_snapshot():
    kept = [(width, step) for step in (100, 200, 300) for width in (0.05, 0.1)]
    factors, distance = combination(kept, 0.1, 200)
    np.testing.assert_allclose(factors, [0, 0, 0, 1, 0, 0], atol=1e-10)
    assert distance < 1e-6


# Both backends


def test_float64_parity():
    options = config(use_ema=False, max_train_steps=6, gradient_accumulation_steps=2, **SEVERAL)
    rows = list(compare(options, 6))
    equal, line = verdict(rows, "float64")
    assert equal, line
    assert max(row.ema for row in rows) > 0.0


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


def train(backend, folder, until=None, **options):
    """Trains, where asked to no further than some step; returns the arrays of the last checkpoint."""

    def make(config, spec):
        made = BACKENDS[backend](config, spec)
        if until is not None:
            made.should_stop = lambda requested, step: step == until
        return made

    values = SMALL | {"max_train_steps": 6, "checkpointing_steps": 4, "ema_snapshot_steps": 2} | SEVERAL | options
    fit(task_of(UnconditionalConfig(output_dir=str(folder), **values)), make)
    return portable.read(folder / f"checkpoint-{until or values['max_train_steps']}")


@pytest.fixture(scope="module")
def whole(backend, tmp_path_factory):
    folder = tmp_path_factory.mktemp(backend) / "run"
    return folder, *train(backend, folder)


def kept(folder):
    root = folder / snapshots.FOLDER
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_resume_is_bitwise(backend, whole, tmp_path):
    folder, expected, metadata = whole
    train(backend, tmp_path, until=3)
    arrays, resumed = train(backend, tmp_path, resume_from_checkpoint="latest")
    assert arrays.keys() == expected.keys()
    assert {name.partition("/")[0] for name in arrays} >= {"params", *NAMES}
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert resumed == metadata
    assert kept(tmp_path) == kept(folder)


def test_averages_differ_and_each_is_written(backend, whole):
    """The first in the run's own folder, and each other one as a pipeline beside it."""
    folder, arrays, _ = whole
    kernels = [arrays[f"{name}/unet/conv_in.weight"] for name in ("params", *NAMES)]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)
    for name, place in zip(NAMES, (".", "ema/0.9", "ema/sigma_rel_0.05", "ema/sigma_rel_0.1"), strict=True):
        for key, tensor in DDPMPipeline.from_pretrained(folder / place).unet.state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), arrays[f"{name}/unet/{key}"], err_msg=f"{name} {key}")
    assert (folder / "ema/0.9/scheduler").is_symlink()
    main_one = checkpoint_arrays(folder / "checkpoint-6")["unet"]
    np.testing.assert_array_equal(main_one["conv_in.weight"], arrays["ema_0.2/unet/conv_in.weight"])


def test_snapshots_are_the_averages_in_half_precision(whole):
    folder, arrays, _ = whole
    found = [(one.sigma_rel, one.step) for one in snapshots.find(folder)]
    assert found == [(width, step) for step in (2, 4, 6) for width in (0.05, 0.1)]
    last = snapshots.find(folder)[-1].folder
    for key, array in load_file(last / "unet/diffusion_pytorch_model.safetensors").items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, arrays[f"ema_sigma_rel_0.1/unet/{key}"].astype(np.float16))


def test_the_other_backend_goes_on(backend, whole, tmp_path):
    folder, expected, _ = whole
    (other,) = set(BACKENDS) - {backend}
    options = UnconditionalConfig(output_dir=str(tmp_path), **SMALL | SEVERAL)
    made = BACKENDS[other](options, task_of(options).make_spec([]))
    made.init_state()
    made.restore(folder / "checkpoint-6")
    arrays = made.state_arrays()
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_a_run_does_not_go_on_with_other_averages(backend, whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    again = {"resume_from_checkpoint": "latest", "max_train_steps": 7}
    with pytest.raises(CheckpointError, match=r"checkpoint-6 was made with averages \['ema_0\.2', .* \(its moving"):
        train(backend, tmp_path, **again, ema_decays=[0.9, 0.2])
    single = {"use_ema": True, "ema_decays": [], "ema_sigma_rels": [], "ema_snapshot_steps": None}
    with pytest.raises(CheckpointError, match=r"of another model or optimizer: .*ema"):
        train(backend, tmp_path, **again, **single)


def test_a_single_average_keeps_its_name_in_checkpoints(backend, tmp_path):
    single = {"use_ema": True, "ema_decays": [], "ema_sigma_rels": [], "ema_snapshot_steps": None}
    arrays, metadata = train(backend, tmp_path, **single, max_train_steps=2)
    assert {name.partition("/")[0] for name in arrays} == {"params", "ema", "mu", "nu", "count"}
    assert "averages" not in metadata
    if backend == "flax_diffusion":
        tree = json.loads((tmp_path / "checkpoint-2/state/_METADATA").read_text())["tree_metadata"]
        assert "('ema', 'unet', 'conv_in', 'kernel')" in tree
    assert not (tmp_path / "ema").exists()
    assert not (tmp_path / snapshots.FOLDER).exists()


def test_devices_divide_each_average():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    single = partition_of("ema/unet/conv_out/kernel", (3, 3, 8, 1), mesh)
    assert partition_of("ema/ema_0.9999/unet/conv_out/kernel", (3, 3, 8, 1), mesh) == single
    counts = [len([part for part in single if part is not None])]
    assert counts == [1]


def test_the_plan_counts_them_all():
    for options, count in (({"use_ema": True}, 1), (SEVERAL, 4)):
        own = UnconditionalConfig(**SMALL | options)
        state = JaxBackend(own, task_of(own).make_spec([]), jax.devices()[:1]).program.state
        assert bytes_per_device(state.ema) == count * bytes_per_device(state.params)


# After training


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run of text_to_image, most of whose pipeline does not train."""
    folder = tmp_path_factory.mktemp("tuned")
    options = {
        "pretrained_model_name_or_path": str(stable_diffusion(folder / "base")),
        "train_data_dir": str(pictures(folder / "data")), "resolution": 16, "train_batch_size": 2,
        "max_train_steps": 8, "learning_rate": 1e-3, "lr_warmup_steps": 0, "validation_epochs": None,
        "report_to": "none", "draw_samples": False, "ema_sigma_rels": [0.05, 0.1, 0.075], "ema_snapshot_steps": 2,
        "output_dir": str(folder / "run"), "checkpointing_steps": 8,
    }  # fmt: skip
    importlib.import_module("torch_backend.train").train("text_to_image", **options)
    return folder / "run"


@pytest.mark.acceptance
def test_what_does_not_train_is_linked(tuned):
    beside = tuned / "ema/sigma_rel_0.1"
    assert not (beside / "unet").is_symlink()
    assert {path.name for path in beside.iterdir() if path.is_symlink()} == {
        "vae", "text_encoder", "tokenizer", "scheduler"
    }  # fmt: skip
    moved = shutil.copytree(tuned, tuned.with_name("moved"), symlinks=True)
    StableDiffusionPipeline.from_pretrained(moved / "ema/sigma_rel_0.1")
    pictures = [
        generate(folder, prompt="a dog", num_inference_steps=2, height=16, width=16) for folder in (tuned, beside)
    ]
    assert pictures[0].shape == (1, 16, 16, 3)
    assert (pictures[0] != pictures[1]).any()


def test_an_average_chosen_after_training(tuned, tmp_path):
    """Of a width that was kept too: the least squares find the snapshot itself, from all others only nearly it."""
    arrays, _ = portable.read(tuned / "checkpoint-8")
    out = post_hoc_ema(tuned, 0.075, tmp_path / "same")
    for key, array in load_file(out / "unet/diffusion_pytorch_model.safetensors").items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, arrays[f"ema_sigma_rel_0.075/unet/{key}"], rtol=1e-3, atol=1e-6)
    shutil.copytree(tuned, tmp_path / "fewer", symlinks=True)
    shutil.rmtree(tmp_path / "fewer" / snapshots.FOLDER / "sigma_rel_0.075")
    main([str(tmp_path / "fewer"), "--sigma_rel", "0.075", "--output", str(tmp_path / "made"), "--step", "8"])
    made = load_file(tmp_path / "made/unet/diffusion_pytorch_model.safetensors")
    key = "conv_in.weight"
    want, other = (arrays[f"ema_sigma_rel_{width}/unet/{key}"] for width in ("0.075", "0.05"))
    assert np.abs(made[key] - want).max() < 0.2 * np.abs(other - want).max() + 2**-11 * np.abs(want).max()
    StableDiffusionPipeline.from_pretrained(tmp_path / "made")
    assert generate(tmp_path / "made", prompt="a dog", num_inference_steps=1, height=16, width=16).shape[1] == 16


def test_it_loads_no_framework(request):
    import subprocess
    import sys

    code = "import sys, flax_diffusion.post_hoc_ema; assert not {'jax', 'torch', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=request.config.rootpath)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{run}", "--sigma_rel", "0.3", "--output", "{new}"], "--sigma_rel: must be less than 0.288675, got '0.3'"),
        (["{run}", "--sigma_rel", "0.1", "--output", "{run}"], "is there already; name an empty or a new folder"),
        (
            ["{run}", "--sigma_rel", "0.1", "--output", "{new}", "--step", "9"],
            "--step 9: the snapshots .* 2 to 8: give",
        ),
        (
            ["{run}", "--sigma_rel", "0.1", "--output", "{new}", "--step", "1"],
            "--step 1: the snapshots .* 2 to 8: give",
        ),
        (
            ["{run}/unet", "--sigma_rel", "0.1", "--output", "{new}"],
            "has no ema_snapshots: train with --ema_sigma_rels",
        ),
        (["{new}", "--sigma_rel", "0.1", "--output", "{new}"], "there is no such folder: name the folder of a run"),
        (["{run}", "--output", "{new}"], "--sigma_rel is required: give it"),
    ],
)
def test_what_cannot_be_made_is_one_line(tuned, tmp_path, words, says):
    with pytest.raises(UserError, match=says):
        main([word.format(run=tuned, new=tmp_path / "new") for word in words])


def test_a_profile_that_is_far_is_warned_of(tuned, tmp_path, caplog):
    post_hoc_ema(tuned, 0.25, tmp_path / "far")
    assert re.search(r"up to 0\.\d+ of its norm, so that this is another average: give a width", caplog.text)


def test_going_back_deletes_later_snapshots(tmp_path):
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    for step in (2, 4, 6):
        snapshots.write(exported, tmp_path, 0.05, step)
    (tmp_path / snapshots.FOLDER / "sigma_rel_0.05/step-4/snapshot.json").unlink()  # killed while it was written
    assert [one.step for one in snapshots.find(tmp_path)] == [2, 6]
    snapshots.forget_after(tmp_path, 5)
    assert [path.name for path in (tmp_path / snapshots.FOLDER / "sigma_rel_0.05").iterdir()] == ["step-2"]


def test_a_full_disk_is_one_line(tmp_path):
    def full(folder):
        (folder / "half").write_text("done")
        raise OSError(errno.ENOSPC, "No space left on device")

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    says = r"--ema_sigma_rels 0\.05 at step 4 could not be kept in .*ema_snapshots: No space left on device; no check"
    with pytest.raises(CheckpointError, match=says):
        Saver(Idle(), tmp_path, None).keep_average(0.05, 4, scratch, full)
    assert not scratch.exists()


def test_what_half_precision_does_not_hold_stays_wide(tmp_path):
    from safetensors.numpy import save_file

    (tmp_path / "exported").mkdir()
    arrays = {"big": np.float32([7e4, 1]), "small": np.float32([1, 2]), "ids": np.arange(3)}
    save_file(arrays, tmp_path / "exported/x.safetensors", {"format": "pt", "rank": "4"})
    for step, scale in ((1, 1), (2, 3)):
        arrays["small"] = scale * np.float32([1, 2])
        save_file(arrays, tmp_path / "exported/x.safetensors", {"format": "pt", "rank": "4"})
        snapshots.write(tmp_path / "exported", tmp_path, 0.1, step)
    snapshots.combine(snapshots.find(tmp_path), np.array([0.25, 0.5]), tmp_path / "out")
    made = load_file(tmp_path / "out/x.safetensors")
    assert made["big"].tolist() == [7e4, 1]  # the same in both
    assert safetensors_metadata(tmp_path / "out/x.safetensors") == {"format": "pt", "rank": "4"}
    assert made["small"].tolist() == [1.75, 3.5]
    assert made["ids"].tolist() == [0, 1, 2]
    assert made["small"].dtype == np.float32


# Bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ema_decays": [1.0]}, "--ema_decays 1.0: must be greater than 0 and less than 1: give another"),
        ({"ema_decays": [0.5, -0.1]}, "--ema_decays -0.1: must be greater than 0"),
        ({"ema_decays": [0.9, 0.9]}, "--ema_decays 0.9 is there 2 times: give it once"),
        ({"ema_sigma_rels": [0.3]}, "--ema_sigma_rels 0.3: must be greater than 0 and less than 0.2887"),
        ({"ema_sigma_rels": [0.1, 0.10]}, "--ema_sigma_rels 0.1 is there 2 times"),
        ({"ema_decays": [0.9], "ema_max_decay": 0.99}, "--ema_max_decay 0.99 is the decay of --use_ema alone: put it"),
        ({"ema_snapshot_steps": 5}, "--ema_snapshot_steps keeps power-function averages: add --ema_sigma_rels"),
        ({"ema_decays": ["a"]}, r"--ema_decays\.0: must be a number, got 'a'"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(ConfigError, match=says):
        config(**options)
