"""What several commands share: lists of numbers, and how a file is read that does not tell all."""

from collections.abc import Callable
from typing import Any

import click

from refine.config.kinds import KWARGS
from refine.errors import option


def parse_ints(text: str, limit: int = 1_000_000) -> list[int]:
    """Integers and ranges, each once and in order: '0-3,7,2' → [0, 1, 2, 3, 7].

    Raises:
        ValueError: It is not such a list, or holds more than `limit` numbers.
    """
    numbers: dict[int, None] = {}
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise ValueError(f"{text!r} is not a list of numbers; expected e.g. 0-35,40")
        span = range(int(low), int(high or low) + 1)
        if len(span) + len(numbers) > limit:
            raise ValueError(f"{text!r} holds more than {limit:,} numbers")
        numbers.update(dict.fromkeys(span))
    return list(numbers)


def kwargs_option(name: str, of: str) -> Callable[[Any], Any]:
    """An option of constructor arguments, such as '--gan-kwargs'.

    Args:
        name: The option.
        of: The option of the file that they belong to.
    """

    def parse(_ctx: click.Context, _param: click.Parameter, value: str | None) -> dict[str, Any] | None:
        with option(name):
            return None if value is None else KWARGS.parse(value)

    text = f"Constructor arguments of {of} that its state dict does not tell."
    return click.option(name, metavar=KWARGS.metavar, callback=parse, help=text)


def sigma_init_option() -> Callable[[Any], Any]:
    """--sigma-init, for one-step:FILE."""
    kind = click.FloatRange(min=0, min_open=True)
    return click.option(
        "--sigma-init", type=kind, default=2.5, show_default=True, help="Noise level of a one-step:FILE."
    )
