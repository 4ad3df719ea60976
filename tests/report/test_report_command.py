"""`python -m flax_diffusion.report`: pages of old runs, comparisons, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from pages import board, noise, page_of
from PIL import Image

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.metrics_file import MetricsFile
from flax_diffusion.core.io.sheets import contact_sheet, save_picture
from flax_diffusion.core.report.files import DATA, PAGE
from flax_diffusion.core.tracking.csv_file import CsvFile
from flax_diffusion.core.tracking.tensorboard import TensorBoard
from flax_diffusion.report import main, report


def a_run(folder, steps=6, first_step=1, learning_rate=0.5, logging_dir="logs", grids=()):
    folder.mkdir(exist_ok=True)
    values = {"task": "unconditional", "learning_rate": learning_rate, "logging_dir": logging_dir, "seed": 0}
    values["output_dir"] = str(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    del values["task"]
    run = board(folder, first_step, options=values, total=steps)
    for step in range(first_step, steps + 1):
        run.scalars({"train/loss": learning_rate / step}, step)
    for step in grids:
        sheet = contact_sheet([noise(np.random.default_rng(step), 8)] * 2, captions=["a", "b"])
        save_picture(sheet, folder / f"samples/{step:08d}.png", {"captions": json.dumps(["a", "b"])})
    run.close()
    return folder


def test_a_page_is_made_again(tmp_path, capsys):
    folder = a_run(tmp_path / "run", grids=(2, 6))
    before = page_of(folder)
    (folder / PAGE).unlink()
    main([str(folder)])
    assert capsys.readouterr().out == f"{folder}/{PAGE}\n"
    again = page_of(folder)
    assert again.data == before.data
    assert again.texts | {"": ""} == before.texts | {"": ""}  # it tells the time
    report(folder, output_file=tmp_path / "other.html")
    assert page_of(tmp_path, "other.html").data == before.data


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_a_run_of_an_older_version(tmp_path, kind):
    """Its values are in the files of its boards, of two starts."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("task: unconditional\nlogging_dir: curves\nseed: 3\n")
    for first, last in ((1, 5), (4, 8)):
        made = (CsvFile if kind == "csv" else TensorBoard)(folder / "curves", first)
        for step in range(first, last + 1):
            made.scalars({"train/loss": first + step / 100, "train/grad_norm": float("inf") if step == 2 else 1}, step)
        made.close()
    MetricsFile(folder / "metrics.jsonl", 0, writes=True).add(8, {"fid": 3.5})
    report(folder)
    page = page_of(folder)
    expected = {step: (1 if step < 4 else 4) + step / 100 for step in range(1, 9)}
    assert page.curve("train/loss") == pytest.approx(expected)
    assert page.curve("fid") == {8: 3.5}
    assert np.isnan(page.curve("train/grad_norm")[2])
    assert "Made from the files of the run: step 8" in page.texts[""]
    assert "--seed30" in page.texts["options"]
    assert "seen" not in page.texts


def test_event_files_that_are_cut_off(tmp_path, caplog):
    made = TensorBoard(tmp_path / "logs", 1)
    for step in range(1, 4):
        made.scalars({"train/loss": step}, step)
    made.close()
    (file,) = (tmp_path / "logs").iterdir()
    content = file.read_bytes()
    for length, steps in ((len(content), [1, 2, 3]), (len(content) - 10, [1, 2]), (len(content) - 45, [1, 2])):
        file.write_bytes(content[:length])
        report(tmp_path, output_file=tmp_path / "page.html")
        assert [*page_of(tmp_path, "page.html").curve("train/loss")] == steps
    assert "the end is left out" in caplog.text


def test_tables_that_are_none_and_that_are_cut_off(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("task: unconditional\n")
    table = tmp_path / "logs/steps.csv"
    table.parent.mkdir()
    table.write_text("step,loss\n1,0.5\n2,0.25\n3")
    report(tmp_path)
    assert page_of(tmp_path).curve("train/loss") == {1: 0.5, 2: 0.25}
    table.write_text("name,age\na,3\n")
    report(tmp_path)
    assert "curves" not in page_of(tmp_path).texts
    assert "steps.csv is left out: it is no table of steps" in caplog.text
    for text in ("step,loss\n1,0.5\nx,1\n", "step,loss\n1\n2,1\n", "step,loss\n1,a\n"):
        table.write_text(text)
        with pytest.raises(ConfigError, match=r"steps.csv line \d: is no row of numbers .*: mend it, or move it"):
            report(tmp_path)
    table.write_text("")
    report(tmp_path)


def test_a_folder_of_pictures_alone(tmp_path):
    (tmp_path / "samples").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "samples/00000010.png")
    report(tmp_path)
    page = page_of(tmp_path)
    assert [one["step"] for one in page.data["runs"][0]["grids"]] == [10]
    assert set(page.texts) == {"", "samples"}


def test_several_runs_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    a_run(tmp_path / "x/run", learning_rate=0.5, grids=(2, 6))
    a_run(tmp_path / "y/run", learning_rate=0.25, steps=9, grids=(3,))
    a_run(tmp_path / "third", learning_rate=0.5)
    assert report("x/run", "y/run", "third").name == "comparison.html"
    page = page_of(tmp_path, "comparison.html")
    assert [run["letter"] for run in page.data["runs"]] == ["A", "B", "C"]
    assert page.curve("train/loss", run=1)[9] == pytest.approx(0.25 / 9)
    for name in ("A x/run: Ended: step 6 of 6", "B y/run: Ended: step 9 of 9", "C third"):
        assert name in page.texts[""]
    assert "--learning_rate0.50.250.5" in page.texts["options"]
    assert "--seed" not in page.texts["options"]
    assert "output_dir" not in page.texts["options"]
    assert "A: x/runB: y/runC: thirdLoss0.20420.078580.2042" in page.texts["values"]
    (slider,) = [one for one in page.all("input") if one["id"] == "step"]
    assert (slider["max"], slider["aria-valuetext"]) == ("2", "step 6")
    assert [image["alt"][:17] for image in page.all("img")] == ["A: x/run: Samples", "B: y/run: Samples"]
    assert "C: third has no grids." in page.texts["samples"]
    report("x/run", "third")
    assert "The runs have the same options" in page_of(tmp_path, "comparison.html").texts["options"]


def test_many_runs_are_told_apart(tmp_path):
    """By colour and dashes together: there are six of each."""
    for number in range(14):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}/config.yaml").write_text("task: unconditional\n")
    report(*(tmp_path / f"{number}" for number in range(14)), output_file=tmp_path / "all.html")
    keys = [one["class"] for one in page_of(tmp_path, "all.html").all("svg")]
    assert len({*keys}) == len(keys) == 14
    assert keys[6] == "key run-0 dash-1"


def test_runs_of_different_tasks(tmp_path):
    for name in ("unconditional", "autoencoder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"task: {name}\nseed: 3\n")
    report(tmp_path / "unconditional", tmp_path / "autoencoder", output_file=tmp_path / "both.html")
    assert "taskunconditionalautoencoder" in page_of(tmp_path, "both.html").texts["options"]


def test_the_grids_of_all_runs_share_the_room(tmp_path, monkeypatch):
    budgets = []
    monkeypatch.setattr(
        "flax_diffusion.core.report.reading.Grids", lambda folder, budget: budgets.append(budget) or NoGrids()
    )
    runs = [a_run(tmp_path / name) for name in "abc"]
    report(*runs, output_file=tmp_path / "all.html")
    assert budgets == [13_000_000 // 3] * 3


class NoGrids:
    count = 0

    def all(self):
        return []


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "run")
    a_run(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.html").write_text("mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.yaml").write_text("[")
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.yaml").write_text("- a")
    for words, says in {
        "": "report: names no run: give the output folder of one, or of several to compare them",
        "nowhere": "nowhere: does not exist; name the output folder of a run",
        "notes.html": "notes.html: is a file; name the output folder of a run",
        "empty": "empty: holds no run: there is neither config.yaml nor metrics.jsonl, and neither logs/ nor samples/",
        "run ./run": "run: is there 2 times; name each run once",
        "run other run": "run: is there 2 times; name each run once",
        "run --output_file a/b.html": "--output_file a/b.html: its folder does not exist; make it, or",
        "run --output_file empty": "--output_file empty: is a folder; name a file in it, such as empty/report.html",
        "run --output_file notes.html": "notes.html: is there already, and is no page of a run; name another",
        "run --output": "command line: unknown option '--output'; did you mean '--output_file'?",
        "bad": "bad/config.yaml: cannot be read (",
        "list": "list/config.yaml: is no mapping of option: value: mend it, or move it away",
    }.items():
        with pytest.raises(ConfigError) as caught:
            main(words.split())
        assert says in str(caught.value), words
        assert "\n" not in str(caught.value)
    assert (tmp_path / "notes.html").read_text() == "mine"
    assert not (tmp_path / "comparison.html").exists()


def test_nothing_is_written_before_all_is_read(tmp_path):
    run = a_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        report(run, tmp_path / "empty", output_file=tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_it_needs_no_framework_and_says_what_it_does(tmp_path):
    a_run(tmp_path / "run")
    code = (
        "import sys; from flax_diffusion.__main__ import run; run(['report', 'run']); run(['report', '--help']);"
        "bad = {'jax', 'torch', 'transformers', 'diffusers', 'datasets', 'grain', 'tensorboard'} & sys.modules.keys();"
        "assert not bad, bad"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("run/report.html\nusage: python -m flax_diffusion.report RUN [RUN …]")
    assert ran.stderr == ""


def test_long_runs_take_few_bytes(tmp_path):
    """It is written with each checkpoint."""
    run = board(tmp_path, total=1_000_000)
    for step in range(1, 1_000_000, 7):
        run.scalars({"train/loss": 1.0, "train/grad_norm": 2.0}, step)
    run.close()
    assert (tmp_path / "logs" / DATA).stat().st_size < 250_000
    assert (tmp_path / PAGE).stat().st_size < 320_000
