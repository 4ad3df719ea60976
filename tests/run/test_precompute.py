"""What is computed once before training: the same run with it as without, on both backends."""

import importlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hosts import together
from PIL import Image
from proofs import proof
from recorder import Idle
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import RUN, losses, paired_pictures, pictures, stable_diffusion, stable_diffusion_xl

from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data import batches, store
from flax_diffusion.core.data.captions import train_tokenizer
from flax_diffusion.core.errors import ConfigError, DataError, NonFiniteError
from flax_diffusion.core.run import precompute
from flax_diffusion.core.run.shards import encoding
from flax_diffusion.core.tasks.task import task_of
from flax_diffusion.jax_backend.backend import JaxBackend
from flax_diffusion.train import train
from torch_backend.backend import TorchBackend


@pytest.fixture
def options(tmp_path):
    return {
        "pretrained_model_name_or_path": str(stable_diffusion(tmp_path / "base")),
        "train_data_dir": str(pictures(tmp_path / "data", 5)), "resolution": 16, "train_batch_size": 2,
        "max_train_steps": 6, "center_crop": True, "random_flip": True, "proportion_empty_prompts": 0.3,
        "learning_rate": 1e-3, "lr_warmup_steps": 0, "output_dir": str(tmp_path / "run"),
        "validation_prompts": ["a dog"], "validation_num_inference_steps": 2, "eval_batch_size": 1,
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["torch_backend", proof("flax_diffusion")])
def test_the_losses_are_those_of_a_run_without(options, tmp_path, backend):
    """Over three epochs with flips, empty prompts and a broken picture; the models come back for the samples."""
    start = importlib.import_module(f"{backend}.train").train
    (tmp_path / "data/1.png").write_bytes(b"not a picture")
    options |= {"skip_bad_images": True}
    cached = {"cache_latents": True, "pre_compute_text_embeddings": True, "dataloader_num_workers": 1}
    runs = [
        start("text_to_image", **options | changes | {"output_dir": str(tmp_path / name)})
        for name, changes in (("each", {}), ("once", cached))
    ]
    np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=1e-5)
    assert not (runs[1] / "precomputed").exists()
    assert (runs[1] / "samples/00000006.png").is_file()


def test_a_picture_that_cannot_be_read(options, tmp_path):
    (tmp_path / "data/1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"1\.png"):
        train("text_to_image", **options, cache_latents=True)


def test_latents_that_are_not_finite(options, tmp_path):
    file = tmp_path / "base/vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"encoder.conv_in.bias": np.full_like(weights["encoder.conv_in.bias"], np.nan)}, file)
    with pytest.raises(NonFiniteError, match=r"the latents of .*0\.png are not finite: check the picture, or"):
        train("text_to_image", **options, cache_latents=True)


def test_what_cannot_be_cached(options, tmp_path):
    with pytest.raises(ConfigError, match="crops at random would differ from epoch to epoch: add --center_crop"):
        train("text_to_image", **options | {"cache_latents": True, "center_crop": False})
    with pytest.raises(ConfigError, match="the model trains on pixels, there is no autoencoder"):
        train("unconditional", **RUN, cache_latents=True, center_crop=True, output_dir=str(tmp_path / "run"))


BACKENDS = ("flax_diffusion", "torch_backend")
ONCE = {"cache_latents": True, "pre_compute_text_embeddings": True}


class Counted:
    """Counts what the models of both backends compute: pictures that were read for it, and prompts."""

    def __init__(self, monkeypatch):
        self.calls, self.pictures, self.prompts = 0, [], []
        decode, posteriors = encoding.decode, {}

        def read(record):
            self.pictures.append(Path(record.name).name)
            return decode(record)

        monkeypatch.setattr(encoding, "decode", read)
        for kind in (JaxBackend, TorchBackend):
            posteriors[kind], embed = kind.posteriors, kind.embed_prompts

            def encode(backend, pixels):
                self.calls += 1
                return posteriors[type(backend)](backend, pixels)

            def embed_prompts(backend, prompts, embed=embed):
                self.prompts += prompts
                return embed(backend, prompts)

            monkeypatch.setattr(kind, "posteriors", encode)
            monkeypatch.setattr(kind, "embed_prompts", embed_prompts)

    def taken(self):
        """What was computed since the last call: the pictures, and the prompts, each once."""
        assert bool(self.calls) == bool(self.pictures)
        seen = sorted(self.pictures), sorted(set(self.prompts))
        self.calls, self.pictures, self.prompts = 0, [], []
        return seen


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


@pytest.fixture
def kept(options, tmp_path, caplog):
    """The options of runs that keep what they compute."""
    caplog.set_level("INFO")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/notes.txt").write_text("of something else")
    changes = {"precomputed_dir": str(tmp_path / "kept"), "validation_prompts": [], "max_train_steps": 3}
    return options | ONCE | changes


def run(kept, name, backend="torch_backend", task="text_to_image", command="train", **changes):
    module = importlib.import_module(f"{backend}.{command}")
    output_dir = str(Path(kept["output_dir"]).with_name(name))
    return getattr(module, command)(task, **kept | changes | {"output_dir": output_dir})


def folders(kept, kind="posteriors"):
    return sorted(Path(kept["precomputed_dir"]).glob(f"{kind}-*"))


NAMES = [f"{number}.png" for number in range(5)]
PROMPTS = ["", *(f"a photo of a dog number {number}" for number in range(5))]


@pytest.mark.parametrize("first", ["torch_backend", proof("flax_diffusion")])
def test_a_second_run_computes_nothing(kept, counted, first):
    """Of either backend, and not of a task with other pictures to follow either."""
    without = losses(run(kept, "without", first, precomputed_dir=None))
    assert counted.taken() == (NAMES, PROMPTS)
    one = run(kept, "one", first)
    assert counted.taken() == (NAMES, PROMPTS)
    two = run(kept, "two", first, dataloader_num_workers=1)
    assert losses(one) == losses(two) == without
    (second,) = set(BACKENDS) - {first}
    three = run(kept, "three", second)
    assert counted.taken() == ([], [])
    np.testing.assert_allclose(losses(three), losses(one), rtol=1e-5)
    assert (Path(kept["precomputed_dir"]) / "notes.txt").exists()
    assert not (one / "precomputed").exists()


def test_a_folder_in_the_run_stays(kept, counted, tmp_path):
    """Even with the name of the scratch folder of a run that keeps nothing."""
    own = str(tmp_path / "run/precomputed")
    run(kept, "run", precomputed_dir=own)
    counted.taken()
    run(kept, "two", precomputed_dir=own)
    assert counted.taken() == ([], [])


def test_tasks_share_pictures(kept, counted, tmp_path):
    """Also under names of their own: the pictures that a ControlNet's data have are those of another folder."""
    data = paired_pictures(tmp_path / "paired", 5)
    kept = kept | {"image_interpolation_mode": "bilinear"}  # of which the two have other defaults
    run(kept, "one")
    counted.taken()
    run(kept, "two", task="controlnet", train_data_dir=str(data))
    assert counted.taken() == ([], [])
    assert len(folders(kept)) == len(folders(kept, "embeddings")) == 1


def test_new_and_changed_pictures(kept, counted, tmp_path, caplog):
    """Only these are encoded; one that has merely been written again is not."""
    run(kept, "one")
    counted.taken()
    data = pictures(tmp_path / "data", 6)
    assert "changed since" not in caplog.text
    run(kept, "two")
    assert counted.taken() == (["5.png"], ["a photo of a dog number 5"])
    shutil.copy(data / "5.png", tmp_path / "five.png")
    shutil.copy(data / "0.png", data / "5.png")
    run(kept, "three")
    assert counted.taken() == ([], [])
    Image.new("RGB", (24, 30), "red").save(data / "2.png")
    run(kept, "four")
    assert counted.taken() == (["2.png"], [])
    assert f"changed since they were encoded: 1 pictures, {data / '2.png'}" in caplog.messages
    again = pictures(tmp_path / "again", 6)
    Image.new("RGB", (24, 30), "red").save(again / "2.png")
    shutil.copy(again / "0.png", again / "5.png")
    np.testing.assert_array_equal(
        losses(run(kept, "four-without", train_data_dir=str(again), precomputed_dir=None)), losses(tmp_path / "four")
    )
    assert len(folders(kept)) == 1


def other_vae(tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL.from_pretrained(tmp_path / "base/vae").save_pretrained(tmp_path / "vae")
    return {"vae": str(tmp_path / "vae")}


def changed_vae(tmp_path):
    file = tmp_path / "base/vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: array * np.float32(1.01) for name, array in weights.items()}, file)
    return {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: {"resolution": 32}, "picture resolution 16 → 32"),
        (lambda _: {"image_interpolation_mode": "nearest"}, "picture interpolation 'lanczos' → 'nearest'"),
        (lambda _: {"random_flip": False}, "picture random_flip True → False"),
        (lambda _: {"resize_mode": "stretch"}, "picture resize_mode 'crop' → 'stretch'"),
        (lambda _: {"mixed_precision": "bf16"}, "precision 'no' → 'bf16'"),
        (changed_vae, "autoencoder weights '[0-9a-f]{16}' → '[0-9a-f]{16}'"),
    ],
)
def test_what_latents_depend_on(kept, counted, tmp_path, caplog, change, says):
    kept = kept | {"pre_compute_text_embeddings": False, "max_train_steps": 1}
    run(kept, "one", command="precompute")
    counted.taken()
    changes = change(tmp_path)
    run(kept, "two", command="precompute", **changes)
    assert counted.taken() == (NAMES, [])
    (said,) = [text for text in caplog.messages if "are made anew" in text]
    assert re.fullmatch(
        rf"posteriors are made anew in .*, because they differ from those in posteriors-\w+: {says}", said
    )
    assert len(folders(kept)) == 2
    run(kept, "three", command="precompute", **changes)
    assert counted.taken() == ([], [])


def test_the_same_autoencoder_elsewhere(kept, counted, tmp_path):
    run(kept, "one", command="precompute")
    counted.taken()
    run(kept, "two", command="precompute", **other_vae(tmp_path))
    assert counted.taken() == ([], [])


def test_what_embeddings_depend_on(kept, counted, tmp_path, caplog):
    kept = kept | {"cache_latents": False}
    run(kept, "one", command="precompute")
    counted.taken()
    file = next((tmp_path / "base/text_encoder").glob("*.safetensors"))
    save_file({name: array * np.float32(1.01) for name, array in load_file(file).items()}, file, {"format": "pt"})
    run(kept, "two", command="precompute")
    assert counted.taken() == ([], PROMPTS)
    train_tokenizer(["another cat", "a photo of a dog"], 700, 8).save_pretrained(tmp_path / "words")
    run(kept, "three", command="precompute", tokenizer_name=str(tmp_path / "words"))
    assert counted.taken() == ([], PROMPTS)
    one, two = (text.partition(": ")[2] for text in caplog.messages if "are made anew" in text)
    assert re.fullmatch(r"text encoders \w+ weights '\w+' → '\w+'", one)
    assert re.fullmatch(r"tokenizers input_ids '\w+' → '\w+'", two)


def test_embeddings_in_bfloat16(kept, counted):
    """They take half of the space, here and in a run that keeps nothing."""
    exact = run(kept, "one")
    assert counted.taken() == (NAMES, PROMPTS)
    rounded = run(kept, "two", precomputed_dtype="bfloat16")
    assert counted.taken() == ([], PROMPTS)
    once = run(kept, "three", precomputed_dtype="bfloat16", precomputed_dir=None)
    assert losses(rounded) == losses(once) != losses(exact)
    np.testing.assert_allclose(losses(rounded), losses(exact), rtol=2e-3)
    stored = {}
    for folder in folders(kept, "embeddings"):
        (shard,) = folder.glob("shard-*")
        with safe_open(shard, framework="pt") as file:
            tensor = file.get_tensor("text_embeddings")
        stored[str(tensor.dtype)] = tensor.numel() * tensor.element_size()
    assert stored["torch.float32"] == 2 * stored["torch.bfloat16"]


def test_a_precompute_that_was_killed_goes_on(kept, counted, monkeypatch):
    """With the shards that were whole; after the last of these the process was killed."""
    monkeypatch.setattr(store, "SHARD_ROWS", 2)
    write, written = store.Writer.flush, []

    def killed(writer):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(writer)
        write(writer)

    kept = kept | {"pre_compute_text_embeddings": False}
    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "flush", killed)
        with pytest.raises(KeyboardInterrupt):
            run(kept, "one", command="precompute")
    counted.taken()
    run(kept, "two", command="precompute")
    assert counted.taken() == (["4.png"], [])


def test_a_damaged_shard(kept, counted, monkeypatch, caplog):
    """It is named, and what it held is computed again."""
    monkeypatch.setattr(store, "SHARD_ROWS", 2)
    one = run(kept, "one")
    counted.taken()
    (folder,) = folders(kept)
    shards = {shard: [Path(row.name).name for row in store.open_shard(shard).rows] for shard in folder.glob("shard-*")}
    cut, flipped, _ = shards
    cut.write_bytes(cut.read_bytes()[:-4])
    content = bytearray(flipped.read_bytes())
    content[-4] ^= 1
    flipped.write_bytes(content)
    two = run(kept, "two")
    assert counted.taken() == (sorted(shards[cut] + shards[flipped]), [])
    assert losses(two) == losses(one)
    said = [text for text in caplog.messages if "is damaged" in text]
    assert sorted(text.partition(" ")[0] for text in said) == sorted(map(str, (cut, flipped)))


@pytest.mark.parametrize("backend", ["torch_backend", proof("flax_diffusion")])
def test_the_command(kept, counted, backend, caplog, tmp_path):
    """It fills the folder, and makes no run."""
    module = importlib.import_module(f"{backend}.precompute")
    words = ["text_to_image", "--cache_latents", "--pre_compute_text_embeddings", "--center_crop", "--random_flip"]
    names = ("pretrained_model_name_or_path", "train_data_dir", "resolution", "precomputed_dir", "output_dir")
    words += [word for name in names for word in (f"--{name}", str(kept[name]))]
    module.main([*words, "--proportion_empty_prompts", "0.3"])
    assert counted.taken() == (NAMES, PROMPTS)
    assert caplog.messages[-1] == f"latents and text embeddings are in {kept['precomputed_dir']}"
    assert not (tmp_path / "run").exists()
    run(kept, "one", backend)
    assert counted.taken() == ([], [])
    with pytest.raises(ConfigError, match="there is no folder to fill: add --precomputed_dir FOLDER, with --cache_lat"):
        module.main(["unconditional", "--dataset_name", "digits"])


def test_folders_that_cannot_be_used(kept, tmp_path):
    def refused(**changes):
        with pytest.raises(ConfigError) as caught:
            run(kept, "refused", **changes)
        return str(caught.value)

    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", "/proc/self/fdinfo"):
        says = refused(precomputed_dir=str(folder))
        assert re.fullmatch(rf"--precomputed_dir {folder}: cannot be written \(.+\); name another folder", says)
    run(kept, "one", command="precompute")
    (folder,) = folders(kept)
    (folder / "manifest.json").write_text("{")
    says = refused(resolution=24)
    assert says.startswith(f"--precomputed_dir {kept['precomputed_dir']}: {folder}/manifest.json cannot be read (")
    assert says.endswith("); delete its folder, or name another one")


@pytest.mark.parametrize(
    ("task", "changes", "says"),
    [
        ("text_to_image", {"cache_latents": False, "pre_compute_text_embeddings": False},
         "add --cache_latents or --pre_compute_text_embeddings, or drop it"),
        ("textual_inversion", {}, "add --cache_latents, or drop it"),
        ("text_to_image", {"precomputed_dtype": "bfloat16", "pre_compute_text_embeddings": False},
         "--precomputed_dtype bfloat16 is of text embeddings .*: add --pre_compute_text_embeddings, or drop it"),
        ("text_to_image", {"train_text_encoder": True}, "changes what comes of it: drop one"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(kept, task, changes, says):
    if task == "textual_inversion":
        kept = {name: kept[name] for name in ("train_data_dir", "precomputed_dir", "output_dir")}
        kept |= {"placeholder_token": "<toy>", "initializer_token": "dog"}
    with pytest.raises(ConfigError, match=says):
        run(kept, "refused", task=task, **changes)


def test_bad_pictures(kept, counted, tmp_path):
    """One that cannot be read is passed over again; with others there it does not hold up the run."""
    (tmp_path / "data/1.png").write_bytes(b"not a picture")
    kept = kept | {"skip_bad_images": True}
    one = run(kept, "one")
    counted.taken()
    two = run(kept, "two")
    assert counted.taken() == (["1.png"], [])
    assert losses(one) == losses(two)


class Halves(Idle):
    """One of two processes that encode together; the other's pictures are given."""

    process_count = device_count = 2

    def __init__(self, index, both):
        self.process_index, self.both = index, both

    def posteriors(self, pixels):
        places = {0: slice(0, 2), 1: slice(2, 4)}
        self.both[places[self.process_index]] = pixels[:, :1, ::2, ::2]
        return np.repeat(np.stack([self.both] * 2, axis=1), 4, axis=2)


def test_processes_write_their_own_share(kept, tmp_path):
    """Each of two writes the pictures that it has read, with their sizes, and reads those of both."""
    kept = kept | {"pre_compute_text_embeddings": False, "random_flip": False}
    task = task_of(command_line.merge("text_to_image", {}, kept, ""))
    source = task.open_source()
    spec = task.make_spec(source)
    both = np.zeros((4, 1, 8, 8), np.float32)
    for index in (0, 1):
        wanted = {name: one for name, one in precompute._wanted(source, None, None).items() if one.index < 4}
        written = precompute._Pictures(task, spec, source, Halves(index, both), tmp_path, wanted, None)
        written._encode(list(wanted.values()), store.Writer(tmp_path / "shared"), kept=True)
    names = [Path(row.name).name for shard in store.Store(tmp_path / "shared").shards for row in shard.rows]
    assert sorted(names) == NAMES[:4]
    assert len(store.shard_names(tmp_path / "shared")) == 2
    sizes = store.Store(tmp_path / "shared").tables({name: name for name in wanted})["sizes"]
    assert [sizes[name].tolist() for name in wanted] == [[24 + number, 24] for number in range(4)]


def test_processes_that_see_other_pictures(tmp_path):
    backend = Halves(1, None)
    place = precompute._Place(tmp_path, True, backend)
    place.agree(["a", "b"], "pictures")
    backend.broadcast_from_first = lambda value: value + 1
    with pytest.raises(DataError, match="the pictures differ between the processes of this run: all must see the same"):
        place.agree(["a", "b"], "pictures")


def test_sizes_are_kept(tmp_path, monkeypatch):
    """SDXL is told of each picture's size, for which no picture is read any more."""
    base = stable_diffusion_xl(tmp_path / "base")
    options = {
        "pretrained_model_name_or_path": str(base), "train_data_dir": str(pictures(tmp_path / "data", 5)),
        "resolution": 16, "train_batch_size": 2, "max_train_steps": 3, "center_crop": True, "random_flip": True,
        "lr_warmup_steps": 0, "output_dir": str(tmp_path / "run"), "validation_epochs": None,
        "draw_samples": False,
    }  # fmt: skip
    each = run(options, "each")
    with monkeypatch.context() as patch:
        patch.setattr(batches, "size_of", None)
        for name, changes in (("once", {}), ("kept", {"precomputed_dir": str(tmp_path / "kept")})):
            np.testing.assert_allclose(losses(run(options, name, **ONCE | changes)), losses(each), rtol=1e-5)
    assert losses(tmp_path / "once") == losses(tmp_path / "kept")


@pytest.mark.acceptance
def test_two_processes_fill_a_folder(request, kept, tmp_path):
    """Together, each with a share of the pictures; what one process and PyTorch read of it is the same."""
    pictures(tmp_path / "data", 19)
    kept = kept | {"global_batch_size": 16, "train_batch_size": 1}
    one = run(kept, "one", "flax_diffusion", precomputed_dir=None)
    for name in ("two", "again"):
        values = kept | {"task": "text_to_image", "output_dir": str(tmp_path / name)}
        codes, logs = together(request, tmp_path, 2, values)
        assert codes == [0, 0], logs
        np.testing.assert_allclose(losses(tmp_path / name), losses(one), rtol=1e-5)
    assert "encoding 0 pictures, 19 of 19 are in" in logs[0]
    (folder,) = folders(kept)
    assert sorted(len(store.open_shard(shard).rows) for shard in folder.glob("shard-*")) == [8, 11]
    np.testing.assert_allclose(losses(run(kept, "torch")), losses(one), rtol=1e-5)
