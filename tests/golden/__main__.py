"""Prints how many golden cases there are of each family, and how far from them this toolkit is at most.

A case is a test with its parameters: one network, file or op, computed in one way. Errors are in units of the largest
expected number (`max_error`, `array_error`, `sample_error`). Cases in 16 bits have tolerances of their own.
"""

import contextlib
import io
import re

import pytest

from tests import golden

NETWORKS, FILES, OPS = "tests/networks/test_", "tests/checkpoints/foreign/test_", "tests/torch_utils/ops/test_"
OF_16_BITS = re.compile(r"::test_\w*(half|fp16|bfloat16)")  # of the test, not of what it is given
STYLEGAN3 = (f"{NETWORKS}golden_stylegan3.py", f"{FILES}stylegan3.py::test_originals")
FAMILIES = {  # name → arguments of pytest
    "StyleGAN2": (
        f"{NETWORKS}golden_stylegan2.py",
        *(
            f"{FILES}nvidia.py::test_{name}"
            for name in ("originals_of_stylegan2", "original_converted_from_tensorflow")
        ),
        *(f"{FILES}forms.py::test_golden_{name}" for name in ("state_dicts", "module_of_torch_save")),
    ),
    "StyleGAN2 of TensorFlow": tuple(f"{FILES}tensorflow.py::test_{name}" for name in ("originals", "every_network")),
    "its ops": (f"{OPS}golden_ops.py",),
    "StyleGAN3": (*STYLEGAN3, "-k not (x0 or sgxl)"),
    "StyleGAN-XL, StyleSAN-XL": (*STYLEGAN3, "-k x0 or sgxl"),
    "filtered_lrelu": (f"{OPS}filtered_lrelu.py::test_golden",),
    "R3GAN": (f"{NETWORKS}golden_r3gan.py", f"{FILES}forms.py::test_r3gan"),
    "EDM": (f"{NETWORKS}edm_golden.py", f"{FILES}nvidia.py::test_original_of_edm"),
    "EDM2": (f"{NETWORKS}edm2.py",),
    "autoguidance": ("tests/test_autoguidance.py::test_golden",),
    "guided-diffusion, consistency_models": (f"{NETWORKS}adm_golden.py", f"{NETWORKS}adm.py"),
    "diffusers": (f"{NETWORKS}ddpm.py",),
}


def main() -> None:
    print("| family | cases | comparisons | largest error | in 16 bits | largest error |")
    print("|---|---|---|---|---|---|")
    for family, arguments in FAMILIES.items():
        golden.COMPARED.clear()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = pytest.main(["-q", "-p", "no:cacheprovider", *arguments])
        if code:
            raise SystemExit(said.getvalue())
        halves = [(test, error) for test, error in golden.COMPARED if OF_16_BITS.search(test)]
        exact = [(test, error) for test, error in golden.COMPARED if not OF_16_BITS.search(test)]
        cases = len({test for test, _ in exact})
        half = f"{len(halves)} | {max(error for _, error in halves):.1e}" if halves else "| "
        print(f"| {family} | {cases} | {len(exact)} | {max(error for _, error in exact):.1e} | {half} |", flush=True)


if __name__ == "__main__":
    main()
