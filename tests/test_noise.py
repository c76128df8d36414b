"""Laws of noise levels and weightings."""

import math

import pytest
import torch

from refine.noise import SigmaLaw, make_weighting


def ks_distance(sample, cdf):
    """Kolmogorov–Smirnov distance between sorted samples and a distribution function."""
    x, _ = sample.flatten().double().sort()
    n = len(x)
    upper = torch.arange(1, n + 1) / n
    return (cdf(x) - upper).abs().max().item()


def normal_cdf(x, mean, std):
    return torch.special.ndtr((x - mean) / std)


def test_lognormal_has_the_stated_distribution():
    torch.manual_seed(0)
    sigma = SigmaLaw("lognormal", -1.2, 1.2, sigma_min=1e-6, sigma_max=1e6).sample(20_000)
    assert sigma.shape == (20_000, 1, 1, 1) and sigma.dtype == torch.float32
    assert ks_distance(sigma.log(), lambda x: normal_cdf(x, -1.2, 1.2)) < 0.015


def test_truncation_renormalises_instead_of_piling_up_at_the_ends():
    torch.manual_seed(0)
    law = SigmaLaw("lognormal", 0.0, 1.0, sigma_min=0.5, sigma_max=2.0)
    sigma = law.sample(20_000)
    low, high = (normal_cdf(torch.tensor(math.log(s)), 0.0, 1.0) for s in (0.5, 2.0))
    assert ks_distance(sigma.log(), lambda x: (normal_cdf(x, 0.0, 1.0) - low) / (high - low)) < 0.015
    assert sigma.min() >= 0.5 and sigma.max() <= 2.0


def test_loguniform_and_karras():
    torch.manual_seed(0)
    low, high = math.log(0.002), math.log(80)
    sigma = SigmaLaw("loguniform").sample(20_000)
    assert ks_distance(sigma.log(), lambda x: (x - low) / (high - low)) < 0.015
    sigma = SigmaLaw("karras", rho=7).sample(20_000)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    assert ks_distance(sigma.double() ** (1 / 7), lambda x: (x - low) / (high - low)) < 0.015


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"name": "normal"}, "normal"),
        ({"sigma_min": 0.0}, "range"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "range"),
        ({"P_std": 0.0}, "P_std"),
        ({"P_mean": math.nan}, "P_mean"),
        ({"name": "karras", "rho": -1.0}, "rho"),
    ],
)
def test_impossible_laws_are_refused(kwargs, word):
    with pytest.raises(ValueError, match=word):
        SigmaLaw(**kwargs)


def test_a_law_without_mass_in_its_range_is_refused():
    with pytest.raises(ValueError, match="no mass"):
        SigmaLaw(P_mean=-100.0, P_std=0.1).sample(1)


def test_weightings():
    sigma, x, D = torch.tensor([0.5, 2.0]).reshape(2, 1, 1, 1), torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    assert torch.equal(make_weighting("1")(sigma, x, D), torch.ones(2, 1, 1, 1))
    assert torch.allclose(make_weighting("sigma^-2")(sigma, x, D).flatten(), torch.tensor([4.0, 0.25]))
    for text in ("2", "sigma", "sigma^", "sigma^x", "sigma^inf", ""):
        with pytest.raises(ValueError, match="unknown weighting"):
            make_weighting(text)
    with pytest.raises(ValueError, match="--objective=dmd"):
        make_weighting("dmd")
