"""The options of a RefineConfig on the command line: made from its fields, read as texts, and shown in groups."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import click

from refine.config import OPTIONS, PRESETS
from refine.config.kinds import BOOLEAN, Kind
from refine.config.needs import NEEDS
from refine.config.option import GROUPS, flag
from refine.errors import option as of_option

_NO_DATA = "expected none, as a teacher takes the place of a data set"
# Options of programs that people come from, for which there is none here, and why.
_ELSEWHERE = {
    **dict.fromkeys(
        ["gpus", "nproc", "num-gpus", "nproc-per-node"],
        "several GPUs are torchrun's, as in torchrun --standalone --nproc-per-node=4 refine.py …",
    ),
    **dict.fromkeys(["mirror", "aug", "augpipe", "ada", "augment"], f"{_NO_DATA}; --aux-augment is the nearest"),
    **dict.fromkeys(["workers", "num-workers", "cache"], _NO_DATA),
    "cond": "classes are those of the networks in --gan and --teacher",
    "gamma": "the critic's penalty is fixed; --adversarial is its weight",
    "wd": "Adam is without weight decay here",
}


class GroupedOption(click.Option):
    """An option with a heading in --help."""

    def __init__(self, *args: Any, group: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


class ConfigCommand(click.Command):
    """A command with an option for every field of RefineConfig, which it gets as texts, None = not given."""

    def __init__(self, name: str, *, params: Sequence[click.Parameter], **kwargs: Any):
        super().__init__(name, params=[*_click_options(), *params], **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes --no-x for --x=false, and knows what an option is called elsewhere."""
        off = {f"--no-{flag(name)[2:]}": f"{flag(name)}=false" for name in OPTIONS if OPTIONS[name].kind is BOOLEAN}
        try:
            return super().parse_args(ctx, [off.get(arg, arg) for arg in args])
        except click.NoSuchOption as error:
            word = error.option_name.lstrip("-")
            if word in _ELSEWHERE:
                message = f"No such option {error.option_name!r}: {_ELSEWHERE[word]}"
                raise click.NoSuchOption(error.option_name, message, ctx=ctx) from None
            if meant := next((flag(name) for name in OPTIONS if word in OPTIONS[name].aliases), None):
                message = f"No such option {error.option_name!r}. Did you mean {meant!r}?"
                raise click.NoSuchOption(error.option_name, message, ctx=ctx) from None
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {heading: [] for heading in GROUPS}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(param, "group", "Other"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def read_options(texts: Mapping[str, str | None]) -> dict[str, Any]:
    """The values of the options that are given, as arguments of RefineConfig.

    Args:
        texts: Click's name of the option ('sigma', 'sigma_range') → text of the command line, None = not given.

    Raises:
        ValueError: A text that cannot be read; the message names the option.
    """
    values: dict[str, Any] = {}
    for name, part, kind, _ in flags_of_fields():
        if (text := texts.get(_click_name(name, part))) is None:
            continue
        with of_option(flag(name, part)):
            value = kind.parse(text)
        values[name] = {**values.get(name, {}), **value} if OPTIONS[name].kind.parts else value
    return values


def show_preset(name: str) -> str:
    """All options of a preset as the command line has them, one a line, with the default beside those that differ."""
    lines = []
    for field, part, kind, _ in flags_of_fields():
        default = OPTIONS[field].default
        value = PRESETS[name].get(field, default)
        if field == "preset" or value is ...:
            continue
        text, usual = kind.format(value), kind.format(default)
        lines.append(f"{flag(field, part)}={text}" + ("" if text == usual else f"  (default: {usual})"))
    return "\n".join(lines)


def flags_of_fields() -> list[tuple[str, str, Kind, str]]:
    """(field, part of its value or '', kind, help) of every option that a field makes."""
    found = []
    for name, known in OPTIONS.items():
        found.append((name, "", known.kind, known.help))
        found += [(name, part, kind, text) for part, (text, kind) in known.kind.parts.items()]
    return found


def _click_name(name: str, part: str) -> str:
    return f"{name}_{part}" if part else name


def _click_options() -> list[click.Option]:
    made: list[click.Option] = []
    for name, part, kind, text in flags_of_fields():
        kwargs: dict[str, Any] = {"metavar": kind.metavar}
        if kind.metavar.startswith("["):
            kwargs["shell_complete"] = functools.partial(_complete, kind.metavar.strip("[],…").split("|"))
        if kind is BOOLEAN:
            kwargs |= {"metavar": f"| --no-{flag(name)[2:]}", "is_flag": False, "flag_value": "true"}
        needs = f" Needs {NEEDS[name].words}." if name in NEEDS else ""
        help_text = f"{text}{needs}  {_defaults(name, kind)}".rstrip()
        group = OPTIONS[name].group
        made.append(GroupedOption([flag(name, part), _click_name(name, part)], group=group, help=help_text, **kwargs))
    return made


def _complete(choices: list[str], _ctx: click.Context, _param: click.Parameter, begun: str) -> list[str]:
    return [choice for choice in choices if choice.startswith(begun.lower())]


def _defaults(name: str, kind: Kind) -> str:
    """The default of an option, for --help, with the presets that differ."""

    def show(value: Any) -> str:
        return kind.none if value is None else kind.format(value)

    default = OPTIONS[name].default
    if default is ...:
        return ""
    others = {preset: show(values[name]) for preset, values in PRESETS.items() if name in values}
    shown = [show(default), *(f"{preset} {text}" for preset, text in others.items() if text != show(default))]
    return f"[default: {'; '.join(shown)}]"
