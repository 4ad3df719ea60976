"""Runs push their results to the Hub beside training: what arrives, what stays at home, and what happens when it fails.

The Hub is a server in this process.
"""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import traceback

import huggingface_hub
import numpy as np
import pytest
import yaml
from fake_hub import READ_TOKEN, TOKEN, Hub
from huggingface_hub import constants
from recorder import Idle
from safetensors.numpy import load, save_file
from tiny import ONE_BLOCK, RUN, UNET

from flax_diffusion.core.checkpoints import portable
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.run.hub import pusher
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.run.preemption import Preemption
from flax_diffusion.core.spec import cards
from flax_diffusion.core.tasks.task import task_of

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # by the Hub's client, of its own calls


class Recorder(Idle):
    """Counts steps, and exports their number."""

    steps = 0

    def __init__(self, config, spec):
        self.spec = spec

    def put(self, batch):
        return batch

    def train_step(self, batch, learning_rate, ema_decays):
        self.steps += 1
        return {"loss": 1.0, "grad_norm": 1.0}

    def save(self, folder, metadata):
        portable.write(folder, {"count": np.asarray(self.steps)}, metadata)

    def restore(self, folder):
        self.steps = int(portable.read(folder)[0]["count"])

    def set_step(self, step):
        self.steps = step

    def sample(self, **asked):
        return np.zeros((asked["num_images"], 8, 8, 1), np.uint8)

    def export(self, folder, *, only_trained=False):
        for name in self.spec.components:
            (folder / name).mkdir(exist_ok=True, parents=True)
            (folder / name / "config.json").write_text(f'{{"step": {self.steps}}}')
            save_file({"x": np.full(9, self.steps)}, folder / name / "diffusion_pytorch_model.safetensors")


OPTIONS = RUN | {
    "unet": UNET | ONE_BLOCK, "max_train_steps": 4, "train_batch_size": 20, "checkpointing_steps": 2,
    "validation_epochs": None, "save_model_epochs": None, "push_to_hub": True,
}  # fmt: skip
"""A run of two epochs."""


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(pusher, "DELAYS", (0.0, 0.0))
    with Hub() as served:
        yield served.use(monkeypatch)
        assert not served.unknown


def config(folder, **options):
    return command_line.merge("unconditional", {}, OPTIONS | {"output_dir": str(folder)} | options, "")


def run(folder, backend=Recorder, preemption=None, **options):
    """A run whose backend computes nothing."""
    return fit(task_of(config(folder, **options)), backend, preemption).output_dir


def test_what_arrives(hub, tmp_path):
    folder = run(tmp_path / "my-model", save_model_epochs=1)
    files = hub.files["me/my-model"]
    assert {"README.md", "config.yaml", "model_index.json", "unet/config.json", "samples/00000004.png"} <= files.keys()
    assert not [name for name in files if name.startswith(("checkpoint", "logs", "precomputed", "report", "."))]
    assert [message for message, _ in hub.commits][-1] == "Step 4"
    for name, content in files.items():
        assert (folder / name).read_bytes() == content, name
    assert not (folder / pusher.STAGE).exists()
    assert hub.private == {"me/my-model": False}


def test_names_and_privacy(hub, tmp_path):
    run(tmp_path / "a", hub_model_id="mine")
    run(tmp_path / "b", hub_model_id="me/ours", hub_private_repo=True)
    assert hub.private == {"me/mine": False, "me/ours": True}


def test_the_card(hub, tmp_path):
    folder = run(tmp_path / "model", validation_split=0.2)
    text = (folder / "README.md").read_text()
    assert hub.files["me/model"]["README.md"].decode() == text
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "diffusers"
    assert head["pipeline_tag"] == "unconditional-image-generation"
    assert {"diffusers-training", "unconditional", "DDPMPipeline"} <= {*head["tags"]}
    assert "base_model" not in head
    assert 'DiffusionPipeline.from_pretrained("me/model")' in text
    assert "![Samples](samples/00000004.png)" in text
    assert "| validation_loss | 2.5 |" in text
    command = re.search(r"```bash\n(.*)\n```", text)[1]
    again = command_line.parse_train(shlex.split(command)[1:], "train")[1]
    pushes = ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token")
    expected = config(folder, validation_split=0.2)
    assert again.model_dump(exclude={*pushes}) == expected.model_dump(exclude={*pushes})


def test_a_card_of_a_persons_own_stays(hub, tmp_path):
    run(tmp_path / "model", max_train_steps=2)
    card = tmp_path / "model/README.md"
    mine = card.read_text().replace(cards.MARK, "My words.").replace("# model", "# Mine")
    card.write_text(mine)
    run(tmp_path / "model", resume_from_checkpoint="latest")
    assert card.read_text() == mine
    assert hub.files["me/model"]["README.md"].decode() == mine


def lines(caplog, level):
    """What the pusher logged of one level."""
    return [record.getMessage() for record in caplog.records if record.levelname == level and "push" in record.name]


def test_a_push_that_fails_is_tried_again(hub, tmp_path, caplog):
    hub.failures = [(412, "a commit at the same time"), (500, "oh")]
    with caplog.at_level(logging.INFO, "flax_diffusion"):
        run(tmp_path / "model")
    assert [message for message, _ in hub.commits] == ["Step 4"]
    assert sum("is tried again in 0 s" in line for line in lines(caplog, "INFO")) == 2
    assert not lines(caplog, "WARNING")


@pytest.mark.parametrize("failures", [[(412, "busy")] * 3, [(403, "storage is full")]])
def test_a_push_that_is_given_up(hub, tmp_path, caplog, failures):
    """The run goes on to the same files, and the last line has the command, which the Hub's own tool takes."""
    hub.failures = [*failures]
    (tmp_path / "without").mkdir()
    expected = contents(run(tmp_path / "without/my model", push_to_hub=False))
    caplog.clear()
    folder = run(tmp_path / "my model", hub_model_id="model")
    assert not hub.failures
    assert not hub.commits
    own = ("README.md", "config.yaml")
    left = {name: content for name, content in contents(folder).items() if name not in own}
    assert left == {name: content for name, content in expected.items() if name not in own}
    status, said = failures[0]
    gives_up, last = lines(caplog, "WARNING")
    assert f"HTTP {status}: {said}" in gives_up
    assert "step 4 is not on the Hub" in last
    assert "\n" not in last
    command = last.partition("push it by: ")[2]
    tool, *words = shlex.split(command)
    assert (tool, words[:4]) == ("hf", ["upload", "me/model", str(folder), "."])
    start = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", *words]
    ran = subprocess.run(start, env=os.environ | hub.environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert {"README.md", "config.yaml", "model_index.json", "samples/00000004.png"} <= hub.files["me/model"].keys()
    assert not [name for name in hub.files["me/model"] if name.startswith(("checkpoint", "logs", "report", "."))]


def contents(folder):
    """Content of the files of a run, but for those that hold times."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes() for name, path in files.items() if not {"events", "report"} & {*re.split(r"\W|_", name)}
    }


def test_training_does_not_wait_for_a_push(hub, tmp_path):
    """A push sees the results as they were when it began, and steps are the same as without one."""
    hub.hold.clear()
    steps = []

    class Watching(Recorder):
        def train_step(self, batch, learning_rate, ema_decays):
            if self.steps == 2:
                hub.arrived.wait(60)
            if self.steps == 5:
                hub.hold.set()
            steps.append(batch["example_index"].ravel().tolist())
            return super().train_step(batch, learning_rate, ema_decays)

    run(tmp_path / "model", Watching, save_model_epochs=1, max_train_steps=6)
    pushed, steps = steps, []
    run(tmp_path / "without", Watching, save_model_epochs=1, max_train_steps=6, push_to_hub=False)
    assert steps == pushed
    assert hub.commits[0][0] == "Step 2"
    assert hub.commits[-1][0] == "Step 6"
    assert hub.files["me/model"]["unet/config.json"] == b'{"step": 6}'


def test_what_is_pushed_is_of_one_moment(hub, tmp_path):
    """Though the export after it writes its files in place."""
    hub.hold.clear()
    first = {}

    class Watching(Recorder):
        def export(self, folder, *, only_trained=False):
            super().export(folder)
            if self.steps == 4:
                hub.hold.set()
                while not hub.commits:
                    hub.arrived.wait(0.01)
                first.update(hub.files["me/model"])

    run(tmp_path / "model", Watching, save_model_epochs=1)
    assert first["unet/config.json"] == b'{"step": 2}'
    weights = load(first["unet/diffusion_pytorch_model.safetensors"])["x"]
    assert weights.tolist() == [2] * 9


def told_to_end(tmp_path, hub, step):
    """A run of which a push is held, and that is told to end after a step."""
    preemption = Preemption()

    class Told(Recorder):
        def train_step(self, batch, learning_rate, ema_decays):
            if self.steps == step:
                hub.arrived.wait(60)
                preemption.handle(signal.SIGTERM)
            return super().train_step(batch, learning_rate, ema_decays)

    hub.hold.clear()
    return run(tmp_path / "model", Told, preemption, save_model_epochs=1)


def test_a_run_that_is_told_to_end_waits_for_no_push(hub, tmp_path, caplog):
    folder = told_to_end(tmp_path, hub, 2)
    assert (folder / "checkpoint-3").is_dir()
    assert not hub.commits
    (last,) = lines(caplog, "WARNING")
    assert last.startswith("step 2 is not on the Hub (the run was ended before it was pushed); push it by: hf upload")


def test_a_signal_in_the_last_push(hub, tmp_path, caplog):
    preemption = Preemption()
    hub.hold.clear()
    waits = threading.Thread(target=lambda: (hub.arrived.wait(60), preemption.handle(signal.SIGTERM)))
    waits.start()
    folder = run(tmp_path / "model", preemption=preemption)
    waits.join()
    assert (folder / "checkpoint-4").is_dir()
    assert not hub.commits
    assert "step 4 is not on the Hub (the run was ended before it was pushed)" in lines(caplog, "WARNING")[-1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hub_model_id": "a/b/c"}, r"'a/b/c' is no name of a repository: give --hub_model_id NAME or OWNER/NAME"),
        ({"hub_model_id": "my model"}, r"'my model' is no name of a repository"),
        ({"hub_token": None}, r"there is no token of the Hub: log in by `hf auth login`, set .* HF_TOKEN, or give"),
        ({"hub_token": "tok-wrong"}, r"the Hub does not take the token: make one with write access at https://"),
        ({"hub_token": READ_TOKEN}, r"the token of me may only read: make one with write access"),
        ({"hub_model_id": "her/model"}, r"me may not write to her/model \(HTTP 403: You don't have the rights"),
        ({"hub_model_id": "me/closed"}, r"me may not write to me/closed \(HTTP 403: .*\): give --hub_model_id NAME"),
    ],
)
def test_what_is_refused_before_training(hub, tmp_path, monkeypatch, options, says):
    hub.refused, hub.files["me/closed"] = {"me/closed"}, {}
    if "hub_token" in options:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=rf"^--push_to_hub: {says}") as caught:
        run(tmp_path / "model", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model/config.yaml").exists()


@pytest.mark.parametrize("how", ["down", "nobody listens", "offline", "no answer"])
def test_without_a_network_the_run_trains(hub, tmp_path, monkeypatch, caplog, how):
    """It says so at the start, and tries again at the end."""
    if how == "down":
        hub.broken = True
    elif how == "nobody listens":
        monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    elif how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(pusher, "CHECK_SECONDS", 0.01)
        monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda api: hub.hold.wait(60))
        hub.hold.clear()

    class Later(Recorder):
        def export(self, folder, *, only_trained=False):
            super().export(folder)
            if how == "no answer":
                monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    folder = run(tmp_path / "model", Later)
    assert (folder / "checkpoint-4").is_dir()
    first, *_, last = lines(caplog, "WARNING")
    assert "the run trains, and nothing is pushed to model until the Hub answers; it is tried again" in first
    assert "step 4 is not on the Hub" in last
    assert "push it by: hf upload model " in last


def test_a_hub_that_comes_back(hub, tmp_path, caplog):
    hub.broken = True

    class Later(Recorder):
        def export(self, folder, *, only_trained=False):
            super().export(folder)
            hub.broken = False

    run(tmp_path / "model", Later)
    assert len(lines(caplog, "WARNING")) == 1
    assert hub.commits[0][0] == "Step 4"


def test_only_the_first_process_pushes(hub, tmp_path):
    class Second(Recorder):
        process_index, process_count = 1, 2

        def broadcast_from_first(self, value):
            return 0

    options = config(tmp_path / "model")
    second = pusher.Pusher(task_of(options), None, Second(options, None))
    second.open()
    second.push(2)
    second.finish(4, Preemption())
    second.close()
    assert not hub.asked


def test_the_first_process_refuses_for_all(tmp_path):
    class Second(Recorder):
        process_index, process_count = 1, 2

        def broadcast_from_first(self, value):
            return 1

    options = config(tmp_path / "model")
    with pytest.raises(ConfigError, match="the first process cannot push; its message says why"):
        pusher.Pusher(task_of(options), None, Second(options, None)).open()


def test_one_step_that_is_repeated_is_not_pushed(hub, tmp_path):
    run(tmp_path / "model", push_to_hub=False)
    run(tmp_path / "model", resume_from_checkpoint="latest", repeat_step=1)
    assert not hub.asked


def test_a_recipe_holds_no_token(tmp_path):
    (tmp_path / "run.yaml").write_text("task: unconditional\npush_to_hub: true\nhub_token: some-token\n")
    with pytest.raises(
        ConfigError, match=r"run.yaml: hub_token: a file is .* take it out, and set .* HF_TOKEN"
    ) as caught:
        command_line.parse_train(["--config", str(tmp_path / "run.yaml")], "train")
    assert "some-token" not in str(caught.value)


def test_no_message_shows_the_token(hub, tmp_path, monkeypatch, caplog):
    """Neither what is refused nor what the Hub says of it, nor the errors under an error."""
    hub.failures = [(403, f"no rights for {TOKEN}")]
    monkeypatch.delenv("HF_TOKEN")
    with caplog.at_level(logging.DEBUG, "flax_diffusion"):
        folder = run(tmp_path / "model", hub_token=TOKEN)
    assert "no rights for …" in caplog.text
    assert TOKEN not in caplog.text
    for path in folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path
    with pytest.raises(ConfigError) as caught:
        config(folder, hub_token=TOKEN, lr_scheduler="piecewise_constant")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert TOKEN not in repr(config(folder, hub_token=TOKEN))


@pytest.mark.parametrize(
    "words",
    [
        "unconditional --dataset_name=huggan/flowers-102-categories --output_dir=ddpm-ema-flowers-64 --push_to_hub",
        "dreambooth --pretrained_model_name_or_path=m --instance_data_dir=d --instance_prompt=p --push_to_hub",
        "text_to_image --pretrained_model_name_or_path=m --dataset_name=d --push_to_hub --hub_model_id=sd-pokemon-lora",
    ],
)
def test_published_commands_are_taken(words):
    _, options = command_line.parse_train(words.split(), "train")
    assert options.push_to_hub
    assert options.hub_token is None
