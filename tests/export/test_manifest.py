"""Manifests: what they say survives a file, what is wrong with files is named, and code needs somebody's word."""

import json
import os
import re
from dataclasses import replace

import pytest

from stylefast import code_caches
from stylefast.errors import EngineMismatch, ExportError, ModelFormatError, ModelNotFound, UntrustedEngine
from stylefast.export.manifest import (
    MANIFEST,
    FileEntry,
    GraphEntry,
    Manifest,
    check_files,
    check_fits,
    check_trust,
    file_entry,
    file_problems,
    graph_from_json,
    graph_to_json,
    read_manifest,
)

CONTENT = {"unet-live.onnx": b"graph" * 9, "unet-live.onnx.data": b"weights" * 1001, "vae_decoder.onnx": b""}


def manifest_of(folder, kind="onnx", **changes):
    """Of the three files of CONTENT, which are written to a folder."""
    folder.mkdir(exist_ok=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o644)
    folder.chmod(0o755)
    graphs = (
        GraphEntry(
            "unet",
            "unet-live.onnx",
            ("unet-live.onnx", "unet-live.onnx.data"),
            shape={"flavour": "live", "references": 1, "segments": 2},
            inputs=(("latents", "float16", ("rows", 4, "height", "width")), ("timestep", "float32", ("rows",))),
            outputs=(("output", "float16", ("rows", 4, "height", "width")),),
            fixed={"rows": 2},
            opset=20,
            extra={"layers": 70},
        ),
        GraphEntry("vae_decoder", "vae_decoder.onnx", ("vae_decoder.onnx",)),
    )
    given = {
        "kind": kind,
        "stylefast": "0.1.0",
        "model": "tiny",
        "fingerprint": "ab" * 32,
        "dtype": "float16",
        "target": "any",
        "toolchain": {"onnx": "1.23.0"},
        "graphs": graphs,
        "files": tuple(file_entry(folder, name) for name in CONTENT),
        "profiles": {"unet-live": ["rows=1:4:8"]},
    }
    manifest = Manifest(**given | changes)
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=3))
    (folder / MANIFEST).chmod(0o644)
    return manifest


def test_a_manifest_comes_back_from_its_file_with_the_same_digest(tmp_path):
    manifest = manifest_of(tmp_path)
    again = read_manifest(tmp_path)
    assert again == manifest and again.digest == manifest.digest and re.fullmatch("[0-9a-f]{64}", again.digest)
    assert again.graph("unet", "live").inputs[0] == ("latents", "float16", ("rows", 4, "height", "width"))
    assert again.graph("unet", "banked") is None and again.graph("vae_decoder").label == "vae_decoder"
    assert again.bytes == sum(map(len, CONTENT.values()))
    graph = manifest.graphs[0]
    assert graph_from_json(json.loads(json.dumps(graph_to_json(graph)))) == graph


def test_the_digest_changes_with_every_field(tmp_path):
    manifest = manifest_of(tmp_path)
    changes = [
        {"kind": "aoti"},
        {"stylefast": "9"},
        {"model": "x"},
        {"fingerprint": "x"},
        {"dtype": "float32"},
        {"target": "sm89"},
        {"toolchain": {}},
        {"profiles": {}},
        {"graphs": manifest.graphs[:1]},
        {"graphs": (replace(manifest.graphs[0], opset=21), manifest.graphs[1])},
        {"files": (*manifest.files[:2], replace(manifest.files[2], sha256="0" * 64))},
    ]
    digests = {manifest.digest, *(replace(manifest, **change).digest for change in changes)}
    assert len(digests) == len(changes) + 1


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda found: found.update(format=2), "has format 2; this version of stylefast reads format 1"),
        (lambda found: found.pop("dtype"), "damaged: the manifest has"),
        (lambda found: found.update(kind="wasm"), "kind 'wasm'"),
        (lambda found: found.update(model=7), "model is 7"),
        (lambda found: found.update(graphs=3), "graphs is 3; it must be a list"),
        (lambda found: found["graphs"][0].update(component="lung"), "graph of 'lung'"),
        (lambda found: found["graphs"][0].update(file="other.onnx"), "'other.onnx' is not among its files"),
        (lambda found: found["graphs"][0].update(inputs=[["latents"]]), "each must be [name, type, dims]"),
        (lambda found: found["graphs"][0].update(shape={"flavour": 3}), "the flavour of unet-live.onnx is 3"),
        (lambda found: found["graphs"][0].update(fixed={"height": "x"}), "is fixed, its height is 'x'"),
        (lambda found: found["graphs"][0].update(fixed={"rows": 0}), "is fixed, its rows is 0"),
        (lambda found: found["graphs"][0].update(opset="20"), "opset of unet-live.onnx is '20'"),
        (lambda found: found["files"].pop(1), "needs unet-live.onnx.data, which is not among the files"),
        (lambda found: found["files"].append(found["files"][0]), "lists a file twice"),
        (lambda found: found["files"][0].update(name="../../etc/passwd"), "plain path of a file in the folder"),
        (lambda found: found["files"][0].update(name="/etc/passwd"), "plain path of a file in the folder"),
        (lambda found: found["files"][0].update(name="a\\b"), "plain path of a file in the folder"),
        (lambda found: found["files"][0].update(bytes=-1), "bytes of unet-live.onnx is -1"),
        (lambda found: found["files"][0].update(sha256="12"), "must be 64 hex digits"),
        (lambda found: found["files"].__setitem__(0, "x"), "damaged: a file has str"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, damage, message):
    found = manifest_of(tmp_path).to_json()
    found = json.loads(json.dumps(found))
    damage(found)
    (tmp_path / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(ModelFormatError, match=re.escape(message)):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"], ids=repr)
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFormatError, match=MANIFEST):
        read_manifest(tmp_path)


def test_a_folder_that_is_no_export_is_not_found(tmp_path):
    with pytest.raises(ModelNotFound, match="there is no export at"):
        read_manifest(tmp_path / "gone")
    with pytest.raises(ModelNotFound, match="was not finished"):
        read_manifest(tmp_path)


def test_whole_files_have_no_problems(tmp_path):
    manifest = manifest_of(tmp_path)
    assert file_problems(tmp_path, manifest) == {}
    check_files(tmp_path, manifest)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("unet-live.onnx.data", lambda path: path.unlink(), "missing external data"),
        ("unet-live.onnx", lambda path: path.unlink(), "missing file"),
        ("unet-live.onnx", lambda path: path.write_bytes(b"gra"), "truncated: .* has 3 of 45 bytes"),
        ("vae_decoder.onnx", lambda path: path.write_bytes(b"x"), "altered: .* has 1 bytes where"),
    ],
)
def test_files_of_another_size_are_named_even_without_hashing(tmp_path, name, damage, message):
    manifest = manifest_of(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ExportError, match=message):
        check_files(tmp_path, manifest, deep=False)
    assert list(file_problems(tmp_path, manifest)) == [name]


def test_altered_bytes_are_found_by_their_hash(tmp_path):
    manifest = manifest_of(tmp_path)
    path = tmp_path / "unet-live.onnx.data"
    before = next(entry for entry in manifest.files if entry.name == path.name).sha256
    path.write_bytes(b"W" + path.read_bytes()[1:])
    now = file_entry(tmp_path, path.name).sha256
    with pytest.raises(ExportError, match=f"altered: .*{path.name} has sha256 {now[:12]} where .* {before[:12]}"):
        check_files(tmp_path, manifest)
    check_files(tmp_path, manifest, deep=False)
    check_files(tmp_path, manifest, names=["vae_decoder.onnx"])
    with pytest.raises(ExportError, match="lists no other.onnx"):
        check_files(tmp_path, manifest, names=["other.onnx"])


def test_own_engines_are_trusted_and_graphs_need_no_trust(tmp_path):
    for kind in ("onnx", "tensorrt", "aoti"):
        check_trust(tmp_path, manifest_of(tmp_path, kind))
    graphs = manifest_of(tmp_path, "onnx")
    tmp_path.chmod(0o777)
    check_trust(tmp_path, graphs)


@pytest.mark.parametrize("kind", ["tensorrt", "aoti"])
@pytest.mark.parametrize("name", [".", MANIFEST, "unet-live.onnx.data"])
def test_engines_that_others_can_write_need_the_digest(tmp_path, kind, name):
    manifest = manifest_of(tmp_path, kind)
    path = tmp_path / name
    path.chmod(0o775 if name == "." else 0o666)
    with pytest.raises(UntrustedEngine, match="others can write to .*--trust") as found:
        check_trust(tmp_path, manifest)
    assert manifest.digest not in str(found.value)  # whoever copied it from there would vouch for what they found
    check_trust(tmp_path, manifest, manifest.digest)
    check_trust(tmp_path, manifest, f" {manifest.digest.upper()}\n")


def test_engines_of_another_user_need_the_digest(tmp_path, monkeypatch):
    manifest = manifest_of(tmp_path, "tensorrt")
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    monkeypatch.setattr(code_caches, "_ROOT", -1)  # who runs the tests may be root, whom everybody trusts
    with pytest.raises(UntrustedEngine, match="belongs to user"):
        check_trust(tmp_path, manifest)
    monkeypatch.delattr(os, "getuid")
    with pytest.raises(UntrustedEngine, match="does not report the owner"):
        check_trust(tmp_path, manifest)
    check_trust(tmp_path, manifest, manifest.digest)


def test_an_engine_behind_a_link_needs_the_digest(tmp_path):
    manifest = manifest_of(tmp_path / "export", "tensorrt")
    path = tmp_path / "export" / "unet-live.onnx"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UntrustedEngine, match="is a link to another place"):
        check_trust(tmp_path / "export", manifest)


def test_a_folder_below_that_others_can_write_is_seen(tmp_path):
    manifest = manifest_of(tmp_path, "triton-repo")
    (tmp_path / "unet" / "1").mkdir(parents=True)
    (tmp_path / "unet" / "1" / "model.py").write_bytes(b"")
    manifest = replace(manifest, files=(*manifest.files, file_entry(tmp_path, "unet/1/model.py")))
    (tmp_path / "unet" / "1" / "model.py").chmod(0o644)
    (tmp_path / "unet" / "1").chmod(0o755)
    (tmp_path / "unet").chmod(0o757)
    with pytest.raises(UntrustedEngine, match="others can write to .*unet "):
        check_trust(tmp_path, manifest)


def test_a_wrong_digest_is_refused_for_every_kind(tmp_path):
    for kind in ("onnx", "tensorrt"):
        manifest = manifest_of(tmp_path, kind)
        with pytest.raises(UntrustedEngine, match=f"is {'0' * 12}, its manifest has {manifest.digest[:12]}"):
            check_trust(tmp_path, manifest, "0" * 64)


def test_an_export_fits_what_it_was_made_for(tmp_path):
    torch = pytest.importorskip("torch")
    manifest = manifest_of(tmp_path, "tensorrt", target="sm89,sm120")
    same = {"kind": "tensorrt", "fingerprint": "ab" * 32, "dtype": torch.float16, "toolchain": {"onnx": "1.23.0"}}
    for target in ("sm89", "sm120", None):
        check_fits(manifest, **same, target=target)
    check_fits(manifest_of(tmp_path), target="sm75")  # "any"


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"kind": "aoti"}, "is of kind tensorrt, not aoti"),
        ({"fingerprint": "cd" * 32}, "fingerprint abababababab.* than those loaded .cdcdcdcdcdcd"),
        ({"dtype": "float32"}, "has dtype float16, the model float32"),
        ({"target": "sm8"}, "was built for sm89,sm120, and this is sm8"),
        ({"toolchain": {"onnx": "2"}}, "made with onnx 1.23.0, and 2 is installed"),
        ({"toolchain": {"torch": "2.13"}}, "made with torch of unknown version"),
    ],
    ids=str,
)
def test_what_an_export_was_not_made_for_is_named(tmp_path, wanted, message):
    with pytest.raises(EngineMismatch, match=message):
        check_fits(manifest_of(tmp_path, "tensorrt", target="sm89,sm120"), **wanted)


def test_of_weights_in_another_type_the_type_is_named(tmp_path):
    with pytest.raises(EngineMismatch, match="has dtype float16, the model float32"):
        check_fits(manifest_of(tmp_path), fingerprint="cd" * 32, dtype="float32")


def test_manifests_need_neither_torch_nor_onnx(checkout):
    import subprocess
    import sys

    code = "import sys, stylefast.export.manifest; print([name for name in ('torch', 'onnx') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_file_entry_counts_and_hashes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_entry(tmp_path, "a") == FileEntry("a", 3, digest)
