"""Tiny models, pipelines and runs that many tests share."""

from collections.abc import Sequence
from pathlib import Path

from flax_diffusion.core.objectives import noise_schedule
from flax_diffusion.core.objectives.ddpm import ddpm

UNET = {
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
ONE_BLOCK = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
"""For tests of what is around the model."""
CONDITION_UNET = {
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
TEXT_ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
VAE = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}
RUN = {
    "dataset_name": "digits",
    "resolution": 8,
    "unet": UNET,
    "train_batch_size": 8,
    "max_train_steps": 6,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 2,
    "eval_batch_size": 4,
    "validation_num_inference_steps": 2,
    "max_train_samples": 40,
}
TEXT_RUN = RUN | {
    "unet": CONDITION_UNET,
    "text_encoder": TEXT_ENCODER,
    "train_text_encoder": True,
    "vae": None,
    "proportion_empty_prompts": 0.2,
    "validation_prompts": ["a handwritten seven", "a handwritten two"],
    "validation_guidance_scale": 2.0,
}

OBJECTIVE = ddpm(noise_schedule.alphas_cumprod(noise_schedule.betas()), "epsilon")
"""Of DDPM, over 1,000 timesteps."""


def stable_diffusion(
    folder: Path,
    prediction_type: str = "epsilon",
    length: int = 8,
    vae: dict[str, object] | None = None,
    text_encoder: dict[str, object] | None = None,
    unet: dict[str, object] | None = None,
) -> Path:
    """A Stable Diffusion pipeline with random weights, written by Diffusers and Transformers."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from flax_diffusion.core.data.captions import train_tokenizer

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a handwritten seven", "a photo of a dog"], 700, length)
    sizes = TEXT_ENCODER | {"max_position_embeddings": length} | (text_encoder or {})
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ids, **sizes)).eval()
    latent = {"in_channels": 4, "out_channels": 4, "sample_size": 8}
    denoiser = UNet2DConditionModel(**CONDITION_UNET | latent | (unet or {}))
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE | (vae or {})),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def stable_diffusion_xl(
    folder: Path,
    length: int = 40,
    unet: dict[str, object] | None = None,
    vae: dict[str, object] | None = None,
    **index: object,
) -> Path:
    """A Stable Diffusion XL pipeline with random weights, written by Diffusers and Transformers."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from flax_diffusion.core.data.captions import train_tokenizer

    torch.manual_seed(0)
    tokenizer, tokenizer_2 = (
        train_tokenizer(["a handwritten seven", "a photo of a dog"], size, length) for size in (700, 690)
    )
    tokenizer_2.pad_token = "!"

    def encoder(kind, words, **sizes):
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        sizes = TEXT_ENCODER | {"num_hidden_layers": 2, "max_position_embeddings": length} | sizes
        return kind(CLIPTextConfig(vocab_size=len(words), **ids, **sizes)).eval()

    sizes = {
        "in_channels": 4, "out_channels": 4, "sample_size": 8, "cross_attention_dim": 16 + 24,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "use_linear_projection": True,
        "projection_class_embeddings_input_dim": 6 * 4 + 12,
    }  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE | (vae or {})),
        text_encoder=encoder(CLIPTextModel, tokenizer),
        text_encoder_2=encoder(
            CLIPTextModelWithProjection, tokenizer_2, hidden_size=24, hidden_act="gelu", projection_dim=12
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=UNet2DConditionModel(**CONDITION_UNET | sizes | (unet or {})),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        **{"add_watermarker": False} | index,
    )
    pipeline.save_pretrained(folder)
    return folder


def rewrite(file: Path, **changes: object) -> None:
    """Changes keys of a JSON file."""
    import json

    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def pictures(folder: Path, count: int = 6, size: int = 24) -> Path:
    """A folder of drawn RGB pictures with metadata.jsonl captions."""
    import json

    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size, size + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": f"a photo of a dog number {number}"}
        rows.append(json.dumps(row | {"label": number % 2, "kind": "big" if number < 3 else "small"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def shaped_pictures(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """A folder of such pictures of given widths and heights."""
    import json

    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
        rows.append(json.dumps({"file_name": f"{number:04d}.png", "text": f"a photo of a dog number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def paired_pictures(folder: Path, count: int = 6, size: int = 24) -> Path:
    """A folder of such pictures whose metadata also name, in a subfolder, a conditioning image of each."""
    import json

    from PIL import Image, ImageOps

    rows = [json.loads(line) for line in (pictures(folder, count, size) / "metadata.jsonl").read_text().splitlines()]
    (folder / "conditioning").mkdir()
    for row in rows:
        row["conditioning_image_file_name"] = f"conditioning/{row['file_name']}"
        with Image.open(folder / row["file_name"]) as picture:
            ImageOps.invert(picture).save(folder / row["conditioning_image_file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def losses(folder: Path) -> list[float]:
    """The logged losses of a run; none, if it logged none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    logged = "train/loss" in events.Tags()["scalars"]
    return [event.value for event in events.Scalars("train/loss")] if logged else []
