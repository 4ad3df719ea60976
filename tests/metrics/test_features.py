"""Features over all devices: of eight they are those of one, whatever the batch."""

import jax
import numpy as np
import pytest
from eight_devices import EIGHT
from inception_reference import random_weights
from safetensors.torch import save_file

from flax_diffusion.core.metrics.judging import collect
from flax_diffusion.jax_backend.features import FeatureExtractor
from flax_diffusion.jax_backend.sharding import make_mesh
from flax_diffusion.models.inception import read_inception

PICTURES = np.random.default_rng(0).integers(0, 256, (19, 6, 5, 3), np.uint8)


def moments(feature, devices, batch_size, pictures=PICTURES, inception=None):
    extractor = FeatureExtractor(feature, make_mesh(-1, 1, EIGHT[:devices]), batch_size, inception)
    batches = (pictures[first : first + batch_size] for first in range(0, len(pictures), batch_size))
    found = collect(batches, extractor, len(pictures), ["kid"])
    return found.moments, found.features


def test_pixels():
    whole, features = moments("pixels", 1, 64)
    np.testing.assert_allclose(features, PICTURES.reshape(19, -1) / 255, rtol=1e-6)
    for devices, batch_size in ((8, 8), (8, 5), (2, 3)):
        other, same = moments("pixels", devices, batch_size)
        np.testing.assert_array_equal(same, features)
        np.testing.assert_array_equal(other.mean, whole.mean)
        np.testing.assert_array_equal(other.scatter, whole.scatter)
    grey, _ = moments("pixels", 8, 8, PICTURES[..., :1])
    np.testing.assert_array_equal(grey.mean, whole.mean[::3])


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(random_weights(), path)
    return read_inception(path)


@pytest.mark.acceptance
def test_inception_of_eight_devices_and_of_one(inception):
    one, features = moments("inception", 1, 4, PICTURES[:6], inception)
    eight, same = moments("inception", 8, 8, PICTURES[:6], inception)
    np.testing.assert_allclose(same, features, rtol=0, atol=1e-4)
    np.testing.assert_allclose(eight.mean, one.mean, rtol=0, atol=1e-4)
    scale = np.sqrt(np.diag(one.covariance).max())
    np.testing.assert_allclose(eight.covariance, one.covariance, rtol=0, atol=1e-4 * scale)


def test_a_batch_is_divided(inception):
    extractor = FeatureExtractor("inception", make_mesh(-1, 1, EIGHT), 12, inception)
    assert extractor._rows == 16  # filled up to as many on each device
    kernel = jax.tree.leaves(extractor._params)[0]
    assert kernel.sharding.is_fully_replicated
    assert len(kernel.sharding.device_set) == 8
    assert extractor.dimension((9, 9), 1) == 2048
