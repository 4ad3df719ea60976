"""Names of parameters in files and on the JAX side."""

from __future__ import annotations


def file_name(kind: str, name: str) -> str:
    """The name of a parameter in files and on the JAX side: Transformers 5 leaves CLIP's `text_model` out in memory."""
    name = name.replace(".default.", ".")  # PEFT's name of the one adapter
    inner = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"text_model.{name}" if kind.startswith("CLIP") and inner else name
