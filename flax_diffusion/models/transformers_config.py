"""Configurations as Transformers' Flax classes take them: its objects, mappings, and the content of a config.json."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from flax_diffusion.core.errors import ConfigError, shown
from flax_diffusion.models.modeling import Config

CLIP_PARTS = ("text_config", "vision_config")
"""Entries of a whole CLIP model's configuration that are its encoders'."""
DEFAULTS: Mapping[str, bool] = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
"""What a call returns unless its arguments or the config say otherwise."""

# Keys that a config of any model may have and that an encoder does not read: how files were written, what a model with
# a head does, how text is generated. The list is PretrainedConfig's of Transformers 4 and 5.
COMMON_KEYS = frozenset({
    "add_cross_attention", "architectures", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_past", "output_scores", "pad_token_id", "prefix", "problem_type",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip


class ConfigMapping(Config):
    """A model's configuration whose keys can be read and set as attributes, as Transformers' can."""

    def __getattr__(self, name: str) -> Any:
        name = "return_dict" if name == "use_return_dict" else name
        if name in DEFAULTS and name not in self:
            return DEFAULTS[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to_dict(self) -> dict[str, Any]:
        """Return a copy made of plain dictionaries."""
        return copy.deepcopy({key: dict(value) if isinstance(value, Mapping) else value for key, value in self.items()})


def as_mapping(config: Any) -> dict[str, Any]:
    """Return the content of a configuration.

    Args:
        config: An object with `to_dict`, such as Transformers' configurations, or a mapping.

    Raises:
        ConfigError: If it is neither.
    """
    if hasattr(config, "to_dict"):
        return config.to_dict()
    if isinstance(config, Mapping):
        return dict(config)
    raise ConfigError(f"the config is {shown(config)}: give a Transformers config, or a mapping such as a config.json")


def as_config(config: Any) -> Any:
    """Return a configuration with attributes: the object itself if it has them, else a mapping as `ConfigMapping`.

    Args:
        config: An object with `to_dict`, or the content of a config.json. A whole CLIP model's may have second entries,
            such as text_config_dict, which replace the first, defaults included.

    Raises:
        ConfigError: If it is neither.
    """
    if hasattr(config, "to_dict"):
        return config
    made = ConfigMapping(as_mapping(config))
    for part in CLIP_PARTS:
        second = made.pop(f"{part}_dict", None)
        found = made.get(part) if second is None else second
        if found is not None:
            made[part] = ConfigMapping(as_mapping(found))
    return made


def complete(config: ConfigMapping, whole: Mapping[str, Any]) -> None:
    """Add to a configuration the keys of a whole one that it lacks, in its parts too."""
    for key, value in whole.items():
        if isinstance(value, Mapping):
            complete(config.setdefault(key, ConfigMapping()), value)
        else:
            config.setdefault(key, value)


def without_common_keys(config: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """Return a configuration without the keys that every config may have, but for a model's own fields.

    Args:
        config: Content of a config.json.
        fields: Names of the model's fields.
    """
    own = set(fields)
    return {key: value for key, value in config.items() if key in own or (key not in COMMON_KEYS and key[:1] != "_")}
