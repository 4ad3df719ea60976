"""Names of parameters in files, which the JAX side uses too."""

from __future__ import annotations


def file_name(kind: str, name: str) -> str:
    """Return the name that a parameter has in files; in memory, Transformers 5 leaves CLIP's `text_model` out.

    The embedder that the blocks of a DiT share has the name of the first block's.

    Args:
        kind: Name of the model's PyTorch class.
        name: Name of the parameter in memory.
    """
    name = name.replace(".default.", ".")  # PEFT's name of the one adapter
    if kind.startswith("DiT") and name.startswith("emb."):  # which all blocks share
        return f"transformer_blocks.0.norm1.{name}"
    inner = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"text_model.{name}" if kind.startswith("CLIP") and inner else name
