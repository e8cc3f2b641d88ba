"""Requests with LoRAs of their own share UNet calls, and each gives what diffusers gives with those LoRAs loaded."""

import random
import threading
from dataclasses import replace

import pytest
import torch

import stylefast as sf
from stylefast.errors import AdapterError, ExportError, InvalidRequest, NumericsError, OutOfMemory, StyleError
from stylefast.models.lora_factors import NotLowRank
from stylefast.record import from_record, to_record
from tests.support.fp64 import Twins, close, measured
from tests.support.scene import SIZE, apart, guided, learned, sharp_pipeline, small_picture
from tests.support.small_checkpoints import random_lora, write_kohya_lora, write_peft_lora
from tests.support.watch import WAIT

STEPS = 2
USED = {
    "plain": {},
    "ink": {"ink": 0.8},
    "ink and pixel": {"ink": 0.5, "pixel": -1.2},
    "wide": {"wide": 1.0},
    "no text": {"ink": (0.8, 0.0)},
}


def louder(lora, factor=3.0):
    return {place: (down * factor, up, alpha) for place, (down, up, alpha) in lora.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory, pipe):
    folder, config = tmp_path_factory.mktemp("loras"), pipe.unet.config
    return {
        "ink": write_kohya_lora(louder(random_lora(pipe, 1)), folder / "ink.safetensors", config),
        "pixel": write_peft_lora(louder(random_lora(pipe, 2, rank=20, text=False)), folder / "pixel.safetensors"),
        "wide": write_kohya_lora(
            random_lora(pipe, 3, rank=4, text=False, convolutions=True), folder / "wide.safetensors", config
        ),
    }


@pytest.fixture
def registered(engine, files):
    for name, file in files.items():
        engine.loras.add(file, name)
    yield engine
    for name in list(engine.loras):
        engine.loras.remove(name)


def requests(**more):
    return {
        name: sf.Request("a cat", seed=3, steps=STEPS, size=SIZE, loras=loras, **more) for name, loras in USED.items()
    }


def latents(engine, given):
    return dict(zip(given, engine.generate(list(given.values()), output="latents").latents, strict=True))


@pytest.fixture(scope="module")
def with_loras(files):
    """diffusers' pipeline under some of the LoRAs, as a function of their names and strengths."""
    pipe = sharp_pipeline()
    for name, file in files.items():
        pipe.load_lora_weights(str(file), adapter_name=name)

    def with_loras(strengths):
        if strengths:
            pipe.enable_lora()
            pipe.set_adapters(list(strengths), list(strengths.values()))
        else:
            pipe.disable_lora()
        # `measured` knows by its weights that a model has changed
        for module in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
            with torch.no_grad():
                next(module.parameters()).mul_(1)
        return pipe

    return with_loras


@pytest.mark.parametrize("name", [name for name in USED if name != "no text"])
def test_every_row_gives_what_diffusers_gives_with_its_loras(registered, with_loras, name):
    found = latents(registered, requests())[name]
    close(found[None], measured(guided, with_loras(USED[name]), ["a cat"], [3]))


def test_strengths_of_the_text_encoders_are_their_own(registered, with_loras):
    pipe = with_loras({"ink": {"unet": 0.8, "text_encoder": 0.0, "text_encoder_2": 0.0}})
    close(latents(registered, requests())["no text"][None], measured(guided, pipe, ["a cat"], [3]))


def test_all_differ_and_share_one_call_a_step(registered):
    before = registered.runner.calls
    found = latents(registered, requests())
    assert registered.runner.calls == before + STEPS
    for name in ("ink", "ink and pixel", "wide", "no text"):
        apart([found[name]], [found["plain"]])
    apart([found["no text"]], [found["ink"]])


def test_neighbours_change_no_bit_of_a_row_without_loras(registered):
    plain = requests()["plain"]
    with_loras = registered.generate([plain, requests()["ink"], requests()["wide"]], output="latents")
    without = registered.generate([plain, plain, plain], output="latents")
    assert torch.equal(with_loras.latents[0], without.latents[0])


def test_strength_zero_is_no_lora_at_all(registered, monkeypatch):
    shapes = []
    original = type(registered.runner)._shape
    monkeypatch.setattr(type(registered.runner), "_shape", lambda *a: shapes.append(original(*a)) or shapes[-1])
    zero = replace(requests()["plain"], loras={"ink": 0.0, "pixel": (0, 0)})
    found = registered.generate(zero, output="latents").latents[0]
    assert {shape.loras for shape in shapes} == {0} and registered.runner.conditions.loras.held == 0
    assert torch.equal(found, registered.generate(requests()["plain"], output="latents").latents[0])


def test_a_merged_lora_gives_what_a_row_gives(registered, files):
    row = latents(registered, requests())["ink"]
    name = registered.load_lora(files["ink"], 0.8)
    try:
        merged = registered.generate(requests()["plain"], output="latents").latents[0]
    finally:
        registered.merged_loras.remove(name)
    # a figure that docs/testing.md promises; above, rows are held to fp64, and merging is in tests/models/test_lora.py
    assert (row - merged).abs().max() <= 1e-5 * merged.abs().max()


def test_styles_and_loras_meet_in_one_call(registered, drawn):
    aligned = sf.StyleAligned(small_picture(4, SIZE))
    bank = registered.bake([aligned], steps=STEPS, size=SIZE, loras={"ink": 0.8})
    given = {
        "plain": sf.Request("a cat", steps=STEPS, size=SIZE),
        "bank": sf.Request("a dog", steps=STEPS, size=SIZE, style=sf.StyleAligned(bank), loras={"ink": 0.8}),
        "picture": sf.Request(
            "a fish", steps=STEPS, size=SIZE, style=sf.InstantStyle(small_picture(5)), loras={"wide": 0.5, "pixel": 0.7}
        ),
        "learned": sf.Request("a house", steps=STEPS, size=SIZE, style=sf.DreamStyler(learned())),
    }
    before = registered.runner.calls
    together = latents(registered, given)
    assert registered.runner.calls == before + STEPS
    live = replace(given["bank"], style=aligned)
    for name, one in given.items():
        close([together[name]], drawn([one], in_fp64=[live] if name == "bank" else None))
    close([together["bank"]], drawn([live]))


@pytest.mark.parametrize("loras", [{}, {"ink": 0.7}, {"ink": 0.8, "wide": 0.1}, {"pixel": 0.8}])
def test_a_bank_fits_only_requests_under_its_loras(registered, loras):
    style = sf.StyleAligned(small_picture(4, SIZE))
    bank = registered.bake(style, steps=STEPS, size=SIZE, loras={"ink": 0.8})
    under = ", ".join(rf"{name} at {strength}, sha256 \w{{8}}" for name, strength in sorted(loras.items()))
    under = f"the LoRAs {under}" if under else "no LoRA"
    expected = rf"baked under the LoRAs ink at 0\.8, sha256 \w{{8}}, but the request is under {under};"
    with pytest.raises(StyleError, match=expected):
        registered.submit(sf.Request("a dog", steps=STEPS, size=SIZE, style=sf.StyleAligned(bank), loras=loras))


@pytest.mark.parametrize("dtype", ["auto", "fp16"])
def test_hidden_states_of_a_bank_are_projected_under_its_readers_loras(registered, drawn, dtype):
    style, loras = sf.StyleAligned(prompt="oil"), {"ink": 0.8, "pixel": -0.5}
    banks = [
        registered.bake(style, steps=STEPS, size=SIZE, loras=used, store="hidden", dtype=dtype) for used in (loras, {})
    ]
    given = [
        sf.Request("a dog", steps=STEPS, size=SIZE, style=sf.StyleAligned(bank), loras=used)
        for bank, used in zip(banks, (loras, {}), strict=True)
    ]
    found = registered.generate([*given, requests()["wide"]], output="latents").latents
    live = drawn([replace(one, style=style) for one in given])
    if dtype == "auto":
        close(found[:2], live)
    else:
        assert all((a - b).abs().max() <= 1e-2 * b.abs().max() for a, b in zip(found, live.value))
    apart(found[:1], drawn([replace(given[1], style=style)]).value)


def test_references_of_one_style_differ_by_lora(registered, drawn):
    style = sf.StyleAligned(prompt="oil")
    given = {name: replace(one, style=style) for name, one in requests().items() if name in ("plain", "ink", "wide")}
    together = latents(registered, given)
    for name, one in given.items():
        close([together[name]], drawn([one]))


def test_a_lora_removed_or_replaced_stays_for_who_has_it(registered, files, drawn):
    alone = drawn([requests()["ink"]])
    job = registered.submit(requests()["ink"], output="latents")
    registered.loras.remove("ink")
    registered.loras.add(files["wide"], "ink")
    later = registered.submit(requests()["ink"], output="latents")
    close(job.result().latents, alone)
    apart(later.result().latents, alone.value)
    with pytest.raises(InvalidRequest, match=r"no LoRA named 'pixle' is registered; .*did you mean 'pixel'"):
        registered.submit(sf.Request("a cat", loras={"pixle": 1.0}))


def test_a_job_that_is_planned_again_keeps_its_loras(registered, files, drawn):
    alone = drawn([requests()["ink"]])
    with registered.scheduler.paused():
        job = registered.submit(requests()["ink"], output="latents")
        job.model = "another"  # as if weights had changed while it waited
        registered.loras.remove("ink")
        registered.loras.add(files["wide"], "ink")
    close(job.result(WAIT).latents, alone)


def test_pictures_that_overflow_name_their_loras_and_strengths(registered, monkeypatch):
    forward = registered.unet.forward

    def overflowing(latents, embedding, text_kv, image_kv, rows, *rest, **named):
        output = forward(latents, embedding, text_kv, image_kv, rows, *rest, **named)
        huge = (rows.lora_scale.abs() > 1e3).any(1) if rows.lora_scale.shape[1] else torch.zeros(len(output))
        return torch.where(huge.bool()[:, None, None, None], torch.nan, output)

    monkeypatch.setattr(registered.unet, "forward", overflowing)
    given = [
        requests()["plain"],
        replace(requests()["plain"], loras={"ink": (1e4, 0.5), "wide": 0.5}),
        replace(requests()["plain"], loras={"pixel": -1e4}),
    ]
    with pytest.raises(NumericsError, match=r"picture\(s\) 1, 2 .*Try ") as caught:
        registered.generate(given)
    assert sorted(caught.value.loras) == ["ink at 10000 (text encoders: 0.5)", "pixel at -10000", "wide at 0.5"]
    assert all(f"{name} at" in str(caught.value) for name in ("ink", "pixel", "wide"))
    with pytest.raises(NumericsError, match=r"weaker LoRAs \(pixel at -10000\)"):
        registered.bake(sf.StyleAligned(prompt="oil"), steps=1, size=SIZE, loras={"pixel": -1e4})


@pytest.fixture
def frugal(pipe, files):
    """An engine with room for one LoRA on the device, and for one in host memory."""
    sizes = {}
    with sf.Engine.from_pipeline(pipe) as engine:
        for name, file in files.items():
            engine.loras.add(file, name)
            sizes[name] = engine.loras[name].nbytes
    room = int(1.4 * max(sizes.values()))
    with sf.Engine.from_pipeline(pipe, lora_memory=room, lora_host_memory=max(sizes.values())) as engine:
        for name, file in files.items():
            engine.loras.add(file, name)
        yield engine


def test_loras_take_turns_where_not_all_fit(frugal, registered, drawn):
    names = ("ink", "pixel", "wide")
    given = {name: sf.Request("a cat", seed=3, steps=STEPS, size=SIZE, loras={name: 0.8}) for name in names}
    jobs = {name: frugal.submit(one, output="latents") for name, one in given.items()}
    for name, job in jobs.items():
        close(job.result(WAIT).latents, drawn([given[name]]))
    pool = frugal.runner.conditions.loras
    assert pool.held == 0 and len(pool.resident) == 1
    assert sum(frugal.loras[name].on_host for name in names) == 1
    with pytest.raises(OutOfMemory, match="lora_memory"):
        frugal.generate(sf.Request("a cat", steps=1, size=SIZE, loras=dict.fromkeys(names, 0.5)))
    assert pool.held == 0


def test_factors_reach_the_device_before_their_request_joins(pipe, files, monkeypatch):
    """Between two steps they are only moved there."""
    engine, brought, put = sf.Engine.from_pipeline(pipe), [], []
    pool = engine.runner.conditions.loras
    copies, enter = pool.copies, pool._put

    def copied(factors):
        brought.append(threading.current_thread().name)
        return tuple(tuple(x.clone() for x in part) for part in copies(factors))

    monkeypatch.setattr(pool, "copies", copied)
    monkeypatch.setattr(pool, "_put", lambda place, lora, factors: (put.append(factors), enter(place, lora, factors)))
    for name in ("ink", "pixel"):
        engine.loras.add(files[name], name)
    used = [sf.Request("a cat", seed=3, steps=1, size=SIZE, loras={name: 1.0}) for name in ("ink", "pixel", "ink")]
    for request in used:
        engine.submit(request, output="latents").result(180)
    assert brought == ["stylefast-helper"] * 2, "once for each LoRA"
    for factors, name in zip(put, ("ink", "pixel"), strict=True):
        assert factors.down[0] is not engine.loras.factors(engine.loras[name]).down[0]


def test_a_file_that_changed_is_noticed_when_it_is_read_again(frugal, files, tmp_path):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(files["ink"].read_bytes())
    frugal.loras.add(moved, "moved")
    frugal.loras.add(files["wide"], "other")  # takes its place in host memory
    assert not frugal.loras["moved"].on_host
    moved.write_bytes(files["pixel"].read_bytes())
    with pytest.raises(AdapterError, match="has changed since it was registered as 'moved'"):
        frugal.generate(sf.Request("a cat", steps=1, size=SIZE, loras={"moved": 1.0}))


def test_nothing_is_held_when_all_is_done(registered):
    conditions = registered.runner.conditions
    jobs = [registered.submit(one) for one in requests().values()]
    jobs[1].cancel()
    registered.generate(list(requests().values()))
    for job in jobs:
        job.exception() or job.status == "cancelled" or job.result(WAIT)
    assert conditions.loras.held == 0 and conditions.text.used == 0


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ("ink", "must be names with strengths"),
        ([("ink", 1)], "must be names with strengths"),
        ({"ink": "much"}, "strength of LoRA 'ink'"),
        ({"ink": float("nan")}, "strength of LoRA 'ink'"),
        ({"ink": 1e9}, "strength of LoRA 'ink'"),
        ({"ink": True}, "strength of LoRA 'ink'"),
        ({"ink": (1, 2, 3)}, "give one number, or"),
        ({"": 1.0}, "the name of a LoRA"),
        ({3: 1.0}, "loras has the key 3"),
        ({f"l{i}": 1.0 for i in range(33)}, "at most 32"),
    ],
)
def test_loras_of_a_request_that_make_no_sense_are_refused(loras, message):
    with pytest.raises(InvalidRequest, match=message):
        sf.Request("a cat", loras=loras)


def test_what_is_written_into_the_loras_of_a_request_counts_or_is_refused():
    request = sf.Request("a cat", loras={"ink": 1.0})
    request.loras["pixel"] = 3
    assert request.lora_scales == {"ink": (1, 1), "pixel": (3, 3)}
    request.loras["ink"] = "much"
    with pytest.raises(InvalidRequest, match="strength of LoRA 'ink'"):
        _ = request.lora_scales


def test_a_name_is_given_once(registered, files):
    with pytest.raises(InvalidRequest, match="'ink' is already registered"):
        registered.loras.add(files["pixel"], "ink")
    assert sorted(registered.loras) == ["ink", "pixel", "wide"]
    with pytest.raises(InvalidRequest, match="no LoRA named 'chalk'"):
        registered.loras.remove("chalk")


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "ink ", " ink", "\x1b[31m", "\u202egold", "\x00"])
def test_names_that_a_line_of_text_could_not_give_back_are_refused(registered, files, name):
    with pytest.raises(InvalidRequest, match="must be printable, without blanks at its ends"):
        registered.loras.add(files["ink"], name)


def test_a_lora_that_is_not_low_rank_names_the_way_out(registered, pipe, tmp_path):
    from safetensors.torch import save_file

    name = "down_blocks.1.attentions.0.proj_in"
    weight = pipe.unet.get_submodule(name).weight
    save_file({f"lora_unet_{name.replace('.', '_')}.diff": torch.ones(weight.shape)}, tmp_path / "full.safetensors")
    with pytest.raises(NotLowRank, match=r"engine\.load_lora"):
        registered.loras.add(tmp_path / "full.safetensors")
    assert "full" not in registered.loras


def test_graphs_without_inputs_for_loras_refuse_by_name(registered, monkeypatch):
    monkeypatch.setattr(type(registered.runner.backend), "takes_loras", False)
    with pytest.raises(ExportError, match=r"uses LoRAs \(ink\)"):
        registered.submit(requests()["ink"])


def test_a_record_replays_the_loras(registered):
    given = list(requests().values())
    result = registered.generate(given)
    again = from_record(to_record(given))
    assert [one.lora_scales for one in again] == [one.lora_scales for one in given]
    # the whole call is made again, so every picture names all files
    assert all(set(entry["lora_files"]) == {"ink", "pixel", "wide"} for entry in result.metadata)


COUNT, HOT = 32, 8


@pytest.mark.parametrize(
    "requests_in_all", [pytest.param(40, id="40"), pytest.param(500, id="500", marks=pytest.mark.slow)]
)
def test_many_requests_under_many_loras_leak_nothing_and_get_their_own(pipe, tmp_path, requests_in_all, drawn):
    draw = random.Random(7)
    lora = {place: factors for place, factors in random_lora(pipe, 4, text=False).items() if "attn2" in place[1]}
    with sf.Engine.from_pipeline(pipe) as measuring:
        file = write_peft_lora(louder(lora), tmp_path / "one.safetensors")
        one = measuring.loras[measuring.loras.add(file)].nbytes
    # room for less than half of them on the device, and for two dozen in host memory
    with sf.Engine.from_pipeline(pipe, lora_memory=16 * one, lora_host_memory=24 * one) as engine:
        for i in range(COUNT):
            changed = {place: (down * (i + 1), up, alpha) for place, (down, up, alpha) in lora.items()}
            engine.loras.add(write_peft_lora(changed, tmp_path / f"lora{i}.safetensors"))
        names = [f"lora{i}" for i in range(COUNT)]

        def request(name):
            return sf.Request("a cat", seed=3, steps=1, size=SIZE, guidance=1.0, loras={name: 1.0})

        alone = {name: drawn([request(name)], using=engine) for name in names}
        apart(alone["lora3"].value, alone["lora4"].value)
        for _ in range(requests_in_all // HOT):
            # most of them hot
            chosen = [draw.choice(names[:HOT] if draw.random() < 0.8 else names) for _ in range(HOT)]
            jobs = [engine.submit(request(name), output="latents") for name in chosen]
            for name, job in zip(chosen, jobs, strict=True):
                close(job.result(WAIT).latents, alone[name])
        pool = engine.runner.conditions.loras
        assert pool.held == 0 and pool.nbytes - pool.rows.units.nbytes <= 16 * one
        assert sum(engine.loras[name].on_host for name in names) <= 24


def merged_and_row(engine, file, request, **settings):
    """(under a merged LoRA, under the same of the request's own, without) latents of a request."""
    engine.loras.add(file, "own")
    plain = engine.generate(request, output="latents").latents[0]
    row = engine.generate([replace(request, loras={"own": 0.8}), request], output="latents").latents[0]
    name = engine.load_lora(file, 0.8)
    try:
        merged = engine.generate(request, output="latents").latents[0]
    finally:
        engine.merged_loras.remove(name)
        engine.loras.remove("own")
    return merged, row, plain


@pytest.mark.parametrize("options", [{"batch_buckets": (2, 4, 8)}, {"max_batch_rows": 2}], ids=["buckets", "halves"])
def test_padding_and_splitting_of_batches_leave_loras_alone(registered, pipe, files, drawn, options):
    with sf.Engine.from_pipeline(pipe, **options) as engine:
        merged, row, plain = merged_and_row(engine, files["wide"], requests()["plain"])
    expected = drawn([replace(requests()["plain"], loras={"wide": 0.8})])
    close([merged], expected)
    close([row], expected)
    apart([row], [plain])


def test_the_content_of_a_picture_is_read_under_the_loras_of_its_request(registered, pipe, adapter_files, files):
    style = sf.InstantStyle(small_picture(5), "all", content="a cat")

    def request(**more):
        return sf.Request("a fish", steps=1, size=SIZE, style=style, **more)

    def drawn(engine, **more):
        return engine.generate(request(**more), output="latents").latents

    def under(engine, weights):
        name = engine.load_lora(files["ink"], weights)
        found = drawn(engine)[0]
        engine.merged_loras.remove(name)
        return found

    with sf.Engine.from_pipeline(pipe) as fresh:
        fresh.load_adapter(adapter_files[0])
        merged = under(fresh, 0.8)
        fresh.loras.add(files["ink"], "ink")
        expected = Twins(fresh, adapter_files[0]).drawn([request(loras={"ink": 0.8})])
    before = drawn(registered)[0]
    # neither another request's content nor that of other weights is taken for it
    for found in (merged, drawn(registered, loras={"ink": 0.8})[0], under(registered, 0.8)):
        close([found], expected)
    assert torch.equal(drawn(registered)[0], before)


def test_a_picture_is_inverted_under_the_loras_of_its_reader(registered, files, drawn):
    style = sf.StyleAligned(small_picture(4, SIZE), noise="ddim")
    request = sf.Request("a cat", style=style, scheduler="ddim", steps=STEPS, size=SIZE)
    merged, row, plain = merged_and_row(registered, files["ink"], request)
    expected = drawn([replace(request, loras={"ink": 0.8})])
    close([merged], expected)
    close([row], expected)
    apart([row], [plain])


def test_half_precision_rounds_no_more_than_merging(files):
    pipe = sharp_pipeline()
    exact, _, _ = merged_and_row(sf.Engine.from_pipeline(pipe), files["ink"], requests()["plain"])
    with sf.Engine.from_pipeline(pipe.to(torch.bfloat16)) as engine:
        merged, row, plain = merged_and_row(engine, files["ink"], requests()["plain"])
    # a merged weight is rounded once more, so a row errs about as much or less
    error, allowed = (row - exact).square().mean().sqrt(), (merged - exact).square().mean().sqrt()
    assert error <= 1.5 * allowed < 0.3 * (plain - merged).square().mean().sqrt()


def test_content_and_style_of_a_b_lora_are_two_loras(registered, tmp_path, pipe, drawn):
    lora = {
        place: factors
        for place, factors in louder(random_lora(pipe, 6, text=False)).items()
        if place[1].startswith(("up_blocks.0.attentions.0.", "up_blocks.0.attentions.1."))
    }
    file = write_peft_lora(lora, tmp_path / "both.safetensors")
    for part in ("content", "style"):
        registered.loras.add(file, part, part=part)
    registered.loras.add(file)
    plain = requests()["plain"]
    given = [{}, {"content": 1.0}, {"style": 1.0}, {"content": 1.0, "style": 1.0}, {"both": 1.0}]
    found = registered.generate([replace(plain, loras=loras) for loras in given], output="latents").latents
    apart(found[1:3], [found[0]] * 2)
    apart([found[1]], [found[2]])
    close([found[3]], drawn([replace(plain, loras=given[4])]))
    with pytest.raises(InvalidRequest, match="part"):
        registered.loras.add(file, "other", part="face")


def test_memory_lists_loras_by_tier(registered):
    registered.generate(requests()["ink"], output="latents")
    loras = registered.memory()["loras"]
    assert loras["device"] > 0 and loras["host"] == registered.loras.nbytes > 0
