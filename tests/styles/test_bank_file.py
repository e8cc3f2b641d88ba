"""Files of style banks: any tool reads them, they appear whole or not at all, and what is no whole bank is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stylefast.errors import OutOfMemory, StyleError
from stylefast.styles import bank_file
from stylefast.styles.bank import BankWriter, StyleBank
from stylefast.styles.bank_file import CHECKSUM, METADATA, bank_checksum
from tests.support.small_bank import SHAPES, fill, random_features, small_bank, small_info

KINDS = [("kv", dtype) for dtype in ("float32", "float16", "bfloat16", "float8_e4m3fn")]
KINDS += [("hidden", dtype) for _, dtype in KINDS] + [("latents", "float32")]


def same(first: StyleBank, second: StyleBank) -> bool:
    """Whether two banks agree in every bit and word."""
    if (first.info, first.shapes, first.tensors.keys()) != (second.info, second.shapes, second.tensors.keys()):
        return False
    return all(
        tensor.dtype == second.tensors[name].dtype
        and torch.equal(tensor.view(torch.uint8), second.tensors[name].view(torch.uint8))
        for name, tensor in first.tensors.items()
    )


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def rewrite(path: Path, tensors=None, checksum=True, **changes) -> None:
    """Write the bank at `path` anew, as another tool would, with other tensors or other facts and a true checksum."""
    metadata = metadata_of(path)
    content = json.loads(metadata[METADATA])
    content["bank"].update(changes)
    text = json.dumps(content)
    tensors = load_file(path) if tensors is None else tensors
    found = {CHECKSUM: bank_checksum(text, tensors)} if checksum else {}
    save_file(tensors, path, metadata | {METADATA: text} | found)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("store, dtype", KINDS)
@pytest.mark.parametrize("way", ["written in place", "saved from memory"])
def test_a_bank_comes_back_from_its_file_bit_for_bit(way, store, dtype, tmp_path):
    path, bank = tmp_path / "brand.bank", small_bank(store=store, dtype=dtype)
    if way == "saved from memory":
        assert bank.save(path) == path
    else:
        assert small_bank(path, store=store, dtype=dtype).path == path
    found = StyleBank.load(path)
    assert same(found, bank) and found.path == path and found.nbytes == bank.nbytes
    assert os.listdir(tmp_path) == ["brand.bank"]


def test_both_ways_of_writing_give_the_same_file(tmp_path):
    small_bank(tmp_path / "a.bank")
    small_bank().save(tmp_path / "b.bank")
    assert (tmp_path / "a.bank").read_bytes() == (tmp_path / "b.bank").read_bytes()


def test_other_tools_open_the_file_and_find_its_tensors(tmp_path):
    bank = small_bank(tmp_path / "brand.bank", dtype="bfloat16")
    found = load_file(tmp_path / "brand.bank")
    assert found.keys() == bank.tensors.keys() and torch.equal(found["kv.1"], bank.tensors["kv.1"])
    assert json.loads(metadata_of(tmp_path / "brand.bank")[METADATA])["bank"]["prompt"] == "a fox, watercolor"


def test_a_file_that_another_tool_wrote_in_another_order_is_the_same_bank(tmp_path):
    path, bank = tmp_path / "brand.bank", small_bank(dtype="float8_e4m3fn")
    bank.save(path)
    before = path.read_bytes()
    save_file(load_file(path), path, metadata_of(path))
    assert path.read_bytes() != before and same(StyleBank.load(path), bank)


def test_loading_reads_no_tensor_and_maps_nothing(tmp_path):
    small_bank().save(tmp_path / "brand.bank")
    bank = StyleBank.load(tmp_path / "brand.bank", verify=False)
    tensors = [bank.tensors[name] for name in bank.tensors]
    assert sum(tensor.nbytes for tensor in tensors) == bank.nbytes
    assert str(tmp_path / "brand.bank") not in Path("/proc/self/maps").read_text()


def test_a_part_of_a_tensor_is_where_its_span_says(tmp_path):
    kept = small_bank()
    kept.save(tmp_path / "brand.bank")
    bank = StyleBank.load(tmp_path / "brand.bank")
    for name in ("kv.1", "mean.0", "norm_mean.0"):
        for place in ((0, 0, 0), (1, 1, 0), (0, 1)):
            assert torch.equal(bank.tensors.read(name, place), kept.tensors[name][place])
    with pytest.raises(IndexError, match="has no index .9"):
        bank.source("kv.1", (9, 0, 0))


def _copied_over(file, other):
    with open(file, "wb") as target:  # as cp does: the same file, emptied and filled anew
        target.write(other.read_bytes())


@pytest.mark.parametrize(
    "change",
    [
        lambda file, other: os.truncate(file, file.stat().st_size // 2),
        lambda file, other: os.truncate(file, 0),
        _copied_over,
        lambda file, other: os.utime(file, (1, 1)),
    ],
    ids=["cut short", "emptied", "another bank copied over it", "written in place"],
)
def test_a_file_that_changes_while_it_is_in_use_is_an_error_not_the_end(tmp_path, change):
    file, other = tmp_path / "brand.bank", tmp_path / "other.bank"
    small_bank().save(file)
    small_bank(seed=5).save(other)
    bank = StyleBank.load(file)
    change(file, other)
    for use in (lambda: bank.tensors["kv.0"], lambda: bank.save(tmp_path / "again.bank")):
        with pytest.raises(StyleError, match="brand.bank was written to while it was in use; load it again"):
            use()


def test_a_file_that_is_replaced_by_renaming_goes_on(tmp_path):
    file = tmp_path / "brand.bank"
    kept = small_bank()
    kept.save(file)
    bank = StyleBank.load(file)
    small_bank(seed=5).save(tmp_path / "other.bank")
    os.replace(tmp_path / "other.bank", file)
    assert torch.equal(bank.tensors["kv.0"], kept.tensors["kv.0"])
    file.unlink()
    assert torch.equal(bank.tensors["kv.0"], kept.tensors["kv.0"])


def test_pages_of_round_size_are_aligned_in_the_file(tmp_path):
    shapes = type(SHAPES)(((16, 2, 32),), (3,), (7,), (1, 3, 3))
    small_bank(tmp_path / "brand.bank", shapes=shapes, dtype="float16", layers=(0,), references=1)
    found = load_file(tmp_path / "brand.bank")
    content = (tmp_path / "brand.bank").read_bytes()
    length = int.from_bytes(content[:8], "little")
    offsets = json.loads(content[8 : 8 + length])["kv.0"]["data_offsets"]
    assert (8 + length) % 4096 == 0 and offsets[0] % 64 == 0 and found["kv.0"].shape == (2, 2, 1, 2, 16, 2, 32)


def test_a_loaded_bank_can_be_saved_over_its_own_file(tmp_path):
    path, bank = tmp_path / "brand.bank", small_bank()
    bank.save(path)
    loaded = StyleBank.load(path)
    loaded.save(path)
    assert same(StyleBank.load(path), bank) and same(loaded, bank)


def test_a_bank_in_use_does_not_change_when_its_file_is_replaced(tmp_path):
    path, bank = tmp_path / "brand.bank", small_bank()
    bank.save(path)
    loaded = StyleBank.load(path)
    small_bank(seed=50).save(path)
    assert same(loaded, bank) and not same(StyleBank.load(path), bank)


def test_a_link_keeps_pointing_to_the_file_that_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    link = tmp_path / "brand.bank"
    link.symlink_to(tmp_path / "store" / "first.bank")
    small_bank().save(link)
    assert link.is_symlink() and same(StyleBank.load(tmp_path / "store" / "first.bank"), small_bank())


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    small_bank().save(tmp_path / "brand.bank")
    assert (tmp_path / "brand.bank").stat().st_mode == (tmp_path / "plain").stat().st_mode


# what is no whole bank


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthened(path):
    path.write_bytes(path.read_bytes() + b"\0")


def one_bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def other_prompt(path):
    path.write_bytes(path.read_bytes().replace(b"a fox", b"a cat", 1))


def foreign_metadata(path):
    save_file(load_file(path), path, {"format": "pt"})


def broken_metadata(path):
    save_file(load_file(path), path, metadata_of(path) | {METADATA: "{"})


def metadata_of_another_kind(path):
    save_file(load_file(path), path, metadata_of(path) | {METADATA: "[1, 2]"})


def shapes_of_another_kind(path):
    content = json.loads(metadata_of(path)[METADATA]) | {"shapes": {"layers": [7], "pages": 3}}
    save_file(load_file(path), path, metadata_of(path) | {METADATA: json.dumps(content)})


def tensors_with(change):
    def spoil(path):
        tensors = load_file(path)
        change(tensors)
        rewrite(path, tensors)

    return spoil


SPOILT = {
    "nothing at all": (lambda path: path.unlink(), "no style bank found at .*; check the path"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "no style bank found at"),
    "an empty file": (lambda path: path.write_bytes(b""), "no valid safetensors header"),
    "a text": (lambda path: path.write_text("a fox, " * 40), "no valid safetensors header"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><html>" + " " * 90), "a web page"),
    "a file cut by one byte": (cut, "but its header declares"),
    "a file with one byte more": (lengthened, "but its header declares"),
    "a file with a flipped bit": (one_bit_flipped, "altered after it was written: its checksum does not match"),
    "a file whose prompt was edited": (other_prompt, "altered after it was written"),
    "some other safetensors file": (foreign_metadata, "is a safetensors file, but not a style bank"),
    "a file with broken metadata": (broken_metadata, "metadata of the style bank .* is damaged"),
    "a file with a list for metadata": (metadata_of_another_kind, "metadata of the style bank .* is damaged"),
    "a file with strange shapes": (shapes_of_another_kind, "metadata of the style bank .* is damaged"),
    "a bank of a later format": (lambda path: rewrite(path, format=2), "has format 2; .* reads format 1"),
    "a bank with a wrong fact": (lambda path: rewrite(path, steps="many"), "steps of a style bank is 'many'"),
    "a bank without one tensor": (
        tensors_with(lambda t: t.pop("mean.1")),
        "lacks mean.1 .1 tensors missing, 0 unexpected",
    ),
    "a bank with a tensor more": (tensors_with(lambda t: t.update(x=torch.zeros(1))), "holds x, which a bank of its"),
    "a bank with a tensor of another shape": (
        tensors_with(lambda t: t.update({"kv.1": t["kv.1"][:1].clone()})),
        r"kv.1 .* \(1, 2, 2, 2, 6, 1, 5\), but its",
    ),
    "a bank with a tensor of another type": (
        tensors_with(lambda t: t.update(latents=t["latents"].half())),
        "latents .* is torch.float16 .* states",
    ),
    "a bank that announces more steps": (lambda path: rewrite(path, steps=3), r"states .*\(3, 2, 2,"),
    "a bank that announces another store": (lambda path: rewrite(path, store="hidden"), "lacks hidden.0"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_is_no_whole_bank_is_refused(kind, tmp_path):
    spoil, said = SPOILT[kind]
    path = tmp_path / "brand.bank"
    small_bank().save(path)
    spoil(path)
    with pytest.raises(StyleError, match=said):
        StyleBank.load(path)


def test_without_verification_only_an_altered_file_passes_and_saving_it_does_not(tmp_path):
    path = tmp_path / "brand.bank"
    small_bank().save(path)
    one_bit_flipped(path)
    bank = StyleBank.load(path, verify=False)
    with pytest.raises(StyleError, match="altered after it was written"):
        bank.save(tmp_path / "copy.bank")
    assert os.listdir(tmp_path) == ["brand.bank"]
    cut(path)
    with pytest.raises(StyleError, match="header declares"):
        StyleBank.load(path, verify=False)


@pytest.mark.parametrize("byte", range(0, 400, 23))
def test_a_damaged_header_is_refused_wherever_the_damage_is(byte, tmp_path):
    path = tmp_path / "brand.bank"
    small_bank().save(path)
    content = bytearray(path.read_bytes())
    content[byte] ^= 0x15
    path.write_bytes(content)
    with pytest.raises(StyleError):
        StyleBank.load(path)


# writing: whole or not at all


def test_places_that_can_not_be_written_are_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "folder").mkdir()
    for name, said in [
        ("nowhere/brand.bank", "the folder .* does not exist"),
        ("folder", "is a folder; give the bank a file"),
        ("brand.bin", "taken for a pickle; name it brand.bank"),
        ("b" * 250 + ".bank", "can't write the bank .*File name too long"),
    ]:
        with pytest.raises(StyleError, match=said):
            BankWriter(small_info(), SHAPES, tmp_path / name)
    assert os.listdir(tmp_path) == ["folder"]


def test_an_existing_file_is_kept_if_overwriting_is_not_wanted(tmp_path):
    path, bank = tmp_path / "brand.bank", small_bank()
    # the name may be taken while the bank is computed, too
    with BankWriter(small_info(), SHAPES, path, overwrite=False) as writer:
        fill(writer, seed=50)
        bank.save(path, overwrite=False)
        with pytest.raises(StyleError, match="exists already; save it under another name, or with overwrite=True"):
            writer.finish()
    with pytest.raises(StyleError, match="exists already"):
        small_bank(seed=50).save(path, overwrite=False)
    assert same(StyleBank.load(path), bank) and os.listdir(tmp_path) == ["brand.bank"]


@pytest.mark.parametrize("way", ["left without finish", "left by an error", "refused by finish"])
def test_a_writer_that_does_not_finish_leaves_no_file_and_keeps_the_old_one(way, tmp_path):
    path, old = tmp_path / "brand.bank", small_bank()
    old.save(path)
    with pytest.raises((ZeroDivisionError, StyleError)), BankWriter(small_info(), SHAPES, path) as writer:
        writer.put(0, "full", 0, random_features())
        assert len(leftovers(tmp_path)) == 1
        if way == "refused by finish":
            writer.finish()
        if way == "left without finish":
            writer.__exit__(None, None, None)
            writer.put(0, "full", 0, random_features())
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["brand.bank"] and same(StyleBank.load(path), old)


def test_a_bank_that_is_larger_than_the_disk_is_refused_with_both_figures(tmp_path):
    with pytest.raises(OutOfMemory, match=r"brand.bank takes .* GB \(\d+ bytes\), but .* has only .* free or allowed"):
        BankWriter(small_info(steps=2**40), SHAPES, tmp_path / "brand.bank")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "code, error",
    [
        (errno.ENOSPC, OutOfMemory),
        (errno.EDQUOT, OutOfMemory),
        (errno.EFBIG, OutOfMemory),
        (errno.EIO, StyleError),
    ],
    ids=["disk full", "quota used up", "file too large", "disk broken"],
)
def test_a_disk_that_fails_to_allocate_is_reported_and_nothing_is_left(code, error, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(bank_file.os, "posix_fallocate", fail)
    with pytest.raises(error, match="brand.bank"):
        small_bank().save(tmp_path / "brand.bank")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_keeps_the_old_file(call, tmp_path, monkeypatch):
    path, old = tmp_path / "brand.bank", small_bank()
    old.save(path)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(bank_file.os, call, fail)
        with pytest.raises(StyleError, match="can't write the bank .*brand.bank"):
            small_bank(seed=50).save(path)
    assert os.listdir(tmp_path) == ["brand.bank"] and same(StyleBank.load(path), old)


def start(code: str, checkout: Path, *arguments) -> subprocess.Popen:
    source = f"import sys, time\nfrom tests.support.small_bank import *\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        cwd=checkout,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_a_writer_that_is_killed_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path, checkout):
    path, old = tmp_path / "brand.bank", small_bank()
    old.save(path)
    code = """
writer = BankWriter(small_info(), SHAPES, sys.argv[1])
writer.put(0, "full", 0, random_features())
print("half way", flush=True)
time.sleep(60)
"""
    process = start(code, checkout, path)
    assert process.stdout.readline() == "half way\n"
    # as long as it lives, its file is not touched
    StyleBank.load(path).save(path)
    assert len(leftovers(tmp_path)) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(leftovers(tmp_path)) == 1 and same(StyleBank.load(path), old)
    # other banks' writers leave it alone, however alike their names are
    small_bank().save(tmp_path / "brandXbank")
    small_bank().save(tmp_path / "other.bank")
    assert len(leftovers(tmp_path)) == 1
    small_bank(seed=50).save(path)
    assert leftovers(tmp_path) == []


def test_of_two_processes_that_save_one_bank_the_last_wins_whole(tmp_path, checkout):
    path = tmp_path / "brand.bank"
    banks = [small_bank(seed=seed, prompt=f"style {seed}") for seed in (0, 50)]
    banks[0].save(path)
    code = """
bank = small_bank(seed=int(sys.argv[2]), prompt=f"style {sys.argv[2]}")
print("ready", flush=True)
for _ in range(40):
    bank.save(sys.argv[1])
"""
    processes = [start(code, checkout, path, seed) for seed in (0, 50)]
    for process in processes:
        process.stdout.readline()
    seen = set()
    while any(process.poll() is None for process in processes):
        found = StyleBank.load(path)
        seen.add(found.info.prompt)
        assert same(found, banks[found.info.prompt == "style 50"])
    for process in processes:
        process.stdout.close()
    assert [process.returncode for process in processes] == [0, 0] and seen
    found = StyleBank.load(path)
    assert same(found, banks[found.info.prompt == "style 50"]) and os.listdir(tmp_path) == ["brand.bank"]


def test_threads_of_one_process_may_save_one_bank_too(tmp_path):
    path, bank = tmp_path / "brand.bank", small_bank()
    errors = []

    def save():
        try:
            for _ in range(10):
                bank.save(path)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and os.listdir(tmp_path) == ["brand.bank"] and same(StyleBank.load(path), bank)
