"""A run whose pictures, model and output are in an object store."""

import os

import fsspec
import pytest
from fake_gcs import Store
from tiny import pictures, stable_diffusion

from flax_diffusion.core.errors import ConfigError
from flax_diffusion.core.files import as_path, write_text
from flax_diffusion.train import train

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # of which the server here knows nothing


@pytest.fixture(scope="module")
def bucket():
    """Its URI; reads and writes go to a server of this process."""
    with Store() as store, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", store.url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield "gs://bucket"


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


def test_a_run_from_store_to_store(bucket, tmp_path):
    upload(stable_diffusion(tmp_path / "base"), f"{bucket}/base")
    upload(pictures(tmp_path / "data"), f"{bucket}/data")
    options = {
        "pretrained_model_name_or_path": f"{bucket}/base", "train_data_dir": f"{bucket}/data", "resolution": 16,
        "train_batch_size": 2, "max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 2,
        "validation_prompts": ["a dog"], "validation_num_inference_steps": 1, "eval_batch_size": 1,
        "output_dir": f"{bucket}/runs/a",
    }  # fmt: skip
    run = train("text_to_image", **options)
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "model_index.json", "unet", "tokenizer", "samples", "logs"}
    assert {name for name in names if name.startswith("checkpoint")} == {"checkpoint-2", "checkpoint-3"}
    assert (run / "samples/00000003.png").exists()
    with pytest.raises(ConfigError, match="holds another run"):
        train("text_to_image", **options)
    again = train("text_to_image", **options | {"max_train_steps": 4, "resume_from_checkpoint": "latest"})
    assert (again / "checkpoint-4").is_dir()
