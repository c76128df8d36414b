"""Averages of any length, from two that were kept."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from refine.checkpoints.native import load_networks, read_metadata
from refine.cli.main import run_command
from refine.training.averages import LONGEST, PowerAverages, Profile, combination, gamma_of, relative_std
from tests.training.test_trainer import make_run, run

LENGTHS = (0.05, 0.25)


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])  # published (EDM2, section 3.1)
def test_gamma_of_a_length(length, gamma):
    assert gamma_of(length) == pytest.approx(gamma, abs=0.005)
    assert relative_std(gamma_of(length)) == pytest.approx(length, rel=1e-9)


@pytest.mark.parametrize("length", [0.0, 0.001, 0.3, float("nan")])
def test_impossible_lengths(length):
    with pytest.raises(ValueError, match="expected a length of"):
        gamma_of(length)


def test_the_longest_is_the_plain_mean():
    assert gamma_of(LONGEST - 1e-9) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [((0.05, 3.0), (0.25, 7.0)), ((0.25, 2.0), (0.1, 2.0)), ((0.2, 9.0), (0.1, 4.0))])
def test_products_equal_numerical_integrals(a, b):
    one, other = Profile.of(*a), Profile.of(*b)
    tau = (np.arange(400_000) + 0.5) / 400_000 * max(one.t, other.t)

    def density(p):
        return np.where(tau <= p.t, (p.gamma + 1) * tau**p.gamma / p.t ** (p.gamma + 1), 0.0)

    numerical = (density(one) * density(other)).mean() * max(one.t, other.t)
    assert one.product(other) == other.product(one) == pytest.approx(numerical, rel=1e-4)


def drifting(steps, seed=0):
    """A network of one weight that walks about, as training would leave it at every step."""
    rng = np.random.RandomState(seed)
    return np.cumsum(rng.randn(steps) * 0.05) + np.log1p(np.arange(steps))


def averages_of(path, lengths, every=None):
    """The averages after each step that is a multiple of `every`: {(length, time): value}."""
    network = nn.Linear(1, 1, bias=False)
    averages, found = PowerAverages(network, lengths), {}
    for step, value in enumerate(path, start=1):
        with torch.no_grad():
            network.weight.fill_(float(value))
        averages.update(network, step - 1, step)
        if (every and step % every == 0) or step == len(path):
            found |= {(length, step): average.weight.item() for length, average in averages.networks.items()}
    return found


def test_an_average_has_its_profile():
    """Of a network that grows linearly, the average is t (γ + 1) / (γ + 2), up to the size of a step."""
    found = averages_of(np.arange(1.0, 2001.0), LENGTHS)
    for (length, t), value in found.items():
        gamma = gamma_of(length)
        assert value == pytest.approx(t * (gamma + 1) / (gamma + 2), rel=1e-3)


@pytest.mark.parametrize("wanted", [0.07, 0.1, 0.15, 0.2])
@pytest.mark.parametrize("time", [1600, 2000])
def test_other_lengths_are_found_from_those_that_were_kept(wanted, time):
    path = drifting(2000)
    kept = averages_of(path, LENGTHS, every=100)
    truth = averages_of(path[:time], [wanted])[wanted, time]
    profiles = [Profile.of(length, t) for length, t in kept]
    coefficients = combination(profiles, Profile.of(wanted, time))
    found = coefficients @ np.array(list(kept.values()))
    assert found == pytest.approx(truth, abs=0.01) and coefficients.sum() == pytest.approx(1, abs=1e-9)
    assert abs(found - truth) < 0.2 * min(abs(kept[length, time] - truth) for length in LENGTHS)  # than either is


def test_a_kept_length_is_found_exactly():
    profiles = [Profile.of(length, t) for t in (100, 200) for length in LENGTHS]
    assert combination(profiles, profiles[2]) == pytest.approx([0, 0, 1, 0], abs=1e-6)


def test_averages_of_a_run_are_made_afterwards(tmp_path, capsys):
    """Against an average of that length that was kept all along; and what was kept is found bit for bit, nearly."""
    options = {"kimg": 0.16, "lr": 1e-2, "tick": 0.016, "average_lengths": (0.05, 0.25)}
    training = make_run(tmp_path / "run", **options)
    truth = PowerAverages(training.trainer.G, [0.12])
    step = training.trainer.step

    def counted():
        before = training.trainer.nimg
        step()
        truth.update(training.trainer.G, before, training.trainer.nimg)

    training.trainer.step = counted
    run(training)
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        run_command("average", [str(folder), "--length=0.12", f"--out={tmp_path / 'found.safetensors'}"])
    assert stop.value.code == 0 and "length 0.12 at 0.16 kimg" in capsys.readouterr().out
    found = load_networks(tmp_path / "found.safetensors")["G_ema"].state_dict()
    last = training.trainer.averages.networks
    for name, wanted in truth.networks[0.12].named_parameters():
        error = (found[name] - wanted).norm()
        assert error <= 0.1 * min((last[length].state_dict()[name] - wanted).norm() for length in last) + 1e-6, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length=0.5"], "--length: found 0.5; expected a length of"),
        (["--length=0.1", "--kimg=9"], "--kimg is 9; expected a number up to 0.024"),
        (["--length=0.1", "--out=x.pkl"], "--out: found x.pkl; expected"),
    ],
)
def test_wrong_arguments_name_their_option(tmp_path, capsys, arguments, message):
    run(make_run(tmp_path / "run"))
    with pytest.raises(SystemExit) as stop:
        run_command("average", [str(tmp_path / "run"), f"--out={tmp_path / 'a.safetensors'}", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_run_without_averages_says_so(tmp_path, capsys):
    run(make_run(tmp_path / "run", average="ema"))
    with pytest.raises(SystemExit) as stop:
        run_command("average", [str(tmp_path / "run"), "--length=0.1", f"--out={tmp_path / 'a.safetensors'}"])
    assert stop.value.code == 2 and "keep no averages" in capsys.readouterr().err


def test_before_the_first_update_averages_are_the_network_and_after_it_the_new_one():
    network = nn.Linear(2, 1)
    averages = PowerAverages(network, LENGTHS)
    assert all(torch.equal(average.weight, network.weight) for average in averages.networks.values())
    with torch.no_grad():
        network.weight.add_(1)
    averages.update(network, 0, 32)
    assert all(torch.equal(average.weight, network.weight) for average in averages.networks.values())


def test_states_go_on_and_other_lengths_are_refused():
    network = nn.Linear(2, 1)
    one, other = PowerAverages(network, LENGTHS), PowerAverages(nn.Linear(2, 1), LENGTHS)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.networks[0.05].weight, network.weight)
    with pytest.raises(ValueError, match=r"lengths 0\.05, 0\.25"):
        PowerAverages(network, [0.1]).load_state_dict(one.state_dict())


class NearestTo:
    """A metric that likes one of the averages: the distance of its weights from some others."""

    name, key, direction = "fd-fake", "fd_fake", "lower"

    def __init__(self):
        self.wanted = None

    def measure(self, G, device, progress=False):
        wanted = self.wanted() if self.wanted else G
        pairs = zip(G.parameters(), wanted.parameters(), strict=True)
        return {"fd_fake": float(sum((p - q).detach().square().sum() for p, q in pairs)), "recall": 0.5}


@pytest.mark.parametrize("length", [0.05, 0.1, 0.25])
def test_a_snapshot_holds_the_average_that_the_first_metric_prefers(tmp_path, length):
    metric = NearestTo()
    training = make_run(tmp_path, lr=1e-2, metrics=[metric])
    metric.wanted = lambda: training.trainer.averages.networks[length]
    run(training)
    for name in ("000000.024", "best"):
        saved = load_networks(tmp_path / f"network-snapshot-{name}.safetensors")
        assert set(saved) == {"G", "G_ema", "G_avg050", "G_avg100", "G_avg250"}
    kept = load_networks(tmp_path / "network-snapshot-000000.024.safetensors")
    preferred = training.trainer.averages.networks[length]
    assert all(torch.equal(p, q) for p, q in zip(kept["G_ema"].parameters(), preferred.parameters(), strict=True))
    metadata = read_metadata(tmp_path / "network-snapshot-000000.024.safetensors")
    assert metadata["provenance"]["average_length"] == length
    line = json.loads((tmp_path / "metric-fd-fake.jsonl").read_text().splitlines()[-1])
    assert line["results"]["average_length"] == length and line["results"]["fd_fake"] == 0.0
    others = line["results"]["averages"]
    assert set(others) == {"0.05", "0.1", "0.25", "raw"} and others[f"{length:g}"] == {"fd_fake": 0.0, "recall": 0.5}
    assert others["raw"]["fd_fake"] > 0 and training.trainer.G.training
