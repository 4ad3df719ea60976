"""The Inception network of the FID against PyTorch, and its weights from files of strangers."""

import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from inception_reference import Reference, random_weights
from safetensors.torch import save_file

from flax_diffusion.core.errors import WeightsError
from flax_diffusion.core.io.torch_files import read_torch_tensors
from flax_diffusion.jax_backend.features import FeatureExtractor
from flax_diffusion.jax_backend.sharding import make_mesh
from flax_diffusion.models.inception import read_inception


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(OrderedDict(weights), path)
    return path


def test_features_are_those_of_pytorch(weights, file):
    pictures = np.random.default_rng(1).integers(0, 256, (2, 40, 33, 3), np.uint8)
    with torch.no_grad():
        features, logits = Reference(weights)(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
    ours, unbiased = FeatureExtractor("inception", make_mesh(-1, 1), 2, read_inception(file))(pictures)
    assert ours.shape == (2, 2048)
    assert features.abs().max() > 1
    np.testing.assert_allclose(ours, features, rtol=0, atol=1e-4)
    np.testing.assert_allclose(unbiased, logits - weights["fc.bias"], rtol=0, atol=1e-4)


def test_all_forms_of_the_file_are_one(weights, file, tmp_path):
    """Releases before PyTorch 1.6 wrote another one, in which pytorch-fid's weights are; safetensors too."""
    names = [name.removesuffix("running_var") for name in weights if name.endswith("running_var")]
    counted = {f"{name}num_batches_tracked": torch.tensor(7) for name in names}
    torch.save(OrderedDict(weights | counted), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "weights.safetensors")
    expected = read_inception(file)
    for name in ("old.pth", "weights.safetensors"):
        assert read_inception(tmp_path / name).fingerprint == expected.fingerprint
    kernel = expected.params["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), weights["Mixed_6b.branch7x7_2.conv.weight"])


@pytest.mark.parametrize("old", [False, True])
def test_views_of_tensors(tmp_path, old):
    whole = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)
    shown = {
        "whole": whole, "turned": whole.permute(2, 0, 1), "part": whole[1, :, 1:3], "row": whole[:, 1].half(),
        "none": torch.zeros(0, 3), "one": torch.tensor(5), "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    torch.save(shown, tmp_path / "file.pth", _use_new_zipfile_serialization=not old)
    found = read_torch_tensors(tmp_path / "file.pth")
    assert found.keys() == shown.keys()
    for name, tensor in shown.items():
        expected = tensor.detach().numpy()
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


class Runs:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"weight": Runs()}, "exec, which is no part of a tensor"),
        ({"weight": [torch.ones(1)]}, "not a tensor"),
        ([torch.ones(1)], "not tensors by name"),
    ],
    ids=["runs", "nested", "list"],
)
def test_what_is_no_tensor_is_refused(tmp_path, value, message, old):
    torch.save(value, tmp_path / "file.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_torch_tensors(tmp_path / "file.pth")


def test_a_tensor_that_reaches_beyond_its_values(tmp_path):
    torch.save({"weight": torch.ones(4)}, tmp_path / "file.pth")
    with zipfile.ZipFile(tmp_path / "file.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    changed = tmp_path / "changed.pth"
    with zipfile.ZipFile(changed, "w") as archive:
        for name, data in members.items():
            pickled = name.endswith("data.pkl")
            archive.writestr(name, data.replace(b"K\x04\x85q", b"K\x05\x85q") if pickled else data)
    assert members["file/data.pkl"].count(b"K\x04\x85q") == 1
    with pytest.raises(ValueError, match="reaches beyond its 4 values"):
        read_torch_tensors(changed)


@pytest.mark.parametrize("old", [False, True])
def test_damage_is_one_error(tmp_path, old):
    """Of flipped bits and of cut files; what is still read are tensors by name."""
    path = tmp_path / "file.pth"
    torch.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=not old)
    data, rng, read = path.read_bytes(), np.random.default_rng(0), 0
    for number in range(1500):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged[: None if number % 4 else int(rng.integers(len(data)))])
        try:
            found = read_torch_tensors(path)
        except (ValueError, OSError):
            continue
        read += 1
        assert all(isinstance(name, str) and isinstance(values, np.ndarray) for name, values in found.items())
    assert 0 < read < 1000


def test_wrong_files(weights, tmp_path):
    def refused(tensors, message, name="file.pth"):
        torch.save(tensors, tmp_path / name)
        with pytest.raises(WeightsError, match=message):
            read_inception(tmp_path / name)

    refused({**weights, "AuxLogits.fc.weight": torch.ones(1)}, "'AuxLogits.fc.weight' is not known; give pytorch-fid's")
    refused({k: v for k, v in weights.items() if k != "fc.bias"}, "fc.bias is missing")
    refused(
        {**weights, "fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1008, dtype=torch.int32)},
        r"fc.bias holds int32, not floats; fc.weight has shape \(1000, 2048\) instead of \(1008, 2048\)",
    )
    refused({"conv1.weight": torch.ones(1)}, "is missing; .* is missing; .* is missing; and 470 more")
    refused({}, r"must end in .safetensors or one of .bin .ckpt .pt .pth", "file.onnx")
    with pytest.raises(WeightsError, match=r"none.pth is no file: give pytorch-fid's pt_inception"):
        read_inception(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_bytes(pickle.dumps("text"))
    with pytest.raises(WeightsError, match="is no file of weights"):
        read_inception(tmp_path / "text.pth")


def test_reading_needs_no_pytorch(file):
    code = (
        "import sys; from pathlib import Path; sys.modules['torch'] = None\n"
        "from flax_diffusion.core.io.torch_files import read_torch_tensors\n"
        f"print(len(read_torch_tensors(Path({str(file)!r}))))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert int(out) == 472
