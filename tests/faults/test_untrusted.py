"""Files from strangers, mutated: every one is read, or refused by an error of ours, soon and in little memory."""

import gc
import json
import pickle
import re
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import save
from tiny import ONE_BLOCK, UNET

from flax_diffusion import FlaxDDPMScheduler, FlaxUNet2DModel
from flax_diffusion.core.cli import command_line
from flax_diffusion.core.data.sources.folders import open_folder
from flax_diffusion.core.errors import ConfigError, DataError, UserError, WeightsError
from flax_diffusion.core.io import model_files
from flax_diffusion.core.spec.pipeline import Component, open_pipeline
from torch_backend.modules import make

MAX_SECONDS, MAX_MEGABYTES = 1.0, 200
PARTS = {
    "safetensors": [
        b"F32", b"F8_E4M3", b"F4", b"BF16", b"I64", b'"shape":[', b"-1", b"18446744073709551615", b"[[", b"{",
    ],
    "yaml": [
        b"&a ", b"*a", b"!!python/object:os.system ", b"!!timestamp ", b"!!bool ", b"!!binary ", b"!!int ", b"- ",
        b": ", b"\n", b"[", b"{", b"<<: ",
        b"9" * 5000, b"\x00", b"\xff", b"? ", b"---\n", b"%YAML 9\n", b"0b_", b".nan",
    ],
    "jsonl": [
        b'"', b"\\ud800", b"\\u0000", b"../", b"/etc/passwd", b"[" * 2000, b"{", b"null", b"9" * 5000, b"\n", b"\xff",
        b"1e999", b"NaN", b",", b'{"file_name": 1}\n', b"\\",
    ],
    "json": [
        b"null", b"[null]", b"-1", b"1e999", b"NaN", b"true", b"[]", b"{}", b"1000000000", b'"', b"[1, [2]]", b'"x"',
        b"9" * 5000, b"[" * 2000, b"\xff", b'"sample_size": ', b'"block_out_channels": ',
    ],
    "msgpack": [
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc9\x00\x00\x00\x10\x01", b"\x93", b"\xc0", b"\x81" * 900,
        b"float32", b"object", b"<U9", b"__msgpack_chunked_array__", b"\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
}  # fmt: skip
"""What is put into files of each kind."""


def mutated(rng: np.random.Generator, data: bytes, parts: list[bytes]) -> bytes:
    """A file with one or two places of it changed."""
    for _ in range(rng.integers(1, 3)):
        # Half of the places lie in the first bytes, where formats keep what they say of themselves.
        near = min(len(data), 64) if rng.random() < 0.5 else len(data)
        place, width = int(rng.integers(near + 1)), int(rng.integers(1, 16))
        kind = rng.integers(7)
        if kind == 0:  # one bit
            place = min(place, len(data) - 1)
            data = data[:place] + bytes([data[place] ^ 1 << rng.integers(8)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:place] + rng.bytes(width) + data[place + width :]
        elif kind == 2:
            data = data[:place] + data[place + width :]
        elif kind == 3:
            data = data[:place]
        elif kind == 4:  # a part of it again
            data = data[:place] + data[place : place + width] * int(rng.integers(2, 50)) + data[place:]
        else:
            part = parts[rng.integers(len(parts))]
            data = data[:place] + part + data[place + (len(part) if kind == 5 else 0) :]
        data = data or b"\x00"
    return data


def mutated_header(rng: np.random.Generator, data: bytes, parts: list[bytes]) -> bytes:
    """A safetensors file whose header is changed, and whose length of it is right."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = mutated(rng, data[8:end], parts)
    return len(header).to_bytes(8, "little") + header + data[end:]


def mutated_value(rng: np.random.Generator, data: bytes, parts: list[bytes]) -> bytes:
    """A JSON object of which a value is another."""
    value = json.loads(data)
    keys, values = list(value), [None, True, -1, 0, 1e308, 10**9, 10**400, "x", "", [], [None], [[1]], {}, [10**9] * 2]
    value[keys[rng.integers(len(keys))]] = values[rng.integers(len(values))]
    return json.dumps(value).encode()


MUTATIONS = {"safetensors": mutated_header, "json": mutated_value}
"""Of what a format says of itself, where most mutations of bytes break the format."""


def peak_kilobytes() -> int:
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


@contextmanager
def in_time():
    """Measures this thread's own work: other programs do not count, nor does the garbage of earlier tests."""
    gc.disable()
    start, taken = time.thread_time(), []
    try:
        yield taken
    finally:
        taken.append(time.thread_time() - start)
        gc.enable()
    assert taken[0] < MAX_SECONDS


def fuzz(figure, name: str, count: int, seeds: list[bytes], path: Path, read) -> None:
    """Reads mutations of some files, and notes what became of them."""
    rng = np.random.default_rng(0)
    for data in seeds:
        path.write_bytes(data)
        read()  # as it is, it can be read
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over from what is used now
    before, messages, slowest = peak_kilobytes(), [], 0.0
    for number in range(count):
        mutate = MUTATIONS[name] if name in MUTATIONS and rng.random() < 0.5 else mutated
        data = mutate(rng, seeds[number % len(seeds)], PARTS[name])
        path.write_bytes(data)
        try:
            with in_time() as taken:
                read()
        except UserError as error:
            messages.append(str(error))
        except BaseException:
            print(f"\n{name}, mutation {number}: {data[:2000]!r}")
            raise
        slowest = max(slowest, *taken)
    refused = len(messages)
    more = (peak_kilobytes() - before) / 1024
    found = f"{refused} refused, {count - refused} read, slowest {slowest:.2f} s, +{more:.0f} MB"
    assert more < MAX_MEGABYTES
    assert 0 < refused < count
    assert all(message.isprintable() for message in messages)
    figure(10, f"{name}: {count} mutations: {found}")


def counts(full: int):
    """The short version, and the whole one."""
    return pytest.mark.parametrize("count", [300, pytest.param(full, marks=pytest.mark.acceptance)])


TREE = {
    "conv": {"kernel": np.zeros((3, 3, 2, 4), np.float32), "bias": np.zeros(4, np.float32)},
    "mid": {"resnets_0": {"norm": {"scale": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}}},
}


@counts(10_000)
def test_safetensors(count, tmp_path, figure):
    """As weights of a model, which must fit it, and as any arrays."""
    from flax_diffusion.models import weights

    tensors = {name: np.ascontiguousarray(array) for name, array in weights.to_torch(TREE)}
    path = tmp_path / "model.safetensors"

    def read():
        assert {array.array().nbytes for array in model_files.read_safetensors(path).values()}
        assert model_files.safetensors_metadata(path) is not None
        weights.load(tmp_path, TREE, "model")

    fuzz(figure, "safetensors", count, [save(tensors), save(tensors, metadata={"format": "pt"})], path, read)


@counts(1_000)
def test_msgpack(count, tmp_path, figure):
    from flax.serialization import msgpack_serialize

    from flax_diffusion.models import weights

    whole = msgpack_serialize(TREE)
    chunks = {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {"0": np.zeros(3, np.float32)}}
    chunks["chunks"]["1"] = np.zeros(1, np.float32)
    chunked = msgpack_serialize({**TREE, "conv": {**TREE["conv"], "bias": chunks}})
    path = tmp_path / "diffusion_flax_model.msgpack"
    fuzz(figure, "msgpack", count, [whole, chunked], path, lambda: weights.load(tmp_path, TREE, "model"))


DREAMBOOTH = """
task: dreambooth
pretrained_model_name_or_path: &model sd
concepts:
  - &dog {instance_data_dir: my_dog, instance_prompt: "a"}
  - {<<: *dog, instance_prompt: b, repeats: 2}
noise_scheduler: {_class_name: DDPMScheduler, name: *model, betas: [0.1, 0.2]}
learning_rate: 1.0e-4
use_ema: yes
max_train_steps: 1_000
"""


@counts(5_000)
def test_yaml(count, tmp_path, request, figure):
    path = tmp_path / "recipe.yaml"
    recipes = [file.read_bytes() for file in sorted((request.config.rootpath / "configs").glob("*.yaml"))]
    recipes = [recipe for recipe in recipes if b"dataset_name" in recipe] + [DREAMBOOTH.encode()]

    def read():
        task, config = command_line.parse_train(["--config", str(path)], "train")
        yaml.safe_dump({"task": task} | config.model_dump(mode="json"))

    fuzz(figure, "yaml", count, recipes, path, read)


@counts(2_000)
def test_metadata(count, tmp_path, figure):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = [{"file_name": "a.png", "text": "größer"}, {"file_name": "b.png", "text": ["one", "two"]}]
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def read():
        source = open_folder(tmp_path)
        for index in range(len(source)):
            record = source[index]
            assert tmp_path in record.image.resolve().parents
            assert record.caption is not None
            "".join(record.caption).encode()

    fuzz(figure, "jsonl", count, [whole], tmp_path / "metadata.jsonl", read)


def test_a_pipeline_of_odd_types():
    for config in ({"layers_per_block": 10**9}, {"sample_size": "64"}, {"cross_attention_dim": [8, None]}):
        (key,) = config
        with pytest.raises(ConfigError, match=f"config of a UNet2DConditionModel: {key} is .*; it must be"):
            Component(kind="UNet2DConditionModel", config=config)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@counts(2_000)
def test_pipeline(count, file, tmp_path, figure):
    """Whatever can be read makes models of both sides."""
    unet = {"_class_name": "UNet2DModel", "sample_size": 8} | UNET | ONE_BLOCK
    files = {
        "unet/config.json": unet,
        "scheduler/scheduler_config.json": {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02},
        "model_index.json": {
            "_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
        },
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))

    def read():
        spec = open_pipeline(str(tmp_path))
        assert spec.sample_shape[0] == min(spec.denoiser[key] for key in ("in_channels", "out_channels"))
        FlaxUNet2DModel.from_config(spec.denoiser.config)
        FlaxDDPMScheduler.from_config(spec.scheduler)
        with torch.device("meta"):
            make(spec.denoiser)

    fuzz(figure, "json", count, [json.dumps(files[file]).encode()], tmp_path / file, read)


def test_a_safetensors_header_without_end(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((2**26).to_bytes(8, "little") + b" " * 100)
    with pytest.raises(
        WeightsError, match=r"is not a whole safetensors file \(its header is 67108864 bytes long, over"
    ):
        model_files.read_safetensors(path)


def test_numbers_that_are_no_floats(tmp_path):
    """Quantised weights of another program, or a header that was tampered with."""
    from flax_diffusion.models import weights

    tree = {"conv": {"bias": np.zeros(4, np.float32)}}
    (tmp_path / "model.safetensors").write_bytes(save({"conv.bias": np.zeros(4, np.int32)}))
    with pytest.raises(WeightsError, match=r"conv\.bias holds int32, not floats"):
        weights.load(tmp_path, tree, "model")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "../..", 5, ["x"], None])
def test_an_index_names_files_beside_it(tmp_path, name):
    from flax_diffusion.models import weights

    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(WeightsError, match="which is not a file next to it: fetch the folder again"):
        weights.load(tmp_path, TREE, "model")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("\x00", "not valid JSON"),
    ],
)
def test_json(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=says):
        model_files.read_json(tmp_path / "config.json")


LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "aliases stand for more than any recipe holds"),
        ("a: &a " + "x" * 60_000 + "\nb: [" + "*a, " * 1000 + "]", "aliases stand for more than any recipe holds"),
        ("a: &a [*a]", r"the alias \*a stands for nothing, or for a node that it lies in"),
        ("a: " + "[" * 50_000, "nested more than 64 deep"),
        ("a: x\n" * 100_000, "larger than 131072 bytes"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: !!bool x", "not valid YAML"),
        ("task: [a]", "unknown task"),
    ],
)
def test_yaml_that_is_no_recipe(tmp_path, text, says):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with in_time(), pytest.raises(ConfigError, match=says):
        command_line.parse_train(["--config", str(path)], "train")


def test_links(tmp_path):
    """To files they are followed, as the Hub's cache is made of them; to folders they are not, by no row either."""
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(outside / "a.png")
    (folder / "b.png").symlink_to(outside / "a.png")
    (folder / "sub").symlink_to(outside)
    assert open_folder(folder, caption_column=None).files == ["b.png"]  # type: ignore[attr-defined]
    for name, there in (("b.png", True), ("sub/a.png", False), ("sub/../b.png", True), ("x" * 5000, False)):
        (folder / "metadata.jsonl").write_text(
            "".join(json.dumps({"file_name": one, "text": "x"}) + "\n" for one in {name, "b.png"})
        )
        if there:
            open_folder(folder)
            continue
        with pytest.raises(DataError, match="names 1 files that do not exist"):
            open_folder(folder)


def test_captions_that_are_no_text(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "\\ud800"}')
    with pytest.raises(DataError, match=r"the caption is '\\ud800', which is not valid Unicode text"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("option", "secret"),
    [
        ("--output_dir", "s3://KEY:SECRET@bucket/run"),
        ("--dataset_name", "https://me:SECRET@example.org/data"),
        ("--revision", "hf_SECRETSECRETSECRETSECRETSECRET"),
    ],
)
def test_secrets_are_not_kept(option, secret):
    with pytest.raises(ConfigError, match=rf"{option} holds a password or token: log in instead") as caught:
        command_line.parse_train(["unconditional", "--dataset_name", "digits", option, secret], "train")
    assert "SECRET" not in str(caught.value)


def test_messages_are_safe_to_print():
    assert str(UserError("a\x1b[31m https://me:pass@host/x?y hf_" + "a" * 34)) == "a\\x1b[31m https://…@host/x?y …"


def test_nothing_that_could_hold_code_is_read(request):
    """The ways in which Python reads pickles; a process's own pipes are in `workers`."""
    root = request.config.rootpath
    ways = re.compile(
        r"torch\.load\(|allow_pickle(?!=False)|pickle\.load|yaml\.(unsafe_|full_)?load\(|trust_remote_code|joblib|shelve"
    )
    files = [path for package in ("flax_diffusion", "torch_backend", "tpu") for path in (root / package).rglob("*.py")]
    found = {path.name for path in files if ways.search(path.read_text())}
    assert found <= {"workers.py"}


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("backend", ["flax", "torch"])
@pytest.mark.parametrize(
    ("file", "content"), [("diffusion_pytorch_model.bin", None), ("diffusion_pytorch_model.safetensors", b"\x09" * 100)]
)
def test_weights_that_are_pickled_or_broken(tmp_path, backend, file, content):
    component = Component(kind="UNet2DModel", config=UNET, weights=str(tmp_path), subfolder="unet")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(UNET | {"_class_name": "UNet2DModel"}))
    (tmp_path / "unet" / file).write_bytes(content or pickle.dumps(Trap(tmp_path / "mark")))
    with pytest.raises(WeightsError, match="unet"):
        load_weights(backend, component)
    assert not (tmp_path / "mark").exists()


def load_weights(backend, component):
    if backend == "torch":
        from torch_backend import modules

        modules.load(component)
    else:
        from flax_diffusion import FlaxUNet2DModel

        FlaxUNet2DModel.from_pretrained(component.weights, subfolder=component.subfolder)
