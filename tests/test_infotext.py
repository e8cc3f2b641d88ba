"""A1111's parameters text is read and written as A1111 means it; what is not taken is named, and bad text refused."""

import contextlib
import hashlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stylefast.errors import InvalidRequest, PromptError, StyleFastError
from stylefast.infotext import (
    MAX_TEXT,
    LoraTag,
    Parameters,
    exif_comment,
    read,
    sampler_name,
    take_tags,
    text_of,
    write,
)
from stylefast.models.prompt_syntax import parse
from stylefast.sampling import FEW_STEP_PRESETS
from stylefast.sampling.few_step import named_schedule
from stylefast.sampling.schedule import SCHEDULER_NAMES

# as A1111 1.9 writes it, with an extension's and a site's additions
FULL = """\
a fish, (red:1.2), \\(literal\\) <lora:water color:0.8><lyco:pen>
in the sea
Negative prompt: blurry, "bad"
low quality
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 4294967296, Size: 1024x768, \
Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Clip skip: 3, \
Lora hashes: "water color: 0123456789ab, pen: ba9876543210, gone: 00", \
Hires prompt: "a, \\"quoted\\"\\nword: x", Civitai resources: [{"type":"checkpoint","id":1, "note":"y, z: 3"}], \
Version: v1.9.4"""


def settings(**changes):
    """A text with these settings in place of the usual ones; None leaves one out."""
    usual = {"Steps": "20", "Sampler": "Euler", "CFG scale": "7", "Seed": "1", "Size": "64x64"}
    usual |= {name.replace("_", " "): value for name, value in changes.items()}
    return "a fish\n" + ", ".join(f"{name}: {value}" for name, value in usual.items() if value is not None)


def test_all_parts_of_a_text_are_read_and_the_rest_is_named():
    assert read(FULL) == Parameters(
        prompt="a fish, (red:1.2), \\(literal\\)\nin the sea",
        negative_prompt='blurry, "bad"\nlow quality',
        steps=20,
        scheduler="dpmpp_2m_karras",
        spacing="linspace",
        guidance=7.5,
        seed=4294967296,
        size=(1024, 768),
        loras=(LoraTag("water color", 0.8, "0123456789ab"), LoraTag("pen", 1.0, "ba9876543210")),
        not_taken={
            "Model hash": "31e35c80fc",
            "Model": "sd_xl_base_1.0",
            "Hires prompt": 'a, "quoted"\nword: x',
            "Civitai resources": '[{"type":"checkpoint","id":1, "note":"y, z: 3"}]',
            "Version": "v1.9.4",
            "Lora hashes of gone": "00",
            "Clip skip": "3",  # A1111 has skipped nothing
        },
    )
    assert read(FULL.replace("\n", "\r\n")) == read(FULL)


def test_a_text_may_be_a_prompt_alone_and_each_part_may_be_missing():
    assert read("a fish") == Parameters("a fish")
    assert read("a fish: red, big, in: the, sea") == Parameters("a fish: red, big, in: the, sea")
    assert read("a fish\nNegative prompt: blurry") == Parameters("a fish", "blurry")
    assert read("a fish\nSteps: 20") == Parameters("a fish", steps=20)
    assert read("a fish\nSampler: Euler, Seed: 3, Size: 64x64, Version: stylefast 1").seed == 3
    assert read("a fish\nNegative prompt:\nSteps: 20").negative_prompt == ""


def test_lines_behind_the_settings_and_settings_inside_the_prompt():
    found = read("Steps: 3\na fish\nSteps: 20, Seed: 1\nTemplate: a {fish|cat}\nmore")
    assert (found.prompt, found.steps) == ("Steps: 3\na fish", 20)
    assert found.not_taken == {"the text after the settings": "Template: a {fish|cat}\nmore"}


def test_values_with_commas_and_broken_quotes_stay_whole():
    found = read(settings(Styles="one, two,, three", Odd='"never closed', Json="[1, 2", Twice='"a, b" c', Last='"x"'))
    expected = {"Styles": "one, two, three", "Odd": '"never closed', "Json": "[1, 2", "Twice": '"a, b" c', "Last": "x"}
    assert found.not_taken == expected


@pytest.mark.parametrize(
    ("sampler", "kind", "scheduler", "spacing"),
    [
        ("Euler", None, "euler", "linspace"),
        ("Euler a", None, "euler_ancestral", "linspace"),
        ("euler A", "Normal", "euler_ancestral", "linspace"),
        ("Euler", "SGM Uniform", "euler", "trailing"),
        ("Euler", "Simple", "euler", "trailing"),
        ("Euler", "DDIM", "euler", "leading"),
        ("DPM++ 2M Karras", None, "dpmpp_2m_karras", "linspace"),
        ("DPM++ 2M Karras", "Karras", "dpmpp_2m_karras", "linspace"),
        ("DPM++ 2M", "Karras", "dpmpp_2m_karras", "linspace"),
        ("DPM++ 2M", "Automatic", "dpmpp_2m_karras", "linspace"),
        ("DPM++ 2M SDE", "Automatic", "dpmpp_2m_sde_exponential", "linspace"),
        ("DPM++ 3M SDE Exponential", "Automatic", "dpmpp_3m_sde_exponential", "linspace"),
        ("DPM++ 2M", "Uniform", "dpmpp_2m", "linspace"),
        ("DPM++ SDE", "karras", "dpmpp_sde_karras", None),
        ("UniPC", "Exponential", "unipc_exponential", "linspace"),
        ("DDIM", None, "ddim", None),
        ("DDIM", "Automatic", "ddim", None),
        ("LCM", None, "lcm", None),
        ("LCM", "Automatic", "lcm", None),
        ("TCD", None, "tcd", None),
        ("dpmpp_2m_sde_karras", None, "dpmpp_2m_sde_karras", "linspace"),
        ("sdxl_lightning", None, "sdxl_lightning", None),
    ],
)
def test_samplers_and_schedule_types_have_our_names(sampler, kind, scheduler, spacing):
    found = read(settings(Sampler=sampler, Schedule_type=kind))
    assert (found.scheduler, found.spacing) == (scheduler, spacing)
    named_schedule(scheduler, 4, spacing=spacing)  # what is read can be sampled


def test_a_schedule_type_that_a_sampler_does_not_use_is_named():
    assert read(settings(Sampler="LCM", Schedule_type="SGM Uniform")).not_taken == {"Schedule type": "SGM Uniform"}


def test_clip_skip_counts_from_the_last_layer_there_and_from_sdxls_own_here():
    ours = [read(settings(Clip_skip=written, Version="stylefast 1.0")) for written in (None, "1", "2", "3")]
    assert [found.clip_skip for found in ours] == [None, 0, 0, 1]
    # in A1111 it has no effect on SDXL
    odd = ("3", "0", "-2", "two")  # other programs count otherwise
    theirs = [read(settings(Clip_skip=written)) for written in (None, "1", "2", *odd)]
    assert [found.clip_skip for found in theirs] == [None, 0, 0, *[None] * 4]
    assert [found.not_taken for found in theirs] == [{}, {}, {}, *({"Clip skip": written} for written in odd)]


@pytest.mark.parametrize(
    ("prompt", "loras"),
    [
        ("a <lora:pen> fish", (LoraTag("pen"),)),
        ("a <lora:pen:0.5> fish", (LoraTag("pen", 0.5),)),
        ("a <lora:pen:-0.5:-0.5> fish", (LoraTag("pen", -0.5),)),
        ("a <LoRA: pen :te=1:unet=1> fish", (LoraTag("pen"),)),
        ("a <lora:pen:0.5:0.7> fish", (LoraTag("pen", 0.7, text_weight=0.5),)),
        # as A1111 has it: the text encoders' weight is 1, the UNet's that of the text encoders
        ("a <lora:pen:unet=0.5> fish", (LoraTag("pen", 0.5, text_weight=1.0),)),
        ("a <lora:pen:te=0.5> fish", (LoraTag("pen", 0.5),)),
        ("a <lora:pen.v2-x (1):.5> fish", (LoraTag("pen.v2-x (1)", 0.5),)),
    ],
)
def test_tags_of_loras_leave_the_prompt(prompt, loras):
    found = read(prompt)
    assert (found.prompt, found.loras) == ("a fish", loras)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (settings(Sampler="Heun"), "scheduler"),
        (settings(Schedule_type="Beta"), "scheduler"),
        (settings(Sampler=None, Schedule_type="Karras"), "scheduler"),
        (settings(Sampler="Euler a", Schedule_type="Karras"), "scheduler"),
        (settings(Steps="5000"), "steps"),
        (settings(CFG_scale="nan"), "guidance"),
        (settings(Seed="-5"), "seed"),
        (settings(Size="1024"), "size"),
        (settings(Clip_skip="0", Version="stylefast 1.0"), "clip_skip"),
        ("a <lora:pen:1> <lora:pen:1>\n" + settings().partition("\n")[2], "prompt"),
        ("\n" + settings().partition("\n")[2], "prompt"),
        ("a\nNegative prompt: <lora:pen:nan>\n" + settings().partition("\n")[2], "negative_prompt"),
    ],
)
def test_what_is_not_wanted_is_not_checked_either(text, name):
    with pytest.raises(InvalidRequest):
        read(text)
    found, usual = read(text, {name}), read(settings())
    assert getattr(found, name) in (None, "")
    kept = {"steps", "guidance", "seed", "size", "scheduler"} - {name}
    assert {getattr(found, one) == getattr(usual, one) for one in kept} == {True} and found.loras == ()


def test_tags_without_effect_are_named():
    found = read("a fish <hypernet:old:0.5>\nNegative prompt: bad <lora:pen:0.5>")
    assert (found.prompt, found.negative_prompt, found.loras) == ("a fish", "bad", ())
    assert found.not_taken == {"<hypernet:old>": "0.5", "<lora:pen> in the negative prompt": "0.5"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (settings(Steps="0"), "Steps is 0; it must be a whole number from 1 to 1000"),
        (settings(Steps="9" * 5000), "Steps is '999.*from 1 to 1000"),
        (settings(Steps="2.5"), "Steps is '2.5'"),
        (settings(CFG_scale="nan"), "CFG scale is 'nan'; it must be a number"),
        (settings(CFG_scale="1e999"), "CFG scale is '1e999'; it must be a number"),
        (settings(CFG_scale="1e9"), "CFG scale is 1000000000.0"),
        (settings(CFG_scale="-1"), "CFG scale is -1.0"),
        (settings(Seed="-5"), "Seed is '-5'"),
        (settings(Seed=str(2**64)), "Seed is 18446744073709551616"),
        (settings(Size="1024"), "Size is '1024'; it must be WIDTHxHEIGHT"),
        (settings(Clip_skip="0", Version="stylefast 1.0"), "Clip skip is 0"),
        (settings(Sampler="DPM++ 2M SDE Heun"), r"the supported ones are DDIM, .*; did you mean 'DPM\+\+ 2M SDE'"),
        (settings(Sampler="Restart"), "Sampler is 'Restart'.*--scheduler euler"),
        (settings(Sampler="x" * 5000), "Sampler is 'xxx"),
        (
            settings(Schedule_type="Align Your Steps"),
            "Schedule type is 'Align Your Steps'; the supported ones.*--scheduler",
        ),
        (settings(Schedule_type="Karas"), "did you mean 'Karras'"),
        (settings(Sampler="Euler a", Schedule_type="Karras"), "Euler a has no Karras form"),
        (settings(Sampler="DPM++ 2M Karras", Schedule_type="Exponential"), "'Exponential' contradicts the sampler"),
        (settings(Sampler=None, Schedule_type="Karras"), "without a sampler"),
        (settings() + ", Seed: 2", "says Seed twice, '1' and '2'"),
        ("a <lora:pen:te=0.5> <lora:pen:1>", "the LoRA 'pen' twice.*a prompt of your own"),
        ("a <lora::1>", "without a name"),
        ("a <lora:pen:1:1:1>", "sets more than the LoRA's weight"),
        (
            "a <lora:pen:1:lbw=XL>",
            "sets more than the LoRA's weight .'lbw=XL'.*<lora:pen:1>', or give a prompt of your own",
        ),
        ("a <lora:pen:1e999>", "the weight in '<lora:pen:1e999>' is '1e999'"),
        ("a <lora:pen:nan>", "it must be a number"),
        ("a <lora:pen:1e5>", "it must be a number from -10000 to 10000"),
        ("a" + "".join(f"<lora:l{i}:1>" for i in range(101)), "more than 100 LoRAs"),
        ("a\nSteps: 2, " + ", ".join(f"k{i}: 1" for i in range(2000)), "more than 1000 settings"),
        ("a" * (MAX_TEXT + 1), "at most 200000 are allowed"),
        (7, "it must be a string"),
        ("a \ud83d", "lone surrogate"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_are_not_done_are_refused_by_name(text, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        read(text)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "text", ["", " \n\n", "Negative prompt: bad", "Steps: 20, Seed: 1, Size: 64x64", "a" * 100_000]
)
def test_texts_without_a_prompt_or_with_too_long_a_one_are_refused(text):
    with pytest.raises(PromptError):
        read(text)


@pytest.mark.parametrize(
    "piece", [",a", ', a:"', ', a:"\\"', ", a:[", ', a:["', ", a:{", " a", "a: ", "<lora:", "(", "\n", "é", '"', "\\"]
)
def test_long_hostile_text_takes_no_longer_than_its_length(piece):
    text = "a fish\nSteps: 20, x: " + piece * (100_000 // len(piece))
    start = time.process_time()
    with contextlib.suppress(InvalidRequest):
        read(text)
    assert time.process_time() - start < 2  # quadratic work would take minutes


PIECES = st.sampled_from(
    ["a fish", "\n", "\r\n", ", ", ": ", "Negative prompt: ", "Steps: 20", "Seed: ", "Sampler: Euler", "Size: 8x8", '"']
    + ["<lora:", "x:1>", "[", "{", "\\", "1e999", "nan", "\0", "é", "Lora hashes: ", "Schedule type: Karras", "-1"]
)


@given(text=st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=20).map("".join)))
def test_any_text_is_read_or_refused_by_our_errors(text):
    try:
        found = read(text)
    except StyleFastError as error:
        assert len(str(error)) < 2000
    else:
        assert found.prompt.strip() and all(isinstance(value, str) for value in found.not_taken.values())


# writing


def metadata(loras=None, **request):
    usual = {"prompt": "a fish", "negative_prompt": "", "steps": 4, "guidance": 5.0, "seed": 1, "scheduler": "euler"}
    usual |= {"spacing": None, "clip_skip": 0, **request}
    facts = {"fingerprint": "0123456789abcdef", "model": "tiny, small", "stylefast": "1.0", "size": [64, 32]}
    return {"call": {"requests": [usual]}, "index": 0, "loras": loras or {}, **facts}


def test_a_text_is_written_as_a1111_does():
    written = write(
        metadata(
            {"pen": 0.8, "a:b": 1.0},
            prompt="a (fish) [x] \\",
            negative_prompt="bad",
            scheduler="dpmpp_2m_karras",
            spacing="trailing",
            clip_skip=1,
        )
    )
    assert written.split("\n") == [
        "a \\(fish\\) \\[x\\] \\\\ <lora:pen:0.8>",
        "Negative prompt: bad",
        "Steps: 4, Sampler: DPM++ 2M Karras, CFG scale: 5.0, Seed: 1, Size: 64x32, "
        'Model hash: 0123456789, Model: "tiny, small", Clip skip: 3, Loras: "a:b: 1", Version: stylefast 1.0',
    ]
    assert write(metadata(prompt="a (fish:1.2)", prompt_syntax="a1111")).startswith("a (fish:1.2)\n")


def test_control_pictures_are_written_in_the_words_of_a1111s_extension():
    control = [
        {"image": {"path": "a.png"}, "network": "canny", "weight": 0.6, "window": [0.0, 0.8]},
        {"image": {"path": "b.png"}, "network": "union, large", "weight": 1, "guess_mode": True, "mode": "depth"},
    ]
    last = write(metadata(control=control)).split("\n")[-1]
    assert (
        'ControlNet 0: "Module: none, Model: canny, Weight: 0.6, Resize Mode: Crop and Resize, Guidance Start: 0, '
        'Guidance End: 0.8, Control Mode: Balanced"'
    ) in last
    assert "Control Mode: ControlNet is more important, Control Type: depth" in last
    assert (
        read(write(metadata(control=control))).not_taken["ControlNet 1"].startswith("Module: none, Model: union, large")
    )


def test_loras_are_written_with_the_hashes_of_their_tensors_as_a1111_does(tmp_path):
    header, tensors = b'{"__metadata__":{"a":"b"}}', b"tensors" * 300_000
    content = len(header).to_bytes(8, "little") + header + tensors
    short = hashlib.sha256(tensors).hexdigest()[:12]
    files, names = {}, ("pen", "in, k", "a:b", "changed", "gone", "folder")
    for name in names:
        path = tmp_path / f"{len(files)}.safetensors"
        path.write_bytes(content)
        files[name] = {"path": str(path), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "3.safetensors").write_bytes(content + b"x")
    (tmp_path / "4.safetensors").unlink()
    files["folder"]["path"] = str(tmp_path)
    used = {**metadata(), "lora_files": files}
    used["call"]["requests"][0]["loras"] = dict.fromkeys(names, 0.5)
    written = write(used)
    assert f'Lora hashes: "pen: {short}", Loras: "a:b: 0.5", Version' in written
    assert read(written).loras[0] == LoraTag("pen", 0.5, short)
    assert [tag.hash for tag in read(written).loras[1:]] == [""] * 4
    merged = {**metadata({"pen": 0.5}), "lora_files": files}
    assert "Lora hashes" not in write(merged)


@pytest.mark.parametrize(
    "text",
    [
        "salt AND pepper and BREAK <lora:gold:1> (x) <Hypernet : z:1>",
        "a fish,",
        "[1] fish",
        "{} fish",
        "a\rfish: a, b",
    ],
)
def test_plain_text_stays_the_same_text_in_a1111s_syntax(text):
    found = read(write(metadata({"pen": 0.5}, prompt=text.replace("\r", " "), prompt_2=text)))
    for written, meant in ((found.prompt, text.replace("\r", " ")), (found.prompt_2, text)):
        assert "".join(run.text for section in parse(written, "a1111") for run in section) == meant
    assert [tag.name for tag in found.loras] == ["pen"] and "\\n" not in found.prompt


def test_compels_weights_and_both_prompts_are_written_in_a1111s_syntax():
    texts = {"prompt": "a (red cat)1.3 on house++ \\(x\\)", "negative_prompt": "blue-", "prompt_2": "a, (dog)0.5"}
    written = write(metadata(prompt_syntax="compel", negative_prompt_2="", **texts))
    assert written.startswith("a (red cat:1.3) on (house:1.21) \\(x\\)\nNegative prompt: (blue:0.9)\n")
    assert read(write(metadata(prompt="a (x)0.00001", prompt_syntax="compel"))).prompt == "a (x:0.00001)"
    assert 'Prompt 2: "a, (dog:0.5)", Negative prompt 2: ' in written
    found = read(written)
    assert (
        found.prompt_2 == "a, (dog:0.5)"
        and found.negative_prompt_2 == ""
        and not {*found.not_taken} - {"Version", "Model", "Model hash"}
    )


@given(
    prompt=st.text(
        st.characters(codec="utf-8", exclude_characters="\n\r<()[]\\", categories=["L", "P", "Zs"]), min_size=1
    ),
    steps=st.integers(1, 1000),
    guidance=st.floats(0, 100),
    seed=st.integers(0, 2**64 - 1),
    scheduler=st.sampled_from(SCHEDULER_NAMES),
    clip_skip=st.integers(0, 9),
)
def test_what_is_written_is_read(prompt, steps, guidance, seed, scheduler, clip_skip):
    prompt = "x " + " ".join(prompt.split())
    prompt = prompt.strip()
    given = {"steps": steps, "guidance": guidance, "seed": seed, "scheduler": scheduler}
    found = read(write(metadata({"pen": 0.5}, prompt=prompt, negative_prompt="bad", clip_skip=clip_skip, **given)))
    assert found.prompt.split() == prompt.strip(" ,\t").split() and found.negative_prompt == "bad"
    assert {name: getattr(found, name) for name in given} == given
    assert (found.size, found.clip_skip or 0, found.loras) == ((64, 32), clip_skip, (LoraTag("pen", 0.5),))
    assert set(found.not_taken) == {"Model hash", "Model", "Version"}


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", None])
def test_a_spacing_that_is_written_is_read(spacing):
    for scheduler in ("euler", "ddim", "unipc"):
        assert read(write(metadata(scheduler=scheduler, spacing=spacing))).spacing == spacing


def test_few_step_presets_are_written_as_their_samplers():
    found = read(write(metadata(scheduler="sdxl_lightning")))
    assert (found.scheduler, found.spacing) == ("euler", "trailing")
    assert {sampler_name(name) for name in FEW_STEP_PRESETS} == {"Euler a", "Euler", "LCM", "DDIM", "TCD"}


# inside pictures

TEXT = "a fish 魚 ✨\nNegative prompt: bad\nSteps: 4, Sampler: Euler, Seed: 1"


def saved(tmp_path, name, comment=None, **options):
    picture = Image.new("RGB", (16, 16))
    if comment is not None:
        exif = picture.getexif()
        exif.get_ifd(0x8769)[0x9286] = comment
        options["exif"] = exif
    picture.save(tmp_path / name, **options)
    return Image.open(tmp_path / name)


@pytest.mark.parametrize("kind", ["tEXt", "iTXt", "zTXt"])
def test_pngs_carry_it_as_text(kind, tmp_path):
    info, text = PngInfo(), TEXT if kind == "iTXt" else TEXT.replace("魚 ✨", "é")
    add = {"tEXt": info.add_text, "iTXt": info.add_itxt, "zTXt": info.add_text}[kind]
    add("parameters", text, **({"zip": True} if kind == "zTXt" else {}))
    assert text_of(saved(tmp_path, "x.png", pnginfo=info)) == text


@pytest.mark.parametrize("name", ["x.jpg", "x.webp"])
@pytest.mark.parametrize(
    "comment",
    [
        exif_comment(TEXT),
        b"UNICODE\0" + TEXT.encode("utf-16-le"),
        b"UNICODE\0" + TEXT.encode("utf-16"),
        bytes(8) + TEXT.encode(),
    ],
)
def test_other_formats_carry_it_as_a_comment_in_every_byte_order(name, comment, tmp_path):
    assert text_of(saved(tmp_path, name, comment)) == TEXT


def test_comments_in_ascii_and_pictures_without_any(tmp_path):
    assert text_of(saved(tmp_path, "x.jpg", b"ASCII\0\0\0a fish")) == "a fish"
    assert text_of(saved(tmp_path, "x.jpg", b"a fish")) == "a fish"
    assert text_of(saved(tmp_path, "x.jpg", b"JIS\0\0\0\0\0\xff\xfe\xfd")) is None
    assert text_of(saved(tmp_path, "y.jpg")) is None and text_of(saved(tmp_path, "y.png")) is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_comments_are_read_or_refused(tmp_path):
    saved(tmp_path, "x.jpg", exif_comment(TEXT))
    whole = (tmp_path / "x.jpg").read_bytes()
    start = whole.index(b"Exif\0\0")
    for place in range(start, start + 120):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "y.jpg").write_bytes(damaged)
        try:
            found = text_of(Image.open(tmp_path / "y.jpg"))
        except InvalidRequest:
            continue
        assert found is None or isinstance(found, str)


def test_settings_can_be_recorded():
    json.dumps(read(FULL).not_taken)


@pytest.mark.parametrize("text", [" " * 32_000, " " * 31_000 + "<lora:", "\t" * 31_000 + "<lora:x:1"])
def test_looking_for_tags_takes_no_longer_than_reading(text):
    began = time.process_time()
    take_tags(text)
    assert time.process_time() - began < 0.1


def test_a_tag_takes_the_blanks_before_it_along():
    assert take_tags("a fish  <lora:gold:0.5>, blue\t<LORA:pixel:1> sky<lora:ink:1>")[0] == "a fish, blue sky"


def test_variations_are_read_and_a_seed_without_a_strength_is_listed():
    both = read("a fish\nSteps: 20, Seed: 1, Variation seed: 5, Variation seed strength: 0.2")
    assert (both.variation_seed, both.variation_strength, both.not_taken) == (5, 0.2, {})
    one = read("a fish\nSteps: 20, Seed: 1, Variation seed: 5")
    assert one.variation_seed is None and one.not_taken == {"Variation seed": "5"}
