"""The page that a run keeps: when it is written, that it goes on after a stop, and what the model saw."""

import json
import logging

import numpy as np
import pytest
from pages import board, page_of, picture_of
from PIL import Image
from recorder import Idle
from tiny import ONE_BLOCK, RUN, TEXT_RUN, UNET, paired_pictures, stable_diffusion

from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.sources.source import Record
from flax_diffusion.core.errors import NonFiniteError
from flax_diffusion.core.report import board as boards
from flax_diffusion.core.report.files import DATA, PAGE
from flax_diffusion.core.report.reading import read_kept
from flax_diffusion.core.report.seen import first_batch
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.run.preemption import Preemption
from flax_diffusion.core.tasks.task import task_of


class Recorder(Idle):
    """Counts steps, of which the loss tells the number, and keeps the first batch."""

    command = "python -m flax_diffusion.train"
    steps, first = 0, None

    def __init__(self, config, spec):
        self.spec = spec

    def put(self, batch):
        self.first = self.first or batch
        return batch

    def train_step(self, batch, learning_rate, ema_decays):
        self.steps += 1
        return {"loss": float(self.steps), "grad_norm": 1.0}

    def save(self, folder, metadata):
        portable.write(folder, {"count": np.asarray(self.steps)}, metadata)

    def restore(self, folder):
        self.steps = int(portable.read(folder)[0]["count"])

    def sample(self, *, num_images, **options):
        return np.full((num_images, 8, 8, 1), 7 * self.steps, np.uint8)

    def export(self, folder, *, only_trained=False):
        (folder / "unet").mkdir(exist_ok=True)


OPTIONS = RUN | {
    "unet": UNET | ONE_BLOCK, "max_train_steps": 6, "checkpointing_steps": 2, "validation_steps": 2,
    "validation_split": 0.2, "validation_loss_steps": 3, "report_to": "tensorboard",
}  # fmt: skip


def run(folder, make=Recorder, task="unconditional", preemption=None, base=OPTIONS, **options):
    made = []

    def backend(config, spec):
        made.append(make(config, spec))
        return made[-1]

    config = command_line.merge(task, {}, base | {"output_dir": str(folder)} | options, "")
    fit(task_of(config), backend, preemption)
    return made[-1]


def test_a_run_leaves_its_page(tmp_path, capsys):
    run(tmp_path / "run")
    assert f"page        {tmp_path}/run/{PAGE}\n" in capsys.readouterr().err
    page = page_of(tmp_path / "run")
    assert page.curve("train/loss") == {step: step for step in range(1, 7)}
    assert {"train/learning_rate", "train/grad_norm", "train/images_per_second"} < page.data["runs"][0]["curves"].keys()
    assert page.curve("validation_loss") == {3: 1, 6: 1}
    assert [one["step"] for one in page.data["runs"][0]["grids"]] == [2, 4, 6]
    assert "Ended: step 6 of 6" in page.texts[""]
    command = page.texts["command"]
    assert "python -m flax_diffusion.train unconditional --resolution 8" in command
    assert f"python -m flax_diffusion.train --config {tmp_path}/run/config.yaml" in command
    assert "--learning_rate0.0010.0001" in page.texts["options"]
    assert "numpy" in page.texts["environment"]


def test_report_to_none_leaves_none(tmp_path, capsys):
    run(tmp_path / "run", report_to="none")
    assert PAGE not in capsys.readouterr().err
    assert not (tmp_path / "run" / PAGE).exists()
    assert not (tmp_path / "run/logs").exists()


@pytest.mark.parametrize("report_to", [["csv"], ["tensorboard", "csv"]])
def test_whatever_else_it_reports_to(tmp_path, report_to):
    run(tmp_path / "run", report_to=report_to, logging_dir="curves")
    assert page_of(tmp_path / "run").curve("train/loss")[6] == 6
    assert (tmp_path / "run/curves" / DATA).exists()


def test_a_run_that_is_told_to_end_goes_on_with_its_curves(tmp_path):
    class Ended(Recorder):
        def should_stop(self, requested, step):
            return step == 3

    run(tmp_path / "run", Ended, preemption=Preemption())
    page = page_of(tmp_path / "run")
    assert "Stopped early: step 3 of 6" in page.texts[""]
    assert [*page.curve("train/loss")] == [1, 2, 3]
    before = page.all("img")[-1]["src"]
    run(tmp_path / "run", resume_from_checkpoint="latest")
    page = page_of(tmp_path / "run")
    assert [*page.curve("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [one["step"] for one in page.data["runs"][0]["grids"]] == [2, 4, 6]
    assert page.all("img")[-1]["src"] == before  # of the first batch of the whole run
    facts = read_kept(tmp_path / "run/logs" / DATA).facts
    assert 0 < facts["upkeep"] < facts["seconds"]


def test_a_run_that_fails_and_goes_back(tmp_path):
    """It wrote values of steps that are taken again."""

    class Failing(Recorder):
        def train_step(self, batch, learning_rate, ema_decays):
            return super().train_step(batch, learning_rate, ema_decays) | ({"loss": np.nan} if self.steps == 6 else {})

    with pytest.raises(NonFiniteError):
        run(tmp_path / "run", Failing)
    assert [*page_of(tmp_path / "run").curve("train/loss")] == [1, 2, 3, 4, 5]
    assert "Stopped early: step 5 of 6" in page_of(tmp_path / "run").texts[""]
    run(tmp_path / "run", resume_from_checkpoint="checkpoint-2", max_train_steps=4)
    page = page_of(tmp_path / "run")
    assert [*page.curve("train/loss")] == [1, 2, 3, 4]
    assert "Ended: step 4 of 4" in page.texts[""]


def test_a_run_that_was_killed_has_the_curves_of_its_checkpoint(tmp_path, monkeypatch):
    """Without the page, which was not due: what is flushed with a checkpoint is enough."""
    monkeypatch.setattr(boards.PageBoard, "close", lambda self: None)
    run(tmp_path / "run", max_train_steps=4)
    monkeypatch.undo()
    assert not (tmp_path / "run" / PAGE).exists()
    run(tmp_path / "run", resume_from_checkpoint="latest")
    assert [*page_of(tmp_path / "run").curve("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_data_file_is_said_and_left(tmp_path, caplog):
    run(tmp_path / "run", max_train_steps=2)
    file = tmp_path / "run/logs" / DATA
    for text in (file.read_text()[:-20], "[]", '{"format": 9}', '{"format": 1, "facts": {}, "curves": [], "seen": []}'):
        file.write_text(text)
        caplog.clear()
        assert read_kept(file) is None
        assert f"{file}: the curves in it cannot be read" in caplog.text
    run(tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=4)
    assert [*page_of(tmp_path / "run").curve("train/loss")] == [3, 4]


def test_a_run_that_replaces_another_takes_nothing_from_it(tmp_path, monkeypatch):
    run(tmp_path / "run")
    page = (tmp_path / "run" / PAGE).read_text()
    monkeypatch.setattr("flax_diffusion.core.run.output_folder.discard_replaced", lambda folder: None)
    run(tmp_path / "run", overwrite_output_dir=True, max_train_steps=2)
    assert [*page_of(tmp_path / "run").curve("train/loss")] == [1, 2]
    assert (tmp_path / "run/replaced-run" / PAGE).read_text() == page
    assert (tmp_path / "run/replaced-run/logs" / DATA).exists()


def test_a_page_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(boards, "write_text", full)
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path / "run").steps == 6
    said = [record.message for record in caplog.records if "No space left" in record.message]
    assert said == [f"{tmp_path}/run/logs/{DATA} cannot be written (No space left on device); the run goes on"]


def test_a_first_batch_that_cannot_be_shown_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def fail(*arguments):
        raise MemoryError("too large")

    monkeypatch.setattr(boards, "first_batch", fail)
    assert run(tmp_path / "run").steps == 6
    assert f"{tmp_path}/run/{PAGE} is without what the model saw (MemoryError: too large)" in caplog.text
    assert "seen" not in page_of(tmp_path / "run").texts


class Clock:
    """A clock that each look, write and picture takes a time of."""

    now = 0.0

    def __call__(self):
        return self.now


def test_when_the_page_is_written(tmp_path, monkeypatch):
    """Its upkeep is less than a hundredth of the time, however long a write takes."""
    clock, written = Clock(), []

    def write(path, text):
        clock.now += 0.5 if path.name == PAGE else 0.002
        written.append((path.name, clock.now))

    monkeypatch.setattr(boards, "write_text", write)
    page = board(tmp_path, clock=clock, total=100_000)
    for step in range(1, 20_001):
        clock.now += 0.05
        page.scalars({"train/loss": 1.0}, step)
        if step % 500 == 0:
            page.image("samples", Image.new("L", (2, 2)), step)
            page.flush()
    pages = [when for name, when in written if name == PAGE]
    assert 9 < pages[0] < 12  # soon there is a first one
    assert len(pages) > 8
    assert min(np.diff(pages)) > 100  # two hundred times as long as a write
    assert sum(name == DATA for name, _ in written) == 40 + len(pages)
    assert page.upkeep / clock.now < 0.006
    page.close()
    assert [name for name, _ in written[-2:]] == [PAGE, DATA]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("base"))


def batch_of(made):
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in made.first.items()}


def as_pixels(pixels):
    return np.rint((pixels + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)


def test_the_model_saw_what_is_shown(tmp_path):
    options = {"random_flip": True, "proportion_empty_prompts": 0.5, "seed": 3, "unet": {**TEXT_RUN["unet"]}}
    made = run(tmp_path / "run", task="text_to_image", base=TEXT_RUN | options, report_to="csv", draw_samples=False)
    shown, batch = read_kept(tmp_path / "run/logs" / DATA).seen, batch_of(made)
    assert len(shown) == 8
    for number, one in enumerate(shown):
        pixels = picture_of(one["address"])
        assert (pixels.reshape(8, 8, -1) == as_pixels(batch["pixel_values"][number])).all()
        caption = "" if one["caption"] == "(the empty caption)" else one["caption"]
        tokens = made.spec.tokenize(caption)
        assert all((batch[name][number] == ids).all() for name, ids in tokens.items())
    captions = {one["caption"] for one in shown}
    assert "(the empty caption)" in captions
    assert any(caption.startswith("a handwritten") for caption in captions)
    page = page_of(tmp_path / "run")
    assert [one["alt"] for one in page.all("img")] == [one["caption"] for one in shown]


def test_the_part_that_is_not_seen_and_the_second_picture(tmp_path, base):
    data = paired_pictures(tmp_path / "data")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = "a photo of a dog that is much too long for it"
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = {
        "pretrained_model_name_or_path": str(base), "train_data_dir": str(data), "resolution": 16,
        "train_batch_size": 4, "max_train_steps": 1, "draw_samples": False, "report_to": "csv",
    }  # fmt: skip
    made = run(tmp_path / "run", task="controlnet", base=options)
    shown, batch = read_kept(tmp_path / "run/logs" / DATA).seen, batch_of(made)
    for number, one in enumerate(shown):
        both = picture_of(one["address"])
        assert both.shape == (16, 32, 3)
        assert (both[:, :16] == as_pixels(batch["pixel_values"][number])).all()
        followed = np.rint(batch["conditioning_pixel_values"][number] * 255).transpose(1, 2, 0)
        assert (both[:, 16:] == followed).all()
        assert one["caption"].endswith(one["rest"])
        assert one["rest"]
    page = page_of(tmp_path / "run")
    assert "At the right: the picture that the model follows." in page.texts["seen"]
    assert "(the end is not seen)" in page.texts["seen"]
    assert page.all("s")


def test_bad_pictures_and_buckets(tmp_path):
    """Pictures of the first batch have the size of its bucket; one that cannot be used is left out."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(8):
        size = (16, 32, 3) if number % 2 else (32, 16, 3)
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(tmp_path / f"data/{number}.png")
    options = {
        "train_data_dir": str(tmp_path / "data"), "resolution": 16, "bucket_resolutions": ["24x12", "12x24"],
        "train_batch_size": 4, "max_train_steps": 1, "draw_samples": False, "unet": UNET | {"in_channels": 3,
        "out_channels": 3}, "report_to": "csv",
    }  # fmt: skip
    made = run(tmp_path / "run", base=options)
    shown, batch = read_kept(tmp_path / "run/logs" / DATA).seen, batch_of(made)
    assert len(shown) == 4
    for number, one in enumerate(shown):
        assert (picture_of(one["address"]) == as_pixels(batch["pixel_values"][number])).all()
        assert sorted(one["size"]) == [12, 24]
    text = (tmp_path / "data/0.png").read_bytes()
    (tmp_path / "data/0.png").write_bytes(text[:-300])
    given = {"bucket_resolutions": [], "train_batch_size": 8, "skip_bad_images": True}
    run(tmp_path / "more", base=options | given)
    assert len(read_kept(tmp_path / "more/logs" / DATA).seen) == 7


def test_latents_have_no_pictures(tmp_path):
    """Nor does a class that is left out have a name."""
    transformer = {"in_channels": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    options = RUN | {"unet": None, "transformer": transformer, "validation_class_labels": ["3"]}
    config = command_line.merge("class_conditional", {}, options | {"class_dropout_prob": 0.5}, "")
    task = task_of(config)
    source = task.open_source()
    spec = task.make_spec(source)
    shown = first_batch(task, spec, source, None, 0, 12)
    assert {one["caption"] for one in shown} & {*spec.classes}
    assert "(no class: it was left out)" in {one["caption"] for one in shown}

    class Latents:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return Record(b"", None, f"{index}", label=3, posterior=np.zeros((2, 2, 1, 8, 8), np.float32))

    shown = first_batch(task, spec, Latents(), None, 0, 4)
    assert [one["address"] for one in shown] == [""] * 4
