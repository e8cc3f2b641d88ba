"""Whole files: their permissions, names that are taken, and the old file where writing fails."""

import errno
import os
import stat

import pytest

from stylefast.whole_files import write_whole


@pytest.mark.parametrize("umask, mode, expected", [(0, 0o600, 0o600), (0o022, 0o666, 0o644), (0, 0o644, 0o644)])
def test_a_file_has_the_permissions_asked_for_less_the_umask(tmp_path, umask, mode, expected):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a", b"one ", memoryview(b"two"), mode=mode)
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"one two" and os.listdir(tmp_path) == ["a"]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == expected


@pytest.mark.parametrize("links", [True, False], ids=["links", "a file system without links"])
def test_a_name_that_is_taken_keeps_its_file_unless_it_may_be_replaced(tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    write_whole(tmp_path / "a", b"old", overwrite=False)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a", b"new", overwrite=False)
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_whole(tmp_path / "a", b"old")
    if call != "write":
        monkeypatch.setattr(os, call, fail)
    with pytest.raises((OSError, TypeError)):
        write_whole(tmp_path / "a", b"new", *(["no bytes"] if call == "write" else []))
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
