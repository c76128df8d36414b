"""What several commands share: lists of numbers, and how a diffusion model among their networks is asked."""

from collections.abc import Callable
from typing import Any

import click

from refine.config.kinds import JSON_TABLE
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


def teacher_options(command: Callable) -> Callable:
    """Decorates a command with the options of `refine.evaluation.teachers.TeacherOptions`."""
    for add in (
        click.option("--guide", metavar="FILE|NAME", help="A worse diffusion model that guides one (autoguidance)."),
        click.option(
            "--guidance",
            type=click.FloatRange(min=0, min_open=True),
            default=1.0,
            show_default=True,
            help="Strength of a diffusion model's guidance, by --guide or classifier-free; 1 = none.",
        ),
        click.option(
            "--teacher-kwargs",
            metavar=JSON_TABLE.metavar,
            callback=_read_table,
            help="How a diffusion model is built whose file does not tell it all.",
        ),
    ):
        command = add(command)
    return command


def _read_table(_ctx: click.Context, _param: click.Parameter, value: str | None) -> dict[str, Any] | None:
    with option("--teacher-kwargs"):
        return None if value is None else JSON_TABLE.parse(value)
