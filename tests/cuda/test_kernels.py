"""The .cu files on the host, with threads that wait for each other."""

import pytest

OPS = ("bias_act", "modulated_act", "upfirdn2d", "group_norm_silu", "sum_group_norm_silu", "filtered_lrelu")


@pytest.mark.parametrize("way", ["launched", "shuffled", "backwards"])
def test_kernels_agree_with_the_reference(found, way):
    """Also with fewer blocks than there is work for, and with threads in any order."""
    errors = found("parts")["errors"][way]
    assert set(errors) == {f"{op} {dtype}" for op in OPS for dtype in ("float32", "float16")}
    for name, error in errors.items():
        assert error < (2e-2 if "float16" in name else 1e-5), name
