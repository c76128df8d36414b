"""Options of `refine.py` that are texts of their own kind: text → value, or a ValueError that says what is right."""

import json
from pathlib import Path
from typing import Any


def _numbers(text: str, names: str, count: int) -> list[float]:
    """'a,b' → [a, b]."""
    try:
        values = [float(part) for part in text.split(",")]
        if len(values) != count:
            raise ValueError
    except ValueError:
        raise ValueError(f"found {text!r}; expected {names}") from None
    return values


def betas(text: str) -> tuple[float, float]:
    first, second = _numbers(text, "two numbers, such as 0.0,0.999", 2)
    return first, second


def sigma_law(text: str) -> dict[str, Any]:
    """'lognormal:-1.2,1.2', 'karras:7' or 'loguniform' → fields of SigmaOptions."""
    name, _, numbers = text.partition(":")
    if name == "lognormal":
        mean, std = _numbers(numbers, "lognormal:P_mean,P_std", 2) if numbers else (-1.2, 1.2)
        return {"name": name, "P_mean": mean, "P_std": std}
    if name == "karras":
        return {"name": name, "rho": _numbers(numbers, "karras:rho", 1)[0] if numbers else 7.0}
    if name == "loguniform" and not numbers:
        return {"name": name}
    raise ValueError(f"found {text!r}; expected lognormal:P_mean,P_std, karras:rho or loguniform")


def sigma_range(text: str) -> dict[str, float]:
    low, high = _numbers(text, "sigma_min,sigma_max", 2)
    return {"sigma_min": low, "sigma_max": high}


def duration(text: str) -> float:
    """SLURM's ways to write a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours:minutes:seconds."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    try:
        numbers = [float(part) for part in parts]
        if len(parts) > 3 or (dash and len(parts) != 3) or min(numbers) < 0:
            raise ValueError
        hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(parts)]
        return float(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    except ValueError:
        raise ValueError(
            f"found {text!r}; expected minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        ) from None


def label_dist(text: str) -> tuple[float, ...] | None:
    """'uniform', a JSON list of numbers, or the path of a file with one."""
    if text == "uniform":
        return None
    try:
        numbers = json.loads(text if text.lstrip().startswith("[") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"found {text!r}; expected uniform, a JSON list, or a file with one ({error})") from None
    if not isinstance(numbers, list) or not all(type(n) in (int, float) for n in numbers):
        raise ValueError(f"found {text!r}; expected a JSON list of one number per class")
    return tuple(float(n) for n in numbers)
