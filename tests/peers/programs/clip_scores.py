"""Scores of pictures for prompts, by a model that holds no parameters, and embeddings by one that does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.jax_utils import replicate
from flax.training.common_utils import shard
from transformers import CLIPTokenizer, FlaxCLIPModel, FlaxCLIPTextModelWithProjection, FlaxCLIPVisionModel


def main(folder):
    path, count = f"{folder}/clip", jax.device_count()
    clip, clip_params = FlaxCLIPModel.from_pretrained(path, dtype=jnp.float32, _do_init=False)
    tokenizer = CLIPTokenizer.from_pretrained(path)
    tokens = tokenizer(["a red cat", "a blue dog"], padding="max_length", max_length=12, return_tensors="np")
    pixels = np.random.default_rng(0).normal(size=(count, 3, 224, 224)).astype(np.float32)

    @partial(jax.pmap, axis_name="batch")
    def p_clip(inputs, params):
        return clip(params=params, **inputs).logits_per_image

    inputs = {name: replicate(tokens[name]) for name in ("input_ids", "attention_mask")}
    logits = p_clip(inputs | {"pixel_values": shard(pixels)}, replicate(clip_params))

    model = FlaxCLIPModel.from_pretrained(path)
    image_features = model.get_image_features(pixel_values=pixels)
    text_features = model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    text_features = text_features / jnp.linalg.norm(text_features, axis=-1, keepdims=True)
    image_features = image_features / jnp.linalg.norm(image_features, axis=-1, keepdims=True)

    text = FlaxCLIPTextModelWithProjection.from_pretrained(path)
    outputs = text(**tokens, output_hidden_states=True)
    vision = FlaxCLIPVisionModel.from_pretrained(path)
    patches = vision.module.apply({"params": vision.params}, jnp.transpose(pixels, (0, 2, 3, 1)))
    return {
        "logits": logits,
        "scores": 100 * text_features @ image_features.T,
        "text_embeds": outputs.text_embeds,
        "penultimate": outputs.hidden_states[-2],
        "patches": patches.last_hidden_state,
    }
