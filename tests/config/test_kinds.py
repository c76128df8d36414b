"""Texts of the command line and the values that they are."""

import os

import pytest

from refine.config import OPTIONS, SigmaOptions


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("kimg", "2.5", 2.5),
        ("batch", "32", 32),
        ("batch_gpu", "none", None),
        ("betas", "0,0.99", (0.0, 0.99)),
        ("objective", "SiD", "sid"),
        ("precision", "BF16", "bf16"),
        ("noise_mode", "none", "none"),
        ("compile", "yes", True),
        ("dropout", "False", False),
        ("ema_rampup", "0", None),
        ("ema_rampup", "0.1", 0.1),
        ("label_dist", "Uniform", None),
        ("label_dist", "[1, 2]", (1.0, 2.0)),
        ("metrics", "NONE", ()),
        ("metrics", "fid50k_full,is50k", ("fid50k_full", "is50k")),
        ("time_limit", "90", 5400.0),
        ("time_limit", "1:30", 90.0),
        ("time_limit", "1:00:30", 3630.0),
        ("time_limit", "2-0:0:1", 172801.0),
    ],
)
def test_texts(name, text, value):
    kind = OPTIONS[name].kind
    assert kind.parse(text) == value and kind.allows(value)
    assert kind.parse(kind.format(value)) == value


def test_what_was_found_and_expected():
    for name, text, message in [
        ("kimg", "many", "found 'many'; expected a number > 0"),
        ("lr_schedule", "steps", "found 'steps'; expected one of constant, cosine, linear"),
        ("betas", "1", "found '1'; expected two numbers, such as 0.0,0.999"),
        ("sigma", "karras:x", "found 'karras:x'; expected karras:rho"),
        ("sigma", "cauchy", "found 'cauchy'; expected lognormal:P_mean,P_std, karras:rho or loguniform"),
    ]:
        with pytest.raises(ValueError) as caught:
            OPTIONS[name].kind.parse(text)
        assert str(caught.value) == message


@pytest.mark.parametrize("name", ["gan_kwargs", "teacher_kwargs", "label_dist"])
def test_files_that_would_never_end_or_take_gigabytes(name, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * ((1 << 20) + 1))
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + (b"[1, 2]" if name == "label_dist" else b'{"z_dim": 4}'))
    for path in ("/dev/zero", *(tmp_path / file for file in ("pipe", "large", "deep"))):
        with pytest.raises(ValueError, match=r"expected (a JSON object|uniform).* with one \("):
            OPTIONS[name].kind.parse(str(path))
    assert OPTIONS[name].kind.parse(str(tmp_path / "marked")) in ((1.0, 2.0), {"z_dim": 4})


def test_how_often_classes_are_drawn_in_single_precision():
    for text in ("[1e-320, 0]", "[1e300, 1e300]", "[0, 0]"):
        assert not OPTIONS["label_dist"].kind.allows(OPTIONS["label_dist"].kind.parse(text))
    with pytest.raises(ValueError, match="smaller numbers"):
        OPTIONS["label_dist"].kind.parse(f"[{'9' * 400}, 1]")


def test_values_in_the_form_of_json_and_of_callers(tmp_path):
    base = SigmaOptions(P_mean=0.4)
    assert OPTIONS["sigma"].kind.cast({"name": "karras", "rho": 5.0}, base) == SigmaOptions("karras", 0.4, rho=5.0)
    assert OPTIONS["betas"].kind.cast([0.5, 0.9], None) == (0.5, 0.9)
    assert OPTIONS["outdir"].kind.cast(tmp_path, None) == str(tmp_path)
