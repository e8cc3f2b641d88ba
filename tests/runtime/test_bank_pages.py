"""Pages of banks on their way to the device: through host blocks or straight, from every kind of storage."""

import threading
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stylefast as sf
from stylefast.errors import OutOfMemory, StyleError
from stylefast.kernels import registry
from stylefast.models import unet
from stylefast.models.unet import UNet
from stylefast.runtime.banks import bank_pages, host_pages
from stylefast.runtime.banks.bank_pages import BankPages, PageKey, idle_pages
from stylefast.runtime.banks.host_pages import chunk_of
from stylefast.runtime.banks.page_pool import PageLayout
from tests.support.fp64 import SEEDS_OF_ROUNDINGS, Measured, close, engine_of, nudged, wide
from tests.support.scene import sharp_pipeline
from tests.support.watch import WAIT, Calls, until

SETTINGS = {"steps": 4, "size": (48, 32)}
LATENTS = (8, 12)
MIB, GIB = 2**20, 2**30
KINDS = [("kv", "fp32"), ("kv", "fp16"), ("kv", "fp8"), ("hidden", "fp32"), ("hidden", "fp8")]


@pytest.fixture(scope="module")
def engine():
    return sf.Engine.from_pipeline(sharp_pipeline())


@pytest.fixture(scope="module")
def banks(engine):
    style = sf.StyleAligned(prompt="a dog", seed=4)
    return {kind: engine.bake(style, **SETTINGS, store=kind[0], dtype=kind[1]) for kind in KINDS}


def content(pages: BankPages, slot: int) -> list[torch.Tensor]:
    parts = [x[slot] for pair in pages.pages.layers for x in pair]
    parts += [x[:, slot] for x in (*pages.pages.means, *pages.pages.variances)]
    return parts + [x[slot] for x in (*pages.pages.norm_means, *pages.pages.norm_variances)]


def keys(bank, step):
    return [PageKey(bank, step, 0, 0), PageKey(bank, step, 3, 0)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " in ".join(kind))
def test_host_blocks_bring_the_same_pages_as_the_tensors_themselves(engine, banks, kind):
    straight, staged = BankPages(engine.unet, LATENTS, 4), BankPages(engine.unet, LATENTS, 4, host_room=2**22)
    for step in range(SETTINGS["steps"]):
        wanted = keys(banks[kind], step)
        if step + 1 < SETTINGS["steps"]:
            staged.prefetch((), keys(banks[kind], step + 1))
        slots, others = straight.hold(wanted), staged.hold(wanted)
        for slot, other in zip(slots, others):
            for a, b in zip(content(straight, slot), content(staged, other), strict=True):
                assert torch.equal(a, b)
        straight.release(wanted)
        staged.release(wanted)
    assert staged.stats().pinned == 0 and staged._host.stats().pinned == 0
    staged.close()


@pytest.mark.parametrize("host_room", [0, 2**22], ids=["straight", "through host blocks"])
def test_pages_come_from_a_banks_file_and_one_that_was_cut_short_stops_its_readers_alone(
    engine, banks, tmp_path, host_room
):
    kept = banks["kv", "fp16"]
    stored = sf.StyleBank.load(kept.save(tmp_path / "brand.bank"))
    pages = BankPages(engine.unet, LATENTS, 8, host_room=host_room)
    slots, wanted = pages.hold(keys(stored, 0)), pages.hold(keys(kept, 0))
    for slot, other in zip(slots, wanted):
        assert all(torch.equal(a, b) for a, b in zip(content(pages, slot), content(pages, other), strict=True))
    with open(stored.path, "r+b") as file:
        file.truncate(stored.path.stat().st_size // 3)
    pages.prefetch((), keys(stored, 1))
    for _ in range(2):
        with pytest.raises(StyleError, match="brand.bank was written to while it was in use"):
            pages.hold(keys(stored, 1))
    pages.hold(keys(kept, 1))
    for held in (keys(stored, 0), keys(kept, 0), keys(kept, 1)):
        pages.release(held)
    assert pages.stats().pinned == 0 and (not host_room or pages._host.stats().pinned == 0)
    pages.close()


# the first pages of a request, brought before it joins


def staged(pages: BankPages, *wanted) -> None:
    for call in pages.stage(*wanted):
        call()


@pytest.mark.parametrize("host_room", [0, 2**22], ids=["straight", "through host blocks"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: " in ".join(kind))
def test_a_step_finds_the_pages_that_were_brought_before_it(engine, banks, kind, host_room):
    straight, pages = BankPages(engine.unet, LATENTS, 4), BankPages(engine.unet, LATENTS, 4, host_room=host_room)
    staged(pages, keys(banks[kind], 0), keys(banks[kind], 1))
    assert pages.stats().resident == 2 and pages.stats().pinned == 0 and pages.stats().loading == 0
    slots, others = pages.hold(keys(banks[kind], 0)), straight.hold(keys(banks[kind], 0))
    assert pages.stats().misses == 0, "the step loaded them itself"
    for slot, other in zip(slots, others):
        assert all(torch.equal(a, b) for a, b in zip(content(pages, slot), content(straight, other), strict=True))
    assert list(pages.stage(keys(banks[kind], 0))) == [], "pages that are here are not brought again"
    pages.release(keys(banks[kind], 0))
    if host_room:
        numbers = bank_pages._numbers([*keys(banks[kind], 0), *keys(banks[kind], 1)])
        assert all(map(pages._host.holds, numbers)) and pages._host.stats().pinned == 0
    pages.close()


@pytest.mark.parametrize("host_room", [0, 1], ids=["straight", "through one host block"])
def test_a_pool_too_small_for_the_first_pages_takes_those_that_fit(engine, banks, host_room):
    bank, page = banks[KINDS[0]], PageLayout(engine.unet, LATENTS, torch.float32).nbytes
    pages = BankPages(engine.unet, LATENTS, 3, host_room=host_room * page)
    pages.hold(keys(bank, 3))
    staged(pages, keys(bank, 0), keys(bank, 1))
    stats = pages.stats()
    assert (stats.resident, stats.pinned, stats.loading) == (3, 2, 0)
    with pytest.raises(OutOfMemory, match="2 pages.*3 fit"):
        pages.hold(keys(bank, 0))
    pages.release(keys(bank, 3))
    assert len(pages.hold(keys(bank, 0))) == 2
    pages.release(keys(bank, 0))
    assert pages.stats().pinned == 0
    pages.close()


@pytest.mark.parametrize("host_room", [0, 2**22], ids=["straight", "through host blocks"])
def test_nothing_is_held_when_the_first_pages_are_not_wanted_any_more_or_can_not_be_read(
    engine, banks, tmp_path, host_room
):
    stored = sf.StyleBank.load(banks[KINDS[1]].save(tmp_path / "brand.bank"))
    pages = BankPages(engine.unet, LATENTS, 4, host_room=host_room)
    begun = pages.stage(keys(stored, 0))
    next(begun)
    begun.close()
    assert pages.stats().pinned == pages.stats().loading == 0
    with open(stored.path, "r+b") as file:
        file.truncate(stored.path.stat().st_size // 3)
    with pytest.raises(StyleError, match="brand.bank was written to while it was in use"):
        staged(pages, keys(stored, 2))
    with pytest.raises(StyleError, match="brand.bank was written to while it was in use"):
        pages.hold(keys(stored, 2))
    assert pages.stats().pinned == pages.stats().loading == 0
    if host_room:  # what was begun and then not wanted comes to its end
        begun = bank_pages._numbers([*keys(stored, 0), *keys(stored, 2)])
        assert until(lambda: not pages._host.loading(begun))
        assert pages._host.stats().pinned == pages._host.stats().loading == 0
    pages.close()


class SlowCopy:
    """Stands before the copying of pages: the first waits for `go`, and fails then if `fails`."""

    def __init__(self, monkeypatch, fails=False):
        self.begun, self.go, copy_all = threading.Event(), threading.Event(), bank_pages._copy_all

        def slow(*lists):
            if not self.begun.is_set():
                self.begun.set()
                assert self.go.wait(WAIT)
                if fails:
                    raise OSError("the disk is gone")
            copy_all(*lists)

        monkeypatch.setattr(bank_pages, "_copy_all", slow)


@pytest.mark.parametrize("fails", [False, True], ids=["that comes", "that does not come"])
def test_a_step_waits_for_a_page_that_is_being_brought(engine, banks, monkeypatch, fails):
    bank, copy = banks[KINDS[0]], SlowCopy(monkeypatch, fails)
    pages = BankPages(engine.unet, LATENTS, 2)
    bringing = Calls(lambda: staged(pages, keys(bank, 0)))
    assert copy.begun.wait(WAIT)
    holding = Calls(lambda: pages.hold(keys(bank, 0)))
    assert until(lambda: pages.stats().pinned == 2)
    copy.go.set()
    (slots,), (error,) = holding.wait(), bringing.wait()
    assert sorted(slots) == [0, 1] and (isinstance(error, OSError) if fails else error is None)
    assert pages.stats().resident == 2 and pages.stats().loading == 0


def test_slots_do_not_move_below_a_page_that_is_being_brought(engine, banks, monkeypatch):
    bank, copy = banks[KINDS[0]], SlowCopy(monkeypatch)
    pages, straight = BankPages(engine.unet, LATENTS, 2), BankPages(engine.unet, LATENTS, 2)
    allocate, made = pages.layout.allocate, []
    monkeypatch.setattr(pages.layout, "allocate", lambda *args: made.append(copy.go.is_set()) or allocate(*args))
    bringing = Calls(lambda: staged(pages, keys(bank, 0)))
    assert copy.begun.wait(WAIT)
    started = threading.Event()
    growing = Calls(lambda: started.set() or pages.grow(4))
    assert started.wait(WAIT)
    copy.go.set()
    assert growing.wait() == bringing.wait() == [None] and made == [True] and pages.slots == 4
    slots, others = pages.hold(keys(bank, 0)), straight.hold(keys(bank, 0))
    for slot, other in zip(slots, others):
        assert all(torch.equal(a, b) for a, b in zip(content(pages, slot), content(straight, other), strict=True))


@pytest.fixture
def on_a_gpu(engine, monkeypatch):
    """A pool with host blocks and a stand-in for its stream; `log` has what waited for it."""
    log = []
    stream = SimpleNamespace(synchronize=lambda: log.append("the host"))
    current = SimpleNamespace(wait_stream=lambda other: log.append("the steps"))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(bank_pages, "_event", lambda stream: SimpleNamespace(query=lambda: True))
    pages = BankPages(engine.unet, LATENTS, 8, host_room=2**22)
    pages._stream, pages.log = stream, log
    yield pages
    pages.close()


def test_the_first_pages_come_through_pinned_memory_on_a_gpu(on_a_gpu, engine, banks, monkeypatch):
    straight, bank = BankPages(engine.unet, LATENTS, 4), banks[KINDS[0]]
    slots = straight.hold(keys(bank, 0))
    monkeypatch.setattr(bank_pages, "_copy_all", None)
    staged(on_a_gpu, keys(bank, 0), keys(bank, 1))
    assert on_a_gpu.stats().resident == 2 and on_a_gpu.log == ["the steps"], "the host waits for no copy"
    for slot, other in zip(on_a_gpu.hold(keys(bank, 0)), slots):
        assert all(torch.equal(a, b) for a, b in zip(content(on_a_gpu, slot), content(straight, other), strict=True))
    on_a_gpu.prefetch(keys(bank, 1))
    assert on_a_gpu.stats().resident == 4 and on_a_gpu.stats().misses == 0
    on_a_gpu.release(keys(bank, 0))
    assert on_a_gpu.stats().pinned == on_a_gpu._host.stats().pinned == 0


def test_the_first_pages_come_straight_where_nothing_can_be_pinned(on_a_gpu, banks):
    on_a_gpu._host._refused = True
    staged(on_a_gpu, keys(banks[KINDS[2]], 0))
    assert on_a_gpu.stats().resident == 2 and on_a_gpu.log == ["the host"] * 2, "a step must find a page complete"
    assert on_a_gpu._host.stats().loading == on_a_gpu._host.stats().pinned == 0


def test_pages_that_are_still_being_read_are_left_to_their_step(on_a_gpu, banks, monkeypatch):
    bank, go, copy_blocks = banks[KINDS[0]], threading.Event(), host_pages.copy_blocks
    monkeypatch.setattr(host_pages, "copy_blocks", lambda *lists: (go.wait(WAIT), copy_blocks(*lists)))
    on_a_gpu.prefetch((), keys(bank, 2))
    on_a_gpu.prefetch(keys(bank, 2))
    assert on_a_gpu.awaited(keys(bank, 2)) and on_a_gpu.stats().resident == on_a_gpu.stats().loading == 0
    assert not on_a_gpu.awaited(keys(bank, 3)), "a step reads what nobody has begun to read"
    go.set()
    assert until(lambda: not on_a_gpu.awaited(keys(bank, 2)))
    on_a_gpu.prefetch(keys(bank, 2))
    assert on_a_gpu.stats().resident == 2 and not on_a_gpu.awaited(keys(bank, 2))


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(KINDS[1], 1e-3), (KINDS[2], 0.07), (KINDS[4], 0.1)],
    ids=lambda x: " in ".join(x) if isinstance(x, tuple) else "",
)
def test_every_narrow_kind_of_storage_becomes_the_models_own(engine, banks, kind, tolerance):
    pages = BankPages(engine.unet, LATENTS, 8)
    plain, other = (pages.hold(keys(banks[k], 2)) for k in (KINDS[0], kind))
    for a, b in zip(plain, other):
        for x, y in zip(content(pages, a), content(pages, b), strict=True):
            assert (x - y).abs().max() <= tolerance * x.abs().max()


def test_pages_of_states_are_as_near_to_fp64_as_those_of_keys_and_values(engine, banks):
    def of(kind, change, *further):
        with registry.using("torch"):  # the one form that takes fp64
            pages = BankPages(engine_of(change(sharp_pipeline(), *further)).unet, LATENTS, 8)
            return [part for slot in pages.hold(keys(banks[kind], 2)) for part in content(pages, slot)]

    states = partial(of, KINDS[3])
    roundings = [partial(states, nudged, seed) for seed in SEEDS_OF_ROUNDINGS]
    kept = Measured(of(KINDS[0], lambda pipe: pipe), partial(states, wide), roundings)
    pages = BankPages(engine.unet, LATENTS, 8)
    found = [part for slot in pages.hold(keys(banks[KINDS[3]], 2)) for part in content(pages, slot)]
    assert len(found) == len(kept.value)
    for i, part in enumerate(found):
        close(part, kept[i])


def test_pages_stay_until_room_is_wanted(engine, banks):
    bank = banks[KINDS[0]]
    pages = BankPages(engine.unet, LATENTS, 4)
    for step in (0, 1, 0, 1):
        pages.release(keys(bank, step)) if pages.hold(keys(bank, step)) is not None else None
    stats = pages.stats()
    assert (stats.hits, stats.misses, stats.evictions, stats.resident) == (4, 4, 0, 4)
    pages.hold(keys(bank, 2))
    assert pages.stats().evictions == 2
    pages.release(keys(bank, 2))
    pages.drop(bank)
    assert pages.stats().resident == 0


def test_a_page_that_two_rows_want_is_brought_once(engine, banks):
    pages = BankPages(engine.unet, LATENTS, 2)
    wanted = keys(banks[KINDS[0]], 0) * 3
    slots = pages.hold(wanted)
    assert len(set(slots.tolist())) == 2 and pages.stats().misses == 2
    pages.release(wanted)
    assert pages.stats().pinned == 0


def test_more_pages_than_slots_are_refused_and_nothing_stays_pinned(engine, banks):
    pages = BankPages(engine.unet, LATENTS, 3)
    bank = banks[KINDS[0]]
    with pytest.raises(OutOfMemory, match="4 pages.*12x8.*3 fit.*bank_memory"):
        pages.hold(keys(bank, 0) + keys(bank, 1))
    assert pages.stats().pinned == 0
    assert len(pages.hold(keys(bank, 0))) == 2


def test_a_bank_that_can_not_be_read_leaves_the_pool_as_it_was(engine, banks):
    bank = banks[KINDS[0]]
    pages = BankPages(engine.unet, LATENTS, 4)
    with pytest.raises(IndexError):
        pages.hold([PageKey(bank, 0, 0, 0), PageKey(bank, 99, 0, 0)])
    assert pages.stats().pinned == 0 and pages.stats().loading == 0
    pages.release(keys(bank, 0)) if pages.hold(keys(bank, 0)) is not None else None
    assert pages.stats().resident >= 2


def test_attention_reads_a_banks_keys_and_values_where_they_lie(engine, banks, monkeypatch):
    """No layer copies a page: its kernel gets views of the pool."""
    read, attention = [], unet.shared_attention.run

    def watched(*arguments):
        read.extend(x.untyped_storage().data_ptr() for x in tree_leaves(arguments) if isinstance(x, torch.Tensor))
        return attention(*arguments)

    monkeypatch.setattr(unet.shared_attention, "run", watched)
    engine.generate("a cat", sf.StyleAligned(banks[KINDS[0]]), output="latents", **SETTINGS)
    held = {x.untyped_storage().data_ptr() for pair in engine.runner.bank_pages[LATENTS].pages.layers for x in pair}
    assert sum(x in held for x in read) == 2 * SETTINGS["steps"] * len(engine.unet.layout.layers)


def test_keys_lie_with_the_token_stride_of_the_batch(engine):
    pages = BankPages(engine.unet, LATENTS, 2)
    for layer, (k, v) in zip(engine.unet.layout.layers, pages.pages.layers):
        for x in (k, v):
            assert x.stride(1) == layer.channels and x.stride(3) == 1
            assert x.data_ptr() % 64 == 0 and x.stride(0) * x.element_size() % 64 == 0


@pytest.mark.parametrize(("dtype", "store"), [(torch.float16, "kv"), (torch.float8_e4m3fn, "hidden")], ids=str)
def test_a_layout_places_its_tensors_apart(engine, dtype, store):
    layout = PageLayout(engine.unet, LATENTS, dtype, store)
    parts = layout.split(torch.zeros(1, layout.nbytes, dtype=torch.uint8))
    layers, norms = range(len(engine.unet.layout.layers)), range(len(layout.norm_elements))
    kinds = [("values", layers), ("stats", layers), ("norm", norms)]
    count = 0
    for what, indices in kinds + ([("scale", layers)] if dtype == torch.float8_e4m3fn else []):
        for i in indices:
            view = layout.view(parts, what, i)
            assert not view.float().any(), "tensors of a block overlap"
            view.fill_(1)
            count += view.nbytes
    assert count == sum(part.nbytes for part in layout.parts) <= layout.nbytes < count + 64 * len(layout.parts)
    assert all(part.start % 64 == 0 for part in layout.parts)


def test_pages_of_a_model_in_half_precision(engine, banks):
    pipe = sharp_pipeline()
    unet = UNet.from_state(dict(pipe.unet.config), {k: v.bfloat16() for k, v in pipe.unet.state_dict().items()})
    pages = BankPages(unet, LATENTS, 2)
    slots = pages.hold(keys(banks[KINDS[0]], 1))
    k = banks[KINDS[0]].tensors["kv.0"][1, 0, 0, 0]
    assert torch.equal(pages.pages.layers[0][0][slots[0]], k.bfloat16())
    assert np.unique(slots).size == 2


@pytest.mark.parametrize("options", [{}, {"batch_buckets": (2, 4)}], ids=["batches as they come", "batches in buckets"])
def test_a_request_without_a_bank_takes_no_room_for_pages(options):
    engine = sf.Engine.from_pipeline(sharp_pipeline(), **options)
    engine.generate("a cat", output="latents", **SETTINGS)
    assert engine.runner.bank_pages == {}


def test_the_pool_has_room_for_the_banks_that_were_read_and_grows_with_others(engine, banks):
    runner, each = engine.runner, 2 * SETTINGS["steps"]

    def live(change, *further):
        style = sf.StyleAligned(prompt="a dog", seed=4)
        with registry.using("torch"):  # the one form that takes fp64
            other = engine_of(change(sharp_pipeline(), *further))
            return other.generate("a cat", style, output="latents", **SETTINGS).latents[0]

    def read(*kinds):
        requests = [sf.Request("a cat", style=sf.StyleAligned(banks[kind]), **SETTINGS) for kind in kinds]
        latents = engine.generate(requests, output="latents").latents
        return latents, runner.bank_pages[LATENTS]

    alone, pool = read(KINDS[0])
    assert pool.slots == each and pool.nbytes == each * sum(part.nbytes for part in pool.layout.parts)
    read(KINDS[0])
    assert pool.slots == each and pool.stats().misses == each - 2  # all were there, two before the first step
    before = pool.pages
    both, same = read(KINDS[1], KINDS[0])
    assert same is pool and pool.slots == len(pool.pages.layers[0][0]) == 2 * each and pool.pages is not before
    roundings = [partial(live, nudged, seed) for seed in SEEDS_OF_ROUNDINGS]
    close(both[1], Measured(alone[0], partial(live, wide), roundings))
    read(KINDS[2])
    assert pool.slots == 4 * each, "it grows to twice its size, not for every bank"
    assert runner.unet.device.type == "cpu" and pool.host_bytes == 0


def test_a_pool_that_can_not_grow_serves_its_banks_all_the_same(banks, monkeypatch):
    engine = sf.Engine.from_pipeline(sharp_pipeline())
    read = [sf.Request("a cat", style=sf.StyleAligned(banks[kind]), **SETTINGS) for kind in KINDS[:2]]
    expected = engine.generate(read[1], output="latents").latents
    engine = sf.Engine.from_pipeline(sharp_pipeline())
    engine.generate(read[0], output="latents")
    (pool,) = engine.runner.bank_pages.values()
    allocate, sizes = pool.layout.allocate, []

    def scarce(pages, device):
        sizes.append(pages)
        if pages > 8:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return allocate(pages, device)

    monkeypatch.setattr(pool.layout, "allocate", scarce)
    monkeypatch.setattr(engine.runner, "make_room", lambda: False)
    with pytest.raises(OutOfMemory):
        engine.generate(read[1], output="latents")
    assert sizes == [16, 8] and pool.slots == 8
    (latents,) = engine.generate(read[1], output="latents").latents
    assert torch.equal(latents, expected[0]) and sizes == [16, 8]


def test_other_pools_and_the_budget_bound_what_a_pool_grows_to(banks):
    page = PageLayout(sf.Engine.from_pipeline(sharp_pipeline()).unet, LATENTS, torch.float32).nbytes
    engine = sf.Engine.from_pipeline(sharp_pipeline(), bank_memory=11 * page)
    for kind in KINDS[:2]:
        engine.generate(sf.Request("a cat", style=sf.StyleAligned(banks[kind]), **SETTINGS), output="latents")
    assert engine.runner.bank_pages[LATENTS].slots == 11


@pytest.mark.parametrize(
    ("block", "room", "pinned", "expected"),
    [
        (402 * MIB, 30 * GIB, True, (1, 512 * MIB)),  # a page of SDXL; two would leave as much of 1 GiB unused
        (100 * MIB, 30 * GIB, True, (5, 512 * MIB)),
        (70 * MIB, 30 * GIB, True, (7, 512 * MIB)),
        (100 * MIB, 500 * MIB, True, (1, 128 * MIB)),
        (1500 * MIB, 30 * GIB, True, (1, 2 * GIB)),  # larger than a chunk should be, and yet one piece
        (100 * MIB, 127 * MIB, True, (0, 0)),
        (128 * MIB, 30 * GIB, True, (1, 128 * MIB)),
        (100 * MIB, 350 * MIB, False, (1, 100 * MIB)),
    ],
    ids=lambda value: value if isinstance(value, bool) else str(value if isinstance(value, tuple) else value // MIB),
)
def test_pinned_memory_is_taken_in_chunks_of_which_little_is_lost_to_rounding(block, room, pinned, expected):
    assert chunk_of(block, room, pinned) == expected


def test_host_memory_is_taken_when_it_is_wanted_a_chunk_at_a_time_by_threads_of_its_own(engine, banks, monkeypatch):
    bank, made = banks[KINDS[0]], []
    pages = BankPages(engine.unet, LATENTS, 4, host_room=6 * PageLayout(engine.unet, LATENTS, torch.float32).nbytes)
    empty = torch.empty

    def counted(*shape, **options):
        made.append(threading.current_thread().name) if "pin_memory" in options else None
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", counted)
    assert pages.host_bytes == 0 and pages._host.blocks == 6
    pages.prefetch((), keys(bank, 0))
    pages.release(keys(bank, 0)) if pages.hold(keys(bank, 0)) is not None else None
    assert pages.host_bytes == 2 * pages.layout.nbytes
    pages.prefetch((), keys(bank, 1))
    pages.hold(keys(bank, 1))
    assert pages.host_bytes == 4 * pages.layout.nbytes and len(made) == 4
    # a page that nobody has announced does not wait for memory
    pages.release(keys(bank, 1))
    pages.release(keys(bank, 2)) if pages.hold(keys(bank, 2)) is not None else None
    assert until(lambda: pages.host_bytes == 5 * pages.layout.nbytes) and pages._host.stats().pinned == 0
    pages.close()
    assert all(name.startswith("stylefast-pages") for name in made) and len(made) == 5


def test_where_no_more_memory_can_be_pinned_pages_come_from_their_banks_and_that_is_said_once(
    engine, banks, monkeypatch, caplog
):
    bank, empty, left = banks[KINDS[0]], torch.empty, [1]
    pages = BankPages(engine.unet, LATENTS, 8, host_room=8 * PageLayout(engine.unet, LATENTS, torch.float32).nbytes)

    def scarce(*shape, **options):
        if "pin_memory" in options:
            if not left:
                raise RuntimeError("CUDA error: out of memory")
            left.pop()
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", scarce)
    straight = BankPages(engine.unet, LATENTS, 8)
    for step in range(SETTINGS["steps"]):
        pages.prefetch((), keys(bank, step))
        slots, others = pages.hold(keys(bank, step)), straight.hold(keys(bank, step))
        for a, b in zip(content(pages, slots[1]), content(straight, others[1]), strict=True):
            assert torch.equal(a, b)
    assert pages.host_bytes == pages.layout.nbytes and caplog.text.count("could be pinned") == 1
    assert pages._host.stats().loading == 0
    pages.close()


def test_idle_pages_look_like_real_ones_in_the_room_of_one(engine):
    real, idle = BankPages(engine.unet, LATENTS, 2), idle_pages(engine.unet, LATENTS)

    def looks(pages):
        tensors = [*(x for pair in pages.layers for x in pair), *pages.means, *pages.variances]
        tensors += [*pages.norm_means, *pages.norm_variances]
        return [(x.shape, x.stride(), x.dtype) for x in tensors]

    assert looks(idle) == looks(real.pages) and idle.norm_elements == real.pages.norm_elements
    held = idle.layers[0][0].untyped_storage()
    assert held.nbytes() < 0.75 * real.nbytes
    assert all(x.untyped_storage().data_ptr() == held.data_ptr() for pair in idle.layers for x in pair)


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view  # of the operations that are more than another look at the same memory
        return function(*args, **kwargs or {})


def test_an_fp8_page_is_unpacked_in_a_few_launches_however_many_layers_it_has(engine, banks):
    """On a GPU every operation is a launch; layer by layer they were hundreds for a page of SDXL."""
    pages = BankPages(engine.unet, LATENTS, 4)
    bank = banks[KINDS[2]]
    layout = pages._layout_of(bank)
    parts = layout.allocate(1, engine.unet.device)
    with torch.inference_mode(), Called() as called:
        pages._unpack(bank, layout, parts, 0)
    assert called.count <= len(pages.layout.parts) < len(engine.unet.layout.layers)
