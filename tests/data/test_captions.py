"""Token ids equal to transformers', and the training of tokenizers."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from flax_diffusion.core.data.captions import Tokenize, load_tokenizer, train_tokenizer
from flax_diffusion.core.errors import DataError, WeightsError

CAPTIONS = [f"a handwritten {word}" for word in ("zero", "one", "two", "three", "four", "five")] * 3
TEXTS = [
    "", " ", "a handwritten seven", "A  Handwritten\tZERO!!", "naïve café, 北京 🙂", "it's the dog's", "word " * 40,
    "<|endoftext|> a <|startoftext|>", "1234567890", "Ünïcödé é",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 560, 16)


def reference(tokenizer, text):
    return tokenizer(text, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids


def test_ids_equal_transformers(tokenizer):
    tokenize = Tokenize.from_clip(tokenizer)
    for text in TEXTS:
        ids = tokenize(text)
        assert (ids.dtype, ids.shape) == (np.int32, (16,))
        assert ids.tolist() == reference(tokenizer, text)


def test_other_padding_and_added_tokens():
    # Stable Diffusion 2 pads with "!"; textual inversion adds a token.
    tokenizer = train_tokenizer(CAPTIONS, 560, 16)
    tokenizer.pad_token = "!"
    tokenizer.add_tokens("<cat-toy>")
    tokenize = Tokenize.from_clip(tokenizer)
    ids = tokenize("a <cat-toy>")
    assert ids.tolist() == reference(tokenizer, "a <cat-toy>")
    assert len(tokenizer) - 1 in ids
    assert ids[-1] == tokenizer.convert_tokens_to_ids("!") == 0


def test_taking_over_leaves_the_tokenizer_as_it_was(tokenizer):
    before = tokenizer("a handwritten one").input_ids
    Tokenize.from_clip(tokenizer)
    assert tokenizer("a handwritten one").input_ids == before
    assert len(before) < 16


def test_no_length(tokenizer):
    endless = CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=[])
    with pytest.raises(WeightsError, match=r"states no model_max_length; set it in tokenizer_config\.json"):
        Tokenize.from_clip(endless)


def test_a_worker_needs_no_transformers(tokenizer):
    pickled = pickle.dumps(Tokenize.from_clip(tokenizer))
    code = (
        "import pickle, sys; tokenize = pickle.loads(sys.stdin.buffer.read());"
        "print(tokenize('a handwritten two').tolist(), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickled, capture_output=True, timeout=60, check=True)
    assert done.stdout.decode().strip() == f"{reference(tokenizer, 'a handwritten two')} False"


def test_vocabulary_layout(tokenizer):
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert tokens[0] == "!"
    assert tokens[256] == "!</w>"
    assert len({token.removesuffix("</w>") for token in tokens[:512]}) == 256
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) == len(tokenizer)
    # Every word of the captions is one token by now; text never seen still has one.
    ids = tokenizer("a handwritten three").input_ids
    assert [tokens[n] for n in ids] == ["<|startoftext|>", "a</w>", "handwritten</w>", "three</w>", "<|endoftext|>"]
    assert tokenizer.decode(tokenizer("größe 北").input_ids[1:-1]).strip() == "größe 北"


def test_merges_are_the_most_frequent_pairs():
    # By hand: a+b</w> stands 5 times; then, of c+d (2) and d+e</w> (3), the latter.
    tokenizer = train_tokenizer(["ab"] * 5 + ["de"] * 3 + ["cd"] * 2, 517, 8)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert tokens[512:515] == ["ab</w>", "de</w>", "cd</w>"]


def test_saved_folder_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for loaded in (
        load_tokenizer(tmp_path),
        CLIPTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    ):
        assert type(loaded).__name__ == "CLIPTokenizer"
        assert loaded.model_max_length == 16
        assert [reference(loaded, text) for text in TEXTS] == [reference(tokenizer, text) for text in TEXTS]


def test_folder_of_vocabulary_and_merges(tokenizer, tmp_path):
    # The files of the published Stable Diffusion pipelines.
    import json

    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer", "model_max_length": 16}')
    tokenize = Tokenize.from_clip(load_tokenizer(tmp_path))
    assert [tokenize(text).tolist() for text in TEXTS] == [reference(tokenizer, text) for text in TEXTS]


def test_training_is_the_same_in_every_process(tokenizer):
    # Hash tables in the trainer are seeded anew in each process; ties must not follow them.
    code = (
        "from flax_diffusion.core.data.captions import train_tokenizer; import hashlib;"
        "words = [a + b + c for a in 'abcdef' for b in 'ghijk' for c in 'lmnop'];"
        "made = train_tokenizer(words, 640, 16).backend_tokenizer.to_str();"
        "print(hashlib.sha256(made.encode()).hexdigest())"
    )
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((513, 16), r"vocab_size is 513; bytes and special tokens alone take 514"), ((600, 2), r"model_max_length is 2")],
)
def test_no_room(arguments, message):
    with pytest.raises(DataError, match=message):
        train_tokenizer(CAPTIONS, *arguments)


def test_bad_folders(tmp_path):
    with pytest.raises(WeightsError, match=r"tokenizer folder .*gone does not exist"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(WeightsError, match=r"needs tokenizer\.json, or vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match=r"cannot be read"):
        load_tokenizer(tmp_path)
