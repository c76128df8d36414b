"""Opens programs written by `torch.export.save`, once it is sure that opening and running them computes and no more.

torch's own reader unpickles, evaluates symbolic expressions and calls whatever function of torch's a file names. So the
archive is looked through first: tensors are stored plainly or as what `weights_only` reads, expressions are arithmetic,
and every node of the graph is an operator of ATen or arithmetic on sizes.
"""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

_TARGET = re.compile(r"torch\.ops\.aten\.\w+\.\w+|torch\.sym_\w+|_?operator\.(add|sub|mul|neg|floordiv|mod|getitem|eq)")
_FUNCTIONS = {"Symbol", "Integer", "Eq", "Ne", "Le", "Lt", "Ge", "Gt", "Max", "Min", "Mod", "PythonMod", "FloorDiv"}
_FUNCTIONS |= {"CleanDiv", "CeilDiv", "Add", "Mul", "Pow", "oo"}
_SIZES = {"size", "shape", "stride", "dim", "ndim"}  # what a condition may ask of an input
_SYNTAX: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.Attribute, ast.Subscript),
    *(ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop),
)
_MAX_JSON_BYTES = 256 << 20


def is_exported(path: str | os.PathLike) -> bool:
    """Whether a zip file is an archive of torch.export (.pt2)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/archive_format") or "/models/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def load_exported(path: str | os.PathLike) -> torch.nn.Module:
    """The module of a file of `torch.export.save`.

    Raises:
        ValueError: The file is broken, or holds more than a computation on tensors.
    """
    _check(Path(path))
    try:
        # The reader asks for full unpickling in places; this setting of torch's takes the choice away from it.
        with mock.patch.dict(os.environ, {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(str(path)).module()
    except Exception as error:  # noqa: BLE001 - a broken file ends in any of a dozen types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        raise ValueError(f"{path} cannot be read by torch.export of torch {torch.__version__}: {reason}") from None


def _check(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            documents = [info for info in archive.infolist() if info.filename.endswith(".json")]
            if sum(info.file_size for info in documents) > _MAX_JSON_BYTES:
                raise ValueError(f"{path} has a description of more than {_MAX_JSON_BYTES >> 20} MiB")
            contents = [json.loads(archive.read(info)) for info in documents]
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, json.JSONDecodeError, UnicodeDecodeError, NotImplementedError, RecursionError):
        raise ValueError(f"{path} is not a whole archive of torch.export") from None
    if any("/aotinductor/" in name or name.endswith(".so") for name in names):
        raise ValueError(f"{path} holds compiled code; expected a program of torch.export alone")
    for content in contents:
        for key, value in _entries(content):
            problem = None
            if key == "target" and isinstance(value, str) and "." in value and not _is_name(content, value):
                problem = None if _TARGET.fullmatch(value) else f"calls {value[:80]!r}"
            elif key == "expr_str" and not _is_arithmetic(value):
                problem = "has an expression that is not arithmetic"
            elif key == "guards_code" and not (isinstance(value, list) and all(map(_is_arithmetic, value))):
                problem = "has a condition that is not arithmetic"
            elif key == "path_name" and not re.fullmatch(r"(tensor|weight)_\d+", str(value)):
                problem = f"holds an object {str(value)[:40]!r} that is not a tensor"
            if problem:
                raise ValueError(f"{path} {problem}, which a detector does not need; nothing of it was run")


def _is_arithmetic(text: Any) -> bool:
    """Whether an expression is arithmetic on symbols and sizes; torch evaluates such text as Python."""
    if not isinstance(text, str) or len(text) > 1000:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if not isinstance(node, _SYNTAX):
            return False
        if isinstance(node, ast.Attribute) and node.attr not in _SIZES:
            return False
        if isinstance(node, ast.Name) and ("__" in node.id or (id(node) in called and node.id not in _FUNCTIONS)):
            return False
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name | ast.Attribute):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.fullmatch(r"\w{1,60}", node.value):
            return False
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and not _small(node.right):
            return False
    return True


def _small(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int) and abs(node.value) < 10


def _is_name(content: Any, value: str) -> bool:
    """Whether a `target` names a buffer (in the signature) instead of a function (in the graph)."""
    return value in _tensor_names(content)


def _tensor_names(content: Any) -> set[str]:
    module = content.get("graph_module", {}) if isinstance(content, dict) else {}
    names = set()
    for key, value in _entries(module.get("signature", {}) if isinstance(module, dict) else {}):
        if key in ("parameter_name", "buffer_name", "tensor_constant_name") and isinstance(value, str):
            names.add(value)
    return names


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
