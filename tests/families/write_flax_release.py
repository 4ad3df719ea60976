"""Writes `flax_release.zip`: a tiny FlaxStableDiffusionPipeline of the last Flax release, and what it computes.

Run it in an environment of its own, which PyTorch need not be in:

    pip install diffusers==0.39.0 transformers==4.57.6 jax==0.10.2 flax==0.12.8
    python tests/families/write_flax_release.py tests/families/flax_release.zip

The zip holds `pipeline/`, from that release's `save_pretrained`, and `reference.npz`: inputs of each model and its
outputs. Weights have three values each, so that the file compresses well.

`unet` in `reference.npz` is what the release computes. Its UNet departs from PyTorch's in two constants: GEGLU takes
the tanh approximation of the GELU, and the group norm before attention adds 1e-5 to the variance instead of 1e-6.
`unet_exact` is the same code with PyTorch's two constants.
"""

import functools
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from diffusers import FlaxAutoencoderKL, FlaxPNDMScheduler, FlaxStableDiffusionPipeline, FlaxUNet2DConditionModel
from diffusers.models import attention_flax
from diffusers.pipelines.stable_diffusion import safety_checker_flax
from diffusers.pipelines.stable_diffusion.safety_checker_flax import FlaxStableDiffusionSafetyChecker
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTokenizer, FlaxCLIPTextModel
from transformers.models.clip.tokenization_clip import bytes_to_unicode

TOKENS = 8


def tokenizer(folder):
    """A CLIP tokenizer that knows single letters."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def weights(shapes):
    """Three values a tensor, and 1 ± a tenth for the scales of norms."""
    rng, made = np.random.default_rng(0), {}
    for path, leaf in sorted(flatten_dict(shapes).items()):
        steps = rng.integers(-1, 2, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        made[path] = 1 + np.float32(0.1) * steps if path[-1] == "scale" else steps / np.float32(np.sqrt(fan_in))
    return unflatten_dict(made)


def pipeline(folder):
    """The pipeline and its weights."""
    # The release's own calls `jnp.clip` by an argument that newer JAX has not; only shapes are asked for here.
    safety_checker_flax.jax_cosine_distance = lambda left, right: left @ right.T
    words = tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=TOKENS, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    eyes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = CLIPConfig(
        text_config=text.to_dict(), vision_config=eyes | {"image_size": 8, "patch_size": 4}, projection_dim=8
    )
    made = FlaxStableDiffusionPipeline(
        vae=FlaxAutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, sample_size=16,
        ),
        text_encoder=FlaxCLIPTextModel(text, _do_init=False),
        tokenizer=words,
        unet=FlaxUNet2DConditionModel(
            sample_size=8, block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1, attention_head_dim=2, cross_attention_dim=16,
            split_head_dim=True, use_memory_efficient_attention=False,
        ),
        scheduler=FlaxPNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=FlaxStableDiffusionSafetyChecker(checker, _do_init=False, input_shape=(1, 8, 8, 3)),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    )  # fmt: skip
    key = jax.random.key(0)
    shapes = {
        "vae": jax.eval_shape(made.vae.init_weights, key),
        "unet": jax.eval_shape(made.unet.init_weights, key),
        "text_encoder": jax.eval_shape(lambda: made.text_encoder.init_weights(key, (1, TOKENS))),
        "safety_checker": jax.eval_shape(lambda: made.safety_checker.init_weights(key, (1, 8, 8, 3))),
    }
    return made, {name: weights(tree) for name, tree in shapes.items()}


def exact_constants():
    """Gives the release's attention PyTorch's GELU, and PyTorch's epsilon before attention."""
    plain = nn.GroupNorm

    def group_norm(*args, **kwargs):
        return plain(*args, **kwargs | {"epsilon": 1e-6})

    attention_flax.nn = type("nn", (), dict(vars(nn)))
    attention_flax.nn.GroupNorm = staticmethod(group_norm)
    attention_flax.nn.gelu = staticmethod(functools.partial(nn.gelu, approximate=False))


def reference(made, params):
    """Inputs of each model and its outputs, in PyTorch's layout."""
    rng = np.random.default_rng(1)
    pixels = rng.uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
    sample = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    timesteps = np.array([7, 801], np.int32)
    ids = made.prepare_inputs(["a dog", "seven"])
    hidden = np.asarray(made.text_encoder(ids, params=params["text_encoder"])[0])
    unet = functools.partial(made.unet.apply, {"params": params["unet"]}, sample, jax.numpy.asarray(timesteps), hidden)
    vae = functools.partial(made.vae.apply, {"params": params["vae"]})
    found = {
        "pixels": pixels, "sample": sample, "timesteps": timesteps, "input_ids": np.asarray(ids), "hidden": hidden,
        "mean": np.asarray(vae(pixels, method="encode").latent_dist.mean).transpose(0, 3, 1, 2),
        "decoded": np.asarray(vae(sample, method="decode").sample),
        "unet": np.asarray(unet().sample),
    }  # fmt: skip
    exact_constants()
    return found | {"unet_exact": np.asarray(unet().sample)}


def main(out):
    """Writes the zip file."""
    with tempfile.TemporaryDirectory() as name, jax.default_matmul_precision("highest"):
        folder = Path(name)
        (folder / "words").mkdir()
        made, params = pipeline(folder / "words")
        made.save_pretrained(folder / "pipeline", params=params)
        np.savez(folder / "reference.npz", **reference(made, params))
        files = [folder / "reference.npz", *sorted((folder / "pipeline").rglob("*"))]
        with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as archive:
            for file in files:
                if file.is_file():
                    entry = zipfile.ZipInfo(str(file.relative_to(folder)))
                    archive.writestr(entry, file.read_bytes(), zipfile.ZIP_LZMA)


if __name__ == "__main__":
    main(sys.argv[1])
