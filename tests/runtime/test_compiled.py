"""The compile backend: the same pictures, code shared by equal blocks, and no compilation for another style."""

import gc
import logging
import weakref
from functools import cache, partial

import pytest
import torch
from PIL import Image

import stylefast as sf
from stylefast.errors import InvalidRequest, MissingDependency
from stylefast.kernels import registry
from stylefast.runtime.backends import compiled
from stylefast.runtime.backends.compiled import BUCKETS, CompileBackend
from stylefast.runtime.backends.cuda_graphs import Captured, StepGraphs
from stylefast.runtime.plan.request import Request
from tests.support.fp64 import SEEDS_OF_ROUNDINGS, Measured, Twins, close, engine_of, nudged, wide
from tests.support.oracle.instant_style import random_adapter
from tests.support.scene import EMBED_DIM, SIZE, STEPS, learned
from tests.support.small_adapter import small_picture
from tests.support.small_checkpoints import random_lora, write_peft_lora
from tests.support.small_graphs import nano_pipeline

PICTURE, OTHER = small_picture(1, (48, 40)), small_picture(2, (90, 70))
# the nano model has four transformer blocks of one shape, and five resnets of two
TRANSFORMERS = 1
SHAPES = TRANSFORMERS + 2


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """An engine on the nano model, with an adapter, running on the backend that `backend(unet)` makes."""
    pipe, file = nano_pipeline(), tmp_path_factory.mktemp("adapter") / "a.bin"
    torch.save(random_adapter(pipe.unet, EMBED_DIM, 5), file)

    def make(backend=None, change=lambda pipe: pipe):
        engine = engine_of(change(pipe))
        engine.load_adapter(file)
        if backend is not None:
            engine.runner.backend = backend(engine.unet)
            engine.runner.buckets = engine.runner.backend.buckets
        return engine

    return make


@pytest.fixture(scope="module")
def plain(make):
    return lengthened(make())


class Replays:
    """A capture that keeps the step and runs it at every replay."""

    def __init__(self):
        self.replays = 0

    def warm(self, step):
        step()

    def capture(self, step):
        def replay():
            self.replays += 1
            step()

        return Captured(replay, lambda: None, 1000)

    def wait(self):
        pass


@pytest.fixture(scope="module")
def traced(make):
    """Guards and graphs are real, generated code is not: that takes a C++ compiler a minute. For tests that don't mind
    what others had compiled."""
    graphs = StepGraphs(Replays())
    return make(lambda unet: CompileBackend(unet, cache=None, compiler="aot_eager", graphs=graphs))


def _traced_only(unet):
    return CompileBackend(unet, cache=None, compiler="eager")


def draw(engine, prompts, style=None, **options):
    return engine.generate(prompts, style, **{"size": SIZE, "steps": STEPS, "output": "latents"} | options).latents


@pytest.fixture(scope="module")
def bank(plain):
    return plain.bake(sf.StyleAligned(OTHER), steps=STEPS, size=SIZE)


@pytest.fixture(scope="module")
def styles(bank):
    return styles_with(partial(sf.StyleAligned, bank))


def styles_with(banked):
    mask = Image.new("L", SIZE)
    mask.paste(255, (0, 0, SIZE[0] // 2, SIZE[1]))
    return {
        "none": None,
        "live StyleAligned": sf.StyleAligned(prompt="a dog in neon style", seed=5),
        "banked StyleAligned": banked(share_group_norm=True, shift=0.5),
        "swap": banked(mode="swap", scale=0.7),
        "InstantStyle": sf.InstantStyle(PICTURE, scale=0.8),
        "InstantStyle and a bank": [sf.InstantStyle(OTHER, scale=1.3), banked()],
        "InstantStyle in a mask": sf.InstantStyle(PICTURE, mask=mask),
        "DreamStyler": sf.DreamStyler(learned()),
    }


STYLES = (
    "none",
    "live StyleAligned",
    "banked StyleAligned",
    "swap",
    "InstantStyle",
    "InstantStyle and a bank",
    "InstantStyle in a mask",
    "DreamStyler",
)


def mixed(styles, seed=0) -> list[Request]:
    """One request of every style, of unlike guidance, steps and samplers."""
    schedulers, found = ("euler", "ddim", "dpmpp_2m", "unipc"), []
    for i, name in enumerate(STYLES):
        # a bank fits one schedule
        free = {} if "bank" in name or name == "swap" else {"scheduler": schedulers[i % 4], "steps": 2 + i % 3}
        options = {"steps": STEPS, "guidance": 3.0 + i, "size": SIZE} | free
        found.append(Request("a sks cat", seed=seed + i, style=styles[name], **options))
    return found


@pytest.fixture(scope="module")
def drawn(make, plain, styles):
    """What the plain engine draws for `work(styles)`, which gives arguments of `draw`, and how to draw it in fp64."""
    live = styles_with(partial(sf.StyleAligned, OTHER, share_styles=False))  # a bank fits its own model alone

    @cache
    def other(change, *further):
        return lengthened(make(change=lambda pipe: change(pipe, *further)))

    def drawn(work, **options):
        def run(*change):
            return draw(other(*change), *work(live), **options)

        def exact():
            with registry.using("torch"):  # the one form that takes fp64
                return run(wide)

        roundings = [partial(run, nudged, seed) for seed in SEEDS_OF_ROUNDINGS]
        return Measured(draw(plain, *work(styles), **options), exact, roundings)

    return drawn


@pytest.mark.parametrize("name", STYLES)
def test_compiled_equals_plain(traced, drawn, styles, name):
    prompts = ["a sks cat", "a house in sks style"]
    close(draw(traced, prompts, styles[name], seed=3), drawn(lambda styles: (prompts, styles[name]), seed=3))


def test_a_mixed_batch_equals_the_plain_one(traced, drawn, styles):
    close(draw(traced, mixed(styles)), drawn(lambda styles: (mixed(styles),)))


def test_equal_blocks_share_their_code_and_so_do_batch_sizes_but_not_picture_sizes(make):
    engine = make(_traced_only)
    backend = engine.runner.backend
    # from 16 rows on, convolutions on a single CPU thread are others to PyTorch
    for count in (1, 2, 5, 7):
        draw(engine, ["a cat"] * count, steps=1)
        assert backend.compilations == SHAPES
    draw(engine, "a cat", size=(32, 32), steps=1)
    assert backend.compilations == 2 * SHAPES
    draw(engine, ["a cat", "a dog"], size=(32, 32), steps=1)
    draw(engine, "a cat", steps=1)
    assert backend.compilations == 2 * SHAPES


def test_nothing_is_compiled_again_for_another_style_strength_guidance_sampler_seed_or_mix(traced, styles, bank):
    engine, backend = traced, traced.runner.backend
    draw(engine, "a cat", styles["InstantStyle"])  # the adapter's columns are there from its first use on
    draw(engine, "a cat")
    before = backend.compilations
    for name in STYLES:
        draw(engine, "a sks cat", styles[name], seed=7)
    for scale in (0.2, 1.0, 2.0):
        draw(engine, "a cat", sf.InstantStyle(OTHER, scale=scale))
        draw(engine, "a cat", sf.StyleAligned(bank, scale=scale, shift=scale - 1))
    for guidance, scheduler, steps in ((2.0, "ddim", 2), (9.0, "euler_ancestral", 4), (1.5, "dpmpp_2m", 5)):
        draw(engine, "a house", guidance=guidance, scheduler=scheduler, steps=steps, guidance_rescale=0.3)
    # as many rows, and more pages of text than there was room for at first
    for seed in range(3):
        draw(
            engine,
            [f"a cat {seed}", f"a dog {seed}", f"a fish {seed}", f"a house {seed}"],
            styles["InstantStyle and a bank"],
            seed=seed,
        )
    draw(engine, ["a sks cat", "a sks dog", "a sks fish"], styles["DreamStyler"], steps=5)
    assert len(engine.runner.conditions.text) > 8
    assert backend.compilations == before


def test_several_references_compile_one_set_of_transformer_blocks_whatever_their_number(traced):
    draw(traced, "a cat", sf.StyleAligned([PICTURE]))
    before = traced.runner.backend.compilations
    draw(traced, "a cat", sf.StyleAligned([PICTURE, OTHER]))
    assert traced.runner.backend.compilations == before + TRANSFORMERS
    draw(traced, "a cat", sf.StyleAligned([PICTURE, OTHER, PICTURE]))
    assert traced.runner.backend.compilations == before + TRANSFORMERS


LONG = 2  # times as many tokens as other prompts


def lengthened(engine):
    """The engine, whose prompts of something "long" have LONG times as many tokens as others."""
    store = engine.runner.conditions
    encode = store._text_states

    def states(prompts, *rest):
        found = []
        for places, layers, pooled in encode(prompts, *rest):
            if any("long" in (prompt.text or "") for prompt in prompts):
                layers = [tuple(torch.cat([x, *[x.roll(3, 1) / 2] * (LONG - 1)], 1) for x in pair) for pair in layers]
            found.append((places, layers, pooled))
        return found

    store._text_states = states
    return engine


def watch_lengths(engine, monkeypatch):
    """A list to which every step from now on adds whether it was given lengths of texts."""
    given, run = [], engine.runner.backend.run

    def watched(key, state, columns, buffers):
        given.append(buffers.text_lengths is not None)
        assert key[-1] == given[-1], "a graph with lengths is another"
        return run(key, state, columns, buffers)

    monkeypatch.setattr(engine.runner.backend, "run", watched)
    return given


def test_longer_texts_compile_their_width_once_and_no_mix_of_lengths_compiles_again(make, drawn, monkeypatch):
    engine = lengthened(make(_traced_only))
    backend, text, given = engine.runner.backend, engine.runner.conditions.text, watch_lengths(engine, monkeypatch)
    draw(engine, ["a cat", "a dog"])
    assert backend.compilations == SHAPES and not any(given)
    draw(engine, "a long cat")
    assert backend.compilations == SHAPES + TRANSFORMERS and text.tokens == LONG * 77
    found = draw(engine, ["a cat", "a long dog", "a dog"], seed=[1, 2, 3])
    draw(engine, ["a dog", "a cat"])
    draw(engine, ["a long cat", "a long dog"], guidance=1.0)
    assert backend.compilations == SHAPES + TRANSFORMERS and all(given[2 * STEPS :])
    for place, (prompt, seed) in enumerate((("a cat", 1), ("a long dog", 2), ("a dog", 3))):
        close(found[place : place + 1], drawn(lambda styles, prompt=prompt: (prompt,), seed=seed))


def test_only_steps_with_a_shorter_text_are_given_lengths_and_a_text_is_drawn_as_alone(make, drawn, monkeypatch):
    engine = lengthened(make())
    given = watch_lengths(engine, monkeypatch)
    (alone,) = draw(engine, "a long cat", seed=1, guidance=1.0)
    assert not any(given), "all texts are as long as the pages"
    one, other = draw(engine, ["a long cat", "a dog"], seed=[1, 2], guidance=1.0)
    assert all(given[STEPS:])
    for found, prompt, seed in ((one, "a long cat", 1), (other, "a dog", 2)):
        close(found[None], drawn(lambda styles, prompt=prompt: (prompt,), seed=seed, guidance=1.0))
    del given[:]
    assert torch.equal(draw(engine, "a long cat", seed=1, guidance=1.0)[0], alone) and not any(given)


def _told(caplog):
    return [record for record in caplog.records if record.name.startswith("stylefast")]


def test_warm_up_compiles_all_that_requests_need(make, styles, caplog):
    engine = make(_traced_only)
    backend, shape = engine.runner.backend, (4, SIZE[1] // 4, SIZE[0] // 4)
    assert backend.warm_up(shape, [4]) == SHAPES
    assert backend.warm_up(shape, [2, 8], images=True) == TRANSFORMERS
    with caplog.at_level(logging.WARNING, "stylefast"):
        draw(engine, ["a cat", "a house"], styles["live StyleAligned"])
        draw(engine, "a sks cat", styles["InstantStyle and a bank"])
        assert backend.compilations == SHAPES + TRANSFORMERS and not _told(caplog)
        draw(engine, "a cat", size=(32, 32), steps=1)
        draw(engine, "a cat", size=(32, 32), guidance=1.0, steps=1)
    (record,) = _told(caplog)
    assert "after warm_up" in record.getMessage() and "4x8x8" in record.getMessage()


@pytest.mark.parametrize("rows", [[], [0], [2, 1.5]])
def test_warm_up_refuses_what_is_no_row_count(traced, rows):
    with pytest.raises(InvalidRequest, match="rows is"):
        traced.runner.backend.warm_up((4, 8, 12), rows)


def test_idle_rows_change_no_bit_of_the_others(traced, styles):
    assert 8 in BUCKETS and 7 not in BUCKETS
    lone = Request("a cat", seed=1, guidance=1.0, steps=STEPS, size=SIZE)
    others = [
        Request("a house", seed=2, steps=STEPS, size=SIZE, style=styles["InstantStyle and a bank"]),
        Request("a fish", seed=3, steps=STEPS, size=SIZE),
        Request("a dog", seed=4, steps=STEPS, size=SIZE),
    ]
    idle = draw(traced, [lone, *others])  # 7 rows in a table of 8
    extra = Request("neon", seed=5, guidance=1.0, steps=STEPS, size=SIZE, style=styles["InstantStyle"])
    full = draw(traced, [lone, *others, extra])
    for one, other in zip(idle, full):
        assert torch.equal(one, other)


def test_baking_runs_on_the_unet_itself(traced, plain, bank):
    before = traced.runner.backend.compilations
    baked = traced.bake(sf.StyleAligned(OTHER), steps=STEPS, size=SIZE)
    assert traced.runner.backend.compilations == before
    for name, tensor in bank.tensors.items():
        assert torch.equal(baked.tensors[name], tensor), name
    assert not any("forward" in vars(module) for module in traced.unet.modules())


def test_weights_that_a_lora_writes_reach_compiled_blocks(traced):
    engine = traced
    (before,) = draw(engine, "a cat")
    kept = [weight.clone() for weight in engine.unet.parameters()]
    with torch.no_grad():
        for weight in engine.unet.parameters():
            weight.mul_(1.01)
        try:
            (during,) = draw(engine, "a cat")
        finally:
            for weight, old in zip(engine.unet.parameters(), kept):
                weight.copy_(old)
    assert (before - during).abs().max() > 1e-3


@pytest.fixture
def replaying(traced):
    """(engine, capture) with no graph captured yet."""
    traced.runner.backend.reset()
    capture = traced.runner.backend._graphs._capture
    capture.replays = 0
    return traced, capture


def test_steps_are_replayed_from_the_third_on_and_give_the_same_pictures(replaying, drawn, styles):
    engine, capture = replaying
    replayed = draw(engine, "a cat", styles["InstantStyle"], steps=6)
    close(replayed, drawn(lambda styles: ("a cat", styles["InstantStyle"]), steps=6))
    assert capture.replays == 4 and engine.runner.backend.captures == 1
    # another style and strength of the same shape, in the same graph
    draw(engine, "a house", styles["InstantStyle and a bank"])
    assert capture.replays == 4 + STEPS and engine.runner.backend.captures == 1


def test_a_graph_goes_when_the_latents_move(replaying):
    engine, _ = replaying
    draw(engine, "a cat", steps=4)
    assert engine.runner.backend.captures == 1
    state = engine.runner.latents[4, SIZE[1] // 4, SIZE[0] // 4]
    state.release(state.take(torch.zeros(len(state.latents), *state.shape)))
    gc.collect()
    draw(engine, "a cat", steps=2)
    assert engine.runner.backend.captures == 0
    draw(engine, "a cat", steps=2)
    assert engine.runner.backend.captures == 1


def test_forgetting_frees_graphs_and_keeps_code(replaying, styles):
    engine, _ = replaying
    backend = engine.runner.backend
    draw(engine, "a cat", styles["InstantStyle"])
    assert backend.nbytes >= 1000  # as the stand-in says
    count = backend.compilations
    backend.reset()
    assert backend.nbytes == 0 and backend.captures == 0
    draw(engine, "a cat", styles["InstantStyle"])
    assert backend.compilations == count


def test_a_backend_is_freed_with_its_code(plain):
    backend = _traced_only(plain.unet)
    assert backend.warm_up((4, 8, 8), [2]) > 0
    twin = weakref.ref(backend._twin)
    del backend
    gc.collect()
    assert twin() is None


def test_an_unknown_compiler_is_refused_with_those_there_are(plain):
    with pytest.raises(InvalidRequest, match="'nvfuser'; choose one of inductor, aot_eager, eager"):
        CompileBackend(plain.unet, compiler="nvfuser")


def test_a_missing_cpp_compiler_is_told_with_the_way_out(plain, monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependency, match="backend='torch'"):
        CompileBackend(plain.unet, cache=None)


def test_a_missing_triton_is_told_with_the_way_out(monkeypatch):
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"stylefast\[triton\]"):
        compiled._check_toolchain(torch.device("cuda"))


@pytest.fixture(scope="module")
def lora_files(plain, tmp_path_factory):
    """LoRAs of several ranks, one with convolutions."""
    folder, found = tmp_path_factory.mktemp("loras"), {}
    for seed, rank in enumerate((4, 16, 20)):
        pipe = nano_pipeline()
        lora = random_lora(pipe, seed, rank=rank, text=False, convolutions=seed == 1)
        found[f"rank {rank}"] = write_peft_lora(lora, folder / f"{rank}.safetensors")
    return found


def test_loras_compile_once_and_not_again_for_another_one_strength_or_mix(make, plain, lora_files):
    backends = []

    def backend(unet):
        backends.append(CompileBackend(unet, cache=None, compiler="aot_eager", graphs=None))
        return backends[-1]

    engine, twins = make(backend), Twins(plain)
    for name, file in lora_files.items():
        engine.loras.add(file, name)
        if name not in plain.loras:
            plain.loras.add(file, name)
    first, second, third = lora_files

    def both(*loras):
        given = [Request(f"a cat {i}", size=SIZE, steps=1, seed=i, loras=one) for i, one in enumerate(loras)]
        expected = twins.drawn(given)
        for i, found in enumerate(engine.generate(given, output="latents").latents):
            close(found, expected[i])

    both({}, {})
    without = backends[0].compilations
    both({third: 1.0}, {first: 0.5}, {})
    once = backends[0].compilations
    assert without == SHAPES and once == 2 * SHAPES
    both({third: 0.3}, {second: 0.5}, {first: -1.0}, {})
    both({first: 0.3, second: 2.0, third: 0.1}, {second: 0.5}, {})
    both({}, {})
    assert backends[0].compilations == once
