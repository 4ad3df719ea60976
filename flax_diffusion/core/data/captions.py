"""Conversion of captions to CLIP token ids; loading and training of CLIP's byte-pair tokenizer."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer

from flax_diffusion.core.errors import DataError, WeightsError

if TYPE_CHECKING:  # transformers takes seconds to import, and worker processes need none of it
    from transformers import CLIPTokenizer

BYTE_SYMBOLS = 256
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
_WORD_END = "</w>"
_PRIVATE_USE = 0xE000  # first of the Unicode characters that stand for a byte at the end of a word during training


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Callable that tokenizes like `CLIPTokenizer(caption, padding="max_length", truncation=True)`.

    A word that textual inversion added with several vectors (`<toy>`, `<toy>_1`, …) stands for all of them. The object
    holds only the Rust tokenizer, so that worker processes need not import transformers.

    Reference:
        `maybe_convert_prompt` of Diffusers.
    """

    tokenizer: Tokenizer  # with neither padding nor truncation
    length: int  # number of ids
    before: tuple[int, ...]  # special tokens before every caption
    after: tuple[int, ...]  # special tokens after every caption
    pad_id: int
    pads_left: bool
    cuts_left: bool
    words: Mapping[int, tuple[int, ...]]  # id of a word of several tokens to the ids of the tokens that follow it

    @classmethod
    def from_clip(cls, tokenizer: "CLIPTokenizer") -> "Tokenize":
        """Make the callable from a CLIPTokenizer, including the tokens added to it so far.

        Args:
            tokenizer: The tokenizer; its `model_max_length` is the number of ids.

        Raises:
            WeightsError: If the tokenizer states no length.
        """
        length = tokenizer.model_max_length
        if length > 1_000_000:  # transformers' stand-in for "none"
            raise WeightsError(
                "the tokenizer states no model_max_length; set it in tokenizer_config.json (77 for CLIP)"
            )
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        bare, whole = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
        start = next(start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
        return cls(
            tokenizer=backend,
            length=length,
            before=tuple(whole[:start]),
            after=tuple(whole[start + len(bare) :]),
            pad_id=int(str(tokenizer.pad_token_id)),
            pads_left=tokenizer.padding_side == "left",
            cuts_left=tokenizer.truncation_side == "left",
            words=_words(tokenizer.get_added_vocab()),
        )

    def __call__(self, caption: str) -> np.ndarray:
        """Tokenize one caption.

        Args:
            caption: Any text; an empty one gives start, end and padding.

        Returns:
            The ids, int32 (model_max_length,).
        """
        tokens, _ = self._tokens(caption)
        ids = [*self.before, *tokens[self._kept(len(tokens))], *self.after]
        padding = [self.pad_id] * (self.length - len(ids))
        return np.array(padding + ids if self.pads_left else ids + padding, np.int32)

    def count(self, caption: str) -> int:
        """Return the number of a caption's tokens, with those before and after it, also where they do not fit."""
        return len(self.before) + len(self._tokens(caption)[0]) + len(self.after)

    def cut_off(self, caption: str) -> str:
        """Return the part of a caption that does not fit, from the start of a word cut in two; "" if all of it fits."""
        tokens, places = self._tokens(caption)
        kept = len(tokens[self._kept(len(tokens))])
        if kept == len(tokens):
            return ""
        start, end = (0, places[-kept - 1][1]) if self.cuts_left else (places[kept][0], len(caption))
        return caption[start:end].strip()

    def _kept(self, count: int) -> slice:
        """Return the slice of a caption's tokens that fits."""
        room = self.length - len(self.before) - len(self.after)
        return slice(max(0, count - room), None) if self.cuts_left else slice(room)

    def _tokens(self, caption: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return a caption's tokens, with added words in full, and each one's (start, end) in it."""
        encoding = self.tokenizer.encode(caption, add_special_tokens=False)
        if not self.words:
            return encoding.ids, encoding.offsets
        tokens: list[int] = []
        places: list[tuple[int, int]] = []
        for number, (token, place) in enumerate(zip(encoding.ids, encoding.offsets, strict=True), 1):
            rest = self.words.get(token, ())
            if (
                tuple(encoding.ids[number : number + len(rest)]) == rest
            ):  # the caption already writes all tokens of the word
                rest = ()
            tokens += [token, *rest]
            places += [place] * (1 + len(rest))
        return tokens, places


@dataclass(frozen=True)
class TokenizePrompt:
    """Callable that tokenizes a prompt by every tokenizer of a pipeline.

    Attributes:
        by_array: The tokenizers, by the array of a batch that holds their ids.
    """

    by_array: Mapping[str, Tokenize]

    def __call__(self, prompt: str) -> dict[str, np.ndarray]:
        """Return the ids by array, int32 (L,) each, of one prompt."""
        return {name: tokenize(prompt) for name, tokenize in self.by_array.items()}

    def stacked(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the ids by array, int32 (N, L) each, of N prompts."""
        return {name: np.stack([*map(tokenize, prompts)]) for name, tokenize in self.by_array.items()}

    @property
    def length(self) -> int:
        """Number of ids, of the tokenizer that returns the fewest."""
        return min(tokenize.length for tokenize in self.by_array.values())

    def count(self, prompt: str) -> int:
        """Return the number of a prompt's tokens, of the tokenizer that makes the most."""
        return max(tokenize.count(prompt) for tokenize in self.by_array.values())

    def cut_off(self, prompt: str) -> str:
        """Return the longest part of a prompt that does not fit a tokenizer; "" if all of it fits all of them."""
        return max((tokenize.cut_off(prompt) for tokenize in self.by_array.values()), key=len)


def _words(added: Mapping[str, int]) -> dict[int, tuple[int, ...]]:
    """Return the words of several tokens among those added to a tokenizer: first id to the following ids."""
    words = {}
    for word, token in added.items():
        numbered = itertools.takewhile(added.__contains__, (f"{word}_{number}" for number in itertools.count(1)))
        rest = tuple(added[name] for name in numbered)
        if rest:
            words[token] = rest
    return words


def load_tokenizer(folder: str | Path) -> "CLIPTokenizer":
    """Load a CLIP tokenizer from a local folder.

    Args:
        folder: Folder with tokenizer.json, or with vocab.json and merges.txt.

    Raises:
        WeightsError: If the folder or its files are missing or unreadable.
    """
    from transformers import CLIPTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise WeightsError(f"tokenizer folder {folder} does not exist; give the pipeline's tokenizer subfolder")
    has = {name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).is_file()}
    # Without its files, transformers would silently make an empty tokenizer.
    if "tokenizer.json" not in has and not {"vocab.json", "merges.txt"} <= has:
        raise WeightsError(f"tokenizer folder {folder} needs tokenizer.json, or vocab.json and merges.txt")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust reader raises bare Exception
        raise WeightsError(f"tokenizer folder {folder} cannot be read ({error}); save it again") from error


def train_tokenizer(captions: Iterable[str], vocab_size: int, model_max_length: int) -> "CLIPTokenizer":
    """Learn a byte-pair vocabulary like CLIP's from captions, the same one on every run.

    Args:
        captions: Captions to learn from.
        vocab_size: Largest number of entries; fewer if the captions hold no more pairs to merge. 512 of them are the
            bytes, inside and at the end of a word, and two are special.
        model_max_length: Length of the ids, tokens.

    Returns:
        A tokenizer whose `save_pretrained` folder loads as a CLIPTokenizer with the same ids.

    Raises:
        DataError: If `vocab_size` or `model_max_length` is too small.

    Reference:
        Radford et al. 2021, section 2.4, and the layout of CLIP's vocab.json: bytes, bytes that end a word,
        merges in the order learnt, start, end.
    """
    from transformers import CLIPTokenizer

    fixed = 2 * BYTE_SYMBOLS + len(SPECIAL_TOKENS)
    if vocab_size < fixed:
        raise DataError(f"vocab_size is {vocab_size}; bytes and special tokens alone take {fixed}")
    if model_max_length < 3:
        raise DataError(f"model_max_length is {model_max_length}; start, end and one token take 3")
    byte_letters = _byte_letters()
    # The Rust trainer breaks ties by token id, and assigns the ids of word endings in an order that changes from run
    # to run. So each ending is one private letter here, whose id comes from the fixed alphabet.
    endings = {letter: chr(_PRIVATE_USE + n) for n, letter in enumerate(byte_letters)}
    spelled = {ending: letter + _WORD_END for letter, ending in endings.items()}

    rules = CLIPTokenizer().backend_tokenizer  # has CLIP's normalization and splitting into words

    def marked(caption: str) -> str:
        text = rules.normalizer.normalize_str(caption)
        words = [word for word, _ in rules.pre_tokenizer.pre_tokenize_str(text)]
        return " ".join(word[:-1] + endings[word[-1]] for word in words)

    learner = Tokenizer(BPE())
    learner.pre_tokenizer = WhitespaceSplit()
    alphabet = byte_letters + list(spelled)
    learner.train_from_iterator(
        map(marked, captions),
        BpeTrainer(vocab_size=vocab_size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False),
    )
    spell = str.maketrans(spelled)
    learnt = json.loads(learner.to_str())["model"]["merges"]
    merges = [(left.translate(spell), right.translate(spell)) for left, right in learnt]
    tokens = [letter.translate(spell) for letter in alphabet] + [left + right for left, right in merges]
    tokens = list(dict.fromkeys(tokens)) + list(SPECIAL_TOKENS)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=model_max_length)  # type: ignore[arg-type]


def _byte_letters() -> list[str]:
    # GPT-2's letters for the 256 bytes. Printable ones stand for themselves and come first in CLIP's vocabulary; for
    # the others stand the characters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in printable] + [chr(256 + n) for n in range(256 - len(printable))]
