"""What a run reports to TensorBoard, to Weights & Biases and to a CSV file, and how that goes on after a resume."""

import csv
import json
import sys
import time

import fake_wandb
import pytest
from PIL import Image
from tiny import ONE_BLOCK, RUN, UNET, losses

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.tracking.boards import BOARDS, named, prepare
from flax_diffusion.core.tracking.csv_file import CsvFile
from flax_diffusion.core.tracking.tensorboard import TensorBoard
from flax_diffusion.core.tracking.wandb_run import WandbRun
from flax_diffusion.train import main, train


def table(folder):
    return list(csv.reader((folder / "steps.csv").read_text().splitlines()))


def test_a_row_for_each_step(tmp_path):
    board = CsvFile(tmp_path, 1)
    for step in (1, 2, 3):
        board.scalars({"train/loss": 0.5 * step, "train/learning_rate": 1e-3}, step)
        board.scalars({"validation_loss": 7.0}, step)
    board.image("samples", Image.new("L", (2, 2)), 3)
    board.close()
    assert table(tmp_path) == [
        ["step", "loss", "learning_rate"], ["1", "0.5", "0.001"], ["2", "1.0", "0.001"], ["3", "1.5", "0.001"],
    ]  # fmt: skip
    again = CsvFile(tmp_path, 3)  # resumed from step 2
    again.scalars({"train/learning_rate": 1e-4, "train/loss": 9.0}, 3)
    again.close()
    assert table(tmp_path)[2:] == [["2", "1.0", "0.001"], ["3", "9.0", "0.0001"]]
    CsvFile(tmp_path, 1).close()
    assert table(tmp_path) == []


@pytest.mark.parametrize("clock", [1000.0, 900.0], ids=["the same second", "a clock that is behind"])
def test_event_files_are_read_in_the_order_of_the_runs(tmp_path, monkeypatch, clock):
    """Twelve runs, each of which is resumed from step 1: what it writes stands in place of what was written before."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    for run in range(12):
        board = TensorBoard(tmp_path / "logs", first_step=1 + (run > 0))
        for step in (1, 2, 3)[run > 0 :]:
            board.scalars({"train/loss": run}, step)
        board.close()
        monkeypatch.setattr(time, "time", lambda: clock)
    assert losses(tmp_path) == [0.0, 11.0, 11.0]


def test_a_file_of_somebody_else(tmp_path):
    (tmp_path / "steps.csv").write_text("name,age\na,3\n")
    with pytest.raises(ConfigError, match=r"steps\.csv: is no table of steps of a run: move it, or name another"):
        CsvFile(tmp_path, 5)


def test_a_row_that_was_cut_off_by_a_kill(tmp_path):
    (tmp_path / "steps.csv").write_text("step,loss\n1,0.5\n2,0.25\n1")  # of step 12, say
    board = CsvFile(tmp_path, 3)
    assert table(tmp_path) == [["step", "loss"], ["1", "0.5"], ["2", "0.25"]]  # before anything is closed
    board.scalars({"train/loss": 0.125}, 3)
    board.close()
    assert table(tmp_path)[-1] == ["3", "0.125"]


def test_a_damaged_id(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb.module())
    for text in ("", "[]", "{}"):
        (tmp_path / "wandb_run.json").write_text(text)
        with pytest.raises(ConfigError, match=r"wandb_run\.json: holds no id of a run of wandb: delete it"):
            WandbRun(tmp_path, project="p", name="n", options={})


def test_weights_and_biases(tmp_path, monkeypatch):
    made = fake_wandb.module()
    monkeypatch.setitem(sys.modules, "wandb", made)
    board = WandbRun(tmp_path, project="p", name="n", options={"seed": 3})
    identity = made.options["id"]
    assert (made.options["project"], made.options["name"], made.options["config"]) == ("p", "n", {"seed": 3})
    assert json.loads((tmp_path / "wandb_run.json").read_text()) == {"id": identity}
    board.scalars({"train/loss": 1.0}, 4)
    board.image("samples", Image.new("L", (3, 2)), 4)
    board.close()
    (run,) = made.runs
    assert run.logged == [{"train/loss": 1.0, "step": 4}, {"samples": ("picture", (3, 2)), "step": 4}]
    assert run.metrics[-1] == ("*", "step")
    assert run.finished
    WandbRun(tmp_path, project="p", name="n", options={})
    assert (made.options["id"], made.options["resume"]) == (identity, "allow")

    def fail(**options):
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    made.init = fail
    with pytest.raises(ConfigError, match=r"--report_to wandb: No API key .*: log in by `wandb login`, set WANDB_MODE"):
        WandbRun(tmp_path, project="p", name="n", options={})


def test_which_boards(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb.module())
    assert named(["none"]) == []
    assert named(["csv", "tensorboard", "csv"]) == ["csv", "tensorboard"]
    assert named(["all"]) == list(BOARDS)
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert named(["all"]) == ["tensorboard", "csv"]


def test_what_is_not_installed_is_said_before_anything(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="--report_to wandb: wandb is not installed: pip install wandb"):
        main(["unconditional", "--dataset_name", "digits", "--report_to", "wandb", "--output_dir", str(tmp_path / "a")])
    assert not (tmp_path / "a").exists()


def test_a_missing_login_is_said_before_anything(monkeypatch, tmp_path):
    made = fake_wandb.module()
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def login():
        raise RuntimeError("api_key not configured (no-tty).")

    made.login = login
    words = ["unconditional", "--dataset_name", "digits", "--report_to", "wandb", "--output_dir", str(tmp_path / "a")]
    with pytest.raises(ConfigError, match=r"--report_to wandb: api_key not configured \(no-tty\)\.: log in by `wandb"):
        main(words)
    assert not (tmp_path / "a").exists()
    prepare(["wandb"], main=False)  # other processes open no board
    monkeypatch.setenv("WANDB_MODE", "offline")
    prepare(["wandb"], main=True)


def test_a_run_reports_to_several_at_once(tmp_path, monkeypatch):
    made = fake_wandb.module()
    monkeypatch.setitem(sys.modules, "wandb", made)
    options = RUN | {"unet": UNET | ONE_BLOCK, "report_to": ["csv", "wandb"], "draw_samples": False}
    train("unconditional", **options, output_dir=str(tmp_path / "run"))
    rows = table(tmp_path / "run/logs")
    assert rows[0][0] == "step"
    assert {"loss", "grad_norm", "learning_rate", "images_per_second"} < set(rows[0])
    assert [row[0] for row in rows[1:]] == [str(step) for step in range(1, 7)]
    assert all(float(row[rows[0].index("loss")]) > 0 for row in rows[1:])
    (run,) = made.runs
    assert [values["step"] for values in run.logged] == [1, 2, 3, 4, 5, 6]
    assert {"train/loss", "train/images_per_second", "train/learning_rate"} < run.logged[0].keys()
    assert made.options["config"]["max_train_steps"] == 6
    assert not list((tmp_path / "run/logs").glob("events*"))
