"""New words of textual inversion: reading their files, of any program, and adding them to a tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.io import model_files
from flax_diffusion.core.spec.adapters import EMBEDDINGS_FILE, WORD, tokens_of

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger(__name__)

UNNAMED = "emb_params"
"""Key of the rows in kohya's files. It is the same for every word; the word is the name of the file."""
_SDXL_KEYS = {"clip_l", "clip_g"}


def read_words(
    path: Path, encoders: Sequence[str], keys: Mapping[str, str], word: str | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Read the embedding rows of new words.

    Args:
        path: A safetensors file of Diffusers, of programs with the same format, or of kohya; or its folder.
        encoders: Names of the pipeline's text encoders.
        keys: Names of the rows in the file by text encoder, in place of the word; empty where there is one encoder.
        word: The word to use instead of the one in the file.

    Returns:
        Rows by word and text encoder, float32 (tokens, features).

    Raises:
        WeightsError: If the file does not exist, is of another kind or of another family, or holds no rows.
    """
    file = model_files.weights_file(path, "--embeddings", (EMBEDDINGS_FILE,))
    stored = {key: tensor.array() for key, tensor in model_files.read_safetensors(file).items()}
    if keys:
        lacking = [key for key in keys.values() if key not in stored]
        if lacking or len(stored) > len(keys):
            raise WeightsError(
                f"{path} holds {', '.join(stored) or 'nothing'}, and a word of this pipeline has "
                f"{' and '.join(keys.values())}, one for each text encoder: it was learnt for another model"
            )
        own = word or model_files.safetensors_metadata(file).get(WORD, path.stem)
        rows = {encoder: _rows(path, key, stored[key]) for encoder, key in keys.items()}
        return {_in_prompts(path, own, word): rows}
    if _SDXL_KEYS & stored.keys():
        raise WeightsError(
            f"{path} holds {' and '.join(sorted(stored))}, a word of Stable Diffusion XL, and this pipeline has one "
            "text encoder: give the model that it was learnt for by --model"
        )
    if not stored or (word is not None and len(stored) > 1):
        raise WeightsError(f"{path} holds {len(stored)} words ({', '.join(stored)}): give a file with one")
    words = {}
    for key, array in stored.items():
        own = word or (path.stem if key == UNNAMED else key)
        words[_in_prompts(path, own, word, key)] = dict.fromkeys(encoders, _rows(path, key, array))
    return words


def _rows(path: Path, key: str, array: np.ndarray) -> np.ndarray:
    rows = array.astype(np.float32)
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or 0 in rows.shape:
        raise WeightsError(
            f"{path}: {key} has the shape {array.shape}, must be (vectors, features) with one vector or more: it "
            "is not a file of textual inversion, or was not saved whole"
        )
    return rows


def _in_prompts(path: Path, own: str, word: str | None, key: str | None = None) -> str:
    """Return a word as prompts have it, in small letters; say so where that is not what the file says."""
    name = own.lower()
    if name not in (key or own, word):
        log.warning("%s holds %s; its word in prompts is %s (for another word, give PATH:WORD)", path, key or own, name)
    return name


def add_word(tokenizer: CLIPTokenizer, word: str, count: int, origin: str, fix: str) -> tuple[int, tuple[str, ...]]:
    """Add a new word to a tokenizer, as one or more new tokens.

    Args:
        tokenizer: The tokenizer, which is changed.
        word: The word in lower case, because CLIP's tokenizer turns prompts into lower case.
        count: Number of tokens that the word stands for.
        origin: The option that names the word, for messages.
        fix: What to do about a word that cannot be added, for messages.

    Returns:
        The id of the first token (those of the others follow it), and the tokens.

    Raises:
        ConfigError: If the vocabulary has the word already, or one that would be taken for part of it; or if the
            tokenizer does not accept the word.
    """
    tokens = tokens_of(word, count)
    added = {name.lower() for name in tokenizer.get_added_vocab()}
    known = added | tokenizer.get_vocab().keys()
    clash = next((name for name in (*tokens, f"{word}</w>", f"{word}_1") if name in known), None)
    base = re.sub(r"_\d+$", "", word)
    if clash is None and base != word and base in added:
        clash = base
    if clash is not None:
        other = "" if clash.removesuffix("</w>") == word else f", which has {clash}"
        raise ConfigError(f"{origin} {word}: is in the tokenizer's vocabulary already{other}: {fix}")
    first = len(tokenizer)
    if not word.strip() or tokenizer.add_tokens(list(tokens)) != count:
        raise ConfigError(f"{origin} {word}: is not a word that the tokenizer accepts: {fix}")
    return first, tokens
