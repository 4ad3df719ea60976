"""Runs whose shards are streamed: their batches, over several processes and from any step, and what is refused."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from recorder import Idle
from tiny import losses

from flax_diffusion.core.errors import ConfigError, DataError
from flax_diffusion.core.run import assembly
from flax_diffusion.core.run.loop import fit
from flax_diffusion.core.run.schedule.steps import make_schedule
from flax_diffusion.core.tasks.class_conditional import ClassConditionalConfig
from flax_diffusion.core.tasks.task import task_of
from torch_backend.train import train

RUN = {
    "transformer": {"in_channels": 3, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8},
    "resolution": 8, "train_batch_size": 4, "max_train_steps": 5, "lr_warmup_steps": 0, "eval_batch_size": 1,
    "validation_num_inference_steps": 1, "validation_class_labels": ["0"], "random_flip": True, "stream_shards": 2,
}  # fmt: skip


def write_shards(folder, sizes=(3, 4, 2, 5)):
    """Tar shards of pictures of two classes."""
    folder.mkdir()
    number = 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as opened:
            for _ in range(size):
                pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "PNG")
                for name, data in ((f"{number}.png", content.getvalue()), (f"{number}.cls", b"%d" % (number % 2))):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    opened.addfile(info, io.BytesIO(data))
                number += 1
    return folder


@pytest.fixture
def options(tmp_path):
    return RUN | {"train_data_dir": str(write_shards(tmp_path / "data")), "cache_dir": str(tmp_path / "cache")}


def batches(options, steps, *, host=0, hosts=1, start=0):
    """The examples of some steps, as one of several processes loads them."""
    task = task_of(ClassConditionalConfig(**options))
    source = task.open_source()
    spec, schedule = task.make_spec(source), make_schedule(task.config, len(source), 1)
    loader = assembly.make_loader(
        task, spec, source, schedule, num_steps=steps, process_index=host, process_count=hosts, start_example=start
    )
    with loader:
        return [batch["example_index"] for batch in loader], [
            (batch["pixel_values"], batch["class_labels"]) for batch in loader
        ]


def test_batches_do_not_depend_on_hosts_or_interruptions(options):
    whole, arrays = batches(options, 9)
    halves = [batches(options, 9, host=host, hosts=2)[0] for host in range(2)]
    for step, indices in enumerate(whole):
        np.testing.assert_array_equal(indices, np.concatenate([half[step] for half in halves], axis=1))
    again, later = batches(options, 4, start=5 * 4 + 2)  # of a run that had another batch
    for ours, theirs in zip(again, whole[5:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(later, arrays[5:], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)
    assert np.bincount(np.concatenate(whole[:7], axis=None)).tolist() == [2] * 14  # two epochs


def test_a_run_learns_and_resumes(options, tmp_path):
    whole = train("class_conditional", **options, output_dir=str(tmp_path / "whole"))
    train("class_conditional", **options | {"max_train_steps": 2}, output_dir=str(tmp_path / "part"))
    part = train("class_conditional", **options, output_dir=str(tmp_path / "part"), resume_from_checkpoint="latest")
    assert losses(part) == losses(whole)
    mixed = train("class_conditional", **options | {"stream_shards": None}, output_dir=str(tmp_path / "mixed"))
    assert losses(mixed) != losses(whole)


def test_a_bad_picture_is_replaced_by_the_next_of_its_shard(options, tmp_path):
    with tarfile.open(tmp_path / "data/002.tar", "w") as opened:
        for number, content in ((7, b"not a picture"), (8, (tmp_path / "good.png"))):
            if number == 8:
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(content)
                content = content.read_bytes()
            for name, data in ((f"{number}.png", content), (f"{number}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=r"002\.tar/7\.png"):
        batches(options, 4)
    found = np.concatenate(batches(options | {"skip_bad_images": True}, 4)[0], axis=None).tolist()
    assert 7 not in found
    assert found.count(8) == 2


@pytest.mark.parametrize(
    ("changes", "hosts", "says"),
    [
        ({"stream_shards": 3}, 1, "--stream_shards 3: must divide the 4 pictures of a batch, .*; the nearest .*: 2"),
        ({"stream_shards": 1}, 2, "be a multiple of the 2 processes, .*; the nearest that fits: 2"),
        ({"stream_shards": 8, "train_batch_size": 8}, 1, "be at most the 4 shards that there are; the nearest .*: 4"),
        ({"stream_shards": 2}, 3, "give another batch"),
        ({"cache_latents": True, "center_crop": True}, 1, "--cache_latents reads all pictures before the first"),
        ({"bucket_resolutions": ["auto"]}, 1, "--bucket_resolutions reads all pictures before the first step, and"),
        ({"dataloader_num_workers": 1}, 1, "--dataloader_num_workers 1: threads read the shards of --stream_shards"),
        ({"validation_split": 0.1}, 1, r"--validation_split 0\.1 takes single pictures out of the data, and --stream_"),
        ({"dataset_name": "digits", "train_data_dir": None}, 1, "digits is not in shards; drop it"),
    ],
)  # fmt: skip
def test_what_is_refused(options, changes, hosts, says):
    with pytest.raises((ConfigError, DataError, ValueError), match=says):
        batches(options | changes, 1, hosts=hosts)


def test_repeats_are_refused(options):
    with pytest.raises(ConfigError, match="--stream_shards 2 goes with one folder of shards: name one"):
        task_of(ClassConditionalConfig(**options | {"train_data_dir": options["train_data_dir"] + ":2"})).open_source()


class Idle3(Idle):
    device_count = 3

    def init_state(self):
        raise AssertionError("weights were loaded")


def test_a_run_refuses_before_it_loads_weights(options, tmp_path):
    task = task_of(ClassConditionalConfig(**options | {"output_dir": str(tmp_path / "run"), "train_batch_size": 1}))
    with pytest.raises(ConfigError, match="--stream_shards 2: must divide the 3 pictures of a batch"):
        fit(task, lambda *_: Idle3())
