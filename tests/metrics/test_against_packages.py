"""The same pictures judged by pytorch-fid and torch-fidelity, with the same random weights: half an hour."""

import numpy as np
import pytest
import torch
from inception_reference import random_weights
from safetensors.torch import save_file

from flax_diffusion.core.metrics import distances
from flax_diffusion.core.metrics.judging import METRICS, Sets, collect, judge
from flax_diffusion.core.metrics.reference import Kind, Reference
from flax_diffusion.core.metrics.statistics import Moments
from flax_diffusion.jax_backend.features import FeatureExtractor
from flax_diffusion.jax_backend.sharding import make_mesh
from flax_diffusion.models.inception import read_inception

pytestmark = pytest.mark.peers

INSTALL = "pip install --no-deps pytorch-fid torch-fidelity torchvision, the latter of PyTorch's own kind (CPU or CUDA)"
SOME = 64  # features
EACH, BATCH = 1000, 50  # as many pictures as a subset of KID, so that there is one subset only


def random_pictures():
    """Two sets of pictures of 32x32 pixels: cells of any colour, with noise; the second set is darker."""
    rng = np.random.default_rng(0)
    for light in (1.0, 0.8):
        cells = rng.integers(0, 256, (EACH, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
        noisy = cells * light + rng.normal(0, 20, cells.shape)
        yield np.clip(noisy, 0, 255).astype(np.uint8)


def theirs(pictures, network):
    """Features and logits without bias, of pytorch-fid's network."""
    found = []
    with torch.no_grad():
        for first in range(0, len(pictures), BATCH):
            batch = torch.from_numpy(pictures[first : first + BATCH]).permute(0, 3, 1, 2).float() / 255
            found.append(network(batch)[0][:, :, 0, 0])
    return torch.cat(found)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_features_and_metrics(monkeypatch, tmp_path, figure):
    inception = pytest.importorskip("pytorch_fid.inception", reason=INSTALL)
    fid_score = pytest.importorskip("pytorch_fid.fid_score", reason=INSTALL)
    pytest.importorskip("torch_fidelity", reason=INSTALL)
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    weights = random_weights()
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda url, progress: weights)
    network = inception.InceptionV3().eval()
    save_file(weights, tmp_path / "weights.safetensors")
    extractor = FeatureExtractor("inception", make_mesh(-1, 1), BATCH, read_inception(tmp_path / "weights.safetensors"))

    sets, expected = [], []
    for pictures in random_pictures():
        batches = np.split(pictures, EACH // BATCH)
        sets.append(collect(batches, extractor, EACH, METRICS))
        expected.append(theirs(pictures, network))
    apart = max(np.abs(ours.features - other.numpy()).max() for ours, other in zip(sets, expected, strict=True))
    figure(1, f"features of {2 * EACH} pictures: at most {apart:.1e} apart, of values up to {expected[0].max():.1f}")
    assert apart < 1e-4

    drawn, real = sets
    reference = Reference.of(real.moments, Kind(feature="inception"), real.features)
    ours = dict(judge(METRICS, Sets(drawn, reference, seed=0)))
    ours["is"], ours["is_std"] = distances.inception_score(drawn.logits, seed=None)
    # Of fewer pictures than features the covariance is singular, where SciPy's root of the product, which pytorch-fid
    # takes, says itself that it is not accurate. So the distance is compared on the features that vary most.
    most = np.argsort(-np.minimum(drawn.features.var(0), real.features.var(0)))[:SOME]
    parts = [Moments.of(one.features[:, most]) for one in sets]
    ours["fid"] = distances.frechet_distance(*(part for one in parts for part in (one.mean, one.covariance)))
    expected = [found.double() for found in expected]  # in float32, torch-fidelity's KID would lose digits
    moments = [(f[:, most].mean(0).numpy(), np.cov(f[:, most].numpy(), rowvar=False)) for f in expected]
    logits = expected[0] @ weights["fc.weight"].double().T
    scores = isc_features_to_metric(logits, splits=10, shuffle=False)
    kernel = kid_features_to_metric(*expected, kid_subsets=2, kid_subset_size=EACH, verbose=False)
    manifold = prc_features_to_metric(*expected, prc_neighborhood=3, prc_batch_size=500, verbose=False)
    same = {
        "fid": fid_score.calculate_frechet_distance(*moments[0], *moments[1]),
        "is": scores["inception_score_mean"],
        "is_std": scores["inception_score_std"],
        "kid": kernel["kernel_inception_distance_mean"],
        "precision": manifold["precision"],
        "recall": manifold["recall"],
    }
    for number, (name, value) in enumerate(same.items(), 2):
        figure(number, f"{name}: {ours[name]:.6f}, theirs {value:.6f}")
        assert ours[name] == pytest.approx(value, abs=1e-3), name
