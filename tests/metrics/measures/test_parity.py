"""FID, KID, precision, recall and Inception Score against torch-fidelity on the same features, and closed forms."""

import math

import numpy as np
import pytest
import torch

from refine.evaluation.paired import bootstrap_interval, paired_difference
from refine.metrics.measures.frechet import frechet_contributions, frechet_distance
from refine.metrics.measures.frechet_infinity import frechet_infinity
from refine.metrics.measures.inception_score import inception_score
from refine.metrics.measures.kernel import kernel_distance
from refine.metrics.measures.precision_recall import precision_recall
from refine.metrics.statistics import FeatureStatistics
from tests.golden import read_json
from tests.metrics.oracles import oracle


def features():
    """Generated and real features, float64 [300, 24], and logits of 20 classes."""
    rng = np.random.RandomState(7)
    mix = rng.standard_normal([24, 24])
    fake, real = rng.standard_normal([300, 24]) @ mix * 0.8 + 0.3, rng.standard_normal([300, 24]) @ mix
    return torch.from_numpy(fake), torch.from_numpy(real), torch.from_numpy(3 * rng.standard_normal([300, 20]))


def moments(x):
    statistics = FeatureStatistics()
    for part in x.split(64):
        statistics.update(part)
    return statistics.mean, statistics.covariance


def ours():
    fake, real, logits = features()
    precision, recall = (part.double().mean().item() for part in precision_recall(real, fake))
    score, score_std = inception_score(logits.softmax(dim=1))
    fd, kid = frechet_distance(*moments(fake), *moments(real)), kernel_distance(fake, real)[0]
    return {"fid": fd, "kid": kid, "precision": precision, "recall": recall, "is": score, "is_std": score_std}


def test_values_equal_torch_fidelitys_golden_numbers():
    for key, expected in read_json("metrics/torch_fidelity_values").items():
        assert ours()[key] == pytest.approx(expected, rel=1e-7), key  # theirs are float32 in places


def test_values_equal_torch_fidelitys():
    oracle("torch_fidelity")
    for key, expected in theirs().items():
        assert ours()[key] == pytest.approx(expected, rel=1e-7), key  # theirs are float32 in places


def theirs():
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    fake, real, logits = features()
    stats = [metric_fid.fid_features_to_statistics(x) for x in (fake, real)]
    options = {"kid_subsets": 1, "kid_subset_size": 300, "rng_seed": 0, "verbose": False, "save_cpu_ram": False}
    kid = metric_kid.kid_features_to_metric(fake, real, **options)
    prc = metric_prc.prc_features_to_metric(fake, real, **options)
    isc = metric_isc.isc_features_to_metric(logits, shuffle=False)
    return {
        "fid": metric_fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
        "precision": prc["precision"],
        "recall": prc["recall"],
        "is": isc["inception_score_mean"],
        "is_std": isc["inception_score_std"],
    }


def test_inception_score_of_known_layouts():
    certain = torch.eye(5).repeat(4, 1)  # sure of each image, all classes alike: as many as there are classes
    assert inception_score(certain, splits=2)[0] == pytest.approx(5) and inception_score(certain, splits=1)[1] == 0
    assert inception_score(torch.full([10, 4], 0.25), splits=5) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="10 splits"):
        inception_score(certain[:9])


def test_extrapolation_finds_the_distance_of_infinitely_many_images():
    rng = np.random.RandomState(0)
    dim, true = 40, 0.5
    x = torch.from_numpy(rng.standard_normal([4000, dim]))
    x[:, 0] += math.sqrt(true)
    zero, one = torch.zeros(dim), torch.eye(dim)
    result = frechet_infinity(x, zero, one)
    biased = result.points[-1][1]
    assert result.points[-1][0] == 4000 and result.points[0][1] > biased > true
    assert abs(result.value - true) < 0.5 * (biased - true)
    with pytest.raises(ValueError, match="found 2 images"):
        frechet_infinity(x[:2], zero, one)


def leave_one_out(x, distance):
    n = len(x)
    whole = distance(x)
    return whole, torch.tensor([(n - 1) * (whole - distance(torch.cat([x[:i], x[i + 1 :]]))) for i in range(n)])


def test_contributions_are_what_leaving_an_image_out_changes():
    rng = np.random.RandomState(1)
    x, y = torch.from_numpy(rng.standard_normal([150, 3])) + 0.5, torch.from_numpy(rng.standard_normal([200, 3]))
    mu, sigma = moments(y)
    _, expected = leave_one_out(x, lambda part: frechet_distance(*moments(part), mu, sigma))
    got = frechet_contributions(x, *moments(x), mu, sigma)
    assert torch.corrcoef(torch.stack([got, expected]))[0, 1] > 0.999
    assert got.std().item() == pytest.approx(expected.std().item(), rel=0.05)
    _, expected = leave_one_out(x, lambda part: kernel_distance(part, y)[0])
    got = kernel_distance(x, y)[1]
    assert torch.corrcoef(torch.stack([got, expected]))[0, 1] > 0.999
    assert got.std().item() == pytest.approx(expected.std().item(), rel=0.05)


def test_contributions_where_covariances_are_singular():
    x = torch.randn(6, 20, dtype=torch.float64)
    mu, sigma = moments(torch.randn(5, 20, dtype=torch.float64))
    assert frechet_contributions(x, *moments(x), mu, sigma).isfinite().all()
    same = torch.ones(4, 20, dtype=torch.float64)
    assert torch.equal(frechet_contributions(same, *moments(same), mu, sigma), torch.zeros(4, dtype=torch.float64))


def test_bootstrap_interval_has_the_right_width():
    rng = np.random.RandomState(0)
    shared = rng.standard_normal([3, 2000]) * 10  # of the latents: cancels
    pairs = [(torch.from_numpy(part), torch.from_numpy(part + rng.standard_normal(2000))) for part in shared]
    low, high = bootstrap_interval(pairs)
    assert (high - low) / 2 == pytest.approx(1.96 / math.sqrt(3 * 2000), rel=0.1)
    assert bootstrap_interval([(pairs[0][0], pairs[0][0])] * 3) == (0, 0)


def test_verdict_needs_interval_and_ranges():
    small = [(torch.zeros(100), torch.linspace(-1, 1, 100)) for _ in range(3)]
    verdicts = [
        paired_difference([5, 5, 5], after, "lower", small)["verdict"]
        for after in ([4, 4, 4], [6, 6, 6], [5.01, 5.01, 5.01], [2, 2, 5.5])
    ]
    assert verdicts == ["better", "worse", "not distinguishable", "not distinguishable"]


def test_equal_distributions_are_rarely_told_apart():
    # 95 % intervals, and three ranges that agree: other latents of one network must seldom look like a difference.
    rng = np.random.RandomState(3)
    mu, sigma, found = torch.zeros(4), torch.eye(4), 0
    for _ in range(20):
        values, pairs = ([], []), []
        for _ in range(3):
            sides = [torch.from_numpy(rng.standard_normal([200, 4]) + 0.2) for _ in range(2)]
            pairs.append(tuple(frechet_contributions(x, *moments(x), mu, sigma) for x in sides))
            for side, x in zip(values, sides, strict=True):
                side.append(frechet_distance(*moments(x), mu, sigma))
        found += paired_difference(*values, "lower", pairs)["verdict"] != "not distinguishable"
    assert found <= 3
