"""A run whose pictures, model and output are in an object store."""

import io
import os
import tarfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from fake_gcs import Store
from PIL import Image
from safetensors.numpy import load, save_file
from tiny import VAE, losses, pictures, stable_diffusion

from flax_diffusion.convert import convert
from flax_diffusion.core.checkpoints import folders, snapshots
from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.sources.parquet import open_parquet
from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.io.files import as_path, copy_file, local_copy, move, write_text
from flax_diffusion.post_hoc_ema import post_hoc_ema
from flax_diffusion.train import train
from torch_backend.backend import TorchBackend
from torch_backend.generate import generate
from torch_backend.generate import main as generate_main
from torch_backend.precompute import precompute
from torch_backend.train import train as torch_train

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # of which the server here knows nothing


@pytest.fixture(scope="module")
def bucket():
    """Its URI; reads and writes go to a server of this process."""
    with Store() as store, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", store.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield "gs://bucket"
        assert not store.unknown


def upload(folder, target):
    for file in folder.rglob("*"):
        if file.is_file():
            path = as_path(f"{target}/{file.relative_to(folder)}")
            path.write_bytes(file.read_bytes())


def test_files(bucket):
    path = as_path(f"{bucket}/deep/notes.txt")
    write_text(path, "first")
    write_text(path, "second")
    assert path.read_text() == "second"
    assert [one.name for one in path.parent.iterdir()] == ["notes.txt"]


def test_a_local_copy_is_of_what_is_there_now(bucket):
    folder = as_path(f"{bucket}/copied")
    write_text(folder / "a.json", "first")
    write_text(folder / "b.txt", "not asked for")
    copy = local_copy(folder, ("*.json",))
    assert [(file.name, file.read_text()) for file in copy.iterdir()] == [("a.json", "first")]
    write_text(folder / "a.json", "second")
    assert (local_copy(folder, ("*.json",)) / "a.json").read_text() == "second"


def test_paths_that_are_not(monkeypatch):
    with pytest.raises(ConfigError, match="gcs://bucket/a: paths of object stores start with gs:// or s3://"):
        as_path("gcs://bucket/a")

    def missing(scheme):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ConfigError, match="gs://bucket/a: Please install gcsfs"):
        as_path("gs://bucket/a")


def test_a_checkpoint_that_was_cut_off(bucket):
    """A store cannot rename, so that such a one bears a whole one's name."""
    run = as_path(f"{bucket}/cut")
    write_text(run / "checkpoint-1/state", "whole")
    folders.seal(run / "checkpoint-1")
    write_text(run / "checkpoint-2/state", "half")
    assert [folder.name for folder in folders.committed(run)] == ["checkpoint-1"]
    folders.clear_leftovers(run)
    assert [folder.name for folder in run.iterdir()] == ["checkpoint-1"]


def test_parquet(bucket, tmp_path):
    file = as_path(f"{bucket}/parquet/train.parquet")
    for value in (10, 200):  # written again, it is read again
        picture = io.BytesIO()
        Image.new("L", (4, 4), value).save(picture, "PNG")
        pq.write_table(pa.table({"image": [picture.getvalue()] * value, "text": ["grey"] * value}), tmp_path / "own")
        copy_file(tmp_path / "own", file)
        source = open_parquet([file], cache_dir=tmp_path / "cache")
        assert len(source) == value
        assert decode(source[value - 1]).getpixel((0, 0))[0] == value


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if not path.is_dir()}


def test_a_file_and_a_folder_get_other_names(bucket):
    run = as_path(f"{bucket}/moves")
    write_text(run / "a/deep/x", "x")
    write_text(run / "a/y", "y")
    move(run / "a/y", run / "a/z")
    assert contents(run / "a") == {"z": "y"}
    move(run / "a", run / "b")
    assert [path.name for path in run.iterdir()] == ["b"]
    assert (contents(run / "b"), contents(run / "b/deep")) == ({"z": "y"}, {"x": "x"})


def test_what_is_set_aside_is_whole(bucket):
    """A damaged checkpoint, one that the run goes back beyond, and one of the same step as a new one."""
    run = as_path(f"{bucket}/aside")

    def save(step, text):
        folder = folders.checkpoint_folder(run, step)
        folders.make_room(folder)
        write_text(folder / "deep/state", text)
        folders.seal(folder)
        return folder

    first, second, third = (save(step, f"state {step}") for step in (1, 2, 3))
    write_text(third / "deep/state", "damaged")
    assert folders.newest_whole(run) == second
    assert [path.name for path in folders.damaged(run)] == ["checkpoint-3.damaged"]
    assert contents(run / "checkpoint-3.damaged/deep") == {"state": "damaged"}
    assert folders.newer_than(run, first) == [second]
    folders.abandon(second)
    save(1, "another")
    assert [path.name for path in folders.committed(run)] == ["checkpoint-1"]
    aside = folders.abandoned(run)
    assert [path.name for path in aside] == ["checkpoint-1.abandoned", "checkpoint-2.abandoned"]
    assert [folders.find_damage(path) for path in aside] == [None, None]
    assert [contents(path / "deep")["state"] for path in aside] == ["state 1", "state 2"]
    folders.clear_leftovers(run)
    assert len(folders.abandoned(run)) == 2


def test_averages_chosen_after_training(bucket, tmp_path):
    """There are no links in a store: what did not train is copied."""
    run = as_path(f"{bucket}/averaged")
    write_text(run / "model_index.json", '{"_class_name": "X", "unet": ["a", "b"], "vae": ["a", "b"]}')
    write_text(run / "vae/config.json", "{}")
    (tmp_path / "unet").mkdir()
    for step in (2, 4, 6):
        save_file({"weight": np.full(3, step, np.float32)}, tmp_path / "unet/x.safetensors", {"format": "pt"})
        snapshots.write(tmp_path, run, 0.1, step)
    snapshots.forget_after(run, 4)
    assert [one.step for one in snapshots.find(run)] == [2, 4]
    made = post_hoc_ema(str(run), 0.1, f"{bucket}/chosen")
    assert load((made / "unet/x.safetensors").read_bytes())["weight"].tolist() == pytest.approx([4, 4, 4])
    assert contents(made / "vae") == {"config.json": "{}"}
    assert (made / "model_index.json").read_text() == (run / "model_index.json").read_text()


@pytest.mark.acceptance
def test_a_run_from_store_to_store(bucket, tmp_path):
    upload(stable_diffusion(tmp_path / "base"), f"{bucket}/base")
    upload(pictures(tmp_path / "data"), f"{bucket}/data")
    options = {
        "pretrained_model_name_or_path": f"{bucket}/base", "train_data_dir": f"{bucket}/data", "resolution": 16,
        "train_batch_size": 2, "max_train_steps": 2, "checkpointing_steps": 1, "checkpoints_total_limit": 1,
        "validation_prompts": ["a dog"], "validation_num_inference_steps": 1, "eval_batch_size": 1,
        "output_dir": f"{bucket}/runs/a",
    }  # fmt: skip
    run = train("text_to_image", **options)
    names = {path.name for path in run.output_dir.iterdir()}
    assert names >= {"config.yaml", "model_index.json", "unet", "tokenizer", "samples", "logs"}
    assert {name for name in names if name.startswith("checkpoint")} == {"checkpoint-2"}
    assert (run / "samples/00000002.png").exists()
    with pytest.raises(ConfigError, match="holds another run"):
        train("text_to_image", **options)
    again = train("text_to_image", **options | {"max_train_steps": 3, "resume_from_checkpoint": "latest"})
    assert (again / "checkpoint-3").is_dir()
    train("text_to_image", **options | {"overwrite_output_dir": True, "max_train_steps": 1})
    assert {path.name for path in run.output_dir.iterdir() if "checkpoint" in path.name} == {"checkpoint-1"}
    assert not (run / "replaced-run").exists()


def test_commands_from_store_to_store(bucket, tmp_path, monkeypatch):
    """Models, LoRA, new words and output, of `convert` and of `generate`; nothing lands in a folder `gs:` here."""
    monkeypatch.chdir(tmp_path)
    base = stable_diffusion(tmp_path / "base", length=16)
    upload(base, f"{bucket}/commands/base")
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{layer}.lora_A.weight": (2, 8), f"{layer}.lora_B.weight": (8, 2)}
    (tmp_path / "added").mkdir()
    arrays = {name: np.ones(shape, np.float32) for name, shape in pair.items()}
    save_file(arrays, tmp_path / "added/pytorch_lora_weights.safetensors")
    save_file({"<toy>": np.ones((2, 16), np.float32)}, tmp_path / "added/learned_embeds.safetensors")
    upload(tmp_path / "added", f"{bucket}/commands/added")
    added = {"lora": [f"{bucket}/commands/added:0.5"], "embeddings": [f"{bucket}/commands/added"]}
    made = convert(f"{bucket}/commands/base", f"{bucket}/commands/made", **added)
    with pytest.raises(ConfigError, match="gs://bucket/commands/made: is there already"):
        convert(f"{bucket}/commands/base", f"{bucket}/commands/made")
    for form, name in (("flax", "unet/diffusion_flax_model.msgpack"), ("single_file", "model.safetensors")):
        assert (convert(str(made), f"{bucket}/commands/{form}", format=form) / name).exists()
    kohya = convert(f"{bucket}/commands/base", f"{bucket}/commands/kohya", lora=added["lora"], format="kohya")
    assert (kohya / "pytorch_lora_weights.safetensors").exists()
    here = convert(base, tmp_path / "here", lora=["added:0.5"], embeddings=["added"])
    options = {"prompt": "a <toy>", "num_inference_steps": 1}
    expected = generate(here, **options)
    assert (generate(str(made), **options) == expected).all()
    words = ["--model", f"{bucket}/commands/base", "--lora", *added["lora"], "--embeddings", *added["embeddings"]]
    call = [*words, "--prompt", "a <toy>", "--num_inference_steps", "1", "--output_dir", f"{bucket}/commands/images"]
    generate_main(call)
    file = as_path(f"{bucket}/commands/images/00000.png")
    with file.open("rb") as stream, Image.open(stream) as image:
        assert np.abs(np.asarray(image).astype(int) - expected[0]).max() <= 1
    assert {path.name for path in file.parent.iterdir()} == {"00000.png", "grid.png"}
    with pytest.raises(ConfigError, match=r"images: holds 00000\.png of an earlier call"):
        generate_main(call)
    assert not (tmp_path / "gs:").exists()
    for command in (lambda: convert(base, "http://host/a"), lambda: generate_main([*words, "--output_dir", "ftp://a"])):
        with pytest.raises(ConfigError, match="paths of object stores start with gs:// or s3://"):
            command()


def test_latents_in_shards(bucket, tmp_path, monkeypatch):
    """Of tar shards in the store; a run copies the shards as it reads them."""
    torch.manual_seed(0)
    AutoencoderKL(**VAE).save_pretrained(tmp_path / "vae")
    options = {
        "transformer": {"in_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
        "vae": str(tmp_path / "vae"), "resolution": 16, "center_crop": True, "train_batch_size": 2,
        "max_train_steps": 3, "validation_num_inference_steps": 1, "eval_batch_size": 1,
    }  # fmt: skip
    data = pictures(tmp_path / "data")
    for shard in range(2):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w") as opened:
            for number in range(3 * shard, 3 * shard + 3):
                opened.add(data / f"{number}.png", f"{number}.png")
                label = tarfile.TarInfo(f"{number}.cls")
                label.size = 1
                opened.addfile(label, io.BytesIO(b"%d" % (number % 2)))
        as_path(f"{bucket}/tars/{shard:03}.tar").write_bytes(target.getvalue())
        (tmp_path / "tars").mkdir(exist_ok=True)
        (tmp_path / f"tars/{shard:03}.tar").write_bytes(target.getvalue())
    monkeypatch.setattr("flax_diffusion.core.run.shards.latents.SHARD_BYTES", 4 * 2176)
    pattern = bucket + "/tars/{000..001}.tar"
    made = {"latents_dir": f"{bucket}/latents", "cache_dir": str(tmp_path / "cache"), "train_data_dir": pattern}
    folder = precompute("class_conditional", **options | made)
    assert sorted(path.name for path in folder.iterdir()) == [
        "latents-00000-of-00002.array_record", "latents-00001-of-00002.array_record", "manifest.json",
    ]  # fmt: skip
    kept = torch_train("class_conditional", **options, latents_dir=str(folder), output_dir=str(tmp_path / "kept"))
    read = options | {"cache_latents": True, "train_data_dir": f"{bucket}/tars", "cache_dir": str(tmp_path / "cache")}
    assert losses(torch_train("class_conditional", **read, output_dir=str(tmp_path / "read"))) == losses(kept)
    streamed = options | {"stream_shards": 2, "cache_dir": str(tmp_path / "cache")}
    found = [
        losses(torch_train("class_conditional", **streamed, train_data_dir=name, output_dir=str(tmp_path / where)))
        for where, name in (("there", f"{bucket}/tars"), ("here", str(tmp_path / "tars")))
    ]
    assert found[0] == found[1]


def test_latents_and_embeddings_that_are_kept(bucket, tmp_path, monkeypatch, caplog):
    """Of pictures in the store; a damaged shard there is deleted, and made anew by the next run."""
    upload(pictures(tmp_path / "data"), f"{bucket}/kept-data")
    options = {
        "pretrained_model_name_or_path": str(stable_diffusion(tmp_path / "base")), "resolution": 16,
        "train_data_dir": f"{bucket}/kept-data", "train_batch_size": 2, "max_train_steps": 2, "center_crop": True,
        "cache_latents": True, "pre_compute_text_embeddings": True, "precomputed_dir": f"{bucket}/kept",
    }  # fmt: skip
    folder = precompute("text_to_image", **options)
    kinds = {path.name.partition("-")[0]: path for path in folder.iterdir()}
    assert sorted(kinds) == ["embeddings", "posteriors"]
    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "posteriors", None)
        patch.setattr(TorchBackend, "embed_prompts", None)
        kept = torch_train("text_to_image", **options, output_dir=str(tmp_path / "kept"))
    (shard,) = [path for path in kinds["posteriors"].iterdir() if path.name.startswith("shard")]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    again = torch_train("text_to_image", **options, output_dir=str(tmp_path / "again"))
    assert f"{shard} is damaged" in caplog.text
    assert losses(again) == losses(kept)
    assert shard.read_bytes() == content
