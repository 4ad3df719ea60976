"""Writes `flax_folders.zip`: other folders of the last Flax release, made as `write_flax_release.py` says.

    python tests/families/write_flax_folders.py tests/families/flax_folders.zip

Each folder is written by that release's `save_pretrained`. A file that equals the one of `pipeline/` in
`flax_release.zip` is left out and named in `same.txt`; `tests/flax_folders.py` puts it back. The folders:

- `half`: in bfloat16, with a text encoder in shards of 10 KB.
- `safe`: its text encoder in safetensors, with Linen's names and layout.
- `guide`: an autoencoder that halves pictures six times, so that 512 pixels are cheap.
- `img2img`, `inpaint` (whose UNet takes 9 channels), `controlnet` and `xl`: the pipelines of these names. UNets and
  ControlNet are of zeros, which leaves names and shapes. `reference.npz` holds what the second text encoder computes.
- `schedulers`: a folder a class, with its defaults.
"""

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
from diffusers import (
    FlaxAutoencoderKL,
    FlaxControlNetModel,
    FlaxDDIMScheduler,
    FlaxStableDiffusionControlNetPipeline,
    FlaxStableDiffusionImg2ImgPipeline,
    FlaxStableDiffusionInpaintPipeline,
    FlaxStableDiffusionPipeline,
    FlaxStableDiffusionXLPipeline,
)
from transformers import CLIPTextConfig, FlaxCLIPTextModelWithProjection
from write_flax_release import TOKENS, pipeline, weights

NAMES = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")
SCHEDULERS = (
    "DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "DPMSolverMultistep", "KarrasVe", "ScoreSdeVe",
)  # fmt: skip


def zeros(model):
    """Weights of a Diffusers model that compress to nothing."""
    shapes = jax.eval_shape(model.init_weights, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)


def changed(model, **values):
    """A model of the same class with another config."""
    return type(model)(**{key: value for key, value in model.config.items() if not key.startswith("_")} | values)


def half(out, parts, params):
    """A pipeline in bfloat16, whose text encoder is in shards."""
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    FlaxStableDiffusionPipeline(**parts).save_pretrained(out, params=params)
    encoder = out / "text_encoder"
    shutil.rmtree(encoder)
    parts["text_encoder"].save_pretrained(encoder, params=params["text_encoder"], max_shard_size="10KB")


def safe(out, parts, params):
    """A pipeline whose text encoder is in safetensors."""
    FlaxStableDiffusionPipeline(**parts).save_pretrained(out, params=params)
    encoder = out / "text_encoder"
    shutil.rmtree(encoder)
    parts["text_encoder"].save_pretrained(encoder, params=params["text_encoder"], safe_serialization=True)


def guide(out, parts, params):
    """A pipeline that makes latents of 8 x 8 of pictures of 512 x 512."""
    vae = FlaxAutoencoderKL(
        block_out_channels=(4,) * 7, down_block_types=("DownEncoderBlock2D",) * 7, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 7, norm_num_groups=2, sample_size=512,
    )  # fmt: skip
    shapes = jax.eval_shape(vae.init_weights, jax.random.key(0))
    params = params | {"vae": weights(shapes)}
    FlaxStableDiffusionPipeline(**parts | {"vae": vae}).save_pretrained(out, params=params)


def others(out, parts, params):
    """Pipelines of other classes."""
    FlaxStableDiffusionImg2ImgPipeline(**parts).save_pretrained(out / "img2img", params=params)
    parts = parts | {"safety_checker": None}
    unet = changed(parts["unet"], in_channels=9)
    made = FlaxStableDiffusionInpaintPipeline(**parts | {"unet": unet})
    made.save_pretrained(out / "inpaint", params=params | {"unet": zeros(unet)})
    controlnet = FlaxControlNetModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), layers_per_block=1,
        attention_head_dim=2, cross_attention_dim=16, conditioning_embedding_out_channels=(4, 4, 4, 8),
    )  # fmt: skip
    made = FlaxStableDiffusionControlNetPipeline(**parts, controlnet=controlnet)
    made.save_pretrained(out / "controlnet", params=params | {"controlnet": zeros(controlnet)})


def xl(out, parts, params):
    """A pipeline with two text encoders, and what the second one computes."""
    text = CLIPTextConfig(**parts["text_encoder"].config.to_dict() | {"projection_dim": 16})
    second = FlaxCLIPTextModelWithProjection(text, _do_init=False)
    unet = changed(
        parts["unet"], cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64, use_linear_projection=True, transformer_layers_per_block=(1,),
    )  # fmt: skip
    own = {
        "text_encoder": params["text_encoder"],
        "text_encoder_2": weights(jax.eval_shape(lambda: second.init_weights(jax.random.key(0), (1, TOKENS)))),
        "vae": params["vae"],
        "unet": zeros(unet),
    }
    FlaxStableDiffusionXLPipeline(
        text_encoder=parts["text_encoder"], text_encoder_2=second, vae=parts["vae"], tokenizer=parts["tokenizer"],
        tokenizer_2=parts["tokenizer"], unet=unet, scheduler=FlaxDDIMScheduler(),
    ).save_pretrained(out, params=own)  # fmt: skip
    ids = np.array([[512, 64, 300, 513, 513, 513, 513, 513]], np.int32)
    found = second(ids, params=own["text_encoder_2"])
    np.savez(
        out / "reference.npz",
        input_ids=ids,
        text_embeds=np.asarray(found.text_embeds),
        hidden=np.asarray(found.last_hidden_state),
    )


def main(out):
    """Writes the zip file."""
    with tempfile.TemporaryDirectory() as name, jax.default_matmul_precision("highest"):
        folder = Path(name)
        (folder / "words").mkdir()
        made, params = pipeline(folder / "words")
        made.save_pretrained(folder / "pipeline", params=params)
        parts = {part: getattr(made, part) for part in NAMES}
        half(folder / "half", parts, params)
        safe(folder / "safe", parts, params)
        guide(folder / "guide", parts, params)
        others(folder, parts, params)
        xl(folder / "xl", parts, params)
        for scheduler in SCHEDULERS:
            getattr(diffusers, f"Flax{scheduler}Scheduler")().save_pretrained(folder / "schedulers" / scheduler)
        with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as archive:
            left_out = []
            for file in sorted(folder.rglob("*")):
                inside = file.relative_to(folder)
                same = folder / "pipeline" / Path(*inside.parts[1:])
                if inside.parts[0] in ("words", "pipeline") or not file.is_file():
                    continue
                if same.is_file() and same.read_bytes() == file.read_bytes():
                    left_out.append(f"{inside}\n")
                else:
                    archive.writestr(zipfile.ZipInfo(str(inside)), file.read_bytes(), zipfile.ZIP_LZMA)
            archive.writestr(zipfile.ZipInfo("same.txt"), "".join(left_out), zipfile.ZIP_LZMA)


if __name__ == "__main__":
    main(sys.argv[1])
