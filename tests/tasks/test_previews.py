"""What each task draws during training where no option names prompts, and what the sheets say."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny import RUN, TEXT_RUN, VAE, paired_pictures, pictures, stable_diffusion

from flax_diffusion.core.cli.command_line import merge
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.sheets import contact_sheet
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.generate import generate
from flax_diffusion.train import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(stable_diffusion(tmp_path_factory.mktemp("model")))


class Canvas:
    """Stands for a backend, and keeps what it is asked to draw."""

    def sample(self, *, prompts, num_images, **options):
        self.prompts, self.options = prompts, options
        return np.zeros((num_images * max(1, len(prompts)), 8, 8, 3), np.uint8)

    def draw(self, *, num_images, size, **options):
        self.calls = [*getattr(self, "calls", []), options | {"size": size}]
        yield np.zeros((num_images, *size, 3), np.uint8)


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


FILE = """\
a handwritten two --seed 5 --g 3
a handwritten seven --w 16 --h 8 --s 4 --n "a handwritten one"
"""


def with_file(tmp_path, text):
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    options = {name: value for name, value in TEXT_RUN.items() if name != "validation_prompts"}
    return options | {"resolution": 8, "eval_batch_size": 2, "validation_prompts_file": str(file)}


def test_a_file_of_prompts(tmp_path):
    """Each prompt is drawn by itself, with its own options, as `generate` draws it."""
    canvas, captions = drawn("text_to_image", with_file(tmp_path, FILE))
    two, seven = canvas.calls
    common = {"extra": None, "num_inference_steps": 2}
    assert two == common | {"prompts": ["a handwritten two"], "guidance_scale": 3.0, "seed": 5, "size": (8, 8)}
    assert seven == common | {
        "prompts": ["a handwritten seven"], "guidance_scale": 2.0, "seed": 0, "size": (8, 16),
        "num_inference_steps": 4, "negative_prompt": "a handwritten one",
    }  # fmt: skip
    assert captions == [
        "a handwritten two\nseed 5, image 0", "a handwritten two\nseed 5, image 1",
        "a handwritten seven\nseed 0, image 0", "a handwritten seven\nseed 0, image 1",
    ]  # fmt: skip


def test_a_run_draws_its_file_as_generate_does(tmp_path):
    options = with_file(tmp_path, FILE) | {"max_train_steps": 1, "eval_batch_size": 1, "report_to": "none"}
    run = train("text_to_image", **options, output_dir=str(tmp_path / "run"))
    two, seven = ({"prompt": "a handwritten two", "guidance_scale": 3}, {"prompt": "a handwritten seven", "height": 8})
    seven |= {"width": 16, "num_inference_steps": 4, "guidance_scale": 2, "negative_prompt": "a handwritten one"}
    both = [
        generate(run, **{"num_images": 1, "num_inference_steps": 2, "seed": seed} | one)[0]
        for one, seed in ((two, 5), (seven, 0))
    ]
    assert [image.shape[:2] for image in both] == [(8, 8), (8, 16)]
    expected = contact_sheet(both, 1, ["a handwritten two\nseed 5, image 0", "a handwritten seven\nseed 0, image 0"])
    with Image.open(run / "samples/00000001.png") as sheet:
        np.testing.assert_array_equal(np.asarray(sheet), np.asarray(expected))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a two --q 1", r"--validation_prompts_file .*prompts\.txt, line 1: unknown flag --q"),
        ("a two --w 9", r"--validation_prompts_file .*prompts\.txt, 'a two': 9 pixels must be a multiple of 2, which"),
        ("", r"--validation_prompts_file .*prompts\.txt: holds no prompt; write one a line"),
    ],
)
def test_files_that_cannot_be_drawn(tmp_path, text, says):
    unet = TEXT_RUN["unet"] | {
        "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=says):
        drawn("text_to_image", with_file(tmp_path, text) | {"unet": unet})


def test_files_with_what_a_task_cannot_draw(model, tmp_path):
    data = str(paired_pictures(tmp_path / "data"))
    file = tmp_path / "prompts.txt"
    file.write_text("a dog --w 24\na house\n")
    given = {"pretrained_model_name_or_path": model, "train_data_dir": data, "validation_prompts_file": str(file)}
    picture = {"validation_images": [f"{data}/0.png"]}
    with pytest.raises(ConfigError, match="are 0 and --validation_prompts_file are 2: give as many of both"):
        drawn("controlnet", given)
    with pytest.raises(ConfigError, match="'a dog': is drawn at --resolution 16; drop its size"):
        drawn("controlnet", given | picture)
    with pytest.raises(ConfigError, match="'a dog': is drawn at --resolution 16; drop its size"):
        drawn("text_to_image", given | {"inpainting": True, "train_data_dir": str(pictures(tmp_path / "plain"))})
    word = {"placeholder_token": "<dog>", "initializer_token": "dog"}
    with pytest.raises(ConfigError, match=r"_file .*prompts\.txt: validation prompt 'a dog' lacks the new word <dog>"):
        drawn("textual_inversion", given | word)
    with pytest.raises(ConfigError, match="--validation_prompts and --validation_prompts_file: drop one of them"):
        drawn("text_to_image", given | {"validation_prompts": ["a"]})
    file.write_text("a dog --seed 1\na house --seed 2\n")
    canvas, _ = drawn("controlnet", given | picture)
    assert [call["seed"] for call in canvas.calls] == [1, 2]
    assert all(next(iter(call["extra"].values())).shape == (1, 3, 16, 16) for call in canvas.calls)


def test_an_autoencoder_shows_pictures_from_all_over_the_data():
    """A folder of classes is sorted by them: the first pictures are of one."""
    options = {"dataset_name": "digits", "vae": VAE | {"in_channels": 1, "out_channels": 1}, "resolution": 8}
    task = task_of(merge("autoencoder", {}, options | {"eval_batch_size": 8}, "test"))
    source = task.open_source()
    pictures = task._pictures(task.make_spec(source), source)
    shown, again = (next(pictures.batches(8))[0] for _ in range(2))
    np.testing.assert_array_equal(shown, again)
    make = task.make_example_fn(task.make_spec(source))
    first = [make(source, 0, 0, index)["pixel_values"].tobytes() for index in range(100)]
    assert sum(one.tobytes() in first for one in shown) < 4


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
