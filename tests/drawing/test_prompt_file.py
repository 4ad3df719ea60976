"""Files of prompts with options of their own, and what `generate` makes of them."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image
from tiny import stable_diffusion

from flax_diffusion.core.config.prompt_file import read_prompts
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.generate import generate, main
from torch_backend.generate import generate as torch_generate

LINES = """\
# what to draw

a dog, on a sofa -- asleep --w 24 --h 16 --s 3 --g 7.5 --seed 4 --n "a cat -- low quality"
a house
  a tree --d 5 --l 2
"""


def test_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(LINES)
    dog, house, tree = read_prompts(str(file), "prompts_file")
    assert (dog.prompt, house.prompt, tree.prompt) == ("a dog, on a sofa -- asleep", "a house", "a tree")
    assert dog.given() == {
        "width": 24, "height": 16, "num_inference_steps": 3, "guidance_scale": 7.5, "seed": 4,
        "negative_prompt": "a cat -- low quality",
    }  # fmt: skip
    assert house.given() == {}
    assert tree.given() == {"guidance_scale": 2.0, "seed": 5}


def test_yaml(tmp_path):
    file = tmp_path / "prompts.yaml"
    file.write_text("- a dog --g 3\n- {prompt: a house, width: 24, negative_prompt: a cat}\n")
    dog, house = read_prompts(str(file), "prompts_file")
    assert (dog.prompt, dog.guidance_scale) == ("a dog", 3.0)
    assert (house.prompt, house.given()) == ("a house", {"width": 24, "negative_prompt": "a cat"})


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "a\nb --q 3", r"a\.txt, line 2: unknown flag --q; use --w, --h, --s, --g, --l, --seed, --d, --n"),
        ("a.txt", "\na --w x", r"line 2: --width: must be a whole number, or null, got 'x'"),
        ("a.txt", "a --w", r"line 1: --width: must be a whole number, or null, got ''"),
        ("a.txt", "a --g 1 --l 2", r"line 1: --l says the guidance_scale a second time; drop one"),
        ("a.txt", "--w 3", r"line 1: has no prompt before its flags; write one"),
        ("a.txt", "# nothing\n", r"--prompts_file .*a\.txt: holds no prompt; write one a line"),
        ("a.yaml", "prompt: a", r"cannot be read: it must be a list of prompts, as text or as mappings"),
        ("a.yaml", "- {prompt: a, widht: 8}", r"entry 1: unknown option 'widht'; did you mean 'width'\?"),
        ("a.yaml", "- {width: 8}", r"entry 1: --prompt is required"),
        ("none.txt", None, r"--prompts_file .*none\.txt: cannot be read: No such file or directory; name a file"),
    ],
)
def test_what_is_no_file_of_prompts(tmp_path, name, text, says):
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_prompts(str(file), "prompts_file")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(stable_diffusion(tmp_path_factory.mktemp("model")))


def test_pictures_of_a_file(model, tmp_path):
    """Each line is drawn as a call of its own, and its file says which."""
    file, out = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a dog --w 24 --seed 4 --n cat\na house --s 1\n")
    main([
        "--model", model, "--prompts_file", str(file), "--num_inference_steps", "2", "--num_images", "2",
        "--output_dir", str(out), "--batch_size", "2",
    ])  # fmt: skip
    pictures = []
    for number in range(4):
        with Image.open(out / f"0000{number}.png") as image:
            pictures.append((np.asarray(image), dict(image.info)))
    assert [array.shape[:2] for array, _ in pictures] == [(16, 24), (16, 24), (16, 16), (16, 16)]
    first, last = pictures[1][1], pictures[3][1]
    assert (first["prompt"], first["seed"], first["image"], first["negative_prompt"]) == ("a dog", "4", "1", "cat")
    assert (last["prompt"], last["seed"], last["image"]) == ("a house", "0", "1")
    words = shlex.split(first["command"])
    assert words[:3] == ["python", "-m", "flax_diffusion.generate"]
    main([*words[3:], "--output_dir", str(tmp_path / "again")])
    with Image.open(tmp_path / "again/00001.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pictures[1][0])
    with Image.open(out / "grid.png") as sheet:
        assert json.loads(sheet.info["captions"])[3] == "a house\nseed 0, image 1"
    options = {"prompt": "a dog", "width": 24, "seed": 4, "negative_prompt": "cat", "num_inference_steps": 2}
    theirs = torch_generate(model, num_images=2, **options)
    assert np.abs(theirs[1].astype(int) - pictures[1][0]).max() <= 1


def test_a_file_is_read_once(model, tmp_path, monkeypatch):
    """So that all pictures are of the same prompts, if someone writes the file meanwhile."""
    file, read = tmp_path / "prompts.txt", []
    file.write_text("a dog --s 1")

    def counted(*names):
        read.append(names)
        return read_prompts(*names)

    monkeypatch.setattr("flax_diffusion.core.drawing.options.read_prompts", counted)
    main(["--model", model, "--prompts_file", str(file), "--output_dir", str(tmp_path / "out")])
    assert len(read) == 1
    for draw in (generate, torch_generate):
        draw(model, prompts_file=str(file))
    assert len(read) == 3


def test_a_prompt_beside_a_file(model, tmp_path):
    with pytest.raises(ConfigError, match="--prompt and --prompts_file: drop one of them"):
        generate(model, prompt="a", prompts_file=str(tmp_path / "a.txt"))
    file = tmp_path / "a.txt"
    file.write_text("a --w 16\nb")
    for draw in (generate, torch_generate):
        with pytest.raises(
            ConfigError, match=r"a\.txt: pictures of several sizes do not go into one array; write one size"
        ):
            draw(model, prompts_file=str(file))
    file.write_text("a --w 17")
    with pytest.raises(ConfigError, match="--width 17: must be a multiple of"):
        generate(model, prompts_file=str(file))
