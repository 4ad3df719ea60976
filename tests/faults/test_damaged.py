"""Checkpoints that something happened to, disks that are full, and runs that do not fit their checkpoint."""

import random
import shutil
import subprocess
import time
from importlib import import_module

import jax
import numpy as np
import pytest
from faults.trials import BACKENDS, ended, log_of, start
from tiny import ONE_BLOCK, RUN, TEXT_RUN, UNET, pictures

from flax_diffusion.core.checkpoints import folders, portable
from flax_diffusion.core.errors import CheckpointError, UserError
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.run.saving import Saver
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig
from flax_diffusion.jax_backend.backend import JaxBackend

EIGHT = jax.devices()  # other tests see the first of them only
SAVED = RUN | {
    "unet": UNET | ONE_BLOCK | {"block_out_channels": [32]}, "max_train_steps": 4, "checkpointing_steps": 2,
    "use_ema": True, "validation_epochs": None,
}  # fmt: skip


def train(backend, task="unconditional", **options):
    return import_module(f"{backend}.train").train(task, **options).output_dir


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Of a backend, a run with the checkpoints 2 and 4."""
    runs = {}

    def of(backend):
        if backend not in runs:
            runs[backend] = train(backend, **SAVED, output_dir=str(tmp_path_factory.mktemp(backend) / "run"))
        return runs[backend]

    return of


def damages(file, count, draw):
    """A file's content after each thing that may happen to it; None: it is gone."""
    content = file.read_bytes()
    yield "deleted", None
    yield "cut in half", content[: len(content) // 2]
    for _ in range(count if content else 0):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        yield "a bit flipped", bytes(flipped)


def check_damages(run, tmp_path, flips):
    """Each damage of the newest checkpoint: what is restored is right, or it is the one before, and that was said."""
    expected = portable.read(run / "checkpoint-4")
    draw, counts = random.Random(0), {"right": 0, "named": 0}
    work = tmp_path / "work"
    names = sorted(str(path.relative_to(run / "checkpoint-4")) for path in (run / "checkpoint-4").rglob("*"))
    for name in (name for name in names if (run / "checkpoint-4" / name).is_file()):
        for what, content in damages(run / "checkpoint-4" / name, flips, draw):
            shutil.rmtree(work, ignore_errors=True)
            for step in (2, 4):
                shutil.copytree(run / f"checkpoint-{step}", work / f"checkpoint-{step}")
            if content is None:
                (work / "checkpoint-4" / name).unlink()
            else:
                (work / "checkpoint-4" / name).write_bytes(content)
            folder = folders.newest_whole(work)
            step = folders.step_of(folder)
            if step == 4:
                arrays, metadata = portable.read(folder)
                assert metadata == expected[1], (name, what)
                for key, array in expected[0].items():
                    np.testing.assert_array_equal(arrays[key], array, err_msg=f"{name} {what}")
            assert (work / "checkpoint-4.damaged").exists() == (step == 2)
            counts["right" if step == 4 else "named"] += 1
    return counts


def test_no_damage_is_restored(saved, tmp_path):
    assert check_damages(saved("torch_backend"), tmp_path, 3)["named"] > 10


@pytest.mark.acceptance
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_damage_is_restored_of_many(saved, tmp_path, backend, figure):
    counts = check_damages(saved(backend), tmp_path, 20)
    assert counts["named"] > 40
    figure(5, f"{backend}: {sum(counts.values())} damages: {counts['named']} named, none restored")


def test_a_run_goes_on_from_the_one_before(saved, tmp_path, caplog):
    run = shutil.copytree(saved("flax_diffusion"), tmp_path / "run")
    expected = portable.read(run / "checkpoint-4")
    (run / "checkpoint-4/metadata/metadata").write_text("{}")
    options = SAVED | {"output_dir": str(run)}
    with pytest.raises(CheckpointError, match="checkpoint-4: metadata/metadata is not what was written; use another"):
        train("flax_diffusion", **options, resume_from_checkpoint="checkpoint-4")
    train("flax_diffusion", **options, resume_from_checkpoint="latest")
    assert "checkpoint-4: metadata/metadata is not what was written; set aside as checkpoint-4.damaged" in caplog.text
    arrays, metadata = portable.read(run / "checkpoint-4")
    assert metadata == expected[1]
    for name, array in expected[0].items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_checkpoint_that_was_sealed_without_its_state(saved, tmp_path):
    config = UnconditionalConfig(**SAVED, output_dir=str(tmp_path))
    backend = JaxBackend(config, task_of(config).make_spec(task_of(config).open_source()))
    backend.state = backend.program.state  # shapes alone will do
    missing = "its `state` is missing or has no _METADATA"
    kinds = [
        (shutil.rmtree, missing),
        (lambda state: (state / "_METADATA").unlink(), missing),
        (lambda state: (state / "_METADATA").write_text("{"), "Expecting property name .*"),
    ]
    for number, (damage, says) in enumerate(kinds):
        folder = shutil.copytree(saved("flax_diffusion") / "checkpoint-4", tmp_path / f"checkpoint-{number}")
        backend.check(folder)
        damage(folder / "state")
        with pytest.raises(CheckpointError, match=rf"^{folder}: not a complete checkpoint \({says}\); resume from a"):
            backend.check(folder)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.acceptance
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_disk(small_disk, tmp_path, backend, figure):
    """The run says so, and the checkpoint that it names is whole."""
    wide = UNET | {"block_out_channels": [24, 48]}
    folder = tmp_path / "run"  # and what it prints beside it
    folder.symlink_to(small_disk)
    process = start(backend, folder, unet=wide, checkpointing_steps=2, checkpoints_total_limit=None, report_to="none")
    assert ended(process) != 0
    have, last = folders.committed(folder), log_of(folder).splitlines()[-1]
    assert have, last
    assert "No space left on device" in last
    assert last.endswith(f"; the newest checkpoint is {have[-1].name}")
    assert all(folders.find_damage(one) is None for one in have)
    figure(6, f"{backend}: {len(have)} whole checkpoints on a disk of 32 MB, then: {last[:60]}…")


@pytest.mark.acceptance
@pytest.mark.parametrize("count", [1, 2, 4])
def test_saved_on_eight_devices(tmp_path, count, figure):
    made = []

    def make(devices):
        def backend(config, spec):
            made.append(JaxBackend(config, spec, devices))
            return made[-1]

        return backend

    options = SAVED | {"global_batch_size": 8, "output_dir": str(tmp_path), "max_train_steps": 2}
    fit(task_of(UnconditionalConfig(**options, fsdp_parallelism=8)), make(EIGHT))
    more = options | {"max_train_steps": 5, "resume_from_checkpoint": "latest"}
    expected = made[0].state_arrays()
    restored = make(EIGHT[:count])(config := UnconditionalConfig(**more), made[0].spec)
    restored.init_state()
    restored.restore(tmp_path / "checkpoint-2")
    for name, array in restored.state_arrays().items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    fit(task_of(config), make(EIGHT[:count]))
    assert folders.committed(tmp_path)[-1].name == "checkpoint-5"
    figure(11, f"saved on 8 devices, restored on {count}: bitwise the same, and the run went on")


@pytest.mark.parametrize(
    ("task", "changes", "says"),
    [
        ("unconditional", {"unet": SAVED["unet"] | {"block_out_channels": [48]}}, r"params/unet/.* is \(.*32.*48"),
        ("unconditional", {"use_8bit_adam": True}, "is missing there|is not in this run"),
        ("unconditional", {"use_ema": False}, "ema/.* is not in this run"),
        ("unconditional", {"max_train_samples": 39}, "num_examples 40, this run has 39"),
        ("unconditional", {"dataset_name": None, "train_data_dir": "data"}, "made with data .*, this run has"),
        ("text_to_image", TEXT_RUN, "made with task 'unconditional', this run has 'text_to_image'"),
    ],
    ids=["width", "optimizer", "average", "size", "data", "task"],
)
@pytest.mark.parametrize("backend", [BACKENDS[0], pytest.param(BACKENDS[1], marks=pytest.mark.acceptance)])
def test_another_run_than_the_checkpoints(saved, tmp_path, backend, task, changes, says, request, figure):
    run = shutil.copytree(saved(backend), tmp_path / "run")
    if changes.get("train_data_dir"):
        changes = changes | {"train_data_dir": str(pictures(tmp_path / "data", 40)), "unet": SAVED["unet"]}
    options = SAVED | changes | {"output_dir": str(run), "max_train_steps": 9, "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match=says):
        train(backend, task, **options)
    assert {path.name for path in folders.committed(run)} == {"checkpoint-2", "checkpoint-4"}
    figure(12, f"{backend}: resumed with another {request.node.callspec.id.split('-')[-1]}: an error that names it")


@pytest.mark.acceptance
@pytest.mark.parametrize("backend", BACKENDS)
def test_saves_hardly_stall_training(tmp_path, backend, figure):
    """The step waits for a tenth of a save at most."""
    options = SAVED | {"output_dir": str(tmp_path), "unet": UNET | {"block_out_channels": [512, 512]}}
    config = UnconditionalConfig(**options)
    owner = JaxBackend if backend == "flax_diffusion" else import_module("torch_backend.backend").TorchBackend
    own = owner(config, task_of(config).make_spec(task_of(config).open_source()))
    own.init_state()
    metadata = {"step": 0}
    saver, times = Saver(own, tmp_path, None), []
    saver.start(1, metadata)  # the first one also makes what saves need
    saver.wait()
    for step in range(2, 7):
        began = time.monotonic()
        saver.start(step, metadata)
        stalled = time.monotonic() - began
        saver.wait()
        times.append((stalled, time.monotonic() - began))
    stalled, whole = (float(np.median(column)) for column in zip(*times, strict=True))
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint-6").rglob("*") if file.is_file())
    assert stalled < 0.1 * whole
    figure(0, f"{backend}: a save of {size / 2**20:.0f} MiB takes {whole:.2f} s, of which training waits {stalled:.3f}")
