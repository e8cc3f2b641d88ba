"""The engine on graphs of flat tensors: the same pictures, by the smallest graph that can, errors that spare others."""

import math
from dataclasses import replace

import pytest
import torch

import stylefast as sf
from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, OutOfMemory
from stylefast.export.unet_graph import GraphShape, lora_kinds
from stylefast.models.masks import MaskTable
from stylefast.models.row_loras import NO_UNIT
from stylefast.models.row_table import NO_PAGE
from stylefast.runtime.backends.base import TorchBackend
from stylefast.runtime.backends.choice import check_backend
from stylefast.runtime.backends.exported import ExportedBackend, Graph
from stylefast.sampling.guidance import StyleContextGuidance
from tests.support.fp64 import Twins, close
from tests.support.scene import SIZE, apart, half_mask, learned, small_picture
from tests.support.small_checkpoints import random_lora, write_peft_lora
from tests.support.small_graphs import SHAPES, TorchSession, micro_pipeline, write_adapter
from tests.support.watch import WAIT, request

PICTURE, OTHER = small_picture(1, (48, 40)), small_picture(2, (90, 70))
STEPS = 3
STYLE = ["up_blocks.0.attentions.1"]


@pytest.fixture(scope="module", autouse=True)
def plain_weights():
    """Both sides compute with PyTorch's own products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stylefast.engine.pack", lambda unet, room: False)
        yield


@pytest.fixture(scope="module")
def pipe():
    return micro_pipeline()


@pytest.fixture(scope="module")
def adapter(pipe, tmp_path_factory):
    return write_adapter(pipe.unet, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def torch_engine(pipe, adapter):
    engine = sf.Engine.from_pipeline(pipe)
    engine.load_adapter(adapter)
    return engine


@pytest.fixture(scope="module")
def bank(torch_engine):
    return torch_engine.bake(sf.StyleAligned(PICTURE), steps=STEPS, size=SIZE)


@pytest.fixture
def make(pipe, adapter):
    """An engine on graphs of these shapes (or Graphs made by functions of the UNet), its sessions by place."""
    engines = []

    def make(*shapes, stale=lambda: None, **options):
        sessions = {}

        def backend(unet):
            def graph(i, shape):
                if not isinstance(shape, GraphShape):
                    return shape(unet)
                return Graph(shape, lambda: sessions.setdefault(i, TorchSession(unet, shape)))

            return ExportedBackend(
                unet, {str(i): graph(i, shape) for i, shape in enumerate(shapes)}, "onnxruntime", stale
            )

        engine = sf.Engine.from_pipeline(pipe, backend=backend, **options)
        engine.load_adapter(adapter)
        engines.append(engine)
        return engine, sessions

    yield make
    for engine in engines:
        engine.close()


def draw(engine, *requests):
    return engine.generate(list(requests), output="latents").latents


@pytest.fixture(scope="module")
def in_torch(torch_engine, adapter, bank):
    """What the torch backend draws, to compare with; a bank fits its own model alone, so others read its picture."""
    twins = Twins(torch_engine, adapter)

    def live(style):
        if isinstance(style, (list, tuple)):
            return [live(one) for one in style]
        banked = getattr(style, "reference", None) is bank
        return replace(style, reference=PICTURE, share_styles=False) if banked else style

    return lambda *requests: twins.drawn(requests, [replace(one, style=live(one.style)) for one in requests])


@pytest.fixture(scope="module")
def requests(bank):
    """Requests by what they need, each a group of its own."""
    shared, context = sf.StyleAligned(shift=0.4, share_group_norm=True), StyleContextGuidance(0.5, 3.0, 5.0)
    return {
        "plain": [request("a cat", seed=1)],
        "unguided, other sampler": [request("a dog", guidance=1.0, scheduler="euler_ancestral", seed=2)],
        "two pictures in one style": [request(p, style=shared, seed=i) for i, p in enumerate(("a cat", "neon"))],
        "a live picture with AdaIN": [
            request(style=sf.StyleAligned(OTHER, mode="swap", adain={"q": 1.0, "k": 0.5, "v": 1.0}), seed=3)
        ],
        "a picture prompt under a mask": [request(style=sf.InstantStyle(PICTURE, "all", 0.7, mask=half_mask()))],
        "two picture prompts": [request(style=[sf.InstantStyle(PICTURE, STYLE), sf.InstantStyle(OTHER, "all", 0.4)])],
        "a bank": [request(style=sf.StyleAligned(bank, shift=0.5, share_group_norm=True), seed=4)],
        "learned tokens in four branches": [request(style=sf.DreamStyler(learned(), guidance=context), seed=5)],
        "a bank, a picture and learned tokens": [
            request(style=[sf.StyleAligned(bank), sf.InstantStyle(PICTURE, STYLE), sf.DreamStyler(learned())], seed=6)
        ],
    }


NEEDED = {
    "plain": "plain",
    "unguided, other sampler": "plain",
    "two pictures in one style": "live",
    "a live picture with AdaIN": "live",
    "a picture prompt under a mask": "plain",
    "two picture prompts": "plain",
    "a bank": "banked",
    "learned tokens in four branches": "plain",
    "a bank, a picture and learned tokens": "banked",
}


@pytest.mark.parametrize("what", NEEDED)
def test_pictures_are_those_of_the_torch_backend_and_the_smallest_graph_makes_them(make, in_torch, requests, what):
    engine, sessions = make(*SHAPES)
    assert engine.runner.backend.loaded == ()
    close(draw(engine, *requests[what]), in_torch(*requests[what]))
    assert engine.runner.backend.loaded == (NEEDED[what],)
    (session,) = sessions.values()
    assert len(session.calls) == STEPS


def test_a_mixed_batch_shares_one_call_a_step(make, in_torch, requests):
    engine, sessions = make(SHAPES[2], SHAPES[0])
    every = [one for several in requests.values() for one in several]
    close(draw(engine, *every), in_torch(*every))
    assert engine.runner.calls == STEPS
    # the plain graph is open, for when its requests are alone, and has run nothing
    assert len(sessions[0].calls) == STEPS and not sessions[1].calls


@pytest.mark.parametrize("what", NEEDED)
def test_a_larger_graph_does_what_smaller_ones_would(make, in_torch, requests, what):
    engine, sessions = make(GraphShape("banked", 3, 4))
    close(draw(engine, *requests[what]), in_torch(*requests[what]))


def test_columns_that_a_batch_has_not_are_idle(make, requests):
    engine, sessions = make(GraphShape("banked", 3, 4))
    draw(engine, *requests["two pictures in one style"])
    for given in sessions[0].calls:
        rows = len(given["latents"])
        assert (given["self_page"][:, 1:] == NO_PAGE).all() and (given["self_page"][:, 0] >= 0).any()
        assert (given["self_scale"][:, 1:] == 1).all() and not given["self_shift"][:, 1:].any()
        assert (given["image_page"] == NO_PAGE).all() and (given["image_mask"] == -1).all()
        assert not given["image_strength"].any()
        assert given["image_group"].tolist() == [[0, 1, 2, 3]] * rows
        assert given["page_norms"].shape[0] == given["image_lengths"].shape[0] == given["mask_0"].shape[0] == 1
        assert (given["norm_page"] >= 0).any() and (given["norm_page"] == NO_PAGE).any()
        assert given["image_lengths"].tolist() == [1], "no picture has no tokens"


def test_a_batch_in_which_no_row_shares_norms_has_a_full_column_of_none(make, requests):
    engine, sessions = make(GraphShape("live", 1, 0))
    draw(engine, *requests["plain"])
    assert all(given["norm_page"].tolist() == [NO_PAGE] * 2 for given in sessions[0].calls)


def test_tensors_stay_where_they_are_from_step_to_step(make, requests):
    engine, sessions = make(*SHAPES)
    draw(engine, *requests["a bank"])
    draw(engine, *requests["a bank"])
    places = [{name: x.data_ptr() for name, x in given.items()} for given in sessions[2].calls]
    assert len(places) == 2 * STEPS and all(one == places[0] for one in places)


def test_pages_of_banks_and_prompts_are_read_where_they_lie(make, requests):
    engine, sessions = make(*SHAPES)
    draw(engine, *requests["a bank, a picture and learned tokens"])
    given, store = sessions[2].calls[-1], engine.runner.conditions
    (pool,) = engine.runner.bank_pages.values()
    assert all(given[name].data_ptr() == x.data_ptr() for name, x in pool.by_name.items())
    assert all(given[f"text_kv_{i}"].data_ptr() == x.data_ptr() for i, x in enumerate(store.text.by_level))
    assert all(given[f"image_kv_{i}"].data_ptr() == x.data_ptr() for i, x in enumerate(store.images.by_level))
    assert given["image_lengths"].data_ptr() == store.images.lengths.data_ptr()
    assert given["pooled"].data_ptr() == store.text.extra.data_ptr()


def test_of_two_graphs_of_a_flavour_the_one_with_fewer_columns_is_taken(make, requests):
    engine, sessions = make(GraphShape("live", 4, 4), GraphShape("live", 1, 2), GraphShape("live", 1, 1))
    draw(engine, *requests["two pictures in one style"])
    assert list(sessions) == [2]
    draw(engine, *requests["two picture prompts"])
    assert sorted(sessions) == [1, 2]


def test_buckets_pad_rows_and_keep_the_smallest_graph(make, in_torch, requests):
    engine, sessions = make(*SHAPES, batch_buckets=(5,))
    close(draw(engine, *requests["plain"]), in_torch(*requests["plain"]))
    assert engine.runner.backend.loaded == ("plain",) and not engine.runner.bank_pages
    assert all(len(given["latents"]) == 5 for given in sessions[0].calls)


# what graphs can't do

LACKING = {
    "a bank": (SHAPES[:2], r"banked graph \(references: 1, pictures per row: 0.*--flavour banked --references 1"),
    "a live picture with AdaIN": (SHAPES[:1], r"live graph \(references: 1.*available: plain \(0, 2\)"),
    "two picture prompts": (
        [GraphShape("live", 1, 1)],
        r"plain graph \(references: 0, pictures per row: 2.*--segments 2",
    ),
    "two pictures in one style": ([GraphShape("plain", 0, 0)], "live graph.*stylefast export onnx --flavour live"),
}


@pytest.mark.parametrize("what", LACKING)
def test_a_batch_that_no_graph_can_do_is_refused_with_the_command_that_makes_one(make, requests, what):
    shapes, message = LACKING[what]
    engine, sessions = make(*shapes)
    with pytest.raises(EngineMismatch, match=message):
        draw(engine, *requests[what])
    assert engine.runner.pictures == 0 and sessions == {}


def test_pictures_that_need_no_missing_graph_are_finished_all_the_same(make, in_torch, requests):
    engine, _ = make(*SHAPES[:2])
    names = ("plain", "a bank", "two pictures in one style", "a picture prompt under a mask")
    with engine.scheduler.paused():
        jobs = {name: engine.submit(requests[name], output="latents") for name in names if name != "a bank"}
        with pytest.raises(EngineMismatch, match="banked graph"):
            engine.submit(requests["a bank"], output="latents")
    for name, job in jobs.items():
        close(job.result(WAIT).latents, in_torch(*requests[name]))


def test_a_table_of_masks_whose_first_one_is_still_being_read_is_no_input(make, in_torch, requests):
    """A masked request that joins makes the table before its mask is there; others go on meanwhile."""
    engine, _ = make(SHAPES[1])
    size = (SIZE[1] // engine.downscale, SIZE[0] // engine.downscale)
    engine.runner.conditions.masks[size] = MaskTable(engine.unet.attention_sizes(*size), engine.unet.device)
    close(draw(engine, *requests["plain"]), in_torch(*requests["plain"]))


def test_a_batch_is_divided_among_graphs_where_none_can_do_all_of_it(make, in_torch, requests):
    engine, sessions = make(GraphShape("plain", 0, 2), GraphShape("live", 1, 0))
    names = ("two picture prompts", "two pictures in one style")
    every = [one for name in names for one in requests[name]]
    close(draw(engine, *every), in_torch(*every))
    assert sorted(sessions) == [0, 1]


class Failing(TorchSession):
    """Raises `error` for batches of more rows than `most`."""

    def __init__(self, unet, shape, error, most=0):
        super().__init__(unet, shape)
        self.error, self.most = error, most

    def run(self, inputs, outputs):
        if len(inputs["latents"]) > self.most:
            outputs["output"].fill_(float("nan"))
            raise self.error
        return super().run(inputs, outputs)


@pytest.mark.parametrize("error", [ExportError("it broke"), OutOfMemory("no room")], ids=["broken", "no room"])
def test_a_session_that_fails_costs_no_picture_that_runs_without_the_others(make, in_torch, requests, error):
    engine, _ = make(lambda unet: Graph(SHAPES[1], Failing(unet, SHAPES[1], error, most=4)))
    every = [*requests["plain"], *requests["two pictures in one style"], *requests["unguided, other sampler"]]
    close(draw(engine, *every), in_torch(*every))


def test_a_session_that_always_fails_fails_the_pictures_and_not_the_engine(make):
    engine, _ = make(lambda unet: Graph(SHAPES[1], Failing(unet, SHAPES[1], ExportError("it broke"), most=3)))
    jobs = [engine.submit(request(guidance=guidance), output="latents") for guidance in (1.0, 5.0)]
    both = engine.submit([request(style=(one := sf.StyleAligned())), request(style=one)], output="latents")
    with pytest.raises(ExportError, match="it broke"):
        both.result(WAIT)
    assert all(torch.isfinite(job.result(WAIT).latents[0]).all() for job in jobs)


def test_a_graph_that_can_not_be_opened_is_tried_once(make, torch_engine, requests):
    tries = []

    def broken():
        tries.append(1)
        raise ExportError("altered")

    engine, _ = make(lambda unet: Graph(SHAPES[1], broken))
    for _ in range(2):
        with pytest.raises(ExportError, match="altered"):
            draw(engine, *requests["plain"], *requests["unguided, other sampler"])
    assert tries == [1]


def test_graphs_of_fewer_rows_take_a_batch_in_parts(make, in_torch):
    def graph(unet):
        return Graph(SHAPES[0], TorchSession(unet, SHAPES[0]), {"rows": (1, 4)})

    engine, _ = make(graph)
    every = [request("a cat", seed=i) for i in range(5)]
    close(draw(engine, *every), in_torch(*every))
    assert engine.runner.calls == math.ceil(5 * STEPS / 2)


def test_graphs_of_one_row_count_get_batches_filled_up(make, in_torch, requests):
    session = []

    def graph(unet):
        session.append(TorchSession(unet, SHAPES[1]))
        return Graph(SHAPES[1], session[0], {"rows": (6, 6)})

    engine, _ = make(graph)
    for name in ("plain", "two pictures in one style"):
        close(draw(engine, *requests[name]), in_torch(*requests[name]))
    assert {len(given["latents"]) for given in session[0].calls} == {6}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"width": (16, 32)}, "width 12 is outside 16 to 32.*another size"),
        ({"height": (8, 8), "width": (8, 8)}, "2 rows at 12x8 latents.*width 12 is outside 8 to 8"),
        ({"rows": (1, 1)}, "rows 2 is outside 1 to 1"),
    ],
    ids=["width", "fixed size", "rows"],
)
def test_a_size_outside_of_a_graphs_ranges_is_refused(make, ranges, message):
    engine, _ = make(lambda unet: Graph(SHAPES[0], TorchSession(unet, SHAPES[0]), ranges))
    with pytest.raises(EngineMismatch, match=message):
        draw(engine, request())


@pytest.mark.parametrize("taken", [(1, 4), (4, 4), (300, 400)], ids=["fewer", "one number", "more"])
def test_pages_and_masks_that_rows_read_are_picked_out_where_a_graph_does_not_take_all(make, in_torch, requests, taken):
    session, shape, ranges = [], GraphShape("plain", 0, 1), dict.fromkeys(("text_pages", "image_pages", "masks"), taken)

    def graph(unet):
        session.append(TorchSession(unet, shape))
        return Graph(shape, session[0], ranges)

    engine, _ = make(graph)
    masked = requests["a picture prompt under a mask"]
    both = [*masked, request("a dog", style=sf.InstantStyle(OTHER, "all", 0.5, mask=1 - half_mask()), seed=3)]
    close(draw(engine, *both), in_torch(*both))
    close(draw(engine, *requests["plain"]), in_torch(*requests["plain"]))
    for given in session[0].calls:
        counts = (
            given["text_kv_0"].shape[2],
            given["pooled"].shape[0],
            given["image_kv_1"].shape[2],
            given["image_lengths"].shape[0],
            given["mask_0"].shape[0],
            given["mask_1"].shape[0],
        )
        assert all(taken[0] <= count <= taken[1] for count in counts)


def test_a_step_that_reads_more_pages_than_a_graph_takes_is_refused(make):
    engine, _ = make(lambda unet: Graph(SHAPES[0], TorchSession(unet, SHAPES[0]), {"text_pages": (1, 1)}))
    with pytest.raises(EngineMismatch, match="2 rows reads up to 2 text_pages, but the graph supports 1 to 1"):
        draw(engine, request())


def test_a_text_shorter_than_others_is_refused_with_the_way_out(make):
    engine, sessions = make(SHAPES[0])
    text, run = engine.runner.conditions.text, engine.runner.backend.run

    def shortened(key, state, columns, buffers):
        return run(key, state, columns, buffers._replace(text_lengths=text.lengths))

    engine.runner.backend.run = shortened
    with pytest.raises(EngineMismatch, match="shorter than others, but graphs .* use backend='torch'"):
        draw(engine, request())
    assert not sessions or not sessions[0].calls


def test_a_pool_has_no_more_pages_than_graphs_can_read(make, in_torch, requests):
    engine, _ = make(lambda unet: Graph(SHAPES[2], TorchSession(unet, SHAPES[2]), {"pages": (1, 3)}))
    close(draw(engine, *requests["a bank"]), in_torch(*requests["a bank"]))
    (pool,) = engine.runner.bank_pages.values()
    assert pool.slots == 3


def test_graphs_of_other_weights_are_refused_at_the_next_step(make):
    reasons = [None]
    engine, _ = make(*SHAPES, stale=lambda: reasons[0])
    draw(engine, request())
    reasons[0] = "the weights have changed"
    with pytest.raises(EngineMismatch, match="the weights have changed"):
        draw(engine, request())


def test_no_graph_at_all_is_refused(pipe):
    with pytest.raises(EngineMismatch, match="no UNet graph.*stylefast export onnx"):
        sf.Engine.from_pipeline(pipe, backend=lambda unet: ExportedBackend(unet, {}, "onnxruntime"))


# LoRAs and long texts

WITH_LORAS = GraphShape("plain", segments=0, lora_rank=16, lora_slots=3)
FEW, MANY = {"one": 0.8}, {"one": 0.5, "two": -1.0, "three": 0.7}


@pytest.fixture(scope="module")
def lora_files(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: write_peft_lora(random_lora(pipe, i, rank, text=False, convolutions=i == 1), folder / name)
        for i, (name, rank) in enumerate({"one": 3, "two": 16, "three": 4, "larger": 20, "four": 4}.items())
    }


@pytest.fixture
def with_loras(make, torch_engine, lora_files):
    """As `make`, and both engines know the LoRAs."""

    def made(*shapes, **options):
        engine, sessions = make(*shapes, **options)
        engines.append(engine)
        for name, file in lora_files.items():
            engine.loras.add(file, name)
        return engine, sessions

    engines = [torch_engine]
    for name, file in lora_files.items():
        torch_engine.loras.add(file, name)
    yield made
    for name in list(torch_engine.loras):
        torch_engine.loras.remove(name)


def test_a_batch_under_loras_takes_the_graph_that_has_inputs_for_them(with_loras, in_torch):
    engine, sessions = with_loras(SHAPES[0], WITH_LORAS)
    every = [request("a cat", seed=1), request("a cat", seed=1, loras=FEW), request("a dog", loras=MANY)]
    close(draw(engine, *every), in_torch(*every))
    assert [len(sessions[i].calls) for i in range(2)] == [0, STEPS]
    close(draw(engine, every[0]), in_torch(every[0]))
    assert [len(sessions[i].calls) for i in range(2)] == [STEPS, STEPS]


def test_units_are_as_few_as_can_be_and_idle_beyond_those_in_use(with_loras, in_torch):
    engine, sessions = with_loras(WITH_LORAS)

    def units(*requests):
        close(draw(engine, *requests), in_torch(*requests))
        given = sessions[0].calls[-1]
        return given, given["lora_unit"].shape[2]

    plain, few, two = request("a cat"), request("a cat", loras=FEW), request("a cat", loras={"one": 1.0, "two": 0.1})
    given, count = units(plain)
    assert count == 1 and (given["lora_unit"] == NO_UNIT).all() and not given["lora_unit_scale"].any()
    assert {len(x) for name, x in given.items() if name.startswith(("lora_down", "lora_up"))} == {1}
    # the table has two units for each LoRA in a layer, and three slots take four
    assert [units(*batch)[1] for batch in ([plain, few], [two], [request("a cat", loras=MANY), few])] == [2, 4, 6]
    given, _ = units(few, request("a cat", loras=MANY))
    store = engine.runner.conditions.loras.rows
    assert all(
        given[f"lora_{name}_{kind}"].data_ptr() == getattr(store, name)[kind].data_ptr()
        for name in ("down", "up")
        for kind in lora_kinds(engine.unet)
    )
    # two rows under one LoRA, and two under three
    assert ((given["lora_unit"] != NO_UNIT).any(0).sum(1) > 1).sum() == 2


def test_units_of_an_earlier_batch_are_gone(with_loras, in_torch):
    engine, sessions = with_loras(GraphShape("plain", segments=0, lora_rank=16, lora_slots=4))
    for loras in (MANY | {"four": 1.5}, MANY):
        wanted = request("a cat", loras=loras)
        close(draw(engine, wanted), in_torch(wanted))
    assert {given["lora_unit"].shape[2] for given in sessions[0].calls} == {8}, "one batch shape"


def test_inputs_of_loras_stay_where_they_are_from_step_to_step(with_loras):
    engine, sessions = with_loras(WITH_LORAS)
    for strength in (0.5, 0.7):
        draw(engine, request("a cat", loras={"one": strength}))
    places = [{name: x.data_ptr() for name, x in given.items()} for given in sessions[0].calls]
    assert len(places) == 2 * STEPS and all(one == places[0] for one in places)


@pytest.mark.parametrize(
    ("shapes", "loras", "message"),
    [
        (SHAPES, FEW, r"LoRAs \(one\).*have no inputs for them; export the model with --lora-rank 16 --lora-slots 1,"),
        (
            [WITH_LORAS],
            {"larger": 1.0},
            "LoRA 'larger' takes 32 ranks .* take 16; export the model with --lora-rank 32",
        ),
        ([WITH_LORAS], MANY | {"larger": 0.1}, "uses 4 LoRAs .* take 3 per picture; .* --lora-slots 4"),
    ],
    ids=["no inputs", "rank", "number"],
)
def test_loras_that_graphs_can_not_apply_are_refused_with_the_option(with_loras, shapes, loras, message):
    engine, sessions = with_loras(*shapes)
    with pytest.raises(ExportError, match=message):
        engine.submit(request(loras=loras))
    assert not sessions and not engine.runner.conditions.loras.held


def test_loras_beside_a_style_for_which_no_graph_takes_them_are_refused_with_the_command(with_loras):
    engine, _ = with_loras(WITH_LORAS, SHAPES[1])
    message = (
        r"live graph \(references: 1, pictures per row: 0, LoRAs per row: 1 of rank 16\); available: plain "
        r"\(0, 0, 3 LoRAs of rank 16\), live \(1, 2\).*--flavour live --references 1 --lora-rank 16 --lora-slots 1`"
    )
    with pytest.raises(EngineMismatch, match=message):
        engine.submit(request(style=sf.StyleAligned(OTHER), loras=FEW))


def test_pools_that_grew_beyond_a_graph_are_refused_with_the_way_out(with_loras, monkeypatch):
    monkeypatch.setattr("stylefast.export.unet_graph._MOST_ELEMENTS", 2**13)
    engine, _ = with_loras(WITH_LORAS)
    with pytest.raises(EngineMismatch, match="units in layers of a kind, but the graph supports .*lora_memory"):
        draw(engine, request(loras=MANY))
    assert engine.runner.conditions.loras.held == 0


LONG = "a cat and a dog in neon style " * 10  # as many chunks as the words need


def test_texts_of_several_chunks_take_the_graph_that_has_room_for_them(make, in_torch):
    engine, sessions = make(SHAPES[0], GraphShape("plain", text_chunks=4))
    every = [request("a cat"), request(LONG, seed=2), request("a dog", negative_prompt=LONG)]
    close(draw(engine, every[0]), in_torch(every[0]))
    assert list(sessions) == [0]
    close(draw(engine, *every), in_torch(*every))
    given, text = sessions[1].calls[-1], engine.runner.conditions.text
    assert given["text_kv_0"].shape[3] == text.tokens > engine.text_encoder.max_tokens
    assert given["text_lengths"].data_ptr() == text.lengths.data_ptr()
    close(draw(engine, every[0]), in_torch(every[0]))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (SHAPES, r"2 chunks, .* --max-text-chunks 2"),
        ([GraphShape("plain", text_chunks=2)], "3 chunks, .* --max-text-chunks 3"),
    ],
    ids=["one chunk", "two chunks"],
)
def test_texts_that_are_too_long_are_refused_with_the_option(make, shapes, message):
    engine, sessions = make(*shapes)
    with pytest.raises(ExportError, match=message):
        engine.submit(request(LONG if shapes is SHAPES else 2 * LONG))
    assert not sessions


def test_long_texts_beside_a_style_for_which_no_graph_takes_them_are_refused_with_the_command(make):
    engine, _ = make(GraphShape("plain", text_chunks=2), SHAPES[1])
    with pytest.raises(EngineMismatch, match=r"chunks of text: 2\); available: .*2 chunks\).*--max-text-chunks 2`"):
        engine.submit(request(LONG, style=sf.StyleAligned(OTHER)))


# around it


def test_banks_are_baked_beside_graphs(make, torch_engine, bank, requests):
    engine, _ = make(*SHAPES)
    own = engine.bake(sf.StyleAligned(PICTURE), steps=STEPS, size=SIZE)
    for name, tensor in bank.tensors.items():
        assert torch.equal(tensor, own.tensors[name]), name
    apart(draw(engine, request(style=sf.StyleAligned(own))), draw(engine, request()))


def test_what_is_prepared_is_counted_and_freed_and_closing_closes_sessions(make, requests):
    engine, sessions = make(SHAPES[2])
    backend = engine.runner.backend
    assert backend.nbytes == 0
    draw(engine, *requests["plain"])
    idle = sum(x.nbytes for name, x in sessions[0].calls[0].items() if name.startswith(("image_kv", "mask", "page_")))
    assert backend.nbytes > idle + TorchSession.nbytes and engine.memory()["graphs"] == backend.nbytes
    backend.reset()
    assert backend.nbytes == TorchSession.nbytes
    engine.close()
    assert sessions[0].closed


def test_a_backend_of_ones_own_runs_the_steps(pipe):
    class Counting(TorchBackend):
        name, steps = "counting", 0

        def run(self, *arguments):
            self.steps += 1
            super().run(*arguments)

    engine = sf.Engine.from_pipeline(pipe, backend=Counting)
    draw(engine, request())
    assert (engine.runner.backend.name, engine.runner.backend.steps) == ("counting", STEPS)
    again = Counting(engine.unet)
    assert sf.Engine.from_pipeline(pipe, backend=again).runner.backend is again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cuda",), "backend is 'cuda'; choose one of auto, torch, compile, onnxruntime, tensorrt, aoti"),
        ((7,), "backend is 7; give a name"),
        (("torch", "/tmp/x"), "engines applies only to exported engines.*choose onnxruntime"),
        (("compile", None, "abc"), "trust applies only to exported engines"),
        (("tensorrt",), "needs engines=FOLDER.*stylefast export tensorrt"),
        ((TorchBackend, "/tmp/x"), "engines applies only to exported engines"),
    ],
    ids=["unknown", "a number", "engines for torch", "trust for compile", "no folder", "for ones own"],
)
def test_backends_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(InvalidRequest, match=message):
        check_backend(*arguments)


def test_a_function_that_makes_no_backend_is_refused(pipe):
    with pytest.raises(InvalidRequest, match="returned 3, which is not a runtime.backends.base.Backend"):
        sf.Engine.from_pipeline(pipe, backend=lambda unet: 3)
