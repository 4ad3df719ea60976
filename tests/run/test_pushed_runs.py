"""Whole runs of both backends that push to the Hub, in this process and in one of their own."""

import os
import signal
import subprocess
import sys

import pytest
import yaml
from fake_hub import TOKEN, Hub
from proofs import proof
from tiny import ONE_BLOCK, RUN, UNET, pictures, stable_diffusion
from xla_flags import QUICK

import flax_diffusion.train
import torch_backend.train
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.run.hub import pusher
from flax_diffusion.core.run.hub.facts import facts_of
from flax_diffusion.core.spec import cards
from flax_diffusion.core.spec.adapters import EMBEDDINGS_FILE, LORA_FILE
from flax_diffusion.core.tasks.task import task_of

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # by the Hub's client, of its own calls

OPTIONS = RUN | {
    "unet": UNET | ONE_BLOCK, "max_train_steps": 4, "train_batch_size": 20, "validation_epochs": None,
    "save_model_epochs": 1,
}  # fmt: skip
BACKENDS = {"flax_diffusion": flax_diffusion.train, "torch_backend": torch_backend.train}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub():
    with Hub() as served:
        yield served
        assert not served.unknown


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_backends_push(hub, tmp_path, monkeypatch, backend):
    """A run without has the same weights, though one of the pushes fails."""
    hub.use(monkeypatch)
    monkeypatch.setattr(pusher, "DELAYS", ())
    hub.failures = [(500, "no")]
    train = BACKENDS[backend].train
    alone = train("unconditional", **OPTIONS, output_dir=str(tmp_path / "alone"))
    pushes = train("unconditional", **OPTIONS, output_dir=str(tmp_path / "pushes"), push_to_hub=True)
    assert not hub.failures
    assert [message for message, _ in hub.commits] == ["Step 4"]
    assert hub.files["me/pushes"][WEIGHTS] == (pushes / WEIGHTS).read_bytes() == (alone / WEIGHTS).read_bytes()
    assert f"python -m {backend}.train unconditional" in hub.files["me/pushes"]["README.md"].decode()


def start(request, hub, folder, backend, *words):
    """A run in a process of its own, of which the log is a file."""
    recipe = folder / "run.yaml"
    recipe.write_text(yaml.safe_dump({"task": "unconditional"} | OPTIONS))
    environment = os.environ | hub.environment(token="") | {"XLA_FLAGS": QUICK, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", f"{backend}.train", "--config", str(recipe), "--output_dir", str(folder / "run")]
    command += ["--push_to_hub", "--hub_model_id", "me/model", "--hub_token", TOKEN, *words]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, env=environment, cwd=request.config.rootpath, stdout=log, stderr=log)


@pytest.mark.parametrize("backend", ["flax_diffusion", proof("torch_backend")])
def test_no_file_holds_the_token(request, hub, tmp_path, backend):
    ran = start(request, hub, tmp_path, backend, "--checkpointing_steps", "2")
    assert ran.wait(120) == 0, (tmp_path / "log").read_text()
    assert hub.commits
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert tmp_path / "run/config.yaml" in files
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
    for name, content in hub.files["me/model"].items():
        assert TOKEN.encode() not in content, name
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert "hub_token" not in kept
    assert (kept["push_to_hub"], kept["hub_model_id"]) == (True, "me/model")


@pytest.mark.parametrize("backend", [proof("flax_diffusion"), "torch_backend"])
def test_sigterm_waits_for_no_push(request, hub, tmp_path, backend):
    """The Hub holds the push until the process is gone."""
    hub.hold.clear()
    run = start(request, hub, tmp_path, backend, "--max_train_steps", "1000000")
    assert hub.arrived.wait(120), (tmp_path / "log").read_text()
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 0
    assert not hub.commits
    text = (tmp_path / "log").read_text()
    assert "ended by SIGTERM after step" in text
    assert "is not on the Hub (the run was ended before it was pushed); push it by: hf upload me/model" in text
    assert TOKEN not in text


def card_of(folder, task, options, *files):
    """The card of a run of a task that has left some files."""
    own = task_of(command_line.merge(task, {}, options | {"push_to_hub": True, "output_dir": str(folder)}, ""))
    spec = own.make_spec(own.open_source())
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    cards.write(folder, spec, facts_of(own, "train", 7, folder, "me/name"), "me/name")
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_cards_of_adapters(tmp_path):
    base, data = stable_diffusion(tmp_path / "base", length=40), pictures(tmp_path / "data", 2)
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n# Base\n")
    common = {"pretrained_model_name_or_path": str(base), "resolution": 16}
    given = common | {"instance_data_dir": str(data), "instance_prompt": "a photo of\nsks: dog", "lora_rank": 2}
    head, text = card_of(tmp_path / "lora", "dreambooth", given | {"validation_prompts": ["a dog"]}, LORA_FILE)
    assert head["instance_prompt"] == "a photo of\nsks: dog"
    assert head["license"] == "openrail++"
    assert head["pipeline_tag"] == "text-to-image"
    assert {"lora", "dreambooth"} <= {*head["tags"]}
    assert "base_model" not in head  # which is a folder of this machine
    assert 'pipeline.load_lora_weights("me/name")' in text
    assert "- `instance_prompt`: “a photo of sks: dog”\n- `validation_prompts`: “a dog”" in text
    given = common | {"train_data_dir": str(data), "placeholder_token": "<new>", "initializer_token": "dog"}
    head, text = card_of(tmp_path / "word", "textual_inversion", given, EMBEDDINGS_FILE)
    assert "textual_inversion" in head["tags"]
    assert 'pipeline.load_textual_inversion("me/name")' in text
    head, text = card_of(tmp_path / "named", "textual_inversion", given | {"output_name": "x"}, "x.safetensors")
    assert "textual_inversion" in head["tags"]
    assert "lora" not in head["tags"]
    assert 'pipeline.load_textual_inversion("me/name", weight_name="x.safetensors")' in text


def test_the_base_model_of_a_card(tmp_path):
    facts = cards.Facts(title="t", made="trained", base="stabilityai/stable-diffusion-2-1", dataset="lambda/some")
    spec = stable_diffusion(tmp_path / "base")
    own = task_of(command_line.merge("text_to_image", {}, {
        "pretrained_model_name_or_path": str(spec), "train_data_dir": str(pictures(tmp_path / "data", 2)),
        "resolution": 16,
    }, ""))  # fmt: skip
    cards.write(tmp_path / "out", own.make_spec(own.open_source()), facts)
    head = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    assert head["base_model"] == "stabilityai/stable-diffusion-2-1"
    assert head["license"] == "openrail++"
    assert head["datasets"] == ["lambda/some"]
