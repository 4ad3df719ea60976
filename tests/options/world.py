"""The folders that options name: models, data in several forms, a tokenizer."""

import json
import shutil
from io import BytesIO
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from PIL import Image
from tiny import ONE_BLOCK, UNET, VAE, paired_pictures, pictures, stable_diffusion

from flax_diffusion.core.data.captions import train_tokenizer

DIT = {
    "in_channels": 3, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "patch_size": 4,
}  # fmt: skip
COLOUR_UNET = UNET | ONE_BLOCK | {"in_channels": 3, "out_channels": 3}


def png(value):
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{value}.png"}


def make(folder):
    """Writes all of them."""
    world = SimpleNamespace(folder=folder)
    world.base = stable_diffusion(folder / "base", length=48)
    world.other = stable_diffusion(folder / "other", "v_prediction", length=48)
    world.pixels = stable_diffusion(folder / "pixels", length=48, unet={"in_channels": 3, "out_channels": 3})
    torch.manual_seed(0)
    DDPMPipeline(UNet2DModel(**COLOUR_UNET), DDPMScheduler()).save_pretrained(folder / "ddpm")
    world.classes_ddpm = folder / "classes_ddpm"
    DDPMPipeline(UNet2DModel(**COLOUR_UNET, num_class_embeds=6), DDPMScheduler()).save_pretrained(world.classes_ddpm)
    index = json.loads((world.classes_ddpm / "model_index.json").read_text())
    names = {str(number): str(number) for number in range(5)}
    (world.classes_ddpm / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    world.control = folder / "control"
    unet = UNet2DConditionModel.from_pretrained(world.base / "unet")
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=[8, 16]).save_pretrained(world.control)
    world.ddpm, world.vae = folder / "ddpm", folder / "vae"
    AutoencoderKL(**VAE).save_pretrained(world.vae)
    for name in ("base", "ddpm", "classes_ddpm"):
        shutil.copytree(folder / name, folder / f"{name}-half")
        for path in (folder / f"{name}-half").rglob("*.safetensors"):
            shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    world.data, world.more = pictures(folder / "data"), pictures(folder / "more", 7, size=20)
    world.paired, world.paired_more = paired_pictures(folder / "paired"), paired_pictures(folder / "paired_more", 7, 20)
    world.edges = world.paired / "conditioning"
    world.unfilled = folder / "unfilled"  # whose class pictures each run has to draw
    world.classes, world.animals = pictures(folder / "classes", 4), pictures(folder / "animals", 6, size=20)
    world.bad = pictures(folder / "bad")
    (world.bad / "1.png").write_bytes(b"not a picture")
    for path in (world.classes, world.animals):
        (path / "metadata.jsonl").unlink()
    world.words = pictures(folder / "words")
    rows = [json.loads(line) for line in (world.words / "metadata.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"words": f"a cat number {number}"}) for number, row in enumerate(rows)]
    (world.words / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    world.columns = folder / "columns"
    world.columns.mkdir()
    columns = {
        "image": [png(n) for n in range(4)],
        "picture": [png(n + 9) for n in range(4)],
        "text": ["a dog"] * 4,
        "label": [0, 1] * 2,
    }
    columns |= {"conditioning_image": columns["picture"], "edges": columns["image"]}
    pq.write_table(pa.table(columns), world.columns / "data.parquet")
    world.tokenizer = folder / "another_tokenizer"
    train_tokenizer(["quick brown foxes jump", "over lazy dogs"], 700, 48).save_pretrained(world.tokenizer)
    kept = {name: columns[name] for name in ("image", "text", "conditioning_image", "label")}
    world.table = datasets.Dataset.from_dict(kept).cast_column("image", datasets.Image())
    world.table = world.table.cast_column("conditioning_image", datasets.Image())
    return world
