"""Weight files with anything wrong in them are read or refused by our error, and run no code."""

import json
import random
import sys

import pytest
from safetensors.torch import load_file

from stylefast.errors import StyleFastError
from stylefast.models.checkpoint import TINY
from stylefast.models.lora_file import read_lora
from stylefast.runtime.memory import resident_bytes

COUNT = 1000
PARTS = {"unet": "unet/diffusion_pytorch_model", "text_encoder": "text_encoder/model"}
PARTS |= {"text_encoder_2": "text_encoder_2/model"}
_unpickled: list[str] = []
_watching = False


@pytest.fixture(scope="module")
def weights():
    return {part: load_file(TINY / f"{file}.safetensors") for part, file in PARTS.items()}


def _audit(event, arguments):
    if _watching and event == "pickle.find_class":
        _unpickled.append(".".join(map(str, arguments)))


def mutated(draw, content):
    """Return the bytes of a file with one or several mistakes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw.randrange(1, 4)):
        entry, kind = header[draw.choice(names)], draw.randrange(8)
        if kind == 0:
            entry["data_offsets"] = [draw.choice((0, 2**40, -8, 3)), draw.choice((2**63, len(data) + 8, 0, 1))]
        elif kind == 1:
            entry["data_offsets"] = header[draw.choice(names)]["data_offsets"]
        elif kind == 2:
            entry["dtype"] = draw.choice(("F64", "U4", "BOOL", "", "F32 ", 7, None))
        elif kind == 3:
            entry["shape"] = draw.choice(([2**40, 2**40], [0], [], [-1], [1] * 500, "x", [2**31]))
        elif kind == 4:
            length = draw.choice((0, 1, 2**63, 2**64 - 1, len(content), len(content) - 8))
        elif kind == 5:
            data = data[: draw.randrange(len(data) + 1)]
        elif kind == 6:
            header[draw.choice(("__metadata__", "x" * 5000, "\0", names[0] + ".alpha"))] = draw.choice((1, {}, entry))
    text = json.dumps(header).encode()
    if draw.random() < 0.2:  # a name twice, or bytes that are wrong anywhere
        text = text[:-1] + b"," + json.dumps(names[0]).encode() + b":{}}"
    if draw.random() < 0.2:
        at = draw.randrange(len(text))
        text = text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :]
    if length == int.from_bytes(content[:8], "little"):
        length = len(text)
    return length.to_bytes(8, "little") + text + data


def test_a_thousand_damaged_files_are_read_or_refused(tmp_path, weights):
    global _watching
    content, draw, path = (
        (TINY / "loras" / "gold.safetensors").read_bytes(),
        random.Random(19),
        tmp_path / "a.safetensors",
    )
    sys.addaudithook(_audit)
    before, refused = resident_bytes(), 0
    _watching = True
    try:
        for _ in range(COUNT):
            path.write_bytes(mutated(draw, content))
            try:
                read_lora(path, weights)
            except StyleFastError as error:
                refused += 1
                assert len(str(error)) < 2000
        path.write_bytes(content)
        read_lora(path, weights)
    finally:
        _watching = False
    assert refused > COUNT // 2 and _unpickled == []
    assert resident_bytes() - before < 50 * 2**20


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pkl", ".pth"])
def test_a_pickle_by_any_name_runs_no_code(suffix, tmp_path, weights):
    (tmp_path / "ran").unlink(missing_ok=True)
    code = b"cos\nmkdir\n(V" + str(tmp_path / "ran").encode() + b"\ntR."
    path = tmp_path / f"a{suffix}"
    path.write_bytes(code)
    with pytest.raises(StyleFastError):
        read_lora(path, weights)
    assert not (tmp_path / "ran").exists()
