"""How commands start (without torch) and fail (one line, a fitting exit code)."""

import os
import re
import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete

from refine import errors
from refine.cli import main as cli

SCRIPTS = ["refine.py", "compare_fid.py", "generate.py"]
HEAVY = {"torch", "numpy", "scipy", "matplotlib", "safetensors", "PIL", "tensorboard"}


def imported(root, *args: str) -> tuple[set[str], subprocess.CompletedProcess]:
    """Top-level modules that a Python process imported, and how it ended."""
    command = [sys.executable, "-X", "importtime", *args]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return {name.split(".")[0] for name in re.findall(r"\| +([\w.]+)$", result.stderr, re.MULTILINE)}, result


@pytest.mark.parametrize("script", [*SCRIPTS, "-m refine", *(f"-m refine {name}" for name in cli._COMMANDS)])
def test_help_is_instant(root, script):
    modules, result = imported(root, *script.split(), "--help")
    assert result.returncode == 0 and "Usage:" in result.stdout
    assert "click" in modules and not modules & HEAVY


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_option_is_told_at_once(root, script):
    modules, result = imported(root, script, "--no-such-option=1")
    assert result.returncode == 2 and not modules & HEAVY and result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert len(errors) == 1 and errors[0].startswith("Error: No such option") and f"{script} --help" in errors[0]


@pytest.mark.parametrize("missing", ["click", "torch"])
@pytest.mark.parametrize("command", ["refine.py --gan=a --teacher=b", "-m refine doctor"])
def test_python_without_the_packages(root, tmp_path, missing, command):
    # what a newcomer types before the environment is active
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    command = [sys.executable, *command.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"Error: {sys.executable} has no package {missing};")
    assert ". .venv/bin/activate" in result.stderr


def test_group_lists_its_commands(root):
    _, result = imported(root, "-m", "refine", "--help")
    assert all(f"\n  {name} " in result.stdout for name in cli._COMMANDS)
    both = result.stdout + imported(root, "-m", "refine", "ops", "--help")[1].stdout
    assert not re.search(r"^  \S.*\.\.\.$", both, re.MULTILINE)  # no half sentence
    assert "gan-refine " in imported(root, "-m", "refine", "--version")[1].stdout


def test_every_command_knows_its_version(capsys):
    for args in ([name] for name in cli._COMMANDS):
        assert run(capsys, cli.cli, *args, "--version")[:2] == (0, "gan-refine 0.1.0\n")
    assert run(capsys, "ops", "build", "--version")[:2] == run(capsys, raising(KeyError()), "--version")[:2]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("args", "code"), [("--help", 0), ("--preset=demo --show", 0), ("--no-such-option", 2)])
def test_streams_that_are_closed_lead_nowhere(root, closed, args, code):
    command = f"{sys.executable} refine.py {args} {closed}"
    result = subprocess.run(["sh", "-c", command], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert not result.stderr or (code == 2 and result.stderr.startswith("Error: No such option"))


def test_files_do_not_take_the_place_of_closed_streams(root, tmp_path):
    code = "from refine.cli import main\nmain._lead_closed_streams_nowhere()\nfile = open('data', 'w')\n"
    code += "import os\nos.write(1, b'out')\nos.write(2, b'err')\nprint('printed', flush=True)\n"
    code += "assert file.fileno() > 2 and os.stat(0).st_rdev == os.stat(os.devnull).st_rdev\nfile.write('done')"
    command = ["sh", "-c", f'{sys.executable} -c "$0" <&- >&- 2>&-', code]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    assert subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == 0
    assert (tmp_path / "data").read_text() == "done"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_called_that(root, unbuffered):
    for args in (["refine.py", "--help"], ["-m", "refine", "models"]):
        with open("/dev/full", "w") as full:
            result = subprocess.run(
                [sys.executable, *args], stdout=full, stderr=subprocess.PIPE, text=True, cwd=root,
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, check=False,
            )  # fmt: skip
        assert result.stderr.splitlines()[0] == "Error: stdout: No space left on device"


def test_a_folder_that_was_deleted_is_no_place_to_start_in(root, tmp_path):
    command = f"mkdir gone && cd gone && rmdir ../gone && {sys.executable} {root}/generate.py --network=x --seeds=0"
    result = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "Error: the current folder does not exist any more; expected one that does\n"


def test_a_message_needs_no_thread(root):
    code = "import _thread\ndef none(*args): raise RuntimeError('no thread')\n_thread.start_new_thread = none\n"
    code += "from refine.cli.main import run_command\nrun_command('models', ['--no-such-option'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        result.returncode == 2 and result.stderr.startswith("Error: No such option") and result.stderr.count("\n") == 1
    )


def test_a_thread_that_was_left_in_torch_is_not_waited_for(root):
    # at Python's end it would be unwound within C++, which aborts the process
    code = "import atexit, time\nfrom refine.cli.main import run_command\nfrom refine.torch_utils.pulse import within\n"
    code += "import click\natexit.register(print, 'the usual end')\n"
    code += "run_command(click.command()(lambda: within(0.1, time.sleep, 60)), [])"
    for processes, usual in (("2", False), ("1", True)):
        environment = {**os.environ, "PYTHONPATH": str(root), "WORLD_SIZE": processes, "RANK": "0"}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and result.stderr == "Error: no answer within 0 s\n"
        assert ("the usual end" in result.stdout) == usual


def run(capsys, command, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.run_command(command, args)
    return caught.value.code, *capsys.readouterr()


def raising(error: BaseException) -> click.Command:
    @click.command()
    def command():
        raise error

    return command


class OutOfMemoryError(RuntimeError):
    """What torch calls its own."""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("--gan: x.pkl is a text file"), 2, "Error: --gan: x.pkl is a text file"),
        (ValueError("two\n  lines"), 2, "Error: two lines"),
        (ValueError(), 2, "Error: ValueError"),
        (FileNotFoundError(2, "No such file or directory", "x.pkl"), 2, "Error: x.pkl: No such file or directory"),
        (PermissionError(13, "Permission denied", "out"), 2, "Error: out: Permission denied"),
        (OSError(28, "No space left on device"), 2, "Error: No space left on device"),
        (OSError("odd"), 2, "Error: odd"),
        (OSError(28, "No space left on device", b"out/events"), 2, "Error: out/events: No space left on device"),
        (ImportError("lib.so: failed to map"), 2, "Error: a package cannot be loaded: lib.so: failed to map"),
        (ImportError("no name", name="refine.x"), 1, "Error: this should not have happened (ImportError: no name)"),
        (click.UsageError("missing --teacher."), 2, "Error: missing --teacher"),
        (
            click.BadParameter("-3 is negative", param_hint="--batch"),
            2,
            "Error: Invalid value for --batch: -3 is negative",
        ),
        (MemoryError(), 1, "Error: out of memory; try a smaller --batch-gpu or --batch (no details)"),
        (OutOfMemoryError("2 GiB"), 1, "Error: out of memory; try a smaller --batch-gpu or --batch (2 GiB)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "Error: out of memory"),
        (KeyError("x"), 1, "Error: this should not have happened (KeyError: 'x'); REFINE_DEBUG=1 shows the traceback"),
        (GeneratorExit(), 1, "Error: this should not have happened (GeneratorExit: )"),
        (ValueError(f"--gan: {'x' * 9000}: no such file"), 2, f"Error: --gan: {'x' * 993} … {'x' * 986}: no such file"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (click.Abort(), 130, "Interrupted."),
    ],
)
def test_failures_are_one_line(capsys, error, code, text):
    found, out, err = run(capsys, raising(error))
    assert found == code and out == ""
    assert err.strip().startswith(text) and len(err.strip().splitlines()) == 1


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("REFINE_DEBUG", "1")
    code, _, err = run(capsys, raising(ValueError("bad")))
    assert code == 2 and "Traceback" in err and err.strip().endswith("Error: bad")


def test_exit_codes_of_commands(capsys):
    @click.command()
    @click.option("--code", type=int)
    @click.pass_context
    def command(ctx, code):
        if code is not None:
            ctx.exit(code)
        return True  # no exit code

    assert run(capsys, command)[0] == 0
    assert run(capsys, command, "--code=3")[0] == 3
    assert run(capsys, command, "--help")[0] == 0
    code, _, err = run(capsys, command, "--code=x")
    assert code == 2 and err.startswith("Error: Invalid value for '--code'") and "--help lists the options)" in err


def test_help_calls_numbers_alike(root):
    text = imported(root, "compare_fid.py", "--help")[1].stdout
    assert "--seeds LIST" in text and "--steps N" in text and "--trunc X" in text and "RANGE" not in text
    assert text.index("--ref ") < text.index("--gan-kwargs ")  # what every run needs stands first


def test_system_exit_passes(capsys):
    assert run(capsys, raising(SystemExit(7)))[0] == 7


@pytest.mark.parametrize(("size", "level"), [("1", "None"), ("2", "ERROR")])
def test_of_several_processes_none_prints_torch_s_page_about_a_closed_connection(capsys, monkeypatch, size, level):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "")  # so that it is put back
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    command = click.Command("x", callback=lambda: click.echo(str(os.environ.get("TORCH_CPP_LOG_LEVEL"))))
    assert run(capsys, command)[:2] == (0, f"{level}\n")


def test_option_names_the_option():
    for error, text in [
        (ValueError("x is bad"), "--gan: x is bad"),
        (ValueError("--teacher: y is bad"), "--teacher: y is bad"),
        (IsADirectoryError(21, "Is a directory", "x"), "--gan: x: Is a directory"),
    ]:
        with pytest.raises(ValueError) as caught, errors.option("--gan"):
            raise error
        assert str(caught.value) == text and caught.value.__cause__ is error
    with pytest.raises(KeyError), errors.option("--gan"):
        raise KeyError("not for the user")


def test_a_closed_pipe_is_no_failure(root):
    """As with `| head`: the reader leaves, nothing is printed on stderr."""
    code = (
        "import click\nfrom refine.cli.main import run_command\n"
        "@click.command()\ndef lines():\n    for i in range(200_000): click.echo(i)\n"
        "run_command(lines, [])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() in (0, 1)
    process.stderr.close()


@pytest.mark.parametrize(
    ("typed", "begun", "offered"),
    [
        ("", "ge", {"generate"}),
        ("refine", "--prec", {"--precision"}),
        ("refine --precision", "B", {"bf16"}),
        ("generate --noise-mode", "", {"const", "random", "none"}),
        ("refine --gan", "x", "file"),
        ("compare --ref", "x", "file"),
        ("inspect", "x", "file"),
    ],
)
def test_a_shell_completes(typed, begun, offered):
    """Commands, options, their words, and files."""
    found = ShellComplete(cli.cli, {}, "gan-refine", "_GAN_REFINE_COMPLETE").get_completions(typed.split(), begun)
    if offered == "file":
        assert [item.type for item in found] == ["file"]
    else:
        assert {item.value for item in found} == offered
