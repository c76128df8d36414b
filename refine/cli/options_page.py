"""docs/options.md, made from the options themselves: `python -m refine.cli.options_page > docs/options.md`."""

from collections.abc import Sequence
from typing import Any

import click

from refine.cli.config_command import GroupedOption, flags_of_fields
from refine.cli.main import load_command
from refine.config import OPTIONS, PRESETS
from refine.config.kinds import Kind
from refine.config.needs import NEEDS
from refine.config.option import GROUPS, flag

_HEAD = """# Options

Every option of every command, made by `python -m refine.cli.options_page` from the options themselves. `--help` says
the same in short, and `python refine.py --preset=NAME --show` prints a preset, one option a line. Words are taken in
any case, `--no-x` means `--x=false`, and a name that another program uses is answered with the one here
(`--learning-rate`: did you mean `--lr`?). [method.md](method.md#options-that-matter) tells which ones matter.

A shell completes commands, options, their words and files once it was told of the console script:
`eval "$(_GAN_REFINE_COMPLETE=bash_source gan-refine)"` (`zsh_source`, `fish_source`).

An option that contradicts another is refused. One that has no part in a run, because what it *needs* is not there, is
named on stderr, and the run goes on. `↻` marks what `--resume` may change.
"""
_COMMANDS = {
    "compare": "`python compare_fid.py` or `python -m refine compare`",
    "generate": "`python generate.py` or `python -m refine generate`",
    **{name: f"`python -m refine {name}`" for name in ("models", "inspect", "export", "average", "doctor", "ops")},
}


def page() -> str:
    """The document."""
    parts = [_HEAD, "## `python refine.py` or `python -m refine refine`\n"]
    refine = load_command("refine")
    for group in GROUPS:
        rows = [_row_of_field(*found) for found in flags_of_fields() if OPTIONS[found[0]].group == group]
        own = [param for param in refine.params if isinstance(param, GroupedOption) and param.group == group]
        rows += [
            (_flags(param), _value(param), "", _text(param)) for param in own if param.name in ("resume", "config_file")
        ]
        parts.append(f"### {group}\n\n" + _table(("option", "value", "default", "what it does"), rows))
    others = [param for param in refine.params if not isinstance(param, GroupedOption)]
    parts.append("### Other\n\n" + _table_of(others))
    parts.append("## Presets\n\n" + _presets())
    for name, title in _COMMANDS.items():
        command = load_command(name)
        within = (
            [(f"{name} {key}", sub) for key, sub in command.commands.items()]
            if isinstance(command, click.Group)
            else []
        )
        for key, one in within or [(name, command)]:
            heading = title if not within else f"`python -m refine {key}`"
            parts.append(f"## {heading}\n\n{_first_sentence(one)}\n\n{_table_of(one.params)}")
    return "\n".join(parts)


def _row_of_field(name: str, part: str, kind: Kind, help_text: str) -> tuple[str, ...]:
    option, default = OPTIONS[name], OPTIONS[name].default
    needs = f" *Needs {NEEDS[name].words}.*" if name in NEEDS else ""
    shown = "required" if default is ... else _shown(kind, default)
    return (f"`{flag(name, part)}`{' ↻' if option.changeable else ''}", _expected(kind), shown, f"{help_text}{needs}")


def _expected(kind: Kind) -> str:
    """What values an option of a field takes."""
    tells = kind.metavar.startswith("[") or kind.expected == "a text"
    known = f"`{kind.metavar}`" if tells else f"`{kind.metavar}`: {kind.expected}"
    return f"{known}; or none" if kind.none else known


def _shown(kind: Kind, value: Any) -> str:
    return kind.none.removeprefix("none: ") if value is None else f"`{kind.format(value)}`"


def _presets() -> str:
    """The values of every preset that are not the defaults."""
    rows = []
    for name, part, kind, _ in flags_of_fields():
        values = [PRESETS[preset].get(name, OPTIONS[name].default) for preset in PRESETS]
        cells = [_shown(kind, value) for value in values if value is not ...]
        if len(set(cells)) > 1:
            rows.append(
                (f"`{flag(name, part)}`", *(cells[:1] + ["" if cell == cells[0] else cell for cell in cells[1:]]))
            )
    return _table(("option", *PRESETS), rows)


def _table_of(params: list[click.Parameter]) -> str:
    """A table of click's own options and arguments."""
    rows = []
    for param in params:
        if param.name in ("version", "help"):
            continue
        text, default = _text(param), "required" if param.required else ""
        if getattr(param, "show_default", False):
            default = f"`{param.default}`"
        before, found, rest = text.partition("[default: ")
        text, default = (before.strip(), rest.removesuffix("]")) if found else (text, default)
        rows.append((_flags(param), _value(param), default, text))
    return _table(("option", "value", "default", "what it does"), rows)


def _flags(param: click.Parameter) -> str:
    names = [str(param.name).upper()] if isinstance(param, click.Argument) else param.opts
    return ", ".join(f"`{name}`" for name in names)


def _value(param: click.Parameter) -> str:
    """What values a parameter of click takes."""
    kind = param.type
    if getattr(param, "is_flag", False) or isinstance(param, click.Argument):
        return ""
    if isinstance(kind, click.Choice):
        return f"`[{'|'.join(kind.choices)}]`"
    whole = isinstance(kind, click.types.IntParamType)
    if not whole and not isinstance(kind, click.types.FloatParamType):
        return f"`{param.metavar or 'TEXT'}`"
    low = getattr(kind, "min", None)
    bound = "" if low is None else f" {'>' if getattr(kind, 'min_open', False) else '≥'} {low:g}"
    return ("a whole number" if whole else "a number") + bound


def _text(param: click.Parameter) -> str:
    return getattr(param, "help", None) or ""


def _first_sentence(command: click.Command) -> str:
    text = " ".join((command.help or "").split("\n\n")[0].split())
    return text if text.endswith((".", "?")) else f"{text}."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return "It has no options.\n"
    lines = [
        head,
        tuple("---" for _ in head),
        *(tuple(cell.replace("|", r"\|").replace("<", r"\<") for cell in row) for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
