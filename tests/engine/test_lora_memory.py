"""LoRAs on the device: what is kept gives way to what is needed, and tables always say where the factors lie."""

import gc

import pytest
import torch

import stylefast as sf
from stylefast.errors import OutOfMemory
from stylefast.models.row_loras import LEAST_WIDTH, NO_UNIT, table_width
from stylefast.runtime.loras import LoraPool
from stylefast.runtime.memory import row_bytes
from tests.support.scene import SIZE, sharp_pipeline
from tests.support.small_checkpoints import random_lora, write_peft_lora

COUNT = 6


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An engine with LoRAs of rank 16 named a to f, and a wide one of rank 100."""
    pipe, folder = sharp_pipeline(), tmp_path_factory.mktemp("loras")
    engine = sf.Engine.from_pipeline(pipe)
    for seed, name in enumerate("abcdef"):
        lora = random_lora(pipe, seed, rank=16, text=False, convolutions=seed % 2 == 1)
        engine.loras.add(write_peft_lora(lora, folder / f"{name}.safetensors"))
    engine.loras.add(write_peft_lora(random_lora(pipe, 9, rank=100, text=False), folder / "wide.safetensors"))
    return engine


def used(engine, *names):
    return [(engine.loras[name], engine.loras.factors(engine.loras[name])) for name in names]


def hold(pool, engine, *names):
    return pool.hold(used(engine, *names))


def release(pool, engine, *names):
    pool.release([engine.loras[name] for name in names])


def check(pool, engine, place, name):
    """The table's units of a place have the factors of that LoRA, in every layer."""
    layout, factors, rows = engine.unet.loras, engine.loras.factors(engine.loras[name]), pool.rows
    for layer, kind in enumerate(layout.kind_of):
        units = [unit for unit in rows.units[place, layer].tolist() if unit != NO_UNIT]
        start, count = factors.starts[layer], factors.counts[layer]
        assert len(units) == count
        assert torch.equal(rows.down[kind][units], factors.down[kind][start : start + count])
        assert torch.equal(rows.up[kind][units], factors.up[kind][start : start + count])


class ShortOf:
    """Stands before `torch.zeros` in this one thread: allocations of the given numbers run out of memory."""

    def __init__(self, monkeypatch, failing):
        self.count, made = 0, torch.zeros

        def zeros(*arguments, **named):
            self.count += 1
            if self.count in failing:
                raise torch.OutOfMemoryError("CUDA out of memory. (as on a full GPU)")
            return made(*arguments, **named)

        monkeypatch.setattr(torch, "zeros", zeros)


def test_pools_that_could_not_grow_hold_what_their_table_says(own, monkeypatch):
    for failing in range(1, 200):
        pool = LoraPool(own.unet)
        places = dict(zip("ab", hold(pool, own, "a", "b"), strict=True))
        with monkeypatch.context() as patch:
            # every attempt to grow fails, at the first pool, at the second, ...
            short = ShortOf(patch, range(failing, 10_000))
            try:
                hold(pool, own, "c", "d", "f", "wide")
            except torch.OutOfMemoryError:
                failed = True
            else:
                failed = False
        # one more small one, for which there was room before
        (places["e"],) = hold(pool, own, "e")
        for name, place in places.items():
            check(pool, own, place, name)
        if not failed:
            break
    assert not failed and short.count > 4 and pool.held == 7


def test_growth_that_does_not_fit_with_spare_room_takes_what_is_needed(own, monkeypatch):
    pool = LoraPool(own.unet)
    hold(pool, own, "a")
    release(pool, own, "a")
    before = pool.nbytes
    with monkeypatch.context() as patch:
        ShortOf(patch, {1})
        (place,) = hold(pool, own, "wide")
    check(pool, own, place, "wide")
    assert pool.resident == ["wide"] and pool.nbytes > before
    spare = LoraPool(own.unet)
    hold(spare, own, "wide")
    assert pool.nbytes - pool.rows.units.nbytes < 0.8 * (spare.nbytes - spare.rows.units.nbytes)


def test_a_wide_lora_widens_the_table_only_while_it_is_there(own):
    pool = LoraPool(own.unet)
    place, _ = hold(pool, own, "a", "wide")
    wide = table_width(own.loras["wide"].rank // 16)
    assert pool.rows.units.shape[2] == wide > LEAST_WIDTH
    # a batch without it reads a narrow table all the same
    narrow = pool.rows_for([own.loras["a"]])
    assert narrow.units.shape[2] == LEAST_WIDTH and narrow is pool.rows_for([own.loras["a"]])
    assert torch.equal(narrow.units, pool.rows.units[:, :, :LEAST_WIDTH])
    assert pool.rows_for([own.loras["a"], own.loras["wide"]]).units.shape[2] == wide
    release(pool, own, "wide")
    assert pool.shrink() and pool.rows.units.shape[2] == LEAST_WIDTH
    check(pool, own, place, "a")
    assert not pool.shrink()


def test_a_row_beside_a_wide_lora_pays_for_its_own_rank(own, monkeypatch):
    own.generate(sf.Request("a cat", steps=1, size=SIZE, loras={"wide": 1.0}), output="latents")
    seen = []
    forward = own.unet.forward
    monkeypatch.setattr(own.unet, "forward", lambda *a, **k: seen.append(k["loras"].unit.shape[2]) or forward(*a, **k))
    own.generate(sf.Request("a cat", steps=1, size=SIZE, loras={"a": 1.0}), output="latents")
    own.generate(sf.Request("a cat", steps=1, size=SIZE, loras={"a": 1.0, "wide": 0.5}), output="latents")
    assert seen == [LEAST_WIDTH, 2 * table_width(own.loras["wide"].rank // 16)]


def test_a_removed_lora_leaves_the_device_with_its_last_request(own, tmp_path):
    pool, file = own.runner.conditions.loras, own.loras["b"].path
    own.loras.add(file, "brief")
    request = sf.Request("a cat", steps=2, size=SIZE, loras={"brief": 1.0})
    own.generate(request, output="latents")
    assert "brief" in pool.resident
    own.loras.remove("brief")
    assert "brief" not in pool.resident
    own.loras.add(file, "brief")
    there = []

    def remove(*_):
        if "brief" in own.loras:
            own.loras.remove("brief")
        there.append("brief" in pool.resident)

    own.generate(request, output="latents", callback=remove)
    assert there[0] and "brief" not in pool.resident and pool.held == 0


def limited(pipe, room):
    """An engine with all LoRAs and about `room` bytes beside what an engine without any holds."""
    plain = sf.Engine.from_pipeline(pipe)
    plain.generate(sf.Request("a cat", steps=1, size=SIZE), output="latents")
    return sf.Engine.from_pipeline(pipe, memory_limit=plain.memory()["held"] + room)


def test_unused_loras_stay_within_the_limit_and_make_room_for_pictures(own, monkeypatch):
    pipe, files = sharp_pipeline(), {name: own.loras[name].path for name in own.loras}
    most = max(own.loras[name].nbytes for name in "abcdef")
    rows = 2 * row_bytes(own.unet, (SIZE[1] // 4, SIZE[0] // 4))
    side = 8
    while 2 * row_bytes(own.unet, (side, side)) < 4 * most:
        side += 2
    large = 2 * row_bytes(own.unet, (side, side))
    with limited(pipe, large + rows + most // 2) as engine:
        pool = engine.runner.conditions.loras
        for name in "abcdef":
            engine.loras.add(files[name], name)
        for name in "abcdef":
            engine.generate(sf.Request("a cat", steps=1, size=SIZE, loras={name: 1.0}), output="latents")
            assert engine.memory()["held"] <= engine.budget.limit
        assert len(pool.resident) > 1
        before = pool.nbytes
        assert engine.memory()["held"] + large > engine.budget.limit
        engine.generate(sf.Request("a cat", steps=1, size=(4 * side, 4 * side)), output="latents")
        assert pool.resident == [] and pool.nbytes < before


def test_loras_that_never_fit_are_refused_and_the_next_request_runs(own):
    rows = 4 * row_bytes(own.unet, (SIZE[1] // 4, SIZE[0] // 4))
    with limited(sharp_pipeline(), rows) as engine:
        engine.loras.add(own.loras["wide"].path)
        for _ in range(2):
            with pytest.raises(OutOfMemory, match="the LoRAs in use and 1 more take .* MiB are free for them"):
                engine.generate(sf.Request("a cat", steps=1, size=SIZE, loras={"wide": 1.0}), output="latents")
            engine.generate(sf.Request("a cat", steps=1, size=SIZE), output="latents")


@pytest.mark.parametrize("where", ["step", "encoders"])
def test_memory_that_runs_out_is_sought_in_unused_loras_first(own, monkeypatch, where):
    """As on a GPU without a limit, where only an allocation that fails tells."""
    pool = own.runner.conditions.loras
    own.generate(sf.Request("a cat", steps=1, size=SIZE, loras=dict.fromkeys("abc", 0.5)), output="latents")
    request = sf.Request(f"a dog, {where}", steps=1, size=SIZE, seed=4)
    thing, name = (own.unet, "forward") if where == "step" else (own.text_encoder, "encode")
    whole = getattr(thing, name)

    def short(*arguments, **named):
        if pool.resident:
            raise torch.OutOfMemoryError("CUDA out of memory. (as on a full GPU)")
        return whole(*arguments, **named)

    monkeypatch.setattr(thing, name, short)
    found = own.generate(request, output="latents").latents[0]
    assert pool.resident == []
    monkeypatch.undo()
    assert torch.equal(found, own.generate(request, output="latents").latents[0])


def test_memory_that_has_run_out_for_good_fails_that_request_alone(own, monkeypatch):
    own.generate(sf.Request("a cat", steps=1, size=SIZE, loras={"a": 0.5}), output="latents")

    def short(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. (as on a full GPU)")

    with monkeypatch.context() as patch:
        patch.setattr(own.unet, "forward", short)
        with pytest.raises(OutOfMemory, match="don't fit into memory even alone"):
            own.generate(sf.Request("a cat", steps=1, size=SIZE, loras={"a": 0.5}), output="latents")
    gc.collect()
    own.generate(sf.Request("a cat", steps=1, size=SIZE), output="latents")
    assert own.runner.conditions.loras.held == 0
