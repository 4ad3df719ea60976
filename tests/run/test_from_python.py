"""`train()` from Python: with examples in place of options that name data, with callbacks, and what it returns."""

import json
import os
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from proofs import proof
from recorder import Idle
from tiny import ONE_BLOCK, RUN, TEXT_RUN, UNET, losses, pictures, stable_diffusion

import flax_diffusion.generate
import flax_diffusion.train
import torch_backend.generate
import torch_backend.train
from flax_diffusion.core.checkpoints import folders, portable
from flax_diffusion.core.cli.command_line import merge
from flax_diffusion.core.config.options import EXAMPLES
from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.errors import CallbackError, CheckpointError, ConfigError, DataError
from flax_diffusion.core.run import launch
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.run.preemption import Preemption
from flax_diffusion.core.tasks.task import TASKS, task_of
from flax_diffusion.train import Callback

BACKENDS = {"flax_diffusion": flax_diffusion, "torch_backend": torch_backend}
SMALL = RUN | {
    "unet": UNET | ONE_BLOCK,
    "validation_epochs": None,
    "checkpointing_steps": 2,
    "lr_scheduler": "constant",
}
GIVEN = {name: value for name, value in SMALL.items() if name not in ("dataset_name", "max_train_samples")}


def digits(count=40):
    source = open_source(dataset_name="digits", max_train_samples=count)
    return [{"image": one.image, "text": one.caption} for one in map(source.__getitem__, range(count))]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


class Log(Callback):
    """Remembers what it is told."""

    def __init__(self):
        self.steps, self.samples, self.checkpoints = [], [], []

    def on_step(self, step, metrics):
        self.steps.append((step, metrics))

    def on_sample(self, step, picture, captions):
        self.samples.append((step, picture.size, captions))

    def on_checkpoint(self, step, path):
        folders.require_whole(path)
        self.checkpoints.append((step, path))


def test_examples_callbacks_and_the_result(backend, tmp_path):
    """The digits train as those of the option do; all of it is told, and is in the result."""
    options = {"validation_steps": 3, "validation_split": 0.1, "validation_loss_steps": 2, "checkpoints_total_limit": 1}
    named = backend.train.train("unconditional", **SMALL | options, output_dir=str(tmp_path / "named"))
    log = Log()
    run = backend.train.train(
        "unconditional", **GIVEN | options, output_dir=str(tmp_path / "run"), examples=digits(), callbacks=[log]
    )
    assert losses(run.output_dir) == losses(named.output_dir)
    assert [step for step, _ in log.steps] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(np.float32([values["loss"] for _, values in log.steps]), losses(run.output_dir))
    assert log.steps[0][1].keys() == {"loss", "grad_norm", "learning_rate", "images_per_second", "data_wait_seconds"}
    with Image.open(run.samples[0]) as grid:
        assert log.samples == [(3, grid.size, []), (6, grid.size, [])]
    assert log.checkpoints == [(step, run.output_dir / f"checkpoint-{step}") for step in (2, 4, 6)]

    assert (run.output_dir, run.steps, run.complete) == (tmp_path / "run", 6, True)
    assert run.samples == [run.output_dir / "samples" / f"0000000{step}.png" for step in (3, 6)]
    assert run.checkpoints == [run.output_dir / "checkpoint-6"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert run.history == rows
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert run.metrics == log.steps[-1][1] | {"validation_loss": rows[-1]["validation_loss"]}
    assert (str(run), os.fspath(run)) == (str(tmp_path / "run"), str(tmp_path / "run"))

    options = {"num_images": 3, "num_inference_steps": 2, "seed": 5}
    drawn = run.sample(**options)
    assert [one.size for one in drawn] == [(8, 8)] * 3
    np.testing.assert_array_equal([*map(np.asarray, drawn)], backend.generate.generate(run, **options)[..., 0])


def test_a_run_with_examples_resumes_with_the_same_alone(backend, tmp_path, monkeypatch, capsys):
    train, given = backend.train.train, digits()
    whole = train("unconditional", **GIVEN, output_dir=str(tmp_path / "whole"), examples=given)
    options = GIVEN | {"output_dir": str(tmp_path / "run")}
    train("unconditional", **options | {"max_train_steps": 4}, examples=iter(given))
    config = tmp_path / "run/config.yaml"
    assert yaml.safe_load(config.read_text())["dataset_name"] == EXAMPLES
    more = {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 was made with data .* \(its pictures, .* changed\): resume"
    ):
        train("unconditional", config, examples=[*given[:-1], given[0]], **more)
    with pytest.raises(
        ConfigError, match=r"are examples that train\(\) was given in Python, and no option can name them"
    ):
        train("unconditional", config, **more)
    with pytest.raises(ConfigError, match=r"call train\(TASK, CONFIG, examples=EXAMPLES\) from Python, with the same"):
        backend.train.main(["--config", str(config), "--resume_from_checkpoint", "latest"])
    again = train("unconditional", config, examples=given, **more)
    assert (again.steps, again.complete) == (6, True)
    assert losses(again.output_dir) == losses(whole.output_dir)
    (arrays, metadata), expected = (portable.read(run / "checkpoint-6") for run in (again, whole))
    assert metadata == expected[1]
    for name, array in expected[0].items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    again = train("unconditional", config, examples=given, **more)  # nothing is left to train
    assert (again.steps, again.complete, again.metrics) == (6, True, {})


class Failing(Callback):
    def __init__(self, method, step, error):
        self.method, self.step, self.error, self.calls = method, step, error, 0

    def _call(self, method, step):
        if method == self.method and step == self.step:
            self.calls += 1
            raise self.error

    def on_step(self, step, metrics):
        self._call("on_step", step)

    def on_sample(self, step, picture, captions):
        self._call("on_sample", step)

    def on_checkpoint(self, step, path):
        self._call("on_checkpoint", step)


@pytest.mark.parametrize("backend", ["torch_backend", proof("flax_diffusion")], indirect=True)
def test_a_callback_that_raises(backend, tmp_path, capsys):
    """The state is saved first, and the run goes on from it as if nothing had been."""
    options = GIVEN | {"output_dir": str(tmp_path / "run"), "checkpointing_steps": 100}
    failing, later = Failing("on_step", 2, ValueError("boom")), Log()
    with pytest.raises(
        CallbackError, match=r"callback Failing\.on_step failed at step 2 \(ValueError: boom\); .* is checkpoint-4"
    ) as caught:
        backend.train.train("unconditional", **options, examples=digits(), callbacks=[failing, later])
    assert caught.value.__cause__ is failing.error
    assert [step for step, _ in later.steps] == [1]
    said = capsys.readouterr().err
    assert "ended by an error in Failing.on_step after step 4, saved as checkpoint-4; go on with: train('uncon" in said
    assert "config.yaml', examples=EXAMPLES, resume_from_checkpoint='latest')" in said
    backend.train.train("unconditional", **options, examples=digits(), resume_from_checkpoint="latest")
    whole = options | {"output_dir": str(tmp_path / "whole")}
    backend.train.train("unconditional", **whole, examples=digits())
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


class Recorder(Idle):
    """Saves nothing but that it was asked to."""

    def __init__(self, config, spec):
        pass

    def put(self, batch):
        return batch

    def set_step(self, step):
        pass

    def train_step(self, batch, rate, decays):
        return {"loss": 1.0, "grad_norm": 1.0}

    def save(self, folder, metadata):
        folder.mkdir()
        (folder / "metadata.json").write_text(json.dumps(metadata))

    def sample(self, **options):
        return np.zeros((options["num_images"], 8, 8, 1), np.uint8)

    def export(self, folder, *, only_trained=False):
        (folder / "unet").mkdir(exist_ok=True)


def idle(folder, *callbacks, preemption=None, **options):
    config = merge("unconditional", {}, SMALL | {"output_dir": str(folder), "report_to": "none"} | options, "test")
    return fit(task_of(config), Recorder, preemption, callbacks)


@pytest.mark.parametrize(
    ("method", "step", "saved"),
    [("on_step", 1, 3), ("on_step", 6, 6), ("on_sample", 3, 3), ("on_sample", 6, 6), ("on_checkpoint", 6, 6)],
)
@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_whatever_raises_wherever(tmp_path, method, step, saved, error):
    """It is told once, and nothing of the run is lost; `sys.exit()` in a callback is an error of it too."""
    failing = Failing(method, step, error)
    with pytest.raises(
        CallbackError, match=rf"callback Failing\.{method} failed at step {step} \({type(error).__name__}"
    ):
        idle(tmp_path, failing, validation_steps=3, checkpointing_steps=10)
    assert failing.calls == 1
    assert [path.name for path in folders.committed(tmp_path)] == [f"checkpoint-{saved}"]


def test_checkpoints_are_told_before_they_are_rotated(tmp_path):
    """Each of them is whole when it is told of, even where the next one takes its place at once."""
    log = Log()
    ended = idle(tmp_path, log, checkpointing_steps=1, checkpoints_total_limit=1, draw_samples=False)
    assert [step for step, _ in log.checkpoints] == [1, 2, 3, 4, 5, 6]
    assert (ended.steps, ended.complete) == (6, True)


def test_a_signal_is_no_error(tmp_path):
    class Signals(Callback):
        def on_step(self, step, metrics):
            preemption.handle(15)

    preemption = Preemption()
    ended = idle(tmp_path, Signals(), preemption=preemption)
    assert (ended.steps, ended.complete) == (2, False)


def test_only_the_first_process_is_told(tmp_path, monkeypatch):
    log = Log()
    monkeypatch.setattr(Recorder, "process_index", 1)
    monkeypatch.setattr(folders, "make_room", lambda folder: None)
    idle(tmp_path, log)
    assert (log.steps, log.samples, log.checkpoints) == ([], [], [])


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (Log(), "callbacks: must be a list, and is one Log: put it into a list"),
        ([print], r"callbacks\[0\] is a builtin_function_or_method: it must be an object of a subclass of Callback"),
        ([Log(), Log], r"callbacks\[1\] is a type: it must be an object of a subclass"),
    ],
)
def test_what_no_callback_is(tmp_path, callbacks, message):
    with pytest.raises(ConfigError, match=message):
        torch_backend.train.train("unconditional", **GIVEN, examples=digits(), callbacks=callbacks)


def test_a_run_that_was_ended_before_its_first_step(tmp_path, monkeypatch):
    options = SMALL | {"output_dir": str(tmp_path / "run")}

    def end(*_, **__):
        raise launch.Preempted

    monkeypatch.setattr("flax_diffusion.core.run.loop.open_inputs", end)
    run = torch_backend.train.train("unconditional", **options)
    assert (run.steps, run.complete, run.metrics, run.samples, run.checkpoints) == (0, False, {}, [], [])
    with pytest.raises(Exception, match="run"):
        run.sample()


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A pipeline, and pictures."""
    root = tmp_path_factory.mktemp("things")
    return stable_diffusion(root / "model", length=40), pictures(root / "pictures", 4)


def given_to(task, things):
    """The task with examples, and what these must become."""
    model, folder = things
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    examples = [
        {"image": folder / row["file_name"], "text": row["text"], "label": row["kind"],
         "conditioning_image": np.zeros((24, 24), np.uint8)}
        for row in rows
    ]  # fmt: skip
    options = {
        "unconditional": {"unet": UNET}, "autoencoder": {"vae": {}},
        "class_conditional": {"transformer": "DiT-B/2"},
        "textual_inversion": {"placeholder_token": "<toy>", "initializer_token": "dog", "repeats": 2},
        "dreambooth": {"instance_prompt": "a photo of sks dog", "repeats": 2},
    }.get(task, {})  # fmt: skip
    text = {"pretrained_model_name_or_path": str(model)} if task in (
        "text_to_image", "controlnet", "textual_inversion", "dreambooth") else {}  # fmt: skip
    values = launch._with_examples(task, options | text, examples)
    return task_of(merge(task, {}, values, "test"), examples), rows


@pytest.mark.parametrize("task", TASKS)
def test_every_task_takes_examples(task, things):
    made, rows = given_to(task, things)
    source = made.open_source()
    repeats = 2 if task in ("textual_inversion", "dreambooth") else 1
    assert len(source) == repeats * len(rows)
    with Image.open(things[1] / rows[1]["file_name"]) as picture:
        np.testing.assert_array_equal(decode(source[1]), picture)
    captions = {
        "text_to_image": rows[1]["text"], "controlnet": rows[1]["text"], "dreambooth": "a photo of sks dog",
        "textual_inversion": getattr(made, "templated_prompts", None),
    }  # fmt: skip
    assert source[1].caption == captions.get(task)
    assert source[3].label == (1 if task == "class_conditional" else None)
    assert (source[1].extra is not None) == (task == "controlnet")
    with pytest.raises(ConfigError, match=r"are examples that train\(\) was given in Python"):
        task_of(made.config).open_source()


def test_a_class_that_is_missing(tmp_path):
    options = {"transformer": "DiT-B/2", "resolution": 8, "output_dir": str(tmp_path / "run")}
    with pytest.raises(DataError, match=r"^examples\[0\] has no 'label', only image, text: add it, or name another"):
        torch_backend.train.train("class_conditional", **options, examples=digits())


def test_texts(tmp_path):
    """They make the tokenizer and are trained on, as those of the option are."""
    options = TEXT_RUN | {"max_train_steps": 2, "draw_samples": False}
    named = torch_backend.train.train("text_to_image", **options, output_dir=str(tmp_path / "named"))
    options = {name: value for name, value in options.items() if name not in ("dataset_name", "max_train_samples")}
    options, log = options | {"draw_samples": True}, Log()
    run = torch_backend.train.train(
        "text_to_image", **options, output_dir=str(tmp_path / "run"), examples=digits(), callbacks=[log]
    )
    ((step, _, captions),) = log.samples
    assert (step, len(captions)) == (2, 8)
    assert [caption.splitlines()[0] for caption in captions[::4]] == TEXT_RUN["validation_prompts"]
    assert losses(run.output_dir) == losses(named.output_dir)
    one, two = run.sample(["a handwritten seven", "a handwritten two"], num_inference_steps=2)
    assert one.size == two.size == (8, 8)
    with pytest.raises(DataError, match=r"examples\[1\] has no 'text', only image: .*, or skip such examples"):
        torch_backend.train.train("text_to_image", **options | {"output_dir": str(tmp_path / "bad")}, examples=[
            digits(1)[0], {"image": np.zeros((8, 8), np.uint8)}])  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset_name": "digits"},
            "examples and --dataset_name digits are both the data of the run: drop one of them",
        ),
        ({"train_data_dir": "folder"}, "examples and --train_data_dir folder are both the data of the run"),
        ({"dataset_config_name": "c"}, "examples and --dataset_config_name c are both the data of the run"),
    ],
)
def test_data_twice(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        torch_backend.train.train("unconditional", **GIVEN | options, examples=digits())


def test_examples_take_the_place_of_a_recipes_data(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(GIVEN | {"train_data_dir": "nowhere", "dataset_config_name": "c"}))
    run = torch_backend.train.train(
        "unconditional", recipe, examples=digits(9), output_dir=str(tmp_path / "run"), max_train_steps=1
    )
    assert run.steps == 1
    # The first lies in the second, but is no folder.
    again = {"resume_from_checkpoint": "latest", "max_train_steps": 2, "output_dir": str(tmp_path / "run")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "run")
        assert torch_backend.train.train("unconditional", recipe, examples=digits(9), **again).steps == 2


def test_a_task_that_takes_none(monkeypatch):
    monkeypatch.setattr(TASKS["unconditional"], "data_options", ())
    with pytest.raises(ConfigError, match="examples: the task unconditional takes none; drop them"):
        torch_backend.train.train("unconditional", examples=digits())
    with pytest.raises(ConfigError, match="unknown task 'unconditionally'"):
        torch_backend.train.train("unconditionally", examples=digits())


def test_shards_are_no_examples(tmp_path):
    options = {"transformer": "DiT-B/2", "resolution": 8, "output_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"--stream_shards 2: examples of train\(\) are not in shards; drop it"):
        torch_backend.train.train("class_conditional", **options, stream_shards=2, examples=digits())


def test_worker_processes(tmp_path):
    options = GIVEN | {"max_train_steps": 2, "draw_samples": False, "report_to": "csv"}
    plain = torch_backend.train.train("unconditional", **options, output_dir=str(tmp_path / "0"), examples=digits())
    workers = {"dataloader_num_workers": 1, "output_dir": str(tmp_path / "1")}
    other = torch_backend.train.train("unconditional", **options | workers, examples=digits())
    rows = [(run / "logs/steps.csv").read_text().splitlines() for run in (plain, other)]
    assert [row.split(",")[:3] for row in rows[0]] == [row.split(",")[:3] for row in rows[1]]
    given = [{"image": digits(1)[0]["image"], "camera": sys.stderr}]
    with pytest.raises(ConfigError, match=r"--dataloader_num_workers 1: the examples cannot be copied to other proc"):
        torch_backend.train.train("unconditional", **options | workers, examples=given, overwrite_output_dir=True)
