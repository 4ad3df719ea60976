"""Names of parameters in files, which the JAX side uses too."""

from __future__ import annotations


def file_name(kind: str, name: str) -> str:
    """Return the name that a parameter has in files; in memory, Transformers 5 leaves CLIP's `text_model` out.

    Args:
        kind: Name of the model's PyTorch class.
        name: Name of the parameter in memory.
    """
    name = name.replace(".default.", ".")  # PEFT's name of the one adapter
    inner = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"text_model.{name}" if kind.startswith("CLIP") and inner else name
