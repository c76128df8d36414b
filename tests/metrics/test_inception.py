"""The Inception network: parity with torch-fidelity and pytorch-fid, and the forms in which its weights come."""

import hashlib
import pickle
import warnings

import numpy as np
import pytest
import torch

from refine.checkpoints.sources.index import read_index
from refine.metrics import detectors
from refine.metrics.detectors import load_detector, observe
from refine.metrics.inception import InceptionNetwork, resize_like_tensorflow1
from refine.metrics.inception_weights import load_inception, tensorflow_name, units
from tests.checkpoints.builders import Format, write
from tests.golden import ROOT
from tests.metrics.networks import metric_names, score_name
from tests.metrics.oracles import oracle, random_inception_state, sample_pictures

GOLDEN = ROOT / "metrics" / "torch_fidelity_inception.npz"
SIZES = (32, 256, 1024)


@pytest.fixture(scope="module")
def state():
    return random_inception_state()


@pytest.fixture(scope="module")
def network(state):
    return load_inception(state.items())


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(state, path)
    return path


def relative_error(got, expected):
    return ((got - expected).norm(dim=1) / expected.norm(dim=1)).max().item()


@pytest.mark.parametrize("size", SIZES)
def test_features_and_logits_equal_torch_fidelitys_golden_numbers(network, size):
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN).items()}
    with torch.no_grad():
        features = network(sample_pictures(size))
        logits = network.logits(features, bias=False)
    assert relative_error(features, golden[f"features{size}"]) < 1e-5
    assert relative_error(logits, golden[f"logits_unbiased{size}"]) < 1e-5


def test_features_equal_torch_fidelitys(network, weights):
    oracle("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased", "logits"]
    theirs = FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=str(weights))
    golden = np.load(GOLDEN)
    for size in SIZES:
        with torch.no_grad():
            features, unbiased, logits = theirs(sample_pictures(size))
            ours = network(sample_pictures(size))
        assert relative_error(ours, features) < 1e-5
        assert relative_error(network.logits(ours), logits) < 1e-5
        assert relative_error(torch.from_numpy(golden[f"features{size}"]), features) < 1e-5
        assert relative_error(torch.from_numpy(golden[f"logits_unbiased{size}"]), unbiased) < 1e-5


def test_trunk_equals_pytorch_fids(network, state, monkeypatch):
    oracle("pytorch_fid")
    from pytorch_fid import inception

    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    x = torch.rand(2, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        assert relative_error(network.trunk(x), theirs(x)[0].flatten(1)) < 1e-6


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_resize_reads_input_j_times_w_over_size(size):
    x = torch.rand(1, 1, 5, 5, dtype=torch.float64)
    got = resize_like_tensorflow1(x.clone(), size)
    for i in range(size):
        for j in range(size):
            (r, fr), (c, fc) = divmod(i * 5 / size, 1), divmod(j * 5 / size, 1)
            r, c, r2, c2 = int(r), int(c), min(int(r) + 1, 4), min(int(c) + 1, 4)
            top = x[0, 0, r, c] * (1 - fc) + x[0, 0, r, c2] * fc
            bottom = x[0, 0, r2, c] * (1 - fc) + x[0, 0, r2, c2] * fc
            assert got[0, 0, i, j].item() == pytest.approx((top * (1 - fr) + bottom * fr).item())


def test_grey_is_repeated_and_the_score_has_no_bias(weights, network):
    detector = load_detector(weights)
    grey = sample_pictures(32)[:, :1]
    with torch.no_grad():
        features, probabilities = observe(detector, grey, classes=True)
        assert torch.equal(features, network(grey.repeat(1, 3, 1, 1)))
    expected = (features @ network.fc.weight.T).softmax(dim=1)
    torch.testing.assert_close(probabilities, expected)
    with pytest.raises(ValueError, match=r"expected uint8 \[N, 3, H, W\]"):
        detector(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))


def equal_but_for_gamma(got: InceptionNetwork, expected: InceptionNetwork) -> bool:
    pairs = zip(got.state_dict().items(), expected.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for (_, a), b in pairs)


def renamed(network, name):
    """Tensors under other names: `name(index, unit)` of each convolution, gamma left out as in TensorFlow's graph."""
    for index, (unit, module) in enumerate(units(network).items()):
        prefix, bn = name(index, unit), module.bn
        yield f"{prefix}.weight", module.conv.weight
        yield from ((f"{prefix}.{key}", value) for key, value in [("beta", bn.bias), ("mean", bn.running_mean)])
        yield f"{prefix}.var", bn.running_var
    yield "output.weight", network.fc.weight
    yield "output.bias", network.fc.bias


def test_tensors_are_recognised_by_tensorflows_names_and_by_order(network):
    by_name = list(renamed(network, lambda _, unit: "layers." + tensorflow_name(unit).replace("/", "_")))
    assert equal_but_for_gamma(load_inception(reversed(by_name)), network)
    assert equal_but_for_gamma(load_inception(renamed(network, lambda index, _: f"layers.{index}")), network)
    with pytest.raises(ValueError, match=r"93 convolutions .* expected the 94"):
        load_inception((k, v) for k, v in renamed(network, lambda i, _: f"layers.{i}") if not k.startswith("layers.7."))


def test_a_persistent_pickle_is_read_without_executing_it(network, tmp_path):
    form = Format(protocol=4, numpy=1, torch_style=1)
    tree = torch.nn.Module()  # modules and tensors under names of the file's own
    for index, unit in enumerate(units(network).values()):
        child = torch.nn.Module()
        child.weight = unit.conv.weight
        for name, value in [("beta", unit.bn.bias), ("mean", unit.bn.running_mean), ("var", unit.bn.running_var)]:
            child.register_buffer(name, value.detach())
        tree.add_module(f"layer{index}", child)
    tree.output = torch.nn.Linear(1, 1)
    tree.output.weight, tree.output.bias = network.fc.weight, network.fc.bias
    path = write(tmp_path / "inception-v3-2015-12-05.pkl", form.dumps(form.module(tree)))
    detector = load_detector(path)
    assert equal_but_for_gamma(detector.network, network)
    assert metric_names(detector) == ("fid", "kid") and "by the file's name" in detector.fid_basis
    assert metric_names(load_detector(path.rename(tmp_path / "mine.pkl"))) == ("fd_mine", "kid_mine")
    evil = write(tmp_path / "evil.pkl", pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match="nothing of it was run"):
        load_detector(evil)


class _Evil:
    def __reduce__(self):
        return print, ("run",)


def test_fid_only_by_published_content_or_name(weights, monkeypatch, tmp_path):
    assert metric_names(load_detector(weights)) == ("fd_random", "kid_random")
    named = tmp_path / "pt_inception-2015-12-05-6726825d.pth"  # its name tells a checksum, which random weights fail
    named.write_bytes(weights.read_bytes())
    assert metric_names(load_detector(named))[0] == "fd_pt_inception_2015_12_05_6726825d"
    digits = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(detectors, "KNOWN_BY_CONTENT", (digits,))
    detector = load_detector(weights)
    assert metric_names(detector) == ("fid", "kid") and score_name(detector) == "is" and digits in detector.fid_basis


def test_the_published_file_has_a_name(root):
    entry = read_index(root / "pretrained")[detectors.INCEPTION_SPACE]
    assert entry.url.endswith("pt_inception-2015-12-05-6726825d.pth") and entry.kind == "classifier"


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "other"])
def test_other_state_dicts_are_told(state, tmp_path, damage):
    changed = dict(state)
    if damage == "missing":
        del changed["Mixed_7c.branch_pool.conv.weight"]
    elif damage == "shape":
        changed["fc.weight"] = torch.zeros(1000, 2048)
    elif damage == "nan":
        changed["fc.bias"] = torch.full([1008], torch.nan)
    else:
        changed = {"a": torch.zeros(3)}
    torch.save(changed, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth is not a detector") as caught:
        load_detector(tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
