"""Tests of the image operations."""

import shutil

import pytest

from refine.torch_utils.build import custom_ops


def require_native() -> None:
    """Skip where there is no compiler; where there is one, a failing build fails the test."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    custom_ops.obtain()
