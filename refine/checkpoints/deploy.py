"""Generators for other runtimes: a graph from z (and labels, and psi) to images, as ONNX or a torch.export program.

    inputs    z (N, z_dim); c (N, c_dim) with classes; psi, one number, where there is truncation; all float32
    output    image (N, img_channels, R, R), float32, about [-1, 1]; noise inputs are the stored ones

N is free. Kernels of this toolkit are not in the graph: plain torch stands for them while it is made. What was written
is run once and compared before it takes its name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from refine import dnnlib
from refine.checkpoints.writers import patient
from refine.networks.bases import Generator
from refine.torch_utils.build import custom_ops

TOLERANCE = 1e-4  # of the largest value of the images
_MAX_BYTES = 2_000_000_000  # of one ONNX file, a limit of the format
_N = 2  # images that are compared


class _Graph(torch.nn.Module):
    """A generator as a function of tensors only."""

    def __init__(self, G: Generator):
        super().__init__()
        self.G = G
        self.truncates = G.takes_truncation and getattr(getattr(G, "mapping", None), "w_avg", None) is not None

    @property
    def inputs(self) -> list[str]:
        return ["z", *(["c"] if self.G.c_dim else []), *(["psi"] if self.truncates else [])]

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.inputs, values, strict=True))
        z, c, options = given["z"], given.get("c"), self.G.accepted(noise_mode="const")
        if not self.truncates:
            return self.G(z, c, **options)
        mapping: Any = self.G.mapping
        mean = mapping.w_avg
        if mean.ndim == 2:  # one for each class
            assert c is not None, "means of classes need labels"
            mean = mean[c.argmax(dim=1)].unsqueeze(1)
        ws = mean + given["psi"] * (mapping(z, c) - mean)
        return self.G.synthesis(ws, **options)  # type: ignore[operator] # of every generator with a mapping

    def example(self) -> tuple[torch.Tensor, ...]:
        rng = torch.Generator().manual_seed(0)
        made = {"z": torch.randn(_N, self.G.z_dim, generator=rng), "psi": torch.tensor(0.7)}
        made["c"] = torch.eye(_N, max(self.G.c_dim, 1))
        return tuple(made[name] for name in self.inputs)


@torch.no_grad()
def write_graph(out: str | os.PathLike, G: Generator) -> str:
    """Writes a generator as a graph, by the suffix of the file: .onnx, or .pt2 of torch.export.

    Args:
        out: The file to write or replace, whole or not at all.
        G: On the CPU.

    Returns:
        One sentence: inputs, output, and how far its images are from G's.

    Raises:
        ValueError: The network is too large for one file, has no graph, or the result is another function.
        OSError: The file cannot be written.
    """
    write, run = _WRITERS[Path(out).suffix.lstrip(".").lower()]
    graph = _Graph(G.cpu().float().eval())
    with _plain_ops(), dnnlib.replaced_atomically(out) as temporary:
        try:
            with _quiet():
                write(graph, temporary)
        except RuntimeError as error:  # what exporters raise
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"this network cannot be made into a graph: {reason[:200]}") from None
        inputs = graph.example()
        expected = graph(*inputs)
        apart = float((run(graph, temporary, inputs) - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not apart <= TOLERANCE:
            raise ValueError(f"the graph gives images that differ by {apart:.2g}; expected at most {TOLERANCE:g}")
    shape = f"(N, {G.img_channels}, {G.img_resolution}, {G.img_resolution})"
    return f"{', '.join(graph.inputs)} → image {shape}; it was run and differs by {apart:.1g} at most"


def check_installed(suffix: str) -> None:
    """Raises ValueError where torch is too old, or the packages for a format are missing."""
    if not hasattr(torch.compiler, "is_exporting"):
        raise ValueError(f"graphs need torch 2.7 or newer; this is {torch.__version__}")
    packages = ("onnx", "onnxscript", "onnxruntime") if suffix == "onnx" else ()
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"ONNX needs {', '.join(missing)}; pip install 'gan-refine[deploy]' brings them")


def _exported(graph: _Graph) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("N", min=1)
    shapes = tuple(None if name == "psi" else {0: batch} for name in graph.inputs)
    return torch.export.export(graph, graph.example(), dynamic_shapes=(shapes,), strict=False)


def _write_onnx(graph: _Graph, path: Path) -> None:
    if sum(t.nbytes for t in graph.state_dict().values()) > _MAX_BYTES:
        raise ValueError("the network is larger than 2 GB, the most that one ONNX file holds; .pt2 has no such limit")
    names: dict[str, Any] = {"input_names": graph.inputs, "output_names": ["image"]}
    program = torch.onnx.export(_exported(graph), (), dynamo=True, verbose=False, optimize=True, **names)
    assert program is not None, "dynamo gives a program"
    program.save(str(path), external_data=False)


def _run_onnx(graph: _Graph, path: Path, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
    return torch.from_numpy(session.run(["image"], feeds)[0])


def _write_program(graph: _Graph, path: Path) -> None:
    with patient(path) as file:
        torch.export.save(_exported(graph), file)


def _run_program(graph: _Graph, path: Path, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    with open(path, "rb") as file:
        return torch.export.load(file).module()(*inputs)


_Writer = tuple[Callable[[_Graph, Path], None], Callable[[_Graph, Path, tuple[torch.Tensor, ...]], torch.Tensor]]
_WRITERS: dict[str, _Writer] = {"onnx": (_write_onnx, _run_onnx), "pt2": (_write_program, _run_program)}


@contextlib.contextmanager
def _plain_ops() -> Iterator[None]:
    """Plain torch instead of compiled ops."""
    before = custom_ops.get_mode()
    custom_ops.set_mode("ref")
    try:
        yield
    finally:
        custom_ops.set_mode(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves: standard output is for programs."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
