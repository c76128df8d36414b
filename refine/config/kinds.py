"""Kinds of option values: how each is read from the command line, shown, and checked."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from refine.dnnlib import read_text

_MAX_JSON_BYTES = 1 << 20


class Unreadable(ValueError):
    """A text that is not a value; the message is what was expected."""


@dataclass(frozen=True)
class Kind:
    """One kind of option value.

    Attributes:
        metavar: What stands for a value in --help.
        read: Text → value. It raises `Unreadable`, which says what was expected, or any ValueError, which means that
            `expected` was.
        expected: What `holds` wants, for messages.
        holds: Whether a value is possible. A TypeError means that it is not.
        show: Value → the text that `read` makes it from.
        cast: (value, value of the preset) → value, for what JSON and callers write in another form.
        none: What the value None means; '' = None is not allowed. It is read from the text 'none'.
        parts: Further options `--<option>-<suffix>` that hold part of the value, as suffix → (help, kind). `read` of
            the option and of its parts then return a dict of fields, which `cast` lays over the value of the preset.
    """

    metavar: str
    read: Callable[[str], Any]
    expected: str
    holds: Callable[[Any], bool]
    show: Callable[[Any], str] = str
    cast: Callable[[Any, Any], Any] = lambda value, _: value
    none: str = ""
    parts: Mapping[str, tuple[str, "Kind"]] = field(default_factory=dict)

    def parse(self, text: str) -> Any:
        """The value of a text of the command line. Raises ValueError: found …; expected …"""
        if self.none and text.lower() == "none":
            return None
        try:
            return self.read(text)
        except ValueError as error:
            expected = error if isinstance(error, Unreadable) else self.expected
            found = text if len(text) <= 200 else f"{text[:200]}…"
            raise ValueError(f"found {found!r}; expected {expected}") from None

    def format(self, value: Any) -> str:
        """The text that `parse` makes the value from."""
        return "none" if value is None else self.show(value)

    def allows(self, value: Any) -> bool:
        """Whether the value is possible."""
        if value is None:
            return bool(self.none)
        if isinstance(value, bool) and self.read in (int, float):  # numbers to Python only
            return False
        try:
            return self.holds(value)
        except TypeError:
            return False


def optional(kind: Kind, none: str) -> Kind:
    """The same, or None, which means `none`."""
    return dataclasses.replace(kind, none=none)


def number(expected: str, holds: Callable[[float], bool], metavar: str = "X") -> Kind:
    return Kind(metavar, float, expected, holds)


def count(low: int, high: float = math.inf) -> Kind:
    """A whole number of at least `low`, and at most `high`."""
    expected = f"a whole number ≥ {low}" if high == math.inf else f"a whole number, {low} to {high}"
    return Kind("N", int, expected, lambda value: low <= value <= high)


def count_or(word: str, low: int) -> Kind:
    """A whole number of at least `low`, or a word."""

    def read(text: str) -> int | str:
        return word if text.lower() == word else int(text)

    expected = f"a whole number ≥ {low}, or {word}"
    return Kind(
        f"N|{word}", read, expected, lambda value: value == word or (not isinstance(value, str) and value >= low)
    )


def words(choices: tuple[str, ...]) -> Kind:
    """One of the choices, which are lower-case; on the command line in any case."""

    def read(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError
        return text.lower()

    return Kind(f"[{'|'.join(choices)}]", read, f"one of {', '.join(choices)}", lambda value: value in choices)


def text(metavar: str, expected: str = "a text") -> Kind:
    def cast(value: Any, _: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    return Kind(metavar, str, expected, lambda value: isinstance(value, str), cast=cast)


def _tuple(value: Any, _: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples


def _numbers(text: str, names: str, how_many: int) -> list[float]:
    """'a,b' → [a, b]; `names` says which numbers are expected."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise Unreadable(names) from None
    if len(values) != how_many:
        raise Unreadable(names)
    return values


def _read_bool(text: str) -> bool:
    table = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in table:
        raise ValueError
    return table[text.lower()]


def _read_label_dist(text: str) -> tuple[float, ...] | None:
    """'uniform', a JSON list of numbers, or the path of a file with one."""
    if text.lower() == "uniform":
        return None
    try:
        numbers = json.loads(text if text.lstrip().startswith("[") else read_text(text, _MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"uniform, a JSON list, or a file with one ({error})") from None
    if not isinstance(numbers, list) or not all(type(n) in (int, float) for n in numbers):
        raise Unreadable("a JSON list of one number per class")
    try:
        return tuple(float(n) for n in numbers)
    except OverflowError:
        raise Unreadable("a JSON list of smaller numbers") from None


def _read_minutes(text: str) -> float:
    """Seconds from SLURM's ways to write a time: minutes, minutes:seconds, hours:minutes:seconds, days-h:m:s."""
    days, dash, rest = text.rpartition("-")
    numbers = [float(part) for part in rest.split(":")]
    if len(numbers) > 3 or (dash and len(numbers) != 3) or min(numbers) < 0:
        raise ValueError
    hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(numbers)]
    return float(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


POSITIVE = number("a number > 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = number("a number ≥ 0", lambda value: 0 <= value < math.inf)
SHARE = number("0 to 1", lambda value: 0 <= value <= 1)
BETAS = Kind(
    "B1,B2",
    lambda text: tuple(_numbers(text, "two numbers, such as 0.0,0.999", 2)),
    "two numbers in [0, 1)",
    lambda value: len(value) == 2 and all(0 <= b < 1 for b in value),
    show=lambda value: ",".join(map(str, value)),
    cast=_tuple,
)
BOOLEAN = Kind(
    "[true|false]", _read_bool, "true or false", lambda value: isinstance(value, bool), lambda value: str(value).lower()
)
# A limit that 0 lifts on the command line.
LIMIT = optional(
    Kind("X", lambda text: float(text) or None, "a number > 0", lambda value: value > 0),
    "no limit",
)
MINUTES = Kind(
    "MINUTES|H:M:S",
    _read_minutes,
    "minutes, hours:minutes:seconds or days-hours:minutes:seconds",
    lambda value: value > 0,
    show=lambda seconds: str(seconds / 60),
)
LABEL_DIST = optional(
    Kind(
        "LIST",
        _read_label_dist,
        "numbers ≥ 0, not all of them 0",
        lambda value: all(0 <= p <= 1e30 for p in value) and sum(value) >= 1e-30,  # they are drawn in single precision
        show=lambda value: json.dumps(list(value)),
        cast=_tuple,
    ),
    "uniform",
)
RATE = optional(number("a rate in [0, 1)", lambda value: 0 <= value < 1), "none")
_TERM = r"\s*\w+(:[^+:]+)?\s*"  # NAME or NAME:WEIGHT; which names there are, the registry of objectives knows
_SUM = re.compile(rf"{_TERM}(\+{_TERM})*")


def _read_objective(text: str) -> str:
    if not _SUM.fullmatch(text):
        raise ValueError
    return text.lower()


OBJECTIVE = Kind(
    "NAME[+NAME]",
    _read_objective,
    "a name such as ikl, or a sum such as ikl:0.7+sid:0.3",
    lambda value: bool(_SUM.fullmatch(value)),
)


def some_of(choices: tuple[str, ...]) -> Kind:
    """Any of the choices, which are lower-case, separated by commas; on the command line in any case."""

    def read(text: str) -> tuple[str, ...]:
        return () if text.lower() == "none" else tuple(text.lower().split(","))

    return Kind(
        f"[{'|'.join(choices)}],…",
        read,
        f"some of {', '.join(choices)}, or none",
        lambda value: isinstance(value, tuple) and set(value) <= set(choices),
        show=lambda value: ",".join(value) or "none",
        cast=_tuple,
    )


NAMES = Kind(
    "LIST",
    lambda text: () if text.lower() == "none" else tuple(text.split(",")),
    "a list of names",
    lambda value: isinstance(value, tuple) and all(isinstance(name, str) for name in value),
    show=lambda value: ",".join(value) or "none",
    cast=_tuple,
)


def _read_table(text: str) -> dict[str, Any]:
    """A JSON object, or the path of a file with one."""
    try:
        if not (written := text.lstrip()).startswith("{"):
            written = read_text(text, _MAX_JSON_BYTES)
        table = json.loads(written)
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"a JSON object or a file with one ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(table, dict):
        raise Unreadable('a JSON object such as {"synthesis_kwargs": {"conv_clamp": 256}}')
    return table


JSON_TABLE = Kind(
    "FILE.json|JSON",
    _read_table,
    "a JSON object",
    lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value),
    show=json.dumps,
)
LENGTHS = Kind(
    "LIST",
    lambda text: tuple(float(part) for part in text.split(",")),
    "different numbers of 0.005 to 0.288, ascending",
    lambda value: len(value) > 0 and list(value) == sorted(set(value)) and all(0.005 <= v <= 0.288 for v in value),
    show=lambda value: ",".join(map(str, value)),
    cast=_tuple,
)


@dataclass(frozen=True)
class SigmaOptions:
    """The law of noise levels of one step; see `refine.noise.SigmaLaw`, which draws from it."""

    name: str = "lognormal"
    P_mean: float = -1.2
    P_std: float = 1.2
    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0


def _read_law(text: str) -> dict[str, Any]:
    """'lognormal:-1.2,1.2', 'karras:7' or 'loguniform' → fields of SigmaOptions."""
    name, _, numbers = text.partition(":")
    name = name.lower()
    if name == "lognormal":
        default = [SigmaOptions.P_mean, SigmaOptions.P_std]
        mean, std = _numbers(numbers, "lognormal:P_mean,P_std", 2) if numbers else default
        return {"name": name, "P_mean": mean, "P_std": std}
    if name == "karras":
        return {"name": name, "rho": _numbers(numbers, "karras:rho", 1)[0] if numbers else SigmaOptions.rho}
    if name == "loguniform" and not numbers:
        return {"name": name}
    raise ValueError


def _show_law(law: SigmaOptions) -> str:
    numbers = {"lognormal": f":{law.P_mean},{law.P_std}", "karras": f":{law.rho}"}
    return law.name + numbers.get(law.name, "")


def _is_law(value: Any) -> bool:
    return isinstance(value, SigmaOptions)


_RANGE = "MIN,MAX with 0 < MIN < MAX"


def _read_range(text: str) -> dict[str, Any]:
    low, high = _numbers(text, _RANGE, 2)
    if not 0 < low < high < math.inf:
        raise ValueError
    return {"sigma_min": low, "sigma_max": high}


_SIGMA_RANGE = Kind(
    "MIN,MAX",
    _read_range,
    _RANGE,
    _is_law,
    show=lambda law: f"{law.sigma_min},{law.sigma_max}",
)
SIGMA_LAW = Kind(
    "LAW",
    _read_law,
    "lognormal:P_mean,P_std, karras:rho or loguniform",
    _is_law,
    show=_show_law,
    cast=lambda value, law: dataclasses.replace(law, **value) if isinstance(value, dict) else value,
    parts={"range": ("Range of those noise levels.", _SIGMA_RANGE)},
)
