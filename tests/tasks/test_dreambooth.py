"""DreamBooth: pairs of new thing and class, class pictures drawn once, checkpoints that load, bad input."""

import inspect
import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import pictures, stable_diffusion

import flax_diffusion.generate
import torch_backend.generate
from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.run import assembly
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.tasks import dreambooth
from flax_diffusion.core.tasks.dreambooth import DreamBoothConfig
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.train import main, train
from torch_backend.backend import TorchBackend


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture
def options(model, tmp_path):
    pictures(tmp_path / "new", 3)
    return {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(tmp_path / "new"),
        "instance_prompt": "a photo of sks dog",
        "with_prior_preservation": True,
        "class_data_dir": str(tmp_path / "class"),
        "class_prompt": "a photo of dog",
        "num_class_images": 5,
        "prior_loss_weight": 0.5,
        "resolution": 16,
        "train_batch_size": 2,
        "sample_batch_size": 2,
        "output_dir": str(tmp_path / "run"),
        "report_to": "none",
        "draw_samples": False,
    }


class Painter:
    """Draws pictures whose colour is their seed."""

    process_index, process_count, device_count = 0, 1, 2

    def __init__(self):
        self.asked, self.options = [], []

    def sample(self, *, prompts, num_images, seed, **options):
        self.asked.append((prompts, num_images, seed))
        self.options.append(options)
        return np.stack([np.full((16, 16, 3), seed + i, np.uint8) for i in range(num_images)])

    def all_processes(self, condition):
        return condition


def test_the_shortfall_is_drawn_and_nothing_is_overwritten(options, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "class-00001.png").write_bytes((tmp_path / "new/0.png").read_bytes())
    before = (folder / "class-00001.png").read_bytes()
    config, painter = DreamBoothConfig(**options | {"num_class_images": 8}), Painter()
    dreambooth.draw_missing(config, painter)
    assert painter.asked == [(["a photo of dog"], 4, 1), (["a photo of dog"], 4, 5)]
    assert len(list(folder.iterdir())) == 8
    assert (folder / "class-00001.png").read_bytes() == before
    colours = {np.asarray(Image.open(path)).flat[0] for path in folder.glob("*.png") if path.name != "class-00001.png"}
    assert colours == {1, 2, 3, 4, 5, 6, 7}
    dreambooth.draw_missing(config, painter)
    assert len(painter.asked) == 2


def test_the_class_is_drawn_as_diffusers_draws_by_default(options):
    from diffusers import StableDiffusionPipeline

    painter = Painter()
    dreambooth.draw_missing(DreamBoothConfig(**options), painter)
    by_default = inspect.signature(StableDiffusionPipeline.__call__).parameters
    for name in ("num_inference_steps", "guidance_scale"):
        assert {asked[name] for asked in painter.options} == {by_default[name].default}


@pytest.mark.parametrize(
    ("backend", "generate"),
    [(JaxBackend, flax_diffusion.generate.generate), (TorchBackend, torch_backend.generate.generate)],
)
def test_the_class_is_drawn_with_its_own_steps_and_guidance(options, model, tmp_path, backend, generate):
    """As `generate` draws it, which other steps and another guidance would not."""
    asked = {"num_inference_steps": 3, "guidance_scale": 2.0}
    changes = {"num_class_images": 2} | {f"class_{name}": value for name, value in asked.items()}
    config = DreamBoothConfig(**options | changes)
    made = backend(config, task_of(config).make_spec(task_of(config).open_source()))
    made.init_state()
    dreambooth.draw_missing(config, made)
    drawn = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "class").iterdir())])
    shared = {"prompt": "a photo of dog", "num_images": 2, "batch_size": 2}
    np.testing.assert_array_equal(drawn, generate(model, **shared | asked))
    for other in ({"num_inference_steps": 4}, {"guidance_scale": 3.0}):
        assert (drawn != generate(model, **shared | asked | other)).any()


def test_pairs_make_the_mean_of_one_plus_lambda_times_the_mean_of_the_other(options):
    config = DreamBoothConfig(**options)
    instances = task_of(config).open_source()
    assert task_of(config).count_examples(instances) == 5  # the longer side
    source = task_of(config).complete_source(instances, Painter())
    spec = task_of(config).make_spec(source)
    schedule = make_schedule(config, 5, 1)
    with assembly.make_loader(task_of(config), spec, source, schedule, num_steps=5) as loader:
        batches = list(loader)
    weights = np.concatenate([batch["loss_weights"].ravel() for batch in batches])
    np.testing.assert_array_equal(weights, np.tile([2.0, 1.0], 10))
    losses = np.random.default_rng(0).random(4)
    mean = losses[::2].mean() + 0.5 * losses[1::2].mean()
    np.testing.assert_allclose((losses * weights[:4]).mean(), mean, rtol=1e-6)
    records = np.concatenate([batch["example_index"].ravel() for batch in batches])
    assert sorted(records[:10]) == list(range(10))  # every pair once an epoch
    noise = np.concatenate([batch["noise"][0] for batch in batches])
    assert len(np.unique(noise[:, 0, 0, 0])) == 20  # no two rows share their noise


CAT = {"instance_data_dir": "cat", "instance_prompt": "a ktn cat", "class_data_dir": "cats", "class_prompt": "a cat"}
DOG = {"instance_data_dir": "new", "instance_prompt": "a sks dog", "class_data_dir": "dogs", "class_prompt": "a dog"}
OVERLAPS = {
    "class in instances": ([DOG | {"class_data_dir": "new/class"}], "would be trained as the new thing"),
    "instances in class": ([DOG | {"class_data_dir": "."}], "would be trained as the new thing"),
    "one for both": ([DOG | {"class_data_dir": "new"}], "would be trained as the new thing"),
    "one for two classes": ([DOG, CAT | {"class_data_dir": "dogs"}], "which would mix the two"),
    "a class in another": ([DOG, CAT | {"class_data_dir": "dogs/cats"}], "which would mix the two"),
    "instances of another": ([DOG, CAT | {"class_data_dir": "new/cats"}], "would be trained as the new thing"),
    "things in each other": ([DOG | {"instance_data_dir": "cat/dog"}, CAT], "whose pictures it would become"),
}


@pytest.mark.parametrize("what", OVERLAPS)
def test_folders_that_overlap(options, tmp_path, what):
    """Refused before anything is written."""
    concepts, says = OVERLAPS[what]
    pictures(tmp_path / "cat/dog", 2)
    placed = [
        {key: str(tmp_path / value) if "dir" in key else value for key, value in concept.items()}
        for concept in concepts
    ]
    given = {k: v for k, v in options.items() if not k.startswith(("instance", "class"))}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=says):
        task_of(DreamBoothConfig(**given, concepts=placed)).open_source()
    assert sorted(tmp_path.rglob("*")) == before
    shared = [DOG, CAT | {"class_data_dir": "dogs", "class_prompt": DOG["class_prompt"]}]  # two things of one class
    placed = [
        {key: str(tmp_path / value) if "dir" in key else value for key, value in concept.items()} for concept in shared
    ]
    assert task_of(DreamBoothConfig(**given, concepts=placed)).open_source()


def test_several_concepts(options, tmp_path):
    pictures(tmp_path / "cat", 2)
    concepts = [
        {"instance_data_dir": options["instance_data_dir"], "instance_prompt": "a photo of sks dog"},
        {"instance_data_dir": str(tmp_path / "cat"), "instance_prompt": "a photo of ktn cat", "repeats": 3},
    ]
    given = {k: v for k, v in options.items() if not k.startswith(("instance", "class")) and "prior" not in k}
    source = task_of(DreamBoothConfig(**given, concepts=concepts)).open_source()
    prompts = [source[index].caption for index in range(len(source))]
    assert prompts == ["a photo of sks dog"] * 3 + ["a photo of ktn cat"] * 6
    assert source[3].name == source[5].name != source[4].name


def test_a_run(options, tmp_path):
    """Checkpoints hold models for plain Diffusers; resuming passes them by; the text encoder trains too."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    pictures(tmp_path / "class", 5)  # nothing is left to draw
    values = options | {"train_text_encoder": True, "checkpointing_steps": 2, "max_train_steps": 3}
    out = train("dreambooth", **values)
    checkpoint = out / "checkpoint-2"
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
    model = options["pretrained_model_name_or_path"]
    pipeline = DiffusionPipeline.from_pretrained(model, unet=unet, text_encoder=encoder, safety_checker=None)
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = train("dreambooth", **values | {"resume_from_checkpoint": "checkpoint-2"})
    assert yaml.safe_load((again / "config.yaml").read_text())["task"] == "dreambooth"
    assert (out / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"instance_prompt": None}, "dreambooth needs --instance_prompt"),
        ({"pretrained_model_name_or_path": None}, "dreambooth starts from a model"),
        ({"class_prompt": None}, "--with_prior_preservation needs --class_prompt"),
        ({"with_prior_preservation": False}, "go with --with_prior_preservation: add it"),
        ({"pre_compute_text_embeddings": True, "train_text_encoder": True}, "changes what comes of it: drop one"),
        (
            {"concepts": [{"instance_data_dir": "a", "instance_prompt": "b"}]},
            "exclude each other: put it into the list",
        ),
        ({"class_prompt": "a photo of sks dog"}, "names both the new thing and its class"),
        ({"concepts": [{"instance_data_dir": "a"}]}, "--concepts.0.instance_prompt is required"),
    ],
)
def test_options_that_do_not_go_together(options, changes, says):
    with pytest.raises(ConfigError, match=says):
        train("dreambooth", **options | changes)


def test_folders_that_cannot_be_used(options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"class_data_dir .*file/class: cannot be made"):
        train("dreambooth", **options | {"class_data_dir": str(tmp_path / "file/class")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no images"):
        train("dreambooth", **options | {"instance_data_dir": str(tmp_path / "empty")})
    assert not (tmp_path / "class").exists()


def test_a_class_folder_that_is_short_and_cannot_be_written(options, monkeypatch):
    monkeypatch.setattr(dreambooth.os, "access", lambda *_: False)
    with pytest.raises(DataError, match=r"holds 0 of 5 pictures and cannot be written; .*--num_class_images 0"):
        train("dreambooth", **options)


def test_lora_has_a_rate_of_its_own_by_default(options):
    assert DreamBoothConfig(**options).learning_rate == 5e-6
    assert DreamBoothConfig(**options, lora_rank=4).learning_rate == 5e-4
    assert DreamBoothConfig(**options, lora_rank=4, learning_rate=1e-3).learning_rate == 1e-3


def test_a_pipeline_that_was_trained_on_pixels_needs_no_vae(options, tmp_path):
    pixels = tmp_path / "pixels"
    shutil.copytree(options["pretrained_model_name_or_path"], pixels)
    index, unet = pixels / "model_index.json", pixels / "unet/config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": [None, None]}))
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"in_channels": 3, "out_channels": 3}))
    config = DreamBoothConfig(**options | {"pretrained_model_name_or_path": str(pixels)})
    spec = task_of(config).make_spec(task_of(config).open_source())
    assert spec.vae is None
    assert spec.sample_shape == (3, 16, 16)


def test_concepts_on_the_command_line(options, tmp_path):
    concept = {"instance_data_dir": str(tmp_path / "nowhere"), "instance_prompt": "sks"}
    model = ["--pretrained_model_name_or_path", options["pretrained_model_name_or_path"]]
    with pytest.raises(DataError, match="nowhere does not exist"):
        main(["dreambooth", *model, "--concepts", json.dumps(concept), "--output_dir", str(tmp_path / "out")])
