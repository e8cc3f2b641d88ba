"""Where pictures go: names that no other writer takes, whole files, and what becomes of them on a full disk."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from stylefast.commands import demo, files, folder_lock
from stylefast.commands.files import Destination
from stylefast.commands.generate import ModelChoice
from stylefast.commands.signals import Stopped
from stylefast.errors import InvalidRequest, StyleFastError
from stylefast.whole_files import write_whole
from tests.support.watch import WAIT

WRITER = """
import sys, time
from pathlib import Path
from PIL import Image
from stylefast.commands import files
files.png_info = lambda metadata: None
out, colour, start = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
destination = files.Destination(out, ["a fish"] * 3)
time.sleep(max(0, start - time.time()))
paths, problem = destination.write([Image.new("RGB", (64, 64), (colour, i, 0)) for i in range(3)], [{}] * 3, None)
print(*paths, sep="\\n")
sys.exit(problem and 1)
"""


@pytest.fixture(autouse=True)
def without_records(monkeypatch):
    """Pictures without metadata, which others test."""
    monkeypatch.setattr(files, "png_info", lambda metadata, parameters=True: None)


def pictures(count):
    return [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(count)]


def write(destination, count, sheet=None):
    paths, problem = destination.write(pictures(count), [{}] * count, sheet)
    return [path.name for path in paths], problem


def test_calls_that_write_to_one_folder_at_once_all_get_their_pictures(checkout, tmp_path):
    start = str(time.time() + 1.5)
    words = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    running = [
        subprocess.Popen([*words, str(colour), start], cwd=checkout, stdout=subprocess.PIPE, text=True)
        for colour in range(4)
    ]
    shown = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * 4
    for colour, paths in enumerate(shown):
        assert [Image.open(path).getpixel((0, 0)) for path in paths] == [(colour, i, 0) for i in range(3)]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{number:04d}-a-fish.png" for number in range(1, 13)]


def test_a_file_that_appears_while_pictures_are_made_is_kept_and_so_is_the_picture(tmp_path):
    destination = Destination(tmp_path / "x.png", ["a fish"])
    (tmp_path / "x.png").write_bytes(b"precious")
    names, problem = write(destination, 1)
    assert names == ["x-2.png"] and "x-2.png" in str(problem) and "x.png was created by another" in str(problem)
    assert (tmp_path / "x.png").read_bytes() == b"precious" and Image.open(tmp_path / "x-2.png").size == (16, 16)


def test_a_number_that_another_program_takes_is_passed_over(tmp_path, monkeypatch):
    destination, highest = Destination(tmp_path, ["a fish", "a cat"]), files._highest_number
    (tmp_path / "0001-a-fish.png").write_bytes(b"precious")
    looks = iter([0])  # the first look is from before the other's file
    monkeypatch.setattr(files, "_highest_number", lambda folder: next(looks, highest(folder)))
    assert write(destination, 2) == (["0002-a-fish.png", "0003-a-cat.png"], None)
    assert (tmp_path / "0001-a-fish.png").read_bytes() == b"precious"


def test_the_grid_has_the_number_of_its_first_picture(tmp_path):
    (tmp_path / "0007-a-dog.png").touch()
    names, _ = write(Destination(tmp_path, ["a fish", "a cat"]), 2, Image.new("RGB", (16, 16)))
    assert names == ["0008-a-fish.png", "0009-a-cat.png", "0008-grid.png"]


def test_what_a_killed_writer_left_is_removed_and_its_lock_holds_nobody_up(tmp_path):
    (tmp_path / ".0001-a-fish.png.0123abcd.part").write_bytes(b"half")
    (tmp_path / folder_lock.LOCK).touch()
    (tmp_path / ".hidden").touch()
    (tmp_path / ".brand.bank.4711.0123abcd.part").touch()  # of a bake, which has a lock of its own
    assert write(Destination(tmp_path, ["a fish"]), 1) == (["0001-a-fish.png"], None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".brand.bank.4711.0123abcd.part",
        ".hidden",
        "0001-a-fish.png",
    ]


# stops with a picture half written, and waits there to be killed
HALF = """
import os, sys, time
from PIL import Image
from stylefast.commands import files
files.png_info = lambda metadata, parameters: None
def stop(descriptor):
    print("writing", flush=True)
    time.sleep(3600)
destination = files.Destination(sys.argv[1], ["a fish"], parameters=False)
os.fsync = stop
destination.write([Image.new("RGB", (64, 64))], [{}], None)
"""


@pytest.mark.parametrize("out", ["", "x.png", "x.jpg", "x.JPEG"])
def test_the_next_call_removes_what_a_writer_killed_in_the_midst_of_a_picture_left(checkout, tmp_path, out):
    words = [sys.executable, "-c", HALF, str(tmp_path / out)]
    writer = subprocess.Popen(words, cwd=checkout, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "writing\n"
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=WAIT)
    (part,) = tmp_path.glob(".*.part")
    assert part.stat().st_size > 0 and (tmp_path / folder_lock.LOCK).exists() and writer.returncode == -signal.SIGKILL
    ((path,), problem) = Destination(tmp_path / out, ["a fish"], parameters=False).write(pictures(1), [{}], None)
    assert problem is None and list(tmp_path.iterdir()) == [path] and Image.open(path).size == (16, 16)


def test_a_writer_that_hangs_is_not_waited_for_for_ever_and_keeps_its_files(tmp_path, monkeypatch, capsys):
    lock, part = tmp_path / folder_lock.LOCK, tmp_path / ".0001-a-fish.png.0123abcd.part"
    part.write_bytes(b"on its way")
    monkeypatch.setattr(files, "only_writer", lambda *paths: folder_lock.only_writer(*paths, patience=0.05))
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert write(Destination(tmp_path, ["a fish"]), 1) == (["0001-a-fish.png"], None)
    assert part.read_bytes() == b"on its way" and lock.exists()
    assert "another stylefast is writing to" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_as_safe(tmp_path, monkeypatch, number):
    def link(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    destination = Destination(tmp_path / "x.png", ["a fish"])
    (tmp_path / "x.png").write_bytes(b"precious")
    assert write(destination, 1)[0] == ["x-2.png"]
    assert (tmp_path / "x.png").read_bytes() == b"precious" and Image.open(tmp_path / "x-2.png").size == (16, 16)


class FullAfter:
    """`write_whole` on a disk that has room for some files only; `elsewhere`: whether other folders have any."""

    def __init__(self, folder, room, elsewhere):
        self.folder, self.room, self.elsewhere = folder, room, elsewhere

    def __call__(self, path, content, overwrite):
        here = path.parent == self.folder
        if here and self.room or not here and self.elsewhere:
            self.room -= here
            return write_whole(path, content, overwrite=overwrite)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("room", [0, 2])
def test_on_a_full_disk_pictures_stay_and_the_others_go_where_there_is_room(tmp_path, monkeypatch, room):
    monkeypatch.setattr(files, "write_whole", FullAfter(tmp_path, room, elsewhere=True))
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    paths, problem = Destination(tmp_path, ["a fish"] * 3).write(pictures(3), [{}] * 3)
    assert [Image.open(path).getpixel((0, 0))[0] for path in paths] == [0, 1, 2]
    assert sum(path.parent == tmp_path for path in paths) == room
    assert type(problem) is StyleFastError and "the disk is full" in str(problem)
    assert f"are in {paths[-1].parent}" in str(problem) and ("2 of 3 files" in str(problem)) == bool(room)


def test_where_there_is_no_room_at_all_the_message_says_so_and_nothing_half_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "write_whole", FullAfter(tmp_path, 1, elsewhere=False))
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    paths, problem = Destination(tmp_path, ["a fish"] * 2).write(pictures(2), [{}] * 2)
    assert [path.name for path in paths] == ["0001-a-fish.png"] and "no room for the others" in str(problem)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0001-a-fish.png", "elsewhere"]


LIMITED = """
import os, resource, sys
from pathlib import Path
from PIL import Image
from stylefast.commands import files
files.png_info = lambda metadata: None
destination = files.Destination(sys.argv[1], ["a fish"] * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
print(*destination.write([Image.new("RGB", (64, 64)), noise], [{}] * 2))
"""


def test_a_file_beyond_the_limit_of_the_system_leaves_no_half_picture(checkout, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "out")],
        cwd=checkout,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0 and "the disk is full" in done.stdout and "no room for the others" in done.stdout
    assert [path.name for path in tmp_path.rglob("*") if not path.is_dir()] == ["0001-a-fish.png"]


def test_a_full_disk_is_seen_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100, "total": 9000}))
    with pytest.raises(StyleFastError, match="the disk of .* is full"):
        Destination(tmp_path / "out", ["a fish"])


def test_a_file_system_without_a_size_is_tried_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: True)
    with pytest.raises(InvalidRequest, match=r"/proc does not accept files \(.*\); choose another --out"):
        Destination("/proc/x", ["a fish"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0, "total": 0}))
    Destination(tmp_path / "out", ["a fish"])
    assert list(tmp_path.iterdir()) == []


AS_NOBODY = """
import os, sys
from stylefast.commands.files import Destination
from stylefast.commands.generate import ModelChoice
from stylefast.errors import InvalidRequest
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    Destination(sys.argv[1], ["a fish"])
except InvalidRequest as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user_is_refused_before_any_work(checkout, tmp_path):
    for folder in (tmp_path, *tmp_path.parents):
        # pytest's own folders are this user's alone; processes of pytest-xdist have one more
        if folder == tmp_path or folder.name.startswith(("pytest-", "popen-")):
            folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(tmp_path / "out")], cwd=checkout, capture_output=True, text=True
    )
    assert "can't be written to; choose another --out" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="is a file, so no folder"):
        Destination(tmp_path / "file" / "deeper", ["a fish"])


def test_a_signal_between_writing_and_renaming_leaves_nothing_behind(tmp_path, monkeypatch):
    def link(*arguments, **options):
        raise Stopped

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(Stopped):
        write(Destination(tmp_path, ["a fish"]), 1)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def quick_demo(monkeypatch, stylefast, tmp_path):
    """Runs `stylefast demo` with a page of one word instead of pictures."""
    monkeypatch.setattr(ModelChoice, "load", lambda choice: None)

    def run(page, out=tmp_path / "demo"):
        make = page if callable(page) else lambda folder: (folder / demo.PAGE).write_text(page)
        monkeypatch.setattr(demo, "_make_all", lambda *arguments: make(arguments[-1]))
        return stylefast("demo", "--out", out)

    return run


def test_a_demo_says_where_its_page_is_and_replaces_an_older_one(quick_demo, tmp_path):
    assert quick_demo("old")[0] == 0
    code, out, err = quick_demo("new")
    page = tmp_path / "demo" / "index.html"
    assert code == 0 and page.read_text() == "new" and out == f"{page}\n" and err.endswith(f"\nopen {page.as_uri()}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_second_demo_to_the_same_folder_is_refused(quick_demo, tmp_path):
    seen = []

    def make(folder):
        seen.append(quick_demo("second"))
        (folder / demo.PAGE).write_text("first")

    assert quick_demo(make)[0] == 0
    assert seen[0][0] == 2 and "another stylefast is writing to" in seen[0][2]
    assert (tmp_path / "demo" / demo.PAGE).read_text() == "first"


def test_what_killed_demos_left_is_removed_or_brought_back(quick_demo, tmp_path):
    for name, page in ((".demo.0123abcd", "half"), (".demo.89ab0123-old", "precious")):
        (tmp_path / name).mkdir()
        (tmp_path / name / demo.MARK).touch()
        (tmp_path / name / demo.PAGE).write_text(page)

    def fails(folder):
        assert (tmp_path / "demo" / demo.PAGE).read_text() == "precious"
        raise StyleFastError("no picture")

    assert quick_demo(fails)[0] == 1
    assert (tmp_path / "demo" / demo.PAGE).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
