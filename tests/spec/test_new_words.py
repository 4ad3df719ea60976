"""New words of textual inversion: files of other programs, several vectors, capitals, and what is no new word."""

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny import pictures, stable_diffusion

from flax_diffusion.convert import convert
from flax_diffusion.core.data.captions import Tokenize, load_tokenizer
from flax_diffusion.core.errors import ConfigError, UserError, WeightsError
from flax_diffusion.core.spec.new_words import read_words
from flax_diffusion.core.spec.pipeline import open_pipeline
from flax_diffusion.core.tasks.task import TASKS, task_of
from flax_diffusion.jax_backend.modules import build_modules, load_pretrained
from torch_backend import modules as torch_modules


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("model"), length=40)


def rows(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 16), np.float32)


def saved(path, **words):
    save_file({name.replace("Q", "<").replace("P", ">"): value for name, value in words.items()}, path)
    return path


def theirs(model, file, prompt, **options):
    """What Diffusers' text encoder makes of a prompt with a file's word."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model)
    if file is not None:
        pipe.load_textual_inversion(file, **options)
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0].numpy()


def ours(folder, prompt, backend):
    """The same with a pipeline that was converted."""
    spec = open_pipeline(str(folder))
    ids = spec.tokenize(prompt)["input_ids"][None]
    if backend == "jax":
        params = {"text_encoder": load_pretrained(spec.text_encoder)}
        return np.asarray(jax.jit(build_modules(spec).condition)(params, {"input_ids": ids})["text_embeddings"])
    with torch.no_grad():
        return torch_modules.load(spec.text_encoder)(torch.from_numpy(ids).long())[0].numpy()


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("count", [1, 3])
def test_all_vectors_of_a_word(model, tmp_path, count, backend):
    file = saved(tmp_path / "dog.safetensors", QdogP=rows(count))
    made = convert(model, tmp_path / "made", embeddings=[str(file)])
    for prompt in ("a photo of <dog>", "<dog>, <dog>s and a dog"):
        expected = theirs(model, file, prompt)
        np.testing.assert_allclose(ours(made, prompt, backend), expected, atol=1e-5)
        np.testing.assert_allclose(theirs(made, None, prompt), expected, atol=1e-5)


def test_further_training_reads_all_vectors(model, tmp_path):
    file = saved(tmp_path / "dog.safetensors", QdogP=rows(3))
    made = convert(model, tmp_path / "made", embeddings=[str(file)])
    data = pictures(tmp_path / "data")
    values = {"resolution": 16, "train_data_dir": str(data), "output_dir": str(tmp_path / "run")}
    config = TASKS["text_to_image"].config_class(pretrained_model_name_or_path=str(made), **values)
    spec = task_of(config).make_spec(task_of(config).open_source())
    first = len(load_tokenizer(model / "tokenizer"))
    assert [token for token in spec.tokenize("a <dog>")["input_ids"].tolist() if token >= first] == [
        first,
        first + 1,
        first + 2,
    ]
    again = {"placeholder_token": "<cat>", "initializer_token": "dog", "num_vectors": 2}
    config = TASKS["textual_inversion"].config_class(pretrained_model_name_or_path=str(made), **values, **again)
    spec = task_of(config).make_spec(task_of(config).open_source())
    new = [token - first for token in spec.tokenize("a <dog> and a <Cat>")["input_ids"].tolist() if token >= first]
    assert new == [0, 1, 2, 3, 4]


def test_capitals(model, tmp_path, caplog):
    """CLIP's tokenizer reads small letters, so the word is written in them; in prompts here, capitals do as well."""
    file = saved(tmp_path / "dog.safetensors", QDogP=rows(2))
    made = convert(model, tmp_path / "made", embeddings=[str(file)])
    assert "holds <Dog>; its word in prompts is <dog>" in caplog.text
    small = saved(tmp_path / "small.safetensors", QdogP=rows(2))
    expected = theirs(model, small, "a photo of <dog>")
    np.testing.assert_allclose(theirs(made, None, "a photo of <dog>"), expected, atol=1e-5)
    for prompt in ("a photo of <dog>", "A photo of <Dog>"):
        np.testing.assert_allclose(ours(made, prompt, "jax"), expected, atol=1e-5)


def test_a_placeholder_with_capitals_is_learnt_in_small_letters(model, tmp_path):
    config = TASKS["textual_inversion"].config_class(
        pretrained_model_name_or_path=str(model), train_data_dir=str(pictures(tmp_path)), resolution=16,
        placeholder_token="<Dog>", initializer_token="dog", num_vectors=2, validation_prompts=["a <DOG>"],
    )  # fmt: skip
    new = task_of(config).make_spec(task_of(config).open_source()).text_encoder.new_tokens
    assert (new.placeholder, new.tokens) == ("<dog>", ("<dog>", "<dog>_1"))


def test_a_word_that_a_file_does_not_name(model, tmp_path, caplog):
    """kohya's files call the rows emb_params; the word is the file's name, or what is asked for."""
    file = saved(tmp_path / "MyDog.safetensors", emb_params=rows(2))
    assert list(read_words(file, ["text_encoder"], {})) == ["mydog"]
    assert "holds emb_params; its word in prompts is mydog (for another word, give PATH:WORD)" in caplog.text
    made = convert(model, tmp_path / "made", embeddings=[f"{file}:<toy>"])
    prompt = "a <toy> and emb_params"
    expected = theirs(model, file, prompt, token="<toy>")
    np.testing.assert_allclose(ours(made, prompt, "torch"), expected, atol=1e-5)


def test_one_vector_without_an_axis(tmp_path):
    words = read_words(saved(tmp_path / "a.safetensors", QaP=rows(1)[0]), ["text_encoder"], {})
    assert words["<a>"]["text_encoder"].shape == (1, 16)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"dog": rows(1)}, r"--embeddings .*: dog: is in the tokenizer's vocabulary already: name another, PATH:WORD"),
        ({"a": rows(1)}, "a: is in the tokenizer's vocabulary already"),
        ({"QoldP": rows(1)}, "<old>: is in the tokenizer's vocabulary already"),
        ({"QOLDP": rows(1)}, "<old>: is in the tokenizer's vocabulary already"),
        ({"QoldP_2": rows(1)}, "<old>_2: is in the tokenizer's vocabulary already, which has <old>"),
        ({"QnewP": rows(0)}, r"<new> has the shape \(0, 16\), must be \(vectors, features\) with one vector or more"),
        ({"QnewP": rows(2)[None]}, r"<new> has the shape \(1, 2, 16\)"),
        ({"QnewP": rows(1)[:, :5]}, "'<new>' has 5 features, this text encoder 16"),
        ({"clip_l": rows(1), "clip_g": rows(1)}, "holds clip_g and clip_l, a word of Stable Diffusion XL"),
        ({}, r"holds 0 words \(\): give a file with one"),
    ],
)
def test_files_that_hold_no_new_word(model, tmp_path, words, says):
    old = saved(tmp_path / "old.safetensors", QoldP=rows(2))
    file = saved(tmp_path / "file.safetensors", **words)
    with pytest.raises(UserError, match=says):
        convert(model, tmp_path / "made", embeddings=[str(old), str(file)])
    assert not (tmp_path / "made").exists()


def test_files_that_are_not_there(model, tmp_path):
    (tmp_path / "learned_embeds.bin").write_bytes(b"")
    for path, says in (
        (tmp_path / "no.safetensors", r"--embeddings .*no\.safetensors does not exist: check the path"),
        (tmp_path, r"holds no learned_embeds\.safetensors; it holds learned_embeds\.bin: name the file itself"),
        (tmp_path / "learned_embeds.bin", "is pickled, and loading it can run code: convert it to safetensors first"),
    ):
        with pytest.raises(WeightsError, match=says):
            convert(model, tmp_path / "made", embeddings=[str(path)])


def test_the_same_word_is_refused_in_training(model, tmp_path, caplog):
    caplog.set_level("INFO")
    file = saved(tmp_path / "old.safetensors", QoldP=rows(2))
    made = convert(model, tmp_path / "made", embeddings=[str(file)])
    for word in ("dog", "<Old>", "<old>_1", "<old>_7"):
        config = TASKS["textual_inversion"].config_class(
            pretrained_model_name_or_path=str(made), train_data_dir=str(pictures(tmp_path / "data")), resolution=16,
            placeholder_token=word, initializer_token="dog",
        )  # fmt: skip
        with pytest.raises(ConfigError, match=f"--placeholder_token {word.lower()}: is in the tokenizer's vocabulary"):
            task_of(config).make_spec(task_of(config).open_source())
        said = f"--placeholder_token {word}: the tokenizer reads small letters; the word is <old>"
        assert (said in caplog.text) == (word == "<Old>")


@pytest.mark.parametrize(
    ("text", "side", "rest"),
    [
        ("a photo of a  dog", "right", ""),
        ("a photo of a  dog a a", "right", "a"),
        ("A a a a a a,  A\nPhoto of it", "right", ",  A\nPhoto of it"),
        ("a a a a <Dog>", "right", "<Dog>"),  # its first two vectors fit, the third does not
        ("a a a <Dog>", "right", ""),
        ("a photo of a  dog a a", "left", "a"),
        ("<Dog> a a a a", "left", "<Dog>"),
    ],
)
def test_what_is_cut_off(model, text, side, rest):
    tokenizer = load_tokenizer(model / "tokenizer")
    tokenizer.model_max_length, tokenizer.truncation_side = 8, side
    tokenizer.add_tokens(["<dog>", "<dog>_1", "<dog>_2"])
    assert Tokenize.from_clip(tokenizer).cut_off(text) == rest
