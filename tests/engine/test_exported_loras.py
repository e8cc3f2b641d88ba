"""LoRAs by request and long prompts through ONNX graphs: as in PyTorch, with nothing exported or opened again."""

import pytest
import torch

import stylefast as sf
from stylefast.errors import ExportError
from tests.support.fp64 import Twins, close, engine_of, measured
from tests.support.scene import SIZE, apart, small_picture
from tests.support.small_checkpoints import random_lora, write_folder, write_kohya_lora, write_peft_lora
from tests.support.small_graphs import nano_pipeline, translations  # noqa: F401

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from stylefast.export import pipeline  # noqa: E402
from stylefast.export.options import load_source  # noqa: E402
from stylefast.runtime.backends import choice  # noqa: E402
from tests.support.shared_exports import shared_export  # noqa: E402

LONG = "a cat, a dog and a house in neon style " * 10  # two chunks
TEXTS = ("text_encoder", "text_encoder_2", "text_projector")


@pytest.fixture(scope="module")
def pipe():
    return nano_pipeline()


@pytest.fixture(scope="module")
def files(tmp_path_factory, pipe):
    """LoRAs of rank 3 with text encoders, of rank 20, and of rank 4 with convolutions."""
    folder, config = tmp_path_factory.mktemp("loras"), pipe.unet.config
    return {
        "ink": write_kohya_lora(random_lora(pipe, 1), folder / "ink.safetensors", config),
        "pixel": write_peft_lora(random_lora(pipe, 2, rank=20, text=False), folder / "pixel.safetensors"),
        "wide": write_kohya_lora(
            random_lora(pipe, 3, rank=4, text=False, convolutions=True), folder / "wide.safetensors", config
        ),
    }


@pytest.fixture(scope="module")
def opened():
    """The files of the graphs that were opened."""
    found, open_session = [], choice.open_session
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "open_session", lambda *given: found.append(given[1].name) or open_session(*given))
        yield found


@pytest.fixture(scope="module")
def exported(pipe, files, opened, tmp_path_factory):
    model = write_folder(pipe, tmp_path_factory.mktemp("nano") / "model")
    options = {"lora_rank": 32, "lora_slots": 2, "max_text_chunks": 2}
    source = load_source(model, "float32")
    folder = shared_export(source, flavours=("banked",), segments=0, components=("unet", *TEXTS), **options)
    with sf.Engine.from_pretrained(model, dtype="float32", device="cpu", backend="onnxruntime", engines=folder) as made:
        register(made, files)
        yield made


@pytest.fixture(scope="module")
def eager(pipe, files):
    return register(sf.Engine.from_pipeline(pipe), files)


@pytest.fixture(scope="module")
def twins(eager):
    return Twins(eager)


def register(engine, files):
    for name, file in files.items():
        engine.loras.add(file, name)
    return engine


def one(prompt="a cat", **more) -> sf.Request:
    return sf.Request(prompt, **{"seed": 3, "steps": 2, "size": SIZE} | more)


MIXED = {
    "none": one(),
    "one": one(loras={"pixel": 0.8}),
    "two of unlike ranks": one(loras={"ink": 0.7, "pixel": -1.2}),
    "of convolutions": one(loras={"wide": 1.0}),
    "without its text": one(loras={"ink": (0.8, 0.0)}),
    "long": one(LONG),
    "long, under a LoRA": one(LONG, loras={"ink": 0.5}, negative_prompt="a dog"),
    "a long negative prompt": one(negative_prompt=LONG, loras={"wide": 0.4}),
}


def drawn(pipe, files, requests):
    engine = register(engine_of(pipe), files)
    return torch.stack(engine.generate(list(requests.values()), output="latents").latents).to(pipe.unet.dtype)


def test_mixed_rows_err_no_more_than_twice_as_much_as_pytorch(pipe, files, exported):
    before = exported.runner.calls
    found = exported.generate(list(MIXED.values()), output="latents").latents
    assert exported.runner.calls == before + 2, "one call a step"
    peer = measured(drawn, pipe, files, MIXED)
    for place, name in enumerate(MIXED):
        close(found[place], peer[place])
        if name != "none":
            apart([found[place]], [found[0]])


def test_a_bank_and_loras_meet_in_one_call(eager, twins, exported):
    loras = {"pixel": 0.6, "wide": 0.5}
    live = sf.StyleAligned(small_picture(1, (48, 40)), share_styles=False)
    bank = eager.bake(live, steps=2, size=SIZE, loras=loras)
    both = [
        [one(style=style, loras=loras), one(), one(LONG, loras={"ink": 1.0})] for style in (sf.StyleAligned(bank), live)
    ]
    before = exported.runner.calls
    found = exported.generate(both[0], output="latents").latents
    close(found, twins.drawn(*both))
    assert exported.runner.calls == before + 2


def test_other_loras_strengths_and_mixes_export_and_open_nothing(
    pipe, files, exported, eager, twins, opened, monkeypatch
):
    exported.generate([one(), one(loras={"ink": 1.0})], output="latents")
    monkeypatch.setattr(pipeline, "export_unet", None)
    before, graphs = list(opened), exported.runner.backend.loaded
    pool = exported.runner.conditions.loras
    units = [len(up) for up in pool.rows.up]
    for step in range(6):
        name = f"further {step}"
        lora = random_lora(pipe, 20 + step, rank=(4, 17, 32)[step % 3], convolutions=bool(step % 2))
        file = write_peft_lora(lora, files["ink"].parent / f"{step}.safetensors")
        for engine in (exported, eager):
            engine.loras.add(file, name)
        mix = [one(loras={name: 0.3 * step - 0.5}), one(LONG, loras={name: 1.0, "ink": 0.1 * step}), one()]
        close(exported.generate(mix[step % 2 :], output="latents").latents, twins.drawn(mix[step % 2 :]))
        exported.loras.remove(name)
    assert [len(up) for up in pool.rows.up] != units, "the pool has not grown"
    assert opened == before and exported.runner.backend.loaded == graphs
    assert opened.count("unet-banked.onnx") == 1


def test_a_prompt_is_encoded_by_graphs_unless_a_lora_changes_the_encoders(exported, monkeypatch):
    text, called = exported.text_encoder.runner, []
    in_pytorch = text._with_loras
    monkeypatch.setattr(text, "_with_loras", lambda *given: called.append(given[0]) or in_pytorch(*given))
    exported.generate(one("a dog in neon style", loras={"pixel": 0.5, "ink": (0.5, 0.0)}), output="latents")
    assert not called
    exported.generate(one("a dog in neon style", loras={"ink": 0.5}), output="latents")
    assert set(called) == {0, 1}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            one(loras={"ink": 1, "pixel": 1, "wide": 1}),
            r"uses 3 LoRAs .* take 2 per picture; .* --lora-slots 3, or load",
        ),
        (one(LONG * 2), r"in 4 chunks, but .* take only 154; shorten it to 150 .* --max-text-chunks 4, or load"),
    ],
    ids=["number", "length"],
)
def test_what_the_graphs_have_no_room_for_is_refused_with_the_option(exported, request_, message):
    with pytest.raises(ExportError, match=message):
        exported.submit(request_)
