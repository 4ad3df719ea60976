"""New words of textual inversion: their files, of any program, and their places in a tokenizer."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flax_diffusion.core.errors import ConfigError, WeightsError
from flax_diffusion.core.io import model_files
from flax_diffusion.core.spec.adapters import EMBEDDINGS_FILE, tokens_of

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger(__name__)

UNNAMED = "emb_params"
"""What kohya's programs call the rows, whatever the word: that is the name of the file."""
_OF_XL = {"clip_l", "clip_g"}


def read_words(path: Path, word: str | None = None) -> dict[str, np.ndarray]:
    """Reads the rows of new words.

    Args:
        path: A safetensors file of Diffusers, of the programs that save as it does, or of kohya; or its folder.
        word: Instead of the one in the file.

    Returns:
        Word to float32 rows (tokens, features).

    Raises:
        WeightsError: If the file is not there, is of another kind, or holds no rows.
    """
    file = model_files.weights_file(path, "--embeddings", (EMBEDDINGS_FILE,))
    stored = model_files.read_safetensors(file)
    if _OF_XL & stored.keys():
        raise WeightsError(
            f"{path}: holds {' and '.join(sorted(stored))}, a word of Stable Diffusion XL, not known here"
        )
    if not stored or (word is not None and len(stored) > 1):
        raise WeightsError(f"{path}: holds {len(stored)} words ({', '.join(stored)}): give the file of one")
    words = {}
    for key, tensor in stored.items():
        rows = tensor.array().astype(np.float32)
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or 0 in rows.shape:
            raise WeightsError(
                f"{path}: {key} has the shape {tensor.shape}, must be (vectors, features) with one vector or more: it "
                "is no file of textual inversion, or was not saved whole"
            )
        own = word or (path.stem if key == UNNAMED else key)
        name = own.lower()
        if name != key and name != word:
            log.warning("%s: holds %s; its word in prompts is %s (for another, PATH:WORD)", path, key, name)
        words[name] = rows
    return words


def add_word(tokenizer: CLIPTokenizer, word: str, count: int, origin: str, fix: str) -> tuple[int, tuple[str, ...]]:
    """Adds a new word to a tokenizer, as tokens of its own.

    Args:
        tokenizer: Changed.
        word: In small letters, as CLIP's tokenizer reads every prompt.
        count: Tokens that it stands for.
        origin: The option that names it, for messages.
        fix: What to do about a word that cannot be added, likewise.

    Returns:
        The id of the first token, whom the others follow, and the tokens.

    Raises:
        ConfigError: If the vocabulary has the word, or one that would be taken for part of it.
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
        raise ConfigError(f"{origin} {word}: is no word that the tokenizer takes: {fix}")
    return first, tokens
