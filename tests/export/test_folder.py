"""Export folders: whole or absent, resumed after a kill, one export at a time."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import replace

import pytest

from stylefast.errors import ExportError, InvalidRequest
from stylefast.export import folder as folders
from stylefast.export.folder import RECORD, check_target, publishing
from stylefast.export.manifest import MANIFEST, GraphEntry, Manifest, check_files, check_trust, read_manifest


def manifest_of(export, kind="onnx"):
    graphs = tuple(GraphEntry("vae_decoder", entry.name, (entry.name,)) for entry in export.files)
    return Manifest(kind, "0.1.0", "tiny", "ab", "float16", "any", {}, graphs, export.files)


def write(export, name, content=b"graph"):
    (export.path / name).parent.mkdir(parents=True, exist_ok=True)
    (export.path / name).write_bytes(content)
    return export.record(name, [name], {"of": name})


def export_to(target, names=("a.onnx", "b.onnx"), made=None, **options):
    """A whole export of small files; `made` collects the names of those that were not taken over."""
    with publishing(target, **options) as export:
        for name in names:
            if export.finished(name) is None:
                write(export, name, name.encode())
                if made is not None:
                    made.append(name)
        export.complete(manifest_of(export, "tensorrt"))


def interrupted(target, names=("a.onnx",), error=KeyboardInterrupt, **options):
    """An export that finishes some files, begins another, and fails."""
    with pytest.raises(error), publishing(target, **options) as export:
        for name in names:
            write(export, name, name.encode())
        (export.path / "half.onnx").write_bytes(b"ha")
        raise error


def around(target):
    return sorted(path.name for path in target.parent.iterdir())


def test_a_folder_appears_whole_with_its_manifest_and_nothing_beside_it(tmp_path):
    target = tmp_path / "deep" / "export"
    with publishing(target) as export:
        write(export, "a.onnx")
        write(export, "unet/1/model.onnx")
        (export.path / "left.tmp").write_bytes(b"x")
        assert not target.exists()
        export.complete(manifest_of(export))
    assert around(target) == ["export"]
    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert files == ["a.onnx", MANIFEST, "unet/1/model.onnx"]
    check_files(target, read_manifest(target))


def test_what_was_only_needed_on_the_way_is_not_published(tmp_path):
    with publishing(tmp_path / "export") as export:
        write(export, "a.onnx")
        write(export, "a.engine")
        manifest = manifest_of(export)
        engine = tuple(entry for entry in manifest.files if entry.name == "a.engine")
        export.complete(replace(manifest, files=engine, graphs=manifest.graphs[1:]))
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["a.engine", MANIFEST]


def test_what_is_published_can_be_trusted_whatever_the_umask_is(tmp_path):
    before = os.umask(0)
    try:
        export_to(tmp_path / "export")
    finally:
        os.umask(before)
    check_trust(tmp_path / "export", read_manifest(tmp_path / "export"))


def test_an_export_that_fails_before_anything_is_finished_leaves_nothing(tmp_path):
    interrupted(tmp_path / "export", names=(), error=ZeroDivisionError)
    assert around(tmp_path / "export") == []


def test_an_interrupted_export_goes_on_with_what_is_finished(tmp_path):
    target, told, made = tmp_path / "export", [], []
    interrupted(target, arguments={"dtype": "float16"})
    assert around(target) == ["export.part"]
    assert sorted(path.name for path in (tmp_path / "export.part").iterdir()) == ["a.onnx", RECORD]
    export_to(target, made=made, arguments={"dtype": "float16"}, say=told.append)
    assert made == ["b.onnx"] and "a.onnx" in told[0] and around(target) == ["export"]
    check_files(target, read_manifest(target))


def test_what_was_recorded_with_a_graph_comes_back(tmp_path):
    interrupted(tmp_path / "export")
    with pytest.raises(KeyboardInterrupt), publishing(tmp_path / "export") as export:
        assert export.finished("a.onnx") == {"of": "a.onnx"} and export.finished("b.onnx") is None
        assert [entry.name for entry in export.files] == ["a.onnx"] and export.finished_bytes == 6
        raise KeyboardInterrupt


def test_other_arguments_start_anew_and_say_so(tmp_path):
    target, told, made = tmp_path / "export", [], []
    interrupted(target, arguments={"dtype": "float16"})
    export_to(target, made=made, arguments={"dtype": "float32"}, say=told.append)
    assert made == ["a.onnx", "b.onnx"] and "starts anew" in told[0]


@pytest.mark.parametrize("content", [b"A.onnx", b"a.on", None], ids=["altered", "truncated", "gone"])
def test_a_finished_file_that_is_no_longer_what_it_was_is_made_again(tmp_path, content):
    target, told, made = tmp_path / "export", [], []
    interrupted(target)
    path = tmp_path / "export.part" / "a.onnx"
    path.unlink() if content is None else path.write_bytes(content)
    export_to(target, made=made, say=told.append)
    assert made == ["a.onnx", "b.onnx"] and "made again" in told[1]
    assert (target / "a.onnx").read_bytes() == b"a.onnx"


@pytest.mark.parametrize("text", ["{", "[]", '{"arguments": 1}', '{"arguments": 1, "graphs": {"a": {"files": [3]}}}'])
def test_a_damaged_record_starts_anew(tmp_path, text):
    target, told, made = tmp_path / "export", [], []
    interrupted(target)
    (tmp_path / "export.part" / RECORD).write_text(text)
    export_to(target, made=made, say=told.append)
    assert len(made) == 2 and "starts anew" in told[0]


def test_a_killed_export_holds_nobody_back_and_is_taken_over(tmp_path, checkout):
    target, made = tmp_path / "export", []
    code = textwrap.dedent("""
        import sys, time
        from stylefast.export.folder import publishing
        with publishing(sys.argv[1]) as export:
            (export.path / "a.onnx").write_bytes(b"a.onnx")
            export.record("a.onnx", ["a.onnx"])
            (export.path / "b.onnx").write_bytes(b"ha")
            print("ready", flush=True)
            time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", code, str(target)], cwd=checkout, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(ExportError, match=f"another export to .* is running .process {process.pid}"):
            export_to(target)
        process.send_signal(signal.SIGKILL)
    assert around(target) == ["export.part", "export.part.lock"]
    export_to(target, made=made)
    assert made == ["b.onnx"] and around(target) == ["export"]
    assert (target / "b.onnx").read_bytes() == b"b.onnx"


def test_two_exports_into_one_folder_at_once_are_refused_within_a_process_too(tmp_path):
    with pytest.raises(ExportError, match="another export"), publishing(tmp_path / "export"):
        export_to(tmp_path / "export")
    export_to(tmp_path / "export")


def test_a_lock_file_that_its_holder_removed_meanwhile_is_no_lock(tmp_path, monkeypatch):
    target, path = tmp_path / "export", tmp_path / "export.part.lock"
    flock, calls = folders.fcntl.flock, []

    def late(descriptor, operation):
        flock(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()

    monkeypatch.setattr(folders.fcntl, "flock", late)
    export_to(target)
    assert len(calls) == 2 and around(target) == ["export"]


def test_an_export_is_replaced_only_on_request_and_only_once_the_new_one_is_whole(tmp_path):
    target = tmp_path / "export"
    export_to(target)
    with pytest.raises(InvalidRequest, match="--overwrite"):
        export_to(target, names=("c.onnx",))
    interrupted(target, overwrite=True)
    assert [entry.name for entry in read_manifest(target).files] == ["a.onnx", "b.onnx"]
    export_to(target, names=("c.onnx",), overwrite=True, arguments="of another model")
    assert sorted(path.name for path in target.iterdir()) == ["c.onnx", MANIFEST]
    assert around(target) == ["export"]


def test_a_kill_between_the_two_moves_loses_neither_export(tmp_path, monkeypatch):
    target, rename = tmp_path / "export", os.rename
    export_to(target)

    def killed(old, new):
        if str(new) == str(target):
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        export_to(target, names=("c.onnx",), overwrite=True)
    monkeypatch.undo()
    assert not target.exists()
    with pytest.raises(InvalidRequest, match="--overwrite"):
        export_to(target)
    assert [entry.name for entry in read_manifest(target).files] == ["a.onnx", "b.onnx"]
    made = []
    export_to(target, names=("c.onnx",), made=made, overwrite=True)
    assert made == [] and [entry.name for entry in read_manifest(target).files] == ["c.onnx"]
    assert around(target) == ["export"]


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with pytest.raises(InvalidRequest, match="holds other things than an export"):
        export_to(tmp_path / "thesis", overwrite=True)
    (tmp_path / "b.part").mkdir()
    (tmp_path / "b.part" / "chapter.txt").write_text("precious")
    with pytest.raises(ExportError, match="was not left by an export"):
        export_to(tmp_path / "b")
    (tmp_path / "c.replaced").mkdir()
    with pytest.raises(ExportError, match="is in the way"):
        export_to(tmp_path / "c")
    assert around(tmp_path / "b") == ["b.part", "c.replaced", "thesis"]


def test_an_empty_folder_is_filled_and_a_link_stays(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export_to(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and read_manifest(tmp_path / "empty").kind == "tensorrt"


def test_places_that_cannot_be_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidRequest, match="is a file; an export is a folder"):
        check_target(tmp_path / "file")
    with pytest.raises(InvalidRequest, match="file is a file, so"):
        check_target(tmp_path / "file" / "deeper" / "still")
    with pytest.raises(InvalidRequest):
        check_target("/")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidRequest, match="can't be written to"):
        check_target(tmp_path / "export")


def test_an_unfinished_export_that_others_could_fill_is_not_taken_over(tmp_path):
    interrupted(tmp_path / "export")
    (tmp_path / "export.part" / RECORD).chmod(0o666)
    with pytest.raises(ExportError, match="others can write to"):
        export_to(tmp_path / "export")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_what_is_finished_stays_for_the_next_time(tmp_path, number):
    target, made = tmp_path / "export", []
    with pytest.raises(ExportError, match="disk of .* is full.*run the same command again"):  # noqa: SIM117
        with publishing(target) as export:
            write(export, "a.onnx", b"a.onnx")
            (export.path / "b.onnx").write_bytes(b"ha")
            try:
                raise OSError(number, "no room")
            except OSError as error:
                raise RuntimeError("a library's own words") from error
    assert sorted(path.name for path in (tmp_path / "export.part").iterdir()) == ["a.onnx", RECORD]
    export_to(target, made=made)
    assert made == ["b.onnx"]


def test_a_disk_that_fills_while_publishing_leaves_the_old_export(tmp_path, monkeypatch):
    target = tmp_path / "export"
    export_to(target)
    monkeypatch.setattr(folders, "sync", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
    with pytest.raises(ExportError, match="is full"):
        export_to(target, names=("c.onnx",), overwrite=True)
    assert [entry.name for entry in read_manifest(target).files] == ["a.onnx", "b.onnx"]


@contextmanager
def really_full(tmp_path):
    """A file system of 1 MB; needs the right to mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if done.returncode:
        pytest.skip("can't mount a small file system here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_is_really_full_leaves_nothing(tmp_path):
    with really_full(tmp_path) as mount:
        with pytest.raises(ExportError, match="is full"), publishing(mount / "export") as export:
            write(export, "a.onnx", bytes(4 * 2**20))
        assert list(mount.iterdir()) == []


def test_too_little_room_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(ExportError, match="takes another 1e.* GB, and the disk of .* GB free"):
        export_to(tmp_path / "export", needed=10**24)
    assert around(tmp_path / "export") == []


def test_room_for_what_is_finished_is_not_asked_for_again(tmp_path, monkeypatch):
    interrupted(tmp_path / "export")
    usage = type("Usage", (), {"free": 10, "total": 90})
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    export_to(tmp_path / "export", needed=16)  # of which 6 are there


def test_an_export_without_a_manifest_or_with_unrecorded_files_is_not_published(tmp_path):
    with pytest.raises(ExportError, match="ended without a manifest"), publishing(tmp_path / "export") as export:
        write(export, "a.onnx")
    with pytest.raises(ExportError, match="lists b.onnx, which was not recorded"):  # noqa: SIM117
        with publishing(tmp_path / "export") as export:
            write(export, "b.onnx")
            manifest = manifest_of(export)
            write(export, "b.onnx", b"something else")
            export.complete(manifest)
    with pytest.raises(ExportError, match="missing file"), publishing(tmp_path / "export") as export:
        write(export, "c.onnx")
        export.complete(manifest_of(export))
        (export.path / "c.onnx").unlink()
    assert not (tmp_path / "export").exists()


def test_a_mistake_of_ours_keeps_its_type(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"), publishing(tmp_path / "export"):
        open(tmp_path / "gone")  # noqa: SIM115


def test_the_record_is_json_without_surprises(tmp_path):
    interrupted(tmp_path / "export", arguments={"b": 1, "a": [2]})
    record = json.loads((tmp_path / "export.part" / RECORD).read_text())
    assert record["graphs"]["a.onnx"]["detail"] == {"of": "a.onnx"}
    export_to(tmp_path / "export", arguments={"a": [2], "b": 1}, made=(made := []))  # order does not matter
    assert made == ["b.onnx"]
