"""Write tiny folders with Diffusers 0.39 and Transformers 4.57: what both packages are then asked to open.

    python write_folders.py FOLDER

Weights are those of `init_weights` with noise on all of them, so that no zero, no one and no zero convolution is left.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from calls import give_old_names
from diffusers import (
    FlaxAutoencoderKL,
    FlaxControlNetModel,
    FlaxPNDMScheduler,
    FlaxStableDiffusionControlNetPipeline,
    FlaxStableDiffusionInpaintPipeline,
    FlaxStableDiffusionPipeline,
    FlaxStableDiffusionXLPipeline,
    FlaxUNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import safety_checker_flax
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    FlaxCLIPModel,
    FlaxCLIPTextModel,
    FlaxCLIPTextModelWithProjection,
    FlaxCLIPVisionModel,
    FlaxT5EncoderModel,
    T5Config,
)
from transformers.models.clip.tokenization_clip import bytes_to_unicode

TOKENS = 8
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
EYES = TEXT | {"image_size": 8, "patch_size": 4}
UNET = {
    "sample_size": 8, "block_out_channels": (32, 32), "layers_per_block": 1, "attention_head_dim": 2,
    "cross_attention_dim": 16, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}  # fmt: skip
UP = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
XL = UNET | UP | {
    "cross_attention_dim": 32, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 12,
    "transformer_layers_per_block": (2, 1), "attention_head_dim": (2, 4),
}  # fmt: skip


def with_noise(params, seed):
    """Weights with normal noise of 0.05 on every leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.float32(0.05) * rng.standard_normal(leaf.shape).astype("f4"), params)


def weights(model, seed, *shape):
    """Weights of a model by its `init_weights`."""
    return with_noise(jax.jit(lambda key: model.init_weights(key, *shape))(jax.random.key(seed)), seed)


def tokenizer(folder):
    """A CLIP tokenizer that knows single letters."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def vae(channels=(8, 16)):
    """A tiny autoencoder; each level but the first halves the picture."""
    return FlaxAutoencoderKL(
        block_out_channels=channels, layers_per_block=1, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
    )  # fmt: skip


def checker():
    """A safety checker of the one size that 0.39 loads; it refuses some of the pictures of the calls."""
    eyes = EYES | {"image_size": 224, "patch_size": 56}
    config = CLIPConfig(text_config=dict(TEXT), vision_config=eyes, projection_dim=8)
    model = safety_checker_flax.FlaxStableDiffusionSafetyChecker(config, _do_init=False)
    params = weights(model, 5, (1, 224, 224, 3))
    rng = np.random.default_rng(5)
    for name in ("concept_embeds", "special_care_embeds"):
        params[name] = jnp.asarray(rng.standard_normal(params[name].shape).astype("f4"))
    params["concept_embeds_weights"] = jnp.full(17, 0.682)  # between the likenesses of the pictures of the calls
    params["special_care_embeds_weights"] = jnp.full(3, 2.0)
    return model, params


def models(folder, config):
    """The models that are not part of a pipeline here."""
    projected = CLIPTextConfig(**config.to_dict() | {"projection_dim": 12, "hidden_act": "gelu"})
    vision = CLIPVisionConfig(**EYES, projection_dim=12)
    both = CLIPConfig(text_config=config.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    five = T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    gated = T5Config(**five.to_dict() | {"feed_forward_proj": "gated-gelu"})
    for name, cls, made, shape in (
        ("text_projection", FlaxCLIPTextModelWithProjection, projected, ((1, TOKENS),)),
        ("vision", FlaxCLIPVisionModel, vision, ((1, 8, 8, 3),)),
        ("clip", FlaxCLIPModel, both, (((1, TOKENS), (1, 8, 8, 3)),)),
        ("t5", FlaxT5EncoderModel, five, ((1, TOKENS),)),
        ("t5_gated", FlaxT5EncoderModel, gated, ((1, TOKENS),)),
    ):
        size = {"input_shape": shape[0]} if name in ("vision", "clip") else {}
        model = cls(made, _do_init=False, **size)
        model.save_pretrained(folder / name, params=weights(model, 3, *shape))
    unet = FlaxUNet2DConditionModel(**UNET, **UP, use_linear_projection=True, dropout=0.1)
    unet.save_pretrained(folder / "unet_linear", params=weights(unet, 4))
    return projected


def main(folder):
    """Write all folders."""
    give_old_names()
    words = tokenizer(folder / "words")
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=TOKENS, **TEXT, **ids)
    projected = models(folder, config)
    text, denoiser = FlaxCLIPTextModel(config, _do_init=False), FlaxUNet2DConditionModel(**UNET, **UP)
    safety, safety_params = checker()
    scheduler = FlaxPNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    params = {
        "vae": weights(vae(), 0), "text_encoder": weights(text, 1, (1, TOKENS)), "unet": weights(denoiser, 2),
        "safety_checker": safety_params,
    }  # fmt: skip
    shared = {"text_encoder": text, "tokenizer": words, "scheduler": scheduler}
    checked = {"safety_checker": safety, "feature_extractor": CLIPImageProcessor()}
    FlaxStableDiffusionPipeline(vae=vae(), unet=denoiser, **shared, **checked).save_pretrained(folder / "sd", params)
    painter = FlaxUNet2DConditionModel(**UNET, **UP, in_channels=9)
    FlaxStableDiffusionInpaintPipeline(vae=vae(), unet=painter, **shared, **checked).save_pretrained(
        folder / "inpaint", params | {"unet": weights(painter, 6)}
    )
    deep = vae((8, 8, 8, 8))
    control = FlaxControlNetModel(**UNET, conditioning_embedding_out_channels=(8, 8, 16, 16))
    control_params = weights(control, 7)
    pipeline = FlaxStableDiffusionControlNetPipeline(vae=deep, unet=denoiser, controlnet=control, **shared, **checked)
    pipeline.save_pretrained(folder / "control", params | {"vae": weights(deep, 8), "controlnet": control_params})
    second = FlaxCLIPTextModelWithProjection(projected, _do_init=False)
    large = FlaxUNet2DConditionModel(**XL)
    xl_params = {"text_encoder_2": weights(second, 9, (1, TOKENS)), "unet": weights(large, 10)}
    FlaxStableDiffusionXLPipeline(
        vae=vae(), unet=large, text_encoder_2=second, tokenizer_2=words, **shared
    ).save_pretrained(folder / "xl", params | xl_params)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
