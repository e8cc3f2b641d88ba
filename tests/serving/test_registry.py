"""Styles on disk, without an engine: names, links, damage, writers, and archives."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

from stylefast import cli
from stylefast.errors import StyleError
from stylefast.models.checkpoint import TINY
from stylefast.serving.registry import ReadOnlyStyles, StyleExists, StyleRegistry, UnknownStyle
from stylefast.serving.style_archive import pack, unpack
from stylefast.serving.style_files import MANIFEST, Manifest, StyleFile, StyleFolder, safe_file, safe_name

PICTURE = (TINY / "references" / "neon.png").read_bytes()
UNSAFE = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a\\b",
    "%2e%2e",
    "a\0b",
    "a b",
    "a.b",
    "-a",
    "_a",
    "a" * 65,
    "a" * 10_000,
    "ne\u043en",  # a Cyrillic o
    "\uff4eeon",  # a full-width n
    "ne\u0301on",
    "neon\n",
    "nul",
    "NUL",
    "Com1",
    "lpt9",
    "vivid",
    None,
    7,
]


def manifest(**others):
    found = Manifest([{"kind": "StyleAligned", "reference": "reference.png"}], {}, licence="CC0-1.0")
    return replace(found, **others)


def add(registry, name="ours", files=None, **others):
    with registry.draft() as draft:
        for file, content in (files or {"reference.png": PICTURE}).items():
            draft.add(file, content)
        return draft.publish(name, manifest(**others))


@pytest.fixture
def registry(tmp_path):
    folder = tmp_path / "styles"
    folder.mkdir()
    return StyleRegistry(folder)


@pytest.fixture
def archive(registry, tmp_path):
    path = add(registry, files={"reference.png": PICTURE, "again.png": PICTURE, "note.txt": b"n" * 5000}).path
    pack(path, tmp_path / "ours.zip")
    return tmp_path / "ours.zip"


@pytest.mark.parametrize("name", UNSAFE, ids=lambda name: repr(name)[:12])
def test_names_that_are_not_safe_on_every_system_are_refused(registry, name):
    with pytest.raises(StyleError) as caught:
        safe_name(name)
    assert len(str(caught.value)) < 500
    with pytest.raises(StyleError):
        add(registry, name)
    with pytest.raises((UnknownStyle, StyleError)):
        registry.remove(name)
    with pytest.raises(UnknownStyle):
        registry.find(name)
    assert os.listdir(registry.folder) == []


@pytest.mark.parametrize(
    "name", [*UNSAFE[:3], "a/b.png", "/etc/passwd", ".hidden", "style.json", "Style.JSON", "nul.png", "a."]
)
def test_files_of_a_style_lie_in_its_folder(name):
    with pytest.raises(StyleError):
        safe_file(name)
    with pytest.raises(StyleError):
        Manifest.of(manifest(files={name: StyleFile("0" * 64, 1)}).to_json())


def test_a_style_is_there_whole_or_not_at_all(registry):
    with pytest.raises(RuntimeError), registry.draft() as draft:
        draft.add("reference.png", PICTURE)
        assert registry.scan() == {}
        raise RuntimeError
    assert os.listdir(registry.folder) == []
    made = add(registry)
    assert list(registry.scan()) == ["ours"] and made.usable().files["reference.png"].bytes == len(PICTURE)
    assert sorted(os.listdir(made.path)) == ["reference.png", MANIFEST]


def test_a_name_is_taken_once_whatever_its_capital_letters(registry):
    add(registry)
    for name in ("ours", "Ours", "OURS"):
        with pytest.raises(StyleExists):
            add(registry, name)
    registry.taken = ["neon"]
    with pytest.raises(StyleExists):
        add(registry, "Neon")


def test_folders_that_differ_by_capital_letters_alone_are_both_refused(registry):
    shutil.copytree(add(registry).path, registry.folder / "OURS")
    found = registry.scan()
    assert all("capital letters" in found[name].fault for name in ("ours", "OURS"))
    shutil.rmtree(registry.folder / "OURS")
    assert registry.scan()["ours"].fault is None


def test_a_clash_with_the_models_styles_names_both(registry):
    made = add(registry)
    registry.taken = ["Ours"]
    with pytest.raises(StyleError, match="'Ours' comes with the model") as caught:
        registry.check_clashes()
    assert str(made.path) in str(caught.value)
    assert "rename" in registry.scan()["ours"].fault


def test_links_are_not_followed(registry, tmp_path):
    made = add(registry)
    secret = tmp_path / "secret.png"
    secret.write_bytes(PICTURE)
    (made.path / "reference.png").unlink()
    (made.path / "reference.png").symlink_to(secret)
    assert "links are not followed" in registry.find("ours").fault
    with StyleFolder(made.path) as folder, pytest.raises(StyleError, match="links are not followed"):
        folder.read("reference.png", made.usable().files["reference.png"])
    shutil.move(made.path, tmp_path / "outside")
    (registry.folder / "ours").symlink_to(tmp_path / "outside")
    assert "links are not followed" in registry.find("ours").fault
    registry.remove("ours")
    assert (tmp_path / "outside" / MANIFEST).exists() and registry.scan() == {}


def test_a_pipe_in_place_of_a_file_does_not_block(registry):
    made = add(registry)
    (made.path / "reference.png").unlink()
    os.mkfifo(made.path / "reference.png")
    assert "no regular file" in registry.find("ours").fault
    (made.path / MANIFEST).unlink()
    os.mkfifo(made.path / MANIFEST)
    assert "no regular file" in registry.find("ours").fault


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda path: _flip(path / "reference.png"), "altered"),
        (lambda path: (path / "reference.png").write_bytes(PICTURE[:-1]), "altered"),
        (lambda path: (path / "reference.png").unlink(), "can't be read"),
        (lambda path: (path / MANIFEST).unlink(), "style.json"),
        (lambda path: (path / MANIFEST).write_text("{"), "not valid JSON"),
        (lambda path: (path / MANIFEST).write_text("[]"), "must be an object"),
        (lambda path: (path / MANIFEST).write_text("[" * 100_000), "nested too deeply"),
        (lambda path: (path / MANIFEST).write_text('{"format": "stylefast-style/2"}'), "stylefast-style/2"),
        (lambda path: (path / MANIFEST).write_bytes(b" " * (2**20 + 1)), "at most"),
    ],
)
def test_a_damaged_style_is_refused_by_name_and_the_others_stay(registry, damage, says):
    bad = add(registry, "bad")
    add(registry, "good")
    assert registry.find("bad").fault is None
    damage(bad.path)
    found = registry.scan()
    assert says in found["bad"].fault and found["good"].fault is None
    with pytest.raises(StyleError, match="'bad' can't be used"):
        found["bad"].usable()
    registry.remove("bad")
    assert list(registry.scan()) == ["good"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("styles", {}),
        ("styles", [1]),
        ("styles", [{"kind": "StyleAligned"}] * 9),
        ("loras", {"gone.safetensors": 1.0}),
        ("loras", {"reference.png": "much"}),
        ("loras", {"reference.png": [1, 2, 3]}),
        ("defaults", {"prompt": "x"}),
        ("defaults", {"size": [64]}),
        ("defaults", {"size": [63, 64]}),
        ("banks", [{"file": "gone.bank", "style": 0}]),
        ("banks", [{"file": "reference.png", "style": 1}]),
        ("files", {"reference.png": {"sha256": "0"}}),
        ("files", {"reference.png": {"sha256": "0" * 64, "bytes": -1}}),
        ("licence", 7),
        ("description", "x" * 2001),
        ("colour", "red"),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused(registry, field, value):
    made = add(registry)
    content = json.loads((made.path / MANIFEST).read_bytes())
    (made.path / MANIFEST).write_text(json.dumps({**content, field: value}))
    assert registry.find("ours").fault


def test_what_another_server_changes_is_noticed_at_the_next_listing(registry):
    other = StyleRegistry(registry.folder)
    add(registry)
    assert other.scan()["ours"].fault is None
    _flip(registry.folder / "ours" / "reference.png")
    assert "altered" in other.scan()["ours"].fault
    _flip(registry.folder / "ours" / "reference.png")
    assert other.scan()["ours"].fault is None
    registry.remove("ours")
    assert other.scan() == {} and os.listdir(registry.folder) == []


def test_what_a_killed_writer_left_is_removed_and_that_of_a_living_one_is_not(registry):
    program = (
        "import os, sys; from stylefast.serving.registry import StyleRegistry\n"
        "with StyleRegistry(sys.argv[1]).draft() as draft:\n"
        "    draft.add('reference.png', b'half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, registry.folder]).returncode == -9
    (left,) = os.listdir(registry.folder)
    assert registry.scan() == {}
    with registry.draft() as draft:
        assert os.listdir(registry.folder) == [draft.path.name] and draft.path.name != left
        add(StyleRegistry(registry.folder))
        assert draft.path.exists()


def test_a_folder_that_cannot_be_written_serves_its_styles(registry, monkeypatch):
    add(registry)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert list(registry.scan()) == ["ours"]
    for change in (lambda: add(registry, "other"), lambda: registry.remove("ours")):
        with pytest.raises(ReadOnlyStyles):
            change()
    assert list(registry.scan()) == ["ours"]


def test_a_bank_takes_the_place_of_an_earlier_one(registry):
    before = add(registry)
    for content in (b"first", b"second"):
        with registry.draft() as draft:
            (draft.path / "x.bank").write_bytes(content)
            before = registry.add_bank("ours", draft, draft.path / "x.bank", 0, {"steps": 7}, before)
    (bank,) = (file for file, _ in before.usable().banks)
    assert bank == f"bank-{hashlib.sha256(b'second').hexdigest()[:12]}.bank"
    assert sorted(os.listdir(before.path)) == [bank, "reference.png", MANIFEST]
    assert before.usable().defaults == {"steps": 7}
    with registry.draft() as draft, pytest.raises(StyleError, match="changed while it was baked"):
        (draft.path / "x.bank").write_bytes(b"third")
        registry.add_bank("ours", draft, draft.path / "x.bank", 0, {}, replace(before, stamp=()))
    assert registry.find("ours").usable().banks == [(bank, 0)]


# archives


def test_an_archive_holds_each_content_once_and_is_the_same_each_time(archive, registry, tmp_path):
    with zipfile.ZipFile(archive) as found:
        names = found.namelist()
    assert names[0] == "manifest.json" and len(names) == 3
    pack(registry.folder / "ours", tmp_path / "second.zip")
    assert (tmp_path / "second.zip").read_bytes() == archive.read_bytes()
    with pytest.raises(FileExistsError):
        pack(registry.folder / "ours", archive)


def test_a_style_comes_out_as_it_went_in(archive, registry, tmp_path):
    (tmp_path / "others").mkdir()
    others = StyleRegistry(tmp_path / "others")
    found = unpack(archive, others)
    assert found.name == "ours" and found.usable() == registry.find("ours").usable()
    assert {file.name: file.read_bytes() for file in found.path.iterdir() if file.name != MANIFEST} == {
        "reference.png": PICTURE,
        "again.png": PICTURE,
        "note.txt": b"n" * 5000,
    }
    with pytest.raises(StyleExists):
        unpack(archive, others)
    assert unpack(archive, others, "second").fault is None


def test_a_damaged_style_is_not_packed(registry, tmp_path):
    made = add(registry)
    _flip(made.path / "reference.png")
    with pytest.raises(StyleError, match="altered"):
        pack(made.path, tmp_path / "x.zip")
    assert not list(tmp_path.glob("*.zip")) and not list(tmp_path.glob(".*part"))


def _rewritten(archive, change):
    """Return the archive's entries, changed, as a new archive."""
    with zipfile.ZipFile(archive) as old:
        entries = [(name, old.read(name)) for name in old.namelist()]
    target = archive.with_name("changed.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in change(entries):
            new.writestr(name, content)
    return target


def _with_manifest(entries, change):
    content = json.loads(entries[0][1])
    change(content)
    return [("manifest.json", json.dumps(content)), *entries[1:]]


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: [*entries, ("../../evil", b"x")],
        lambda entries: [*entries, ("/etc/evil", b"x")],
        lambda entries: [*entries, ("files/" + "0" * 64, b"x")],
        lambda entries: [*entries, (f"files/../{entries[1][0]}", b"x")],
        lambda entries: entries[:-1],
        lambda entries: [*entries[1:], entries[0]],
        lambda entries: entries[1:],
        lambda entries: [],
        lambda entries: [*entries[:-1], (entries[-1][0], entries[-1][1][:-1] + b"!")],
        lambda entries: [*entries[:-1], (entries[-1][0], entries[-1][1] + b"!")],
        lambda entries: [*entries, *((f"files/{i:064x}", b"") for i in range(100))],
        lambda entries: _with_manifest(entries, lambda one: one.update(name="../evil")),
        lambda entries: _with_manifest(entries, lambda one: one.update(name="evil\0")),
        lambda entries: _with_manifest(entries, lambda one: one.update(more=1)),
        lambda entries: _with_manifest(
            entries, lambda one: one["style"]["files"].update({"../evil": one["style"]["files"]["note.txt"]})
        ),
        lambda entries: _with_manifest(entries, lambda one: one["style"]["files"]["note.txt"].update(bytes=2**45)),
    ],
)
def test_an_archive_that_was_tampered_with_writes_nothing(archive, tmp_path, change):
    changed = _rewritten(archive, change)
    (tmp_path / "others").mkdir()
    with pytest.raises(StyleError) as caught:
        unpack(changed, StyleRegistry(tmp_path / "others"))
    assert len(str(caught.value)) < 600
    assert os.listdir(tmp_path / "others") == [] and not (tmp_path / "evil").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_an_entry_twice_is_refused(archive, tmp_path):
    changed = _rewritten(archive, lambda entries: [*entries, entries[1]])
    (tmp_path / "others").mkdir()
    with pytest.raises(StyleError, match="twice"):
        unpack(changed, StyleRegistry(tmp_path / "others"))


def test_any_flipped_byte_is_noticed_or_does_not_matter(archive, registry, tmp_path):
    content = archive.read_bytes()
    (tmp_path / "others").mkdir()
    others, wanted = StyleRegistry(tmp_path / "others"), registry.find("ours").usable()
    for place in range(0, len(content), max(len(content) // 60, 1)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        archive.write_bytes(changed)
        try:
            found = unpack(archive, others)
        except StyleError:
            assert os.listdir(others.folder) == []
        else:
            assert found.usable().files == wanted.files
            others.remove(found.name)


def test_a_bomb_is_refused_before_it_is_unpacked(registry, tmp_path):
    zeros = b"\0" * (4 * 2**20)
    path = add(registry, files={"reference.txt": zeros, "more.txt": zeros + b"1"}).path
    pack(path, tmp_path / "bomb.zip")
    assert (tmp_path / "bomb.zip").stat().st_size < 2**16
    (tmp_path / "others").mkdir()
    with pytest.raises(StyleError, match="--limit"):
        unpack(tmp_path / "bomb.zip", StyleRegistry(tmp_path / "others"), limit=2**20)


def test_no_archive_at_all(tmp_path):
    registry = StyleRegistry(tmp_path)
    with pytest.raises(StyleError, match="no archive found"):
        unpack(tmp_path / "gone.zip", registry)
    (tmp_path / "x.zip").write_bytes(PICTURE)
    with pytest.raises(StyleError, match="no archive of a style"):
        unpack(tmp_path / "x.zip", registry)


def test_the_command_packs_lists_and_unpacks(registry, tmp_path, capsys):
    def styles(*words):
        code = cli.main(["styles", *map(str, words)])
        return code, *capsys.readouterr()

    add(registry)
    (tmp_path / "others").mkdir()
    code, out, err = styles("pack", "ours", "--styles", registry.folder, "--out", tmp_path / "x.zip")
    assert (code, out) == (0, f"{tmp_path / 'x.zip'}\n") and "licence: CC0-1.0" in err
    assert styles("pack", registry.folder / "ours", "--out", tmp_path / "x.zip")[0] == 2
    assert styles("pack", registry.folder / "ours", "--out", tmp_path / "x.zip", "--overwrite")[0] == 0
    code, out, err = styles("unpack", tmp_path / "x.zip", "--styles", tmp_path / "others", "--name", "theirs")
    assert code == 0 and out.strip().endswith("theirs") and "CC0-1.0" in err
    _flip(tmp_path / "others" / "theirs" / "reference.png")
    code, out, _ = styles("list", "--styles", tmp_path / "others")
    assert code == 0 and out.startswith("theirs\tcan't be used: the style's file reference.png was altered")
    code, _, err = styles("unpack", tmp_path / "x.zip", "--styles", tmp_path / "others", "--limit", "1KB")
    assert code == 2 and "--limit" in err
    assert styles("list", "--styles", tmp_path / "gone")[0] == 2
    assert styles("unpack", tmp_path / "x.zip", "--styles", tmp_path / "others", "--name", "../x")[0] == 2
