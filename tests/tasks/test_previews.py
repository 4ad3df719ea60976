"""What each task draws during training where no option names prompts, and what the sheets say."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny import RUN, TEXT_RUN, paired_pictures, pictures, stable_diffusion

from flax_diffusion.core.cli.command_line import merge
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.train import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(stable_diffusion(tmp_path_factory.mktemp("model")))


class Canvas:
    """Stands for a backend, and keeps what it is asked to draw."""

    def sample(self, *, prompts, num_images, **options):
        self.prompts, self.options = prompts, options
        return np.zeros((num_images * max(1, len(prompts)), 8, 8, 3), np.uint8)


def drawn(task, options):
    """What a task asks a backend to draw, and the captions of the pictures."""
    made = task_of(merge(task, {}, {"eval_batch_size": 2, "resolution": 16} | options, "test"))
    source = made.open_source()
    preview = made.make_preview(made.make_spec(source), source)
    canvas = Canvas()
    assert len(preview.draw(canvas)) == len(preview.captions)
    return canvas, preview.captions


def test_new_things(model, tmp_path):
    pictures(tmp_path / "new", 3)
    options = {"pretrained_model_name_or_path": model, "train_data_dir": str(tmp_path / "new")}
    booth = {"instance_data_dir": options.pop("train_data_dir"), "instance_prompt": "a photo of sks dog"}
    canvas, captions = drawn("dreambooth", options | booth)
    assert canvas.prompts == ["a photo of sks dog"]
    assert captions == ["a photo of sks dog\nseed 0, image 0", "a photo of sks dog\nseed 0, image 1"]
    word = {"train_data_dir": booth["instance_data_dir"], "placeholder_token": "<dog>", "initializer_token": "dog"}
    word["prompt_templates"] = ["a {}", "the {}"]
    assert drawn("textual_inversion", options | word)[0].prompts == ["a <dog>"]


def test_captions(tmp_path):
    options = {name: value for name, value in TEXT_RUN.items() if name != "validation_prompts"} | {"resolution": 8}
    canvas, captions = drawn("text_to_image", options)
    assert len(canvas.prompts) == len(set(canvas.prompts)) == 4
    assert all(prompt.startswith("a handwritten ") for prompt in canvas.prompts)
    assert captions[4] == f"{canvas.prompts[1]}\nseed 0, image 4"
    named = drawn("text_to_image", options | {"validation_prompts": ["a handwritten two"]})[0]
    assert named.prompts == ["a handwritten two"]


def test_controls_are_those_of_the_captions(model, tmp_path):
    data = paired_pictures(tmp_path / "data")
    options = {"pretrained_model_name_or_path": model, "train_data_dir": str(data)}
    canvas, _ = drawn("controlnet", options)
    (controls,) = canvas.options["extra"].values()
    assert 0 < len(canvas.prompts) == len(controls) <= 4
    assert controls.shape[1:] == (3, 16, 16)
    assert len({array.tobytes() for array in controls}) > 1


def test_classes_have_their_names():
    transformer = {"in_channels": 1, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    options = RUN | {"unet": None, "transformer": transformer, "resolution": 8, "validation_class_labels": ["7", "two"]}
    canvas, captions = drawn("class_conditional", options | {"eval_batch_size": 1})
    assert canvas.prompts == ["7", "two"]
    assert captions == ["seven\nseed 0, image 0", "two\nseed 0, image 1"]


def test_the_sheet_of_a_run(tmp_path):
    options = TEXT_RUN | {"max_train_steps": 1, "eval_batch_size": 1, "report_to": "none", "checkpointing_steps": 1}
    run = train("text_to_image", **options, output_dir=str(tmp_path / "run"))
    with Image.open(run / "samples/00000001.png") as sheet:
        said = json.loads(sheet.info["captions"])
        assert sheet.info["step"] == "1"
        assert sheet.height > sheet.width // 2  # two pictures below each other, of one column
    assert said == ["a handwritten seven\nseed 0, image 0", "a handwritten two\nseed 0, image 1"]
    run = train("text_to_image", **options, draw_samples=False, output_dir=str(tmp_path / "none"))
    assert not (run / "samples").exists()
