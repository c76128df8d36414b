"""What several commands share: lists of numbers, how files are read and diffusion models asked, run folders."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from refine.config.kinds import JSON_TABLE
from refine.errors import option


class Finite(click.FloatRange):
    """A number within bounds, neither NaN nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"found {value}; expected a finite number", param, ctx)
        return number


F = TypeVar("F", bound=Callable[..., Any])

# Field of `SamplerSettings` → type, and help. EDM's own spelling is taken as well.
_SAMPLER: dict[str, tuple[Any, str]] = {
    "steps": (int, "Steps of a diffusion model's sampler.  [default: as published for such models, told on stderr]"),
    "rho": (float, "How its noise levels are spaced."),
    "sigma_min": (float, "Its last noise level."),
    "sigma_max": (float, "Its first noise level."),
    "S_churn": (float, "Fresh noise along the way (EDM, algorithm 2); 0 = none."),
    "S_min": (float, "Lowest noise level at which noise is added."),
    "S_max": (float, "Highest noise level at which noise is added."),
    "S_noise": (float, "Standard deviation of that noise."),
}


def sampler_options(command: F) -> F:
    """Adds `--steps`, `--rho`, `--sigma-min`, … to a command, which gets them by the names of `SamplerSettings`."""
    for name, (kind, text) in reversed(_SAMPLER.items()):
        spelling = f"--{name.lower().replace('_', '-')}"
        others = {f"--{name}"} - {spelling}
        command = click.option(spelling, *sorted(others), name, type=kind, help=text)(command)
    return command


def taken_sampler(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the sampler's options out of those of a command, and returns the ones that were given."""
    found = {name: options.pop(name) for name in _SAMPLER}
    return {name: value for name, value in found.items() if value is not None}


def network_file(path: str, name: str) -> str:
    """The file of a network, where a run folder may be given: then its best snapshot, which is said on stderr.

    Args:
        path: What the user gave.
        name: The option's name, for errors.
    """
    from pathlib import Path

    with option(name):
        if not Path(path).is_dir():  # the usual case, without importing torch
            return path
    from refine.evaluation.run_folder import network_in
    from refine.processes import is_first

    with option(name):
        file, note = network_in(path)
    if note is not None and is_first():
        click.echo(f"note: {note}", err=True)
    return file


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


def kwargs_option(name: str, of: str) -> Callable[[F], F]:
    """An option of constructor arguments, such as '--gan-kwargs', of the file that the option `of` names."""
    text = f"How the network of {of} is built, where its file does not tell it all."
    parameter = name.removeprefix("--").replace("-", "_")
    return click.option(name, parameter, metavar=JSON_TABLE.metavar, callback=_read_table, help=text)


def kwargs_as_typed(
    gan_kwargs: dict[str, Any] | None, teacher_kwargs: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, Callable[[str], str]]:
    """For commands that take any network: the arguments under either name, and what makes a refusal name that one.

    Raises:
        ValueError: Both are given.
    """
    if gan_kwargs is not None and teacher_kwargs is not None:
        raise ValueError("--gan-kwargs and --teacher-kwargs are given, for one file; expected one of them")
    if gan_kwargs is not None:
        return gan_kwargs, lambda text: text.replace("--teacher-kwargs", "--gan-kwargs")
    if teacher_kwargs is not None:
        return teacher_kwargs, lambda text: text.replace("--gan-kwargs", "--teacher-kwargs")
    return None, lambda text: text


def sigma_init_option() -> Callable[[F], F]:
    """--sigma-init, for one-step:FILE."""
    kind = Finite(min=0, min_open=True)
    return click.option("--sigma-init", type=kind, help="Noise level of a one-step:FILE.  [default: 2.5]")


def noise_mode_option(usual: str) -> Callable[[F], F]:
    """--noise-mode, None = `usual`."""
    kind = click.Choice(["const", "random", "none"], case_sensitive=False)
    return click.option("--noise-mode", type=kind, help=f"Noise inputs of a StyleGAN2.  [default: {usual}]")


def is_typed(name: str) -> bool:
    """Whether the command that runs was given an option, by the name of its parameter, which may have a default."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def teacher_options(command: F) -> F:
    """Decorates a command with the options of `refine.evaluation.teachers.TeacherOptions`."""
    for add in (
        click.option("--guide", metavar="FILE|NAME", help="A worse diffusion model that guides one (autoguidance)."),
        click.option(
            "--guidance",
            type=Finite(min=0, min_open=True),
            default=1.0,
            show_default=True,
            help="Strength of a diffusion model's guidance, by --guide or classifier-free; 1 = none.",
        ),
        kwargs_option("--teacher-kwargs", "a diffusion model"),
    ):
        command = add(command)
    return command


def _read_table(_ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, Any] | None:
    with option(param.opts[0]):
        return None if value is None else JSON_TABLE.parse(value)
