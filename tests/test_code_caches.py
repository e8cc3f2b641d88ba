"""Folders that code is loaded from: only what this user or root alone could have written is used."""

import grp
import logging
import os
import pwd
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from stylefast import code_caches
from stylefast.code_caches import (
    foreign,
    foreign_below,
    inductor_cache,
    private_folder,
    replaceable,
    replaceable_inside,
)

as_root = pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files to another user"
)
NOBODY = 65534


@pytest.fixture(autouse=True)
def _forget_checks():
    for known in (code_caches._checked, code_caches._own_temporary, code_caches.guard_triton_cache):
        known.cache_clear()


@pytest.fixture
def cache(tmp_path):
    """A cache with one file, `cache/inner/code.so`."""
    inner = tmp_path / "above" / "cache" / "inner"
    inner.mkdir(parents=True, mode=0o700)
    (inner / "code.so").write_bytes(b"ELF")
    (inner / "code.so").chmod(0o600)
    return inner.parent


def test_a_folder_of_this_user_alone_is_used(cache):
    assert replaceable(cache) is None and foreign_below(cache) is None
    assert foreign(cache, ["inner/code.so"]) is None
    assert private_folder(cache, "code") == cache


@pytest.fixture
def no_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_folder_that_does_not_exist_yet_is_created_closed_to_others(tmp_path, no_umask):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    new = tmp_path / "shared" / "new" / "cache"
    assert foreign_below(new) is not None and private_folder(new, "code") == new
    assert [path.stat().st_mode & 0o777 for path in (new, new.parent)] == [0o700, 0o700]
    other = tmp_path / "shared" / "other"
    assert replaceable_inside(other) is None and other.stat().st_mode & 0o777 == 0o700


@as_root
def test_a_folder_that_another_user_creates_in_the_meantime_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    wanted, mkdir = tmp_path / "shared" / "cache", os.mkdir

    def faster(path, mode=0o777):
        mkdir(path, mode)
        if path == wanted:
            os.chown(path, NOBODY, NOBODY)
            raise FileExistsError(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", faster)
        assert private_folder(wanted, "code") != wanted
    assert "user 65534" in replaceable_inside(wanted)


def test_where_no_folder_can_be_created_a_private_one_is_used_with_the_reason(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        other = private_folder(tmp_path / "file" / "cache", "compiled code")
    assert not any(other.iterdir()) and f"can't be kept in {tmp_path / 'file' / 'cache'} (Not a" in caplog.text
    with pytest.raises(OSError, match="Not a directory"):
        replaceable_inside(tmp_path / "file")


@pytest.mark.parametrize("open_to_others", [".", "inner", "inner/code.so", ".."])
def test_what_others_can_write_or_rename_is_left_alone_with_a_warning(cache, caplog, open_to_others):
    path = cache / open_to_others
    path.chmod(path.stat().st_mode | 0o002)
    with caplog.at_level(logging.WARNING):
        other = private_folder(cache, "compiled code")
    assert other != cache and not any(other.iterdir()) and other.stat().st_mode & 0o077 == 0
    assert "compiled code" in caplog.text and str(path.resolve()) in caplog.text
    assert foreign(cache, ["inner/code.so"]) is not None


def access_list(user: int) -> bytes:
    """A POSIX access list as Linux stores it: all for the owner and one further user."""
    nobody = 2**32 - 1
    entries = [(1, 7, nobody), (2, 7, user), (4, 0, nobody), (16, 7, nobody), (32, 0, nobody)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@pytest.mark.parametrize("shared", [".", "inner", "inner/code.so", ".."])
def test_what_an_access_list_lets_another_user_write_is_left_alone(cache, monkeypatch, shared):
    # its rights show in the group's bits of the mode, and this group has no other members
    monkeypatch.setattr(code_caches, "_is_users_own", lambda group: True)
    (cache / shared).chmod(0o770)
    assert private_folder(cache, "code") == cache
    try:
        os.setxattr(cache / shared, "system.posix_acl_access", access_list(NOBODY))
    except (AttributeError, OSError):
        pytest.skip("no access lists here")
    assert private_folder(cache, "code") != cache


def test_a_group_is_private_unless_it_is_the_first_one_of_another_user_too(monkeypatch):
    me, group = SimpleNamespace(pw_name="ann", pw_gid=7), SimpleNamespace(gr_name="ann", gr_mem=[])
    users = [me]
    for name, found in (("getpwuid", me), ("getpwall", users)):
        monkeypatch.setattr(pwd, name, lambda *_, found=found: found)
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    assert code_caches._is_users_own.__wrapped__(7)
    users.append(SimpleNamespace(pw_name="bob", pw_gid=7))
    assert not code_caches._is_users_own.__wrapped__(7)


def test_a_sticky_folder_above_such_as_tmp_is_no_reason(cache):
    cache.parent.chmod(0o1777)
    assert private_folder(cache, "code") == cache


@as_root
@pytest.mark.parametrize("owned", [".", "inner", "inner/code.so", ".."])
def test_what_belongs_to_another_user_is_left_alone(cache, owned):
    os.chown(cache / owned, NOBODY, NOBODY)
    assert private_folder(cache, "code") != cache
    assert "user 65534" in foreign(cache, ["inner/code.so"])


@as_root
def test_a_folder_that_another_user_made_first_in_tmp_is_left_alone(tmp_path):
    shared = tmp_path / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "torchinductor_root").mkdir()
    os.chown(shared / "torchinductor_root", NOBODY, NOBODY)
    assert private_folder(shared / "torchinductor_root", "code") != shared / "torchinductor_root"


def test_a_link_is_followed_and_every_folder_on_its_way_counts(cache, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(cache, target_is_directory=True)
    assert private_folder(link, "code") == link
    cache.parent.chmod(0o777)
    assert "may rename" in replaceable(link / "inner")
    assert private_folder(link, "code") != link


@as_root
def test_a_link_of_another_user_is_not_followed(cache, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(cache, target_is_directory=True)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    assert "user 65534" in replaceable(link / "inner")


def test_a_link_that_leads_to_itself_ends_in_a_reason(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "links" in replaceable(tmp_path / "loop" / "cache")


def test_a_link_inside_a_cache_is_refused(cache, tmp_path):
    (cache / "inner" / "other.so").symlink_to(tmp_path / "elsewhere.so")
    assert "is a link to another place" in foreign_below(cache)


@pytest.mark.parametrize("alone", [True, False])
def test_a_group_with_other_members_is_others(cache, monkeypatch, alone):
    monkeypatch.setattr(code_caches, "_is_users_own", lambda group: alone)
    cache.parent.chmod(0o770)
    (cache / "inner").chmod(0o770)
    assert (foreign_below(cache) is None) == alone


def test_pytorchs_cache_is_private_while_something_compiles(cache, monkeypatch):
    variable = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(variable, str(cache))
    with inductor_cache(cache / "unused"):
        assert os.environ[variable] == str(cache)  # the user's own word
    code_caches._checked.cache_clear()
    cache.chmod(0o777)
    with inductor_cache():
        assert os.environ[variable] != str(cache)
    assert os.environ[variable] == str(cache)


def test_code_for_vectors_of_another_width_is_not_found(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    found = []
    for capability in ("AVX2", "AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        with inductor_cache():
            found.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert found[0] == found[2] != found[1]


def test_code_for_another_cpu_with_the_same_width_is_not_found(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    found = []
    for instructions in (["avx2"], ["avx2", "amx_tile"], ["avx2"]):
        monkeypatch.setattr(code_caches, "cpu_instructions", lambda instructions=instructions: instructions)
        with inductor_cache():
            found.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert found[0] == found[2] != found[1]


def test_tritons_cache_is_private_before_the_first_launch(cache, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    code_caches.guard_triton_cache()
    assert triton.knobs.cache.dir == str(cache)
    code_caches.guard_triton_cache.cache_clear()
    code_caches._checked.cache_clear()
    (cache / "inner" / "code.so").chmod(0o666)
    code_caches.guard_triton_cache()
    assert triton.knobs.cache.dir == os.environ["TRITON_CACHE_DIR"] != str(cache)


def test_a_private_folder_goes_with_its_process(tmp_path):
    code = (
        "import os, sys\nfrom stylefast.code_caches import private_folder\n"
        "other = private_folder(sys.argv[1], 'code')\n(other / 'file').write_text('x')\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait(); assert (other / 'file').exists(); print(other)"
    )
    tmp_path.chmod(0o777)
    made = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert made.stdout and not os.path.exists(made.stdout.strip())
