"""Shards that are streamed: the order of their examples, and which of them are on this machine."""

import dataclasses
import threading
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.test_tar import picture, shards, write

from flax_diffusion.core.data.images.decoding import decode
from flax_diffusion.core.data.order import Streamed
from flax_diffusion.core.data.shards import streaming
from flax_diffusion.core.data.shards.streaming import ShardCache
from flax_diffusion.core.data.sources.labels import with_labels
from flax_diffusion.core.data.sources.opening import open_source
from flax_diffusion.core.errors import DataError

COUNTS = (7, 5, 9, 1, 6, 8)
ORDER = Streamed(counts=COUNTS, lanes=4, batch_examples=8, seed=3)


def epoch(order, number):
    """Indices of the places of an epoch, by lane."""
    rows = order.batch_examples // order.lanes
    lanes = [[] for _ in range(order.lanes)]
    for lane, found in enumerate(lanes):
        for place in range(number * order.lane_examples, (number + 1) * order.lane_examples):
            batch, own = divmod(place, rows)
            at = order.at(batch * order.batch_examples + lane * rows + own)
            assert at.epoch == number
            found.append(at.index)
    return lanes


def test_each_example_comes_once_in_an_epoch():
    """But for fewer than there are lanes, which are others in another epoch; the order differs by seed and epoch."""
    assert ORDER.lane_examples == 9
    seen = [epoch(ORDER, number) for number in range(3)]
    for lanes in seen:
        flat = [index for lane in lanes for index in lane]
        assert len(set(flat)) == len(flat) == sum(COUNTS) // 4 * 4
        assert set(flat) <= set(range(sum(COUNTS)))
    assert seen[0] != seen[1] != seen[2]
    assert epoch(dataclasses.replace(ORDER, seed=4), 0) != seen[0]
    assert epoch(dataclasses.replace(ORDER), 1) == seen[1]  # in any order of asking


def test_a_lane_reads_one_shard_after_the_other():
    starts = np.cumsum([0, *COUNTS])
    for lane in epoch(ORDER, 0):
        parts = (np.searchsorted(starts, lane, side="right") - 1).tolist()
        runs = [part for place, part in enumerate(parts) if place == 0 or parts[place - 1] != part]
        assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_host_needs_the_shards_of_its_lanes_alone(hosts):
    """Those that it is told of ahead are all that it reads, and the next one is told of in time."""
    starts, each = np.cumsum([0, *COUNTS]), ORDER.batch_examples // hosts
    for host in range(hosts):
        told = set()
        for batch in range(12):
            first = batch * ORDER.batch_examples + host * each
            read = [ORDER.at(first + place).index for place in range(each)]
            needed = set((np.searchsorted(starts, read, side="right") - 1).tolist())
            told |= set(ORDER.shards_of(first, each))
            assert needed <= told
            assert len(ORDER.shards_of(first, each)) <= 2 * ORDER.lanes // hosts


def test_an_example_that_cannot_be_used_is_replaced_from_its_shard():
    place = ORDER.at(0)
    starts = np.cumsum([0, *COUNTS])
    shard = int(np.searchsorted(starts, place.index, side="right")) - 1
    tried = [ORDER.following(place, attempt) for attempt in range(COUNTS[shard])]
    assert tried[0] == place.index
    assert sorted(tried) == list(range(starts[shard], starts[shard + 1]))


def tables(folder):
    folder.mkdir()
    for shard, numbers in enumerate(((0, 1, 2), (3, 4))):
        rows = {"image": [picture(number) for number in numbers], "label": [number % 3 for number in numbers]}
        pq.write_table(pa.table(rows), folder / f"train-{shard}.parquet")
    return folder


@pytest.mark.parametrize("make", [shards, tables])
def test_streamed_examples_are_those_that_are_not_streamed(tmp_path, monkeypatch, make):
    """In any order, with one shard kept at a time; what was unpacked is deleted."""
    monkeypatch.setattr(streaming, "_KEPT_OF_EACH", 1)
    monkeypatch.setattr(streaming, "is_local", lambda _: False)  # so that tar shards are copied
    monkeypatch.setattr(streaming, "temporary_folder", lambda: folder)
    folder = tmp_path / "here"
    folder.mkdir()
    options = {"train_data_dir": str(make(tmp_path / "data")), "caption_column": None}
    options |= {"cache_dir": str(tmp_path / "cache"), "max_train_samples": 4}
    whole, streamed = (with_labels(open_source(**options, stream_shards=lanes), None) for lanes in (None, 1))
    assert not list(folder.iterdir())
    assert len(streamed) == len(whole) == 4
    for index in (3, 0, 3, 1, 2):
        ours, theirs = streamed[index], whole[index]
        assert (ours.name, ours.label) == (theirs.name, theirs.label)
        np.testing.assert_array_equal(np.asarray(decode(ours)), np.asarray(decode(theirs)))
        assert (streamed.described(index).name, streamed.described(index).label) == (theirs.name, theirs.label)
        assert len(list(folder.iterdir())) == 1


def test_what_is_not_in_shards_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.png").write_bytes(picture(1))
    with pytest.raises(DataError, match=r"--stream_shards 2: .*data holds no tar or Parquet shards; drop it"):
        open_source(train_data_dir=str(tmp_path / "data"), caption_column=None, stream_shards=2)
    with pytest.raises(DataError, match="--stream_shards 2: digits is not in shards; drop it"):
        open_source(dataset_name="digits", stream_shards=2)


class Opened:
    """Opens shards that are lists, and counts how often."""

    def __init__(self, folder):
        self.folder, self.times = folder, Counter()

    def __call__(self, number):
        self.times[number] += 1
        if number == 9 and self.times[9] == 1:
            raise DataError("no network")
        file = self.folder / str(number)
        file.touch()
        return [number], [file]


def test_the_cache(tmp_path):
    """It keeps the ones that were used last, never removes one that is being read, and tries again what failed."""
    opened = Opened(tmp_path)
    cache = ShardCache(opened, 2)
    cache.fetch([0, 1])
    with cache.reading(0) as first, cache.reading(1):
        assert first == [0]
        with cache.reading(2):  # more than it keeps, because all are being read
            assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
    with cache.reading(3), cache.reading(2):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert opened.times == Counter({0: 1, 1: 1, 2: 1, 3: 1})
    with pytest.raises(DataError, match="no network"), cache.reading(9):
        pass
    with cache.reading(9) as again:
        assert again == [9]
    found = []

    def read(start):
        for place in range(50):
            with cache.reading((start + place) % 6) as shard:
                found.append(((start + place) % 6, shard[0], (tmp_path / str(shard[0])).exists()))

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all(asked == got and there for asked, got, there in found)


def test_a_shard_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "is_local", lambda _: False)
    data = write(tmp_path / "data/a.tar", [("a.png", picture(1))])
    source = open_source(
        train_data_dir=str(data), caption_column=None, stream_shards=1, cache_dir=str(tmp_path / "cache")
    )
    data.unlink()
    with pytest.raises(DataError, match=r"a\.tar cannot be copied to .*No such file"):
        source[0]
