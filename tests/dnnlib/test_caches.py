import os
from pathlib import Path

import pytest

from refine.dnnlib import distrust, keep_from_others, make_folder, named_folder, user_cache


@pytest.fixture
def base(tmp_path):
    make_folder(tmp_path / "cache" / "a")
    (tmp_path / "cache" / "a" / "file").touch(mode=0o644)
    return tmp_path / "cache"


def test_ones_own_files_are_trusted(base, tmp_path):
    assert distrust(base / "a" / "file", base) is None
    assert distrust(base / "missing" / "file", base) is None and distrust(tmp_path / "none", tmp_path / "none") is None
    (tmp_path / "link").symlink_to(base)  # the user's word for where the cache is
    assert distrust(tmp_path / "link" / "a" / "file", tmp_path / "link") is None


@pytest.mark.parametrize("part", ["", "a", "a/file"])
def test_what_others_can_write_to(base, part):
    path = base / part
    path.chmod(path.stat().st_mode | 0o002)
    assert distrust(base / "a" / "file", base) == f"{path} can be written to by others"
    if os.getuid() == 0:
        path.chmod(0o755)
        os.chown(path, 1234, -1)
        assert distrust(base / "a" / "file", base) == f"{path} belongs to somebody else"


def test_a_group_of_several(base, monkeypatch):
    (base / "a").chmod(0o775)
    monkeypatch.setattr("refine.dnnlib.caches._is_private", lambda gid: True)
    assert distrust(base / "a" / "file", base) is None
    monkeypatch.setattr("refine.dnnlib.caches._is_private", lambda gid: False)
    assert distrust(base / "a" / "file", base) == f"{base / 'a'} can be written to by others"


def test_links_and_pipes(base):
    (base / "a" / "link").symlink_to("file")
    assert distrust(base / "a" / "link", base) == f"{base / 'a' / 'link'} is a link"
    (base / "b").symlink_to("a")
    assert distrust(base / "b" / "file", base) == f"{base / 'b'} is a link"
    os.mkfifo(base / "pipe")
    assert distrust(base / "pipe", base) == f"{base / 'pipe'} is no regular file"


def test_what_is_made_is_ones_own_whatever_the_umask(tmp_path):
    umask = os.umask(0)
    try:
        make_folder(tmp_path / "x" / "y")
        (tmp_path / "x" / "y" / "file").touch()
        keep_from_others(tmp_path / "x" / "y" / "file")
    finally:
        os.umask(umask)
    assert distrust(tmp_path / "x" / "y" / "file", tmp_path / "x") is None


def test_relative_folders_of_the_environment_are_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in ("relative", "./x", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert user_cache().is_absolute() and user_cache().is_relative_to(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert user_cache() in (Path("/xdg/gan-refine"), tmp_path / "Library/Caches/gan-refine")


def test_folders_that_variables_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, folder in (("", None), ("~/x", tmp_path / "x"), ("x", Path.cwd() / "x"), ("/x", Path("/x"))):
        monkeypatch.setenv("REFINE_CACHE", named)
        assert named_folder("REFINE_CACHE") == folder
    monkeypatch.setenv("REFINE_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(ValueError, match=r"^REFINE_CACHE is ~nobody-of-this-name/x, in the home of nobody known"):
        named_folder("REFINE_CACHE")
