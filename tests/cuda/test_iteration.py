"""An iteration on a GPU: nothing is waited for, nothing copied, and gradients are those of the CPU."""

import pytest

# As in `inside.iterations`, which cannot be imported here: it has a CUDA device.
PRECISIONS = ["fp32", "tf32", "bf16", "fp16"]
OBJECTIVES = ["dmd", "sid", "sim", "ikl+sid"]
TEACHERS = ["VP", "VE", "iDDPM", "EDM2", "DDPM"]
PAIRS = ["one-step", "bridge", "drawn labels", "guidance"]
OPTIONS = ["critic", "label-dist", "aux-steps", "micro-batches", "regularised", "distances", "averages", "const noise"]
CASES = [*PRECISIONS, *OBJECTIVES, *TEACHERS, *PAIRS, *OPTIONS]

DOCUMENTED = {"aux-steps": ["device to host: 2 numbers, at refine/training/pace.py"]}  # every 16 iterations

# 1 − cosine of gradients: measured 1e-12 in float32; 3e-5 in bf16 and 2e-7 in fp16, where the compiled norm rounds once
# and plain torch after every step. Where there is dropout, masks of the same numbers are in another order: 6e-4.
ANGLES = {"bf16": 1e-4, "fp16": 5e-7, "micro-batches": 3e-3, "regularised": 3e-3, "EDM2": 1e-2}


@pytest.fixture(params=CASES)
def case(request, found):
    """Name, and what was found."""
    result = found("iterations")[request.param]
    if isinstance(result, str):
        pytest.skip(result)
    return request.param, result


def test_all_cases_are_known(found):
    assert sorted(found("iterations")) == sorted(CASES)


def test_nothing_is_waited_for_and_nothing_is_copied(case):
    name, result = case
    expected = DOCUMENTED.get(name, [])
    assert len(result["events"]) == len(expected), result["events"]
    assert all(event.startswith(text) for event, text in zip(result["events"], expected, strict=True)), result["events"]
    assert result["hosts"] == []


def test_gradients_are_those_of_the_cpu(case):
    name, result = case
    networks = {"student", "aux", *(["critic"] if name in ("critic", "micro-batches") else [])}
    assert set(result["gradients"]) == networks
    for network, (angle, ratio, length) in result["gradients"].items():
        assert length > 0.05, network
        assert angle < ANGLES.get(name, 1e-10), network
        assert ratio == pytest.approx(1, abs=0.03 if name in ANGLES else 1e-5), network
