"""The one way of writing: whole files, lines behind the last one, and never through a link to elsewhere."""

import ast
import errno
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest

from refine import dnnlib


def test_replaced_atomically_replaces(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with dnnlib.replaced_atomically(target) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and target.read_text() == "old"
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]


def test_replaced_atomically_keeps_the_old_file_on_failure(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), dnnlib.replaced_atomically(target) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_replaced_atomically_honours_the_umask(tmp_path):
    with dnnlib.replaced_atomically(tmp_path / "file.txt") as temporary:
        temporary.touch(mode=0o600)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_replaced_atomically_needs_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError), dnnlib.replaced_atomically(tmp_path / "no" / "file") as temporary:
        temporary.write_text("x")


@pytest.fixture
def small_files():
    """No file may be longer than 4096 bytes, as on a disk that is full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def replace_by_bytes(path):
    with dnnlib.replaced_atomically(path) as temporary:
        temporary.write_bytes(bytes(9999))


def replace_by_copy(path):
    with dnnlib.replaced_atomically(path) as temporary:
        shutil.copyfile(__file__, temporary)


def append_bytes(path):
    dnnlib.append_text(path, "x" * 9999)


@pytest.mark.parametrize("write", [replace_by_bytes, replace_by_copy, append_bytes])
def test_errors_of_the_disk_name_the_file(tmp_path, small_files, write):
    with pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path / "file.txt")
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "file.txt")
    assert caught.value.filename2 is None and not list(tmp_path.glob(".*"))


def test_other_errors_keep_their_names(tmp_path):
    for error in (ConnectionResetError(errno.ECONNRESET, "Connection reset"), FileNotFoundError(2, "No file", "other")):
        name = error.filename
        with pytest.raises(OSError) as caught, dnnlib.replaced_atomically(tmp_path / "file.txt"):
            raise error
        assert caught.value is error and error.filename == name


def test_names_that_are_no_text_are_written_as_they_are(tmp_path):
    dnnlib.append_text(tmp_path / "log.txt", f"run folder  {os.fsdecode(b'runs-' + bytes([255]))}\n")
    assert (tmp_path / "log.txt").read_bytes() == b"run folder  runs-\xff\n"


def replace(path):
    with dnnlib.replaced_atomically(path) as temporary:
        temporary.write_text("new\n")


def append(path):
    dnnlib.append_text(path, "new\n")


@pytest.fixture(params=[replace, append])
def write(request):
    return request.param


def test_a_link_to_a_file_of_the_same_folder_is_followed(write, tmp_path):
    (tmp_path / "real.txt").touch()
    (tmp_path / "link.txt").symlink_to("real.txt")
    write(tmp_path / "link.txt")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new\n"


def test_the_folder_may_be_reached_by_a_link(write, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    write(tmp_path / "runs" / "file.txt")
    assert (tmp_path / "disk" / "file.txt").read_text() == "new\n"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("target", ["../outside.txt", "below/outside.txt", "{}/outside.txt"])
def test_a_link_to_another_folder_is_not_followed(write, there, target, tmp_path):
    folder = tmp_path / "run"
    (folder / "below").mkdir(parents=True)
    link = folder / "log.txt"
    link.symlink_to(target.format(tmp_path))
    outside = Path(os.path.realpath(link))
    if there:
        outside.write_text("mine")
    with pytest.raises(OSError, match=r"log\.txt is a link to another folder; nothing was written"):
        write(link)
    assert link.is_symlink() and (outside.read_text() == "mine" if there else not outside.exists())
    assert sorted(os.listdir(folder)) == ["below", "log.txt"]


def test_what_is_no_regular_file_is_neither_written_nor_replaced(write, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        mode = (tmp_path / name).stat().st_mode
        with pytest.raises(OSError, match="is no regular file"):
            write(tmp_path / name)
        assert (tmp_path / name).stat().st_mode == mode
    (tmp_path / "device").symlink_to("/dev/full")
    with pytest.raises(OSError, match="link to another folder"):
        write(tmp_path / "device")
    with pytest.raises(OSError, match="is no regular file"):
        write("/dev/full")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_another_name_of_the_same_file_stays_as_it_is(write, tmp_path):
    (tmp_path / "elsewhere").write_text("mine\n")
    os.link(tmp_path / "elsewhere", tmp_path / "log.txt")
    write(tmp_path / "log.txt")
    assert (tmp_path / "elsewhere").read_text() == "mine\n"
    assert (tmp_path / "log.txt").read_text() == ("new\n" if write is replace else "mine\nnew\n")


WRITERS = {"write_text", "write_bytes", "symlink_to", "hardlink_to", "rename", "touch", "truncate", "save", "save_file"}
WRITERS |= {"savez", "savez_compressed", "copyfile", "copytree", "move", "mknod"}
# What writes otherwise, and why that is no way out: into folders of their own that nobody else can write to, see
# `dnnlib.distrust`, or into a file that TensorBoard names.
REVIEWED = {
    "dnnlib/writing.py",  # the function itself
    "torch_utils/build/device_code.py",  # the build folder, and a log beside it
    "torch_utils/build/op_builder.py",  # its own build folder
    "torch_utils/build/op_cache.py",  # the cache of compiled code
    "torch_utils/build/custom_ops.py",  # the build folder
    "refine/checkpoints/sources/fetch.py",  # a download's own folder
    "refine/evaluation/styles.py",  # films: the temporary file, as below
    "refine/checkpoints/deploy.py",  # the temporary file that `write_graph` gets of `replaced_atomically`
    "refine/checkpoints/writers.py",  # likewise
}
REVIEWED_CALLS = {
    "picture.save(buffer, format='png')",  # memory
    "self.snapshots.save(monitor)",  # its own calls are looked at
    "claim.rename(path)",  # a folder that was just made
    "save()",  # `save_reference`, likewise
    "save(ctx, inputs, output)",  # tensors of autograd
}


def written(tree):
    """(line, call) of what may write, outside of blocks with `replaced_atomically`."""

    def visit(node, safe):
        if isinstance(node, ast.With):
            safe = safe or any("replaced_atomically" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.Call) and not safe:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            mode = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode")]
            opens = name in ("open", "fdopen") and any(
                isinstance(part, ast.Constant) and set(str(part.value)) & set("wax+") for part in mode
            )
            if opens or name in WRITERS or ast.unparse(node.func) in ("os.replace", "os.link", "os.symlink"):
                yield node.lineno, ast.unparse(node)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, safe)

    yield from visit(tree, False)


def test_everything_is_written_through_it(root):
    """Every call in the package that could write to a file is in a block of `replaced_atomically`, or was reviewed."""
    found = []
    for folder in ("refine", "dnnlib", "torch_utils"):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            for line, call in written(ast.parse(path.read_text(encoding="utf-8"))):
                if name not in REVIEWED and call not in REVIEWED_CALLS:
                    found.append(f"{name}:{line}: {call}")
    assert found == []
