"""The training loop with a backend that computes nothing: order, cadence, files and refusals."""

import json
import logging
import math
import shutil

import numpy as np
import pytest
import yaml
from recorder import Idle
from tiny import RUN, UNET, pictures

from flax_diffusion.core.checkpoints.folders import identity_of, seal
from flax_diffusion.core.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from flax_diffusion.core.run import output_folder
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.run.preemption import Preempted, Preemption
from flax_diffusion.core.run.schedule.rates import ema_decays
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.core.tasks.unconditional import UnconditionalConfig, UnconditionalTask


class Recorder(Idle):
    """Remembers what the loop asked for."""

    bytes = 0

    def __init__(self, config, spec, nan_at=()):
        self.nan_at = (nan_at,) if isinstance(nan_at, int) else nan_at
        self.taken, self.saved, self.sampled, self.exported = 0, [], [], []
        self.examples, self.rates, self.checked = [], [], []

    def put(self, batch):
        self.examples += batch["example_index"].ravel().tolist()
        return batch

    def set_step(self, step):
        self.taken = step

    def train_step(self, batch, learning_rate, ema_decays):
        self.taken += 1
        self.rates.append((learning_rate, ema_decays))
        return {"loss": float("nan") if self.taken in self.nan_at else 1.0, "grad_norm": 1.0}

    def save(self, folder, metadata):
        folder.mkdir()
        (folder / "metadata.json").write_text(json.dumps(metadata | {"taken": self.taken}))
        self.saved.append(metadata["step"])

    def state_bytes(self):
        return self.bytes

    def check(self, folder):
        self.checked.append(folder.name)

    def restore(self, folder):
        metadata = json.loads((folder / "metadata.json").read_text())
        self.taken = metadata.pop("taken")
        return metadata

    def sample(self, *, prompts, num_images, num_inference_steps, guidance_scale, seed, extra):
        self.sampled.append(self.taken)
        return np.zeros((num_images, 8, 8, 1), np.uint8)

    def export(self, folder, *, only_trained=False):
        (folder / "unet").mkdir(exist_ok=True)
        self.exported.append(self.taken)


def run(folder, nan_at=(), preemption=None, **options):
    made = []

    def make(config, spec):
        made.append(Recorder(config, spec, nan_at))
        return made[-1]

    config = UnconditionalConfig(**RUN | {"output_dir": str(folder), "report_to": "none"} | options)
    fit(task_of(config), make, preemption)
    return made[-1]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_cadence(tmp_path):
    # 40 examples in batches of 8: an epoch is five steps.
    seen = run(
        tmp_path, max_train_steps=11, checkpointing_steps=4, checkpoints_total_limit=2, validation_epochs=1,
        save_model_epochs=2,
    )  # fmt: skip
    assert (seen.taken, seen.saved, seen.sampled, seen.exported) == (11, [4, 8, 11], [5, 10, 11], [10, 11])
    assert checkpoints(tmp_path) == ["checkpoint-11", "checkpoint-8"]
    assert sorted(seen.examples[:40]) == sorted(seen.examples[40:80]) == list(range(40))
    assert seen.examples[:40] != seen.examples[40:80]


def test_validation_steps_count_steps(tmp_path):
    seen = run(tmp_path, max_train_steps=9, validation_steps=4)
    assert seen.sampled == [4, 8, 9]


def test_epochs_give_the_length(tmp_path):
    seen = run(tmp_path, max_train_steps=None, num_train_epochs=3, train_batch_size=16)
    assert seen.taken == 8  # ceil(3 x 40 / 16): batches cross the end of an epoch


def test_rates(tmp_path):
    options = {"learning_rate": 1e-3, "lr_warmup_steps": 2, "lr_scheduler": "linear", "use_ema": True}
    seen = run(tmp_path / "a", **options, max_train_steps=4)
    assert [rate for rate, _ in seen.rates] == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])
    config = UnconditionalConfig(**RUN | {"use_ema": True})
    assert [decays for _, decays in seen.rates] == [ema_decays(config, step) for step in range(4)]
    scaled = run(tmp_path / "b", **options, max_train_steps=4, scale_lr=True, gradient_accumulation_steps=2)
    assert scaled.rates[2][0] == pytest.approx(16e-3)  # 2 accumulated x 8 images


@pytest.mark.parametrize("every", [1, 2])
def test_non_finite_loss_names_the_step_and_is_never_saved(tmp_path, every):
    with pytest.raises(
        NonFiniteError, match=r"step 5 is not finite \(loss nan, .*; the newest checkpoint is checkpoint-4"
    ):
        run(tmp_path, nan_at=5, checkpointing_steps=every)
    assert checkpoints(tmp_path)[-1] == "checkpoint-4"
    said = json.loads((tmp_path / "nonfinite-5.json").read_text())
    whole = run(tmp_path / "whole", max_train_steps=5)
    assert [one["index"] for one in said["examples"]] == whole.examples[4 * 8 : 5 * 8]
    assert said["examples"][0]["name"] == f"digits[{whole.examples[32]}]"
    assert said["loss"] == "nan"


def test_non_finite_steps_that_are_passed_over(tmp_path, capsys):
    seen = run(tmp_path / "a", nan_at=(3, 5), max_train_steps=6, skip_nonfinite=2, checkpointing_steps=4)
    assert seen.taken == 6
    assert sorted(path.name for path in (tmp_path / "a").glob("nonfinite-*")) == [
        "nonfinite-3.json",
        "nonfinite-5.json",
    ]
    assert "step 3 is not finite (loss nan, grad_norm 1) and passed over" in capsys.readouterr().err
    with pytest.raises(NonFiniteError, match="step 5 is not finite"):
        run(tmp_path / "b", nan_at=(3, 5), max_train_steps=6, skip_nonfinite=1, checkpointing_steps=4)
    with pytest.raises(NonFiniteError, match="step 5 is not finite"):  # the first one is not forgotten
        run(
            tmp_path / "b", nan_at=(5,), max_train_steps=6, skip_nonfinite=1, checkpointing_steps=4,
            resume_from_checkpoint="latest",
        )  # fmt: skip


def test_the_batch_of_a_step_again(tmp_path, caplog):
    whole = run(tmp_path, max_train_steps=6, checkpointing_steps=4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with caplog.at_level(logging.INFO):
        again = run(tmp_path, resume_from_checkpoint="checkpoint-4", repeat_step=6)
    assert again.examples == whole.examples[5 * 8 :]
    assert "the batch of step 6, with the weights of step 4: loss 1, grad_norm 1; of digits[" in caplog.text
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="--repeat_step computes with the weights of a checkpoint: add --resume"):
        run(tmp_path, repeat_step=6)


@pytest.mark.parametrize("state", ["step", "data", "sample", "save", "setup"])
def test_a_signal_to_end(tmp_path, monkeypatch, state, capsys):
    """The step that was started is the last, and saved; once more does no harm."""
    preemption = Preemption()
    places = {
        "step": (Recorder, "train_step"), "data": (Recorder, "put"), "sample": (Recorder, "sample"),
        "save": (Recorder, "save"), "setup": (Recorder, "init_state"),
    }  # fmt: skip
    owner, name = places[state]
    real = getattr(owner, name)

    def signalled(self, *args, **kwargs):
        if state == "setup" or self.taken >= 2:
            for _ in range(2):
                preemption.handle(15)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)
    options = {"max_train_steps": 9, "validation_steps": 3, "checkpointing_steps": 4}
    if state == "setup":
        with pytest.raises(Preempted):
            run(tmp_path, preemption=preemption, **options)
        return
    seen = run(tmp_path, preemption=preemption, **options)
    last = {"step": 3, "data": 3, "sample": 3, "save": 4}[state]
    assert seen.taken == last
    assert checkpoints(tmp_path)[-1] == f"checkpoint-{last}"
    said = f"ended by SIGTERM after step {last}, saved as checkpoint-{last}; go on with: train --config {tmp_path}"
    assert said in capsys.readouterr().err
    again = run(tmp_path, resume_from_checkpoint="latest", **options)
    assert again.taken == 9
    drawn = {path.name for path in (tmp_path / "samples").iterdir()}
    assert drawn == {f"{step:08d}.png" for step in (3, 6, 9)}


def test_a_save_that_fails(tmp_path, monkeypatch):
    """It is said at the next step."""
    real = Recorder.save

    def save(self, folder, metadata):
        real(self, folder, metadata)
        self.full = metadata["step"] == 4

    def wait(self):
        if getattr(self, "full", False):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Recorder, "save", save)
    monkeypatch.setattr(Recorder, "wait", wait)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 could not be written.*No space left.*newest checkpoint is checkpoint-2"
    ):
        run(tmp_path, max_train_steps=400, checkpointing_steps=2)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4.partial"]


def test_a_checkpoint_that_does_not_fit_the_disk(tmp_path, monkeypatch):
    """It is not begun."""
    run(tmp_path, max_train_steps=2)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Recorder, "bytes", 2**60)
    says = (
        r"checkpoint-3 could not be .*: No space left on device, it takes 1,152,921,504,606,846,976 bytes and .* free; "
    )
    with pytest.raises(CheckpointError, match=says + "the newest checkpoint is checkpoint-2"):
        run(tmp_path, max_train_steps=3, resume_from_checkpoint="latest")
    assert sorted(tmp_path.rglob("*")) == before


def test_another_run_in_the_folder(tmp_path):
    run(tmp_path, max_train_steps=1)
    with pytest.raises(ConfigError, match="holds another run; go on with it by --resume_from_checkpoint latest"):
        run(tmp_path, max_train_steps=2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "events.out.tfevents.1").write_text("of the run")
    run(tmp_path, max_train_steps=2, overwrite_output_dir=True, logging_dir=".")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "events.out.tfevents.1").exists()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert not (tmp_path / "replaced-run").exists()


@pytest.mark.parametrize("fails", ["open_source", "make_spec", "complete_source", "init_state", "first save"])
def test_an_overwritten_run_stays_until_the_new_one_has_a_checkpoint(tmp_path, monkeypatch, fails):
    run(tmp_path, max_train_steps=2)
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*args, **kwargs):
        raise DataError("bad input")

    with monkeypatch.context() as patch:
        if fails == "first save":
            patch.setattr(Recorder, "save", fail)
        elif fails == "init_state":
            patch.setattr(Recorder, "init_state", fail)
        else:
            patch.setattr(UnconditionalTask, fails, fail)
        with pytest.raises(DataError, match="bad input"):
            run(tmp_path, max_train_steps=3, overwrite_output_dir=True)
    kept = tmp_path / "replaced-run" if fails == "first save" else tmp_path
    assert {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    if fails == "first save":  # a second try does not take the place of the first run
        run(tmp_path, max_train_steps=3, overwrite_output_dir=True)
    assert (checkpoints(tmp_path) == ["checkpoint-3"]) == (fails == "first save")


def test_an_overwritten_run_whose_move_was_cut_off_loses_nothing(tmp_path, monkeypatch):
    """What was moved by then stays, also where the same command is given again."""
    run(tmp_path, max_train_steps=4, checkpointing_steps=2)
    saved = {path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    move = output_folder.move

    def killed(source, target):
        if source.name == "checkpoint-4":
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "move", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, max_train_steps=3, overwrite_output_dir=True)
    assert (tmp_path / "replaced-run/checkpoint-2").exists()

    def fail(*args, **kwargs):
        raise DataError("bad input")

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "save", fail)
        with pytest.raises(DataError, match="bad input"):
            run(tmp_path, max_train_steps=3, overwrite_output_dir=True)
    assert {path.read_bytes() for path in (tmp_path / "replaced-run").rglob("*") if path.is_file()} >= saved


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match=r"--output_dir .*notes: is a file; name a folder$"):
        run(tmp_path / "notes")


def test_a_checkpoint_that_does_not_say_its_step(tmp_path):
    run(tmp_path, max_train_steps=2)
    folder = tmp_path / "checkpoint-2"
    metadata = json.loads((folder / "metadata.json").read_text())
    del metadata["examples_seen"]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    (folder / "manifest.json").unlink()
    seal(folder.rename(tmp_path / "checkpoint-2.partial").with_name("checkpoint-2"))
    with pytest.raises(CheckpointError, match=r"checkpoint-2: its metadata lacks 'examples_seen'; resume from another"):
        run(tmp_path, max_train_steps=3, resume_from_checkpoint="latest")


def test_a_run_that_saved_nothing_is_not_in_the_way(tmp_path, monkeypatch):
    with pytest.raises(NonFiniteError):
        run(tmp_path, nan_at=1)
    assert (tmp_path / "config.yaml").exists()
    assert run(tmp_path, max_train_steps=2).taken == 2


INSIDE = {
    "the model": {"pretrained_model_name_or_path": ""},
    "its autoencoder": {"vae": "vae"},
    "the data": {"train_data_dir": "data", "dataset_name": None},
    "the data, through a link": {"train_data_dir": "../link/data", "dataset_name": None},
}


@pytest.mark.parametrize("what", INSIDE)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_in_the_output_folder_is_refused(tmp_path, what, overwrite):
    out = tmp_path / "out"
    pictures(out / "data")
    (out / "vae").mkdir()
    (out / "model_index.json").write_text("{}")
    (tmp_path / "link").symlink_to(out)
    values = {key: value if value is None else str(out / value) for key, value in INSIDE[what].items()}
    before = sorted(out.rglob("*"))
    with pytest.raises(ConfigError, match=r"--\w+ .*: lies in --output_dir .*out, where the run writes and deletes"):
        run(out, unet=None, overwrite_output_dir=overwrite, **values)
    assert sorted(out.rglob("*")) == before


def test_an_output_folder_in_the_data_is_refused(tmp_path):
    data = pictures(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"--output_dir .*run: lies in --train_data_dir .*data, so that the run's"):
        run(data / "deep/run", dataset_name=None, train_data_dir=str(data))
    assert not (data / "deep").exists()


def test_what_is_said_once_is_not_in_the_recipe(tmp_path):
    run(tmp_path, max_train_steps=1)
    run(tmp_path, max_train_steps=2, overwrite_output_dir=True)
    run(tmp_path, max_train_steps=3, resume_from_checkpoint="latest")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert not {"overwrite_output_dir", "resume_from_checkpoint", "repeat_step"} & set(saved)
    assert saved["max_train_steps"] == 3


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def read_only(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(ConfigError, match=r"--output_dir .*: cannot be written \(Permission denied\); name another"):
        run(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_run_stays(tmp_path, overwrite):
    mine = [tmp_path / "samples/notes.txt", tmp_path / "unet/mine.txt"]
    for file in mine:
        file.parent.mkdir()
        file.write_text("mine")
    run(tmp_path, max_train_steps=1, overwrite_output_dir=overwrite)
    assert [file.read_text() for file in mine] == ["mine", "mine"]


def test_resume_takes_the_next_examples(tmp_path):
    whole = run(tmp_path / "whole", max_train_steps=12)
    run(tmp_path / "part", max_train_steps=12, checkpointing_steps=5)
    shutil.rmtree(tmp_path / "part/checkpoint-12")
    again = run(tmp_path / "part", max_train_steps=12, resume_from_checkpoint="latest")
    assert again.taken == 12
    assert again.examples == whole.examples[10 * 8 :]
    assert again.rates == whole.rates[10:]
    finished = run(tmp_path / "part", max_train_steps=12, resume_from_checkpoint="latest")
    assert (finished.rates, finished.saved, finished.exported) == ([], [], [12])


def test_progress_is_counted_in_examples_when_the_batch_changes(tmp_path):
    whole = run(tmp_path / "whole", max_train_steps=7)
    run(tmp_path / "part", max_train_steps=4)
    smaller = run(tmp_path / "part", max_train_steps=7, train_batch_size=4, resume_from_checkpoint="checkpoint-4")
    assert smaller.examples == whole.examples[4 * 8 : 4 * 8 + 3 * 4]
    again = run(tmp_path / "part", max_train_steps=8, resume_from_checkpoint="latest")
    assert again.examples == whole.examples[4 * 8 + 3 * 4 :][:8]


@pytest.mark.parametrize("limit", [None, 2])
def test_going_back_to_an_older_checkpoint(tmp_path, limit, caplog):
    run(tmp_path, max_train_steps=6, checkpointing_steps=2)
    abandoned = {(tmp_path / f"checkpoint-{step}/metadata.json").read_bytes() for step in (4, 6)}
    again = {"max_train_steps": 6, "checkpoints_total_limit": limit, "resume_from_checkpoint": "checkpoint-2"}
    run(tmp_path, **again | {"max_train_steps": 3}, learning_rate=1e-2)
    assert "going back to checkpoint-2: checkpoint-4 is set aside as checkpoint-4.abandoned" in caplog.text
    assert checkpoints(tmp_path) == [
        "checkpoint-2", "checkpoint-3", "checkpoint-4.abandoned", "checkpoint-6.abandoned",
    ]  # fmt: skip
    aside = (tmp_path / f"checkpoint-{step}.abandoned/metadata.json" for step in (4, 6))
    assert {file.read_bytes() for file in aside} == abandoned
    whole = run(tmp_path / "whole", max_train_steps=6)
    seen = run(tmp_path, **again | {"resume_from_checkpoint": "latest"})
    assert seen.examples == whole.examples[3 * 8 :]
    manifest = json.loads((tmp_path / "checkpoint-6/manifest.json").read_text())
    assert manifest["parent"] == identity_of(tmp_path / "checkpoint-3")


def test_looking_back_sets_nothing_aside(tmp_path):
    run(tmp_path, max_train_steps=4, checkpointing_steps=2)
    run(tmp_path, resume_from_checkpoint="checkpoint-2", repeat_step=3)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(("first", "then"), [(2, 8), (8, 2), (2, 7)])
def test_epochs_are_counted_in_examples_when_the_batch_changes(tmp_path, first, then):
    """Five epochs of 24, of which the first 80 examples are seen with batches of another size."""
    options = {"max_train_samples": 24, "num_train_epochs": 5}
    whole = run(tmp_path / "whole", max_train_steps=None, train_batch_size=1, **options)
    run(tmp_path / "part", max_train_steps=80 // first, train_batch_size=first, **options)
    rest = run(
        tmp_path / "part", max_train_steps=None, train_batch_size=then, resume_from_checkpoint="latest", **options
    )
    assert rest.taken - 80 // first == math.ceil(40 / then)
    assert rest.examples[:40] == whole.examples[80:]
    assert len(rest.examples) == math.ceil(40 / then) * then


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_train_steps": 3}, "nothing to train: checkpoint-5 is there, and --max_train_steps is 3"),
        (
            {"max_train_steps": None, "num_train_epochs": 1},
            "checkpoint-5 is there, and --num_train_epochs 1 are 40 examples, of which 40 are seen",
        ),
    ],
)
def test_a_run_with_nothing_to_do_says_why(tmp_path, capsys, limits, says):
    run(tmp_path, max_train_steps=5)
    assert "ing the first step" in capsys.readouterr().err
    again = run(tmp_path, **limits, resume_from_checkpoint="latest")
    said = " ".join(capsys.readouterr().err.split())
    assert says in said
    assert "ing the first step" not in said
    assert (again.rates, again.saved, again.sampled) == ([], [], [])
    (tmp_path / "samples/00000005.png").unlink()  # killed before it was drawn
    assert run(tmp_path, **limits, resume_from_checkpoint="latest").sampled == [5]


def test_other_options_at_resume_are_said(tmp_path, caplog):
    run(tmp_path, max_train_steps=2)
    with caplog.at_level(logging.INFO):
        run(tmp_path, max_train_steps=3, learning_rate=2e-3, resume_from_checkpoint="latest")
    assert "config.yaml says: max_train_steps 2 → 3; learning_rate 0.001 → 0.002" in caplog.text


def test_the_checkpoint_is_checked_before_anything_is_drawn(tmp_path, monkeypatch):
    run(tmp_path, max_train_steps=2)

    def refuse(self, folder):
        raise CheckpointError("of another model")

    def drawn(*args):
        raise AssertionError("pictures were drawn first")

    monkeypatch.setattr(UnconditionalTask, "complete_source", drawn)
    with pytest.raises(CheckpointError, match="seed 0, this run has 1"):
        run(tmp_path, seed=1, resume_from_checkpoint="latest")
    monkeypatch.setattr(Recorder, "check", refuse)
    with pytest.raises(CheckpointError, match="of another model"):
        run(tmp_path, resume_from_checkpoint="latest")


def test_resuming_other_data_or_another_seed_is_refused(tmp_path):
    run(tmp_path, max_train_steps=1)
    again = {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(CheckpointError, match="num_examples 40, this run has 41"):
        run(tmp_path, **again, max_train_samples=41)
    with pytest.raises(CheckpointError, match="seed 0, this run has 1"):
        run(tmp_path, **again, seed=1)


def test_bad_images_stop_the_run_or_are_counted(tmp_path, caplog, capsys):
    data = pictures(tmp_path / "data", count=8)
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:200])
    unet = UNET | {"in_channels": 3, "out_channels": 3}
    options = {"dataset_name": None, "train_data_dir": str(data), "unet": unet, "max_train_steps": 2}
    with pytest.raises(DataError, match=r"3\.png"):
        run(tmp_path / "a", **options)
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "b", **options, skip_bad_images=True)
    assert any("3.png" in record.getMessage() for record in caplog.records)
    assert "skipped 1 unreadable images" in capsys.readouterr().err
