"""New words of textual inversion: reading their files, of any program, and adding them to a tokenizer."""

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
"""Key of the rows in kohya's files. It is the same for every word; the word is the name of the file."""
_SDXL_KEYS = {"clip_l", "clip_g"}


def read_words(path: Path, word: str | None = None) -> dict[str, np.ndarray]:
    """Read the embedding rows of new words.

    Args:
        path: A safetensors file of Diffusers, of programs with the same format, or of kohya; or its folder.
        word: The word to use instead of the one in the file.

    Returns:
        Rows by word, float32 (tokens, features).

    Raises:
        WeightsError: If the file does not exist, is of another kind, or holds no rows.
    """
    file = model_files.weights_file(path, "--embeddings", (EMBEDDINGS_FILE,))
    stored = model_files.read_safetensors(file)
    if _SDXL_KEYS & stored.keys():
        raise WeightsError(
            f"{path} holds {' and '.join(sorted(stored))}, a word of Stable Diffusion XL, which is not supported"
        )
    if not stored or (word is not None and len(stored) > 1):
        raise WeightsError(f"{path} holds {len(stored)} words ({', '.join(stored)}): give a file with one")
    words = {}
    for key, tensor in stored.items():
        rows = tensor.array().astype(np.float32)
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or 0 in rows.shape:
            raise WeightsError(
                f"{path}: {key} has the shape {tensor.shape}, must be (vectors, features) with one vector or more: it "
                "is not a file of textual inversion, or was not saved whole"
            )
        own = word or (path.stem if key == UNNAMED else key)
        name = own.lower()
        if name != key and name != word:
            log.warning("%s holds %s; its word in prompts is %s (for another word, give PATH:WORD)", path, key, name)
        words[name] = rows
    return words


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
