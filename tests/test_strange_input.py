"""Whatever JSON and Python can hold is taken or refused by one of our errors, at every door and before any work."""

import json
import struct
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stylefast import infotext
from stylefast.commands.generate import read_requests
from stylefast.commands.style_options import parse_blocks
from stylefast.errors import StyleFastError
from stylefast.export.manifest import Manifest
from stylefast.export.options import Options
from stylefast.models import statements
from stylefast.models.checkpoint import TINY, load_image_encoder, resolve_device
from stylefast.models.config_check import check_model_index, check_unet, check_vae, checked_scheduler
from stylefast.models.hub import HubOptions
from stylefast.models.masks import load_mask
from stylefast.models.pictures import open_picture
from stylefast.models.tensor_files import open_tensors
from stylefast.models.tokenizers import given_folder
from stylefast.models.weight_files import read_header
from stylefast.options import EngineOptions, parse_bytes
from stylefast.record import from_record, to_record
from stylefast.runtime.plan.checks import check_deadline, check_output, prompts_of
from stylefast.runtime.plan.request import Request
from stylefast.sampling.few_step import named_schedule
from stylefast.sampling.guidance import GuidanceInterval, StyleContextGuidance, guidance_weights
from stylefast.sampling.schedule import make_schedule
from stylefast.styles.bank import StyleBank
from stylefast.styles.bank_info import BankInfo
from stylefast.styles.dream_styler import DreamStyler
from stylefast.styles.embeddings import StageEmbedding, load_embedding
from stylefast.styles.image_embeds import read_image_embeds
from stylefast.styles.instant_style import InstantStyle
from stylefast.styles.style_aligned import StyleAligned
from stylefast.styles.textual_inversion import InversionSettings
from stylefast.training.lora import LoraSettings
from stylefast.training.pictures import CaptionedPicture, read_folder
from tests.support.small_bank import small_bank, small_info
from tests.support.strange_values import deep, json_values, python_values

VECTORS = StageEmbedding("sks", torch.ones(2, 1, 4), torch.ones(2, 1, 4))
# what is made, and the least that it needs
MADE = {
    Request: {"prompt": "a fish"},
    StyleAligned: {},
    InstantStyle: {"image": "a.png"},
    DreamStyler: {"embedding": VECTORS},
    StyleContextGuidance: {},
    GuidanceInterval: {},
    StageEmbedding: {"name": "sks", "clip_l": torch.ones(1, 1, 4), "clip_g": torch.ones(1, 1, 4)},
    Options: {"kind": "onnx"},
    EngineOptions: {},
    HubOptions: {},
    LoraSettings: {},
    InversionSettings: {},
    CaptionedPicture: {"path": "a.png", "caption": "a fish"},
    BankInfo: {f.name: getattr(small_info(), f.name) for f in fields(BankInfo)},
}
FIELDS = [(kind, f.name) for kind in MADE for f in fields(kind) if f.init]
CALLS = {
    "the prompts of a call": prompts_of,
    "an output": check_output,
    "a deadline": check_deadline,
    "a device": resolve_device,
    "bytes": lambda value: parse_bytes("memory_limit", value),
    "a picture": open_picture,
    "a mask": load_mask,
    "a scheduler": lambda value: named_schedule(value, 4),
    "steps": lambda value: make_schedule("euler", value),
    "timesteps": lambda value: make_schedule("lcm", 2, timesteps=value),
    "eta": lambda value: make_schedule("ddim", 2, eta=value),
    "a guidance": guidance_weights,
    "a bank's path": StyleBank.load,
    "an image encoder": lambda value: load_image_encoder(value, dtype=torch.float32, device="cpu"),
    "a folder of tokenizers": given_folder,
    "a folder of pictures": read_folder,
    "a parameters text": infotext.read,
    "a scheduler's config": lambda value: checked_scheduler(value, "a model"),
    "a UNet's config": lambda value: check_unet(value, "a model"),
    "a VAE's config": lambda value: check_vae(value, "a model"),
    "a model's index": lambda value: check_model_index(value, "a model"),
    "a learned style": load_embedding,
    "a record": from_record,
    "requests": lambda value: from_record({"requests": value}),
    "a manifest": Manifest.from_json,
    "a bank's metadata": BankInfo.from_json,
}
few = settings(max_examples=25)


def refused_or_done(call, *arguments, **options):
    """The result; None where it was refused by one of our errors, in few words that can be printed."""
    try:
        return call(*arguments, **options)
    except StyleFastError as error:
        assert len(str(error)) < 2000
        str(error).encode()
        return None


@pytest.mark.parametrize("kind, name", FIELDS, ids=lambda one: one if isinstance(one, str) else one.__name__)
@few
@given(value=python_values)
def test_a_field_takes_a_value_or_refuses_it(kind, name, value):
    made = refused_or_done(kind, **MADE[kind] | {name: value})
    if kind is Request and made is not None:
        json.dumps(to_record([made]))  # what was taken can be recorded


@pytest.mark.parametrize("door", CALLS)
@few
@given(value=python_values)
def test_a_call_takes_a_value_or_refuses_it(door, value):
    refused_or_done(CALLS[door], value)


CONFIGS = {
    "a scheduler": lambda config: checked_scheduler({"_class_name": "EulerDiscreteScheduler"} | config, "a model"),
    "an EDM scheduler": lambda config: checked_scheduler({"_class_name": "EDMEulerScheduler"} | config, "a model"),
    "a UNet": lambda config: check_unet(config, "a model"),
    "a VAE": lambda config: check_vae(config, "a model"),
    "an index": lambda config: check_model_index(config, "a model"),
}
KEYS = st.one_of(
    st.sampled_from([*statements.SCHEDULER, *statements.EDM, *statements.UNET, *statements.VAE, *statements.PARTS]),
    st.sampled_from(["x" * 40_000, "\ud83d", "a\nb"]),
)


@pytest.mark.parametrize("part", CONFIGS)
@given(config=st.dictionaries(KEYS, json_values, max_size=2))
def test_a_foreign_config_is_taken_or_refused(part, config):
    refused_or_done(CONFIGS[part], config)


@given(
    text=st.lists(
        st.one_of(
            st.sampled_from([f"{name}: " for name in infotext._TAKEN]),
            st.sampled_from(
                ["<lora:", ":", ">", ", ", '"', "\n", "Negative prompt: ", "Steps: 2", "[", "{", "x" * 5000]
            ),
            st.text(max_size=6),
        ),
        max_size=12,
    )
)
def test_a_parameters_text_is_read_or_refused(text):
    refused_or_done(infotext.read, "".join(text))


STYLES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["StyleAligned", "instant_style", "DreamStyler", "x"])},
    optional={
        name: json_values
        for name in ("reference", "prompt", "image", "mask", "embedding", "stages", "guidance", "content", "window")
    },
)


@given(entry=st.fixed_dictionaries({"prompt": st.just("a fish")}, optional={"style": STYLES, "size": json_values}))
def test_a_request_of_a_record_is_read_or_refused(entry):
    refused_or_done(from_record, [entry], TINY)


@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60)))
def test_a_file_of_requests_is_read_or_refused(content, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "calls.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    refused_or_done(read_requests, file, TINY)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 200_000,
        '{"requests": ' * 200_000,
        '[{"prompt": "a", "prompt": "b"}]',
        '[{"prompt": "a", "seed": 1e999}]',
        f'[{{"prompt": "a", "seed": {"9" * 400}}}]',
        '[{"prompt": "\\ud83d"}]',
        '[{"prompt": "a", "steps": NaN}]',
        '[{"prompt": "a", "style": {"kind": "StyleAligned", "scale": 1e308}}]',
        '[{"prompt": "a", "style": {"kind": "StyleAligned", "layers": [1]}}]',
        '[{"prompt": "a", "style": {"kind": "StyleAligned", "share_group_norm": "false"}}]',
        '[{"prompt": "a", "style": {"kind": "InstantStyle", "image": "neon", "adapter": []}}]',
        '[{"prompt": "a", "style": {"kind": "DreamStyler", "embedding": "chalk", "stages": {"9999999999": "chalk"}}}]',
        '[{"prompt": "a", "size": "99999999999999999999x64"}]',
    ],
    ids=range(13),
)
def test_what_json_can_carry_is_refused_by_name(content, tmp_path):
    (tmp_path / "calls.json").write_text(content)
    with pytest.raises(StyleFastError):
        read_requests(tmp_path / "calls.json", TINY)


@given(text=st.text(max_size=40))
def test_blocks_on_the_command_line_are_read_or_refused(text):
    refused_or_done(parse_blocks, "{" + text)


# files


def header_file(path, header: bytes, size: int = 64):
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    return path


ENTRY = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
BROKEN = {
    "offsets that are strings": {"a": ENTRY | {"data_offsets": ["0", "64"]}},
    "offsets below zero": {"a": ENTRY | {"data_offsets": [-64, 0]}},
    "offsets that fall": {"a": ENTRY | {"data_offsets": [64, 0]}},
    "offsets that are true": {"a": ENTRY | {"data_offsets": [False, 64]}},
    "offsets beyond the file": {"a": ENTRY | {"data_offsets": [64, 128]}},
    "three offsets": {"a": ENTRY | {"data_offsets": [0, 32, 64]}},
    "tensors that overlap": {"a": ENTRY, "b": ENTRY},
    "a gap": {
        "a": ENTRY | {"shape": [2], "data_offsets": [0, 8]},
        "b": ENTRY | {"shape": [4], "data_offsets": [48, 64]},
    },
    "an unknown type": {"a": ENTRY | {"dtype": "F33"}},
    "a type in a list": {"a": ENTRY | {"dtype": ["F32"]}},
    "a shape of another size": {"a": ENTRY | {"shape": [4, 5]}},
    "a shape of halves": {"a": ENTRY | {"shape": [4.0, 4]}},
    "a shape below zero": {"a": ENTRY | {"shape": [-4, -4]}},
    "no type": {"a": {"shape": [4, 4], "data_offsets": [0, 64]}},
    "a list in place of a tensor": {"a": [1]},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": ENTRY},
    "metadata in a list": {"__metadata__": [1], "a": ENTRY},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_header_that_contradicts_itself_is_refused(kind, tmp_path):
    with pytest.raises(StyleFastError, match="header of a.safetensors is damaged|bytes where its header"):
        read_header(header_file(tmp_path / "a.safetensors", json.dumps(BROKEN[kind]).encode()))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"a": 1, "a": 2}',
        b"{" + b"9" * 5000 + b"}",
        b'{"a": 1e999}',
        b"{\xff}",
        b'{"__metadata__": {"x": "\\ud83d"}}',
    ],
    ids=range(7),
)
def test_a_header_of_hostile_json_is_refused_or_read(header, tmp_path):
    refused_or_done(read_header, header_file(tmp_path / "a.safetensors", header, 0))


@few
@given(value=json_values)
def test_a_header_is_read_or_refused(value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "a.safetensors"
    for header in ({"a": value}, {"a": ENTRY | {"shape": value}}, {"a": ENTRY | {"data_offsets": value}}):
        try:
            text = json.dumps(header).encode()
        except (ValueError, RecursionError):
            continue  # not even JSON holds it
        refused_or_done(read_header, header_file(path, text))


def test_a_sound_header_that_begins_like_a_pickle_is_read(tmp_path):
    # its length is 0x0280, and b"\x80\x02" is how pickles begin
    header = json.dumps({"a": ENTRY}).encode().ljust(0x0280)
    assert read_header(header_file(tmp_path / "a.safetensors", header)).shape("a") == (4, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": "2"},
        {"steps": 1e308},
        {"layers": [[0]]},
        {"branches": [["full"]]},
        {"size": {"a": 1}},
        {"format": [1]},
        {"prompt": "\ud83d"},
        {"seed": 2**64},
        {"guidance": "5"},
        {"references": True},
        {"dtype": ["float32"]},
    ],
    ids=str,
)
def test_a_banks_metadata_that_makes_no_sense_is_refused(change, tmp_path):
    info = small_bank().info.to_json()
    with pytest.raises(StyleFastError):
        BankInfo.from_json(info | change)


def test_a_file_of_deeply_nested_metadata_is_no_bank(tmp_path):
    from safetensors.torch import save_file

    from stylefast.styles.bank_file import CHECKSUM, METADATA

    for text in ("[" * 200_000, json.dumps({"bank": deep(60), "shapes": {}}), '{"bank": {}, "bank": {}}'):
        save_file({"a": torch.zeros(1)}, tmp_path / "a.bank", {METADATA: text, CHECKSUM: "0" * 64})
        with pytest.raises(StyleFastError, match="a.bank"):
            StyleBank.load(tmp_path / "a.bank")


@pytest.mark.parametrize("read", [read_header, open_tensors, load_embedding, read_image_embeds, StyleBank.load])
def test_a_file_that_may_not_be_read_is_refused_by_our_error(read, tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(b"secret")

    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    # who runs tests as root may read anything
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(StyleFastError, match="can't read .*Permission denied"):
        read(tmp_path / "x.safetensors")
