"""`python -m refine …` and the console script `gan-refine`; and how every command here starts and fails.

Command modules import click and the standard library only, and torch once their options are valid: `--help` and a
mistyped option answer at once. They raise ValueError (or OSError) for what the user can put right; `run_command` makes
one line of it.
"""

import importlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn, TypeGuard

from refine.dnnlib import descriptor, tell
from refine.errors import describe_missing_package, describe_os_error

try:
    import click
except ModuleNotFoundError as missing:  # a newcomer's first command, before the environment is active
    print(f"Error: {describe_missing_package(missing)}", file=sys.stderr)
    sys.exit(2)

_COMMANDS = {  # name -> module, attribute
    "refine": ("refine.cli.refine_cmd", "refine"),
    "compare": ("refine.cli.compare", "command"),
    "generate": ("refine.cli.generate", "command"),
    "models": ("refine.cli.models_cmd", "models"),
    "inspect": ("refine.cli.inspect_cmd", "inspect"),
    "export": ("refine.cli.export_cmd", "export"),
    "average": ("refine.cli.average_cmd", "average"),
    "doctor": ("refine.cli.doctor_cmd", "doctor"),
    "ops": ("refine.cli.ops_cmd", "ops"),
}


_PLACES = {"FILE", "DIR", "RUN", "PATH", "ZIP"}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load_command(cmd_name) if cmd_name in _COMMANDS else None


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import refine

        click.echo(f"gan-refine {refine.__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Refine a pretrained GAN with a pretrained diffusion model, data-free, by Diff-Instruct."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `python -m refine` and of the console script."""
    run_command(cli, args)


def run_command(command: click.Command | str, args: Sequence[str] | None = None) -> NoReturn:
    """Runs a command as the whole program: ends the process, says failures in one line on stderr.

    Exit codes: 0 done; 1 the program failed (out of memory, or a bug of ours); 2 something the user can put right (an
    option, a file, a full disk); 130 interrupted. `REFINE_DEBUG=1` prints tracebacks as well.

    Args:
        command: A click command, or the name of one of the commands of `python -m refine`.
        args: Command line without the program's name; None = that of the process.
    """
    # Read when torch loads OpenMP. Threads that spin while they wait are good on an idle machine only: beside one other
    # busy process, a refinement step on two cores took 9 to 14 s with spinning threads and 2.3 s with sleeping ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched:  # not torch's page about a closed connection
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code: str | int | None = 1
    _lead_closed_streams_nowhere()
    try:
        _check_current_folder()
        command = load_command(command) if isinstance(command, str) else _with_version(command)
        result = command.main(args=None if args is None else list(args), standalone_mode=False)
        code = result if type(result) is int else 0  # click hands the code of ctx.exit() back like this
        sys.stdout.flush()  # here, where a closed pipe is still handled
    except BrokenPipeError:  # the reader of our output (`| head`) has left: no message, and no second one at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as end:
        code = end.code
    except BaseException as error:  # noqa: BLE001 - the last resort: everything is reported, nothing passed over
        if os.environ.get("REFINE_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        if _is_of_stdout(error):
            error.filename = "stdout"
        code, message = describe_failure(error)
        _complain(message)
    if launched and isinstance(code, int) and any(thread.name == "within" for thread in threading.enumerate()):
        os._exit(code)  # left in C++, where torch waits for a store: Python's end would make it abort the process
    sys.exit(code)


def describe_failure(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for people, for whatever ended a command."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130, "Interrupted."
    if isinstance(error, click.ClickException):
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f" ({error.ctx.command_path} --help lists the options)"
        message = _one_line(error.format_message()).rstrip(".")
        if isinstance(error, click.MissingParameter) and isinstance(error.param, click.Option):
            message = f"{error.param.opts[0]} is missing; expected {error.param.metavar or 'a value'}"
        return 2, f"Error: {message}{hint}"
    if isinstance(error, OSError) and error.strerror:
        return 2, f"Error: {_one_line(describe_os_error(error))}"
    if isinstance(error, ValueError | OSError):
        return 2, f"Error: {_one_line(str(error)) or type(error).__name__}"
    if isinstance(error, ModuleNotFoundError) and not f"{error.name}.".startswith("refine."):
        return 2, f"Error: {describe_missing_package(error)}"
    if isinstance(error, ImportError) and not f"{error.name}.".startswith("refine."):  # half installed, or no memory
        return 2, f"Error: a package cannot be loaded: {_one_line(str(error))}"
    if _is_out_of_memory(error):
        details = _one_line(str(error))[:200] or "no details"
        return 1, f"Error: out of memory; try a smaller --batch-gpu or --batch ({details})"
    details = f"{type(error).__name__}: {_one_line(str(error))[:300]}"
    return 1, f"Error: this should not have happened ({details}); REFINE_DEBUG=1 shows the traceback"


def _lead_closed_streams_nowhere() -> None:
    """Streams that the caller closed (`>&-`): their place would be taken by the next file that is opened, and what is
    printed would go into it; Python has None for them, which nobody who prints expects."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # noqa: PERF203 - three of them
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(null, True)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115 - as long as the process


def _check_current_folder() -> None:
    """Raises ValueError where it was deleted: torch does not even start there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current folder does not exist any more; expected one that does") from None


def _is_of_stdout(error: BaseException) -> TypeGuard[OSError]:
    """Whether a command's own output could not be written, as to `> file` on a full disk; Python does not say."""
    if not isinstance(error, OSError) or error.filename is not None or not error.strerror:
        return False
    return traceback.extract_tb(error.__traceback__)[-1].name in ("echo", run_command.__name__)


def _complain(message: str) -> None:
    """One line to stderr; a reader who does not read does not keep the program from ending."""
    if (file := descriptor(sys.stderr)) is None:
        print(message, file=sys.stderr)
        return
    tell(f"{message}\n", 5, file, sys.stderr.encoding)


def load_command(name: str) -> click.Command:
    """A command of `python -m refine` by its name."""
    module, attribute = _COMMANDS[name]
    command = getattr(importlib.import_module(module), attribute)
    for param in command.params:  # a shell completes the names of files, too
        if param.type is click.STRING and _PLACES & set(re.findall("[A-Z]+", param.metavar or str(param.name).upper())):
            param.type = click.Path(readable=False)
    return _with_version(command)


def _with_version(command: click.Command) -> click.Command:
    """The same command, which knows --version, as do those below it, and whose help calls numbers N and X."""
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        _with_version(below)
    for param in command.params:
        kind = {"integer": "N", "integer range": "N", "float": "X", "float range": "X"}.get(param.type.name)
        if isinstance(param, click.Option) and kind and param.metavar is None and not param.is_flag:
            param.metavar = kind
    if not any("--version" in param.opts for param in command.params):
        shown: dict[str, Any] = {"is_flag": True, "expose_value": False, "is_eager": True, "callback": _print_version}
        command.params.append(click.Option(["--version"], help="Print the version.", **shown))
    return command


def _is_out_of_memory(error: BaseException) -> bool:
    # told by name and text: torch may not have been imported
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _one_line(text: str) -> str:
    """The text with spaces for line ends, and without the middle of one that nobody would read."""
    line = " ".join(text.split())
    return line if len(line) <= 2000 else f"{line[:1000]} … {line[-1000:]}"
