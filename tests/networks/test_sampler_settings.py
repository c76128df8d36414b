"""How diffusion models are sampled unless somebody says otherwise, and what cannot be asked for."""

import re

import pytest

from refine.checkpoints import NetworkInfo
from refine.networks.sampler_settings import SamplerChoice, SamplerSettings, usual_settings


def info(size, classes=0, class_name="edm.EDMPrecond"):
    return NetworkInfo("teacher", size, 3, classes, class_name)


@pytest.mark.parametrize(
    "network, steps, churn, told",
    [
        (info(32, 10), 18, 0, "CIFAR-10"),
        (info(64), 40, 0, "FFHQ"),
        (info(256), 40, 0, "FFHQ"),
        (info(64, 1000), 256, 40, "ImageNet"),
        (info(64, 1000, "edm2.Precond"), 32, 0, "EDM2"),
        (info(32, 0, "ddpm.DDPMPrecond"), 18, 0, "CIFAR-10"),
    ],
)
def test_the_published_settings_of_such_networks(network, steps, churn, told):
    settings, reason = usual_settings(network)
    assert (settings.steps, settings.S_churn) == (steps, churn) and told in reason
    assert SamplerChoice().resolve(network) == (settings, reason)


def test_imagenet_is_sampled_with_fresh_noise():
    settings, _ = usual_settings(info(64, 1000))
    assert (settings.S_min, settings.S_max, settings.S_noise) == (0.05, 50, 1.003)
    assert settings.describe() == "256 Heun steps, S_churn 40, S_min 0.05, S_max 50, S_noise 1.003"


def test_what_is_asked_for_goes_before_what_is_usual():
    settings, reason = SamplerChoice({"steps": 50, "S_churn": 0.0}).resolve(info(64, 1000))
    assert (settings.steps, settings.S_churn, settings.S_noise) == (50, 0, 1.003)
    assert settings.describe() == "50 Heun steps" and "--steps, --s-churn as asked for, the rest" in reason
    assert SamplerSettings(9, rho=5, sigma_max=20).describe() == "9 Heun steps, rho 5, sigma_max 20"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 0}, "--steps is 0; expected a whole number, 1 to"),
        ({"rho": 0.0}, "--rho is 0; expected"),
        ({"sigma_min": -1.0}, "--sigma-min is -1"),
        ({"sigma_max": 0.001}, "--sigma-max is 0.001; expected a number > 0.002"),
        ({"S_churn": float("nan")}, "--s-churn is nan"),
        ({"S_min": 2.0, "S_max": 1.0}, "--s-max is 1; expected a number ≥ 2"),
        ({"S_noise": -1.0}, "--s-noise is -1"),
    ],
)
def test_impossible_settings_name_the_option(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplerSettings(**wrong)
