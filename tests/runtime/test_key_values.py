"""Pages of keys and values, and slots of latents: shared, taken back, and whole after a failure."""

import numpy as np
import pytest
import torch

from stylefast.errors import OutOfMemory
from stylefast.models.layout import AttentionLayout
from stylefast.runtime.backends.base import LatentSlots
from stylefast.runtime.steps.conditions import FIRST_PAGES, IDLE_PAGES, KeyValuePages
from tests.support.small_sdxl import small_unet_config
from tests.support.watch import forget_idle

TOKENS = 7


@pytest.fixture(scope="module")
def layout() -> AttentionLayout:
    return AttentionLayout.from_config(small_unet_config())


@pytest.fixture
def pages(layout):
    return KeyValuePages(layout, TOKENS, 3, torch.device("cpu"), torch.float32)


def values(layout, count, tokens=TOKENS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, tokens, layer.heads, layer.channels // layer.heads) for layer in layout.layers]
    return [(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)) for shape in shapes]


def test_a_page_is_found_by_its_key_and_holds_what_was_stored(pages, layout):
    stored, extra = values(layout, 2), torch.arange(6.0).view(2, 3)
    places = pages.add(["a", "b"], stored, extra)
    assert pages.find("a") == places[0] and pages.find("c") is None
    for (k, v), (key, value) in zip(pages.layers, stored):
        assert torch.equal(k[places], key) and torch.equal(v[places], value)
    assert torch.equal(pages.extra[places], extra) and pages.lengths[places].tolist() == [TOKENS] * 2


def test_a_page_stays_as_long_as_one_user_is_left_and_is_found_after_that(pages, layout):
    (place,) = pages.add(["a"], values(layout, 1))
    pages.find("a")
    pages.release([place])
    assert pages.used == 1
    pages.release([place])
    assert pages.used == 0 and pages.find("a") == place and pages.used == 1


def test_idle_pages_are_taken_oldest_first_before_the_buffers_grow(pages, layout):
    places = pages.add([*range(FIRST_PAGES)], values(layout, FIRST_PAGES))
    pages.release([places[3]])
    pages.release([places[1]])
    assert pages.add(["new"], values(layout, 1)) == [places[3]]
    assert pages.generation == 1 and pages.find(3) is None and pages.find(1) == places[1]


def test_growing_keeps_what_is_stored_and_says_so(pages, layout):
    first = values(layout, FIRST_PAGES)
    places = pages.add([*range(FIRST_PAGES)], first)
    generation = pages.generation
    pages.add(["more"], values(layout, 1, seed=1))
    assert pages.generation == generation + 1 and len(pages) == 2 * FIRST_PAGES
    assert all(torch.equal(k[places], key) for (k, _), (key, _) in zip(pages.layers, first))


def test_longer_pages_widen_all_and_shorter_ones_know_their_length(pages, layout):
    (short,) = pages.add(["short"], values(layout, 1))
    (long,) = pages.add(["long"], values(layout, 1, tokens=TOKENS + 4))
    assert pages.lengths[[short, long]].tolist() == [TOKENS, TOKENS + 4] and pages.tokens == TOKENS + 4


def test_unused_long_pages_are_forgotten_on_demand_and_the_others_keep_their_values(pages, layout):
    stored = values(layout, 1)
    (short,) = pages.add(["short"], stored, torch.ones(1, 3))
    (long,) = pages.add(["long"], values(layout, 1, tokens=TOKENS + 4))
    before, generation = pages.nbytes, pages.generation
    assert not pages.shrink() and pages.generation == generation, "the long page is in use"
    pages.release([long])
    assert pages.shrink() and pages.tokens == TOKENS and pages.nbytes < before and pages.generation > generation
    assert pages.find("long") is None and pages.find("short") == short and not pages.any_shorter(np.array([short]))
    assert all(torch.equal(k[short], key[0]) for (k, _), (key, _) in zip(pages.layers, stored))
    assert pages.extra[short].tolist() == [1, 1, 1] and not pages.shrink()
    # operations read the lengths of all pages, of free ones too
    assert int(pages.lengths.max()) <= TOKENS and pages._lengths.tolist() == pages.lengths.tolist()


def test_unused_pages_beyond_the_first_are_forgotten_on_demand_and_those_in_use_keep_their_places(pages, layout):
    stored = values(layout, FIRST_PAGES)
    places = pages.add([*range(FIRST_PAGES)], stored)
    (last,) = pages.add(["last"], values(layout, 1, seed=1))
    pages.release(places)
    assert len(pages) == 2 * FIRST_PAGES and last == FIRST_PAGES
    assert pages.shrink() and len(pages) == last + 1 and not pages.shrink(), "the last page is in use"
    pages.release([last])
    assert pages.shrink() and len(pages) == FIRST_PAGES and pages.find("last") is None and not pages.shrink()
    assert [pages.find(key) for key in range(FIRST_PAGES)] == places
    assert all(torch.equal(k[places], key) for (k, _), (key, _) in zip(pages.layers, stored))
    pages.add(["more"], values(layout, 1))
    assert len(pages) == 2 * FIRST_PAGES


def test_buffers_grow_only_where_there_is_room(pages, layout):
    def check_room(nbytes):
        asked.append(nbytes)
        raise OutOfMemory("no room")

    asked: list[int] = []
    pages.add(["short"], values(layout, 1))
    pages.check_room = check_room
    with pytest.raises(OutOfMemory):
        pages.add(["long"], values(layout, 1, tokens=TOKENS + 4))
    assert asked == [pages.nbytes_with(TOKENS + 4)] and pages.tokens == TOKENS and pages.find("short") == 0
    kept = sum(x.numel() * x.element_size() for x in pages.by_level)
    assert pages.nbytes_with(3) == kept and asked[0] == kept // TOKENS * (TOKENS + 4)


def test_the_host_knows_whether_a_page_is_shorter_than_the_buffers(pages, layout):
    first = pages.add(["a", "b"], values(layout, 2))
    assert not pages.uneven and not pages.any_shorter(np.array(first))
    (long,) = pages.add(["long"], values(layout, 1, tokens=TOKENS + 4))
    assert pages.uneven and pages.any_shorter(np.array(first)) and pages.any_shorter(np.array([long, first[1]]))
    assert not pages.any_shorter(np.array([long, long]))
    more = pages.add([*range(FIRST_PAGES)], values(layout, FIRST_PAGES, tokens=TOKENS + 4))
    assert len(pages) > FIRST_PAGES and not pages.any_shorter(np.array([long, *more]))
    pages.release([long])
    forget_idle(pages)
    assert pages.add(["short"], values(layout, 1)) == [long] and pages.any_shorter(np.array([long]))


def test_a_first_page_shorter_than_the_buffers_makes_them_uneven(pages, layout):
    (short,) = pages.add(["short"], values(layout, 1, tokens=TOKENS - 2))
    assert pages.uneven and pages.any_shorter(np.array([short])) and pages.lengths[short] == TOKENS - 2


def test_layers_without_values_read_zeros_even_on_a_used_page(pages, layout):
    (place,) = pages.add(["a"], values(layout, 1))
    pages.release([place])
    forget_idle(pages)
    again = pages.add(["b"], [None, *values(layout, 1)[1:]])
    assert again == [place] and not pages.layers[0][0][place].any()


def test_no_more_than_so_many_idle_pages_are_kept(pages, layout):
    count = IDLE_PAGES + 9
    places = pages.add([*range(count)], values(layout, count))
    pages.release(places)
    assert sum(pages.find(key) is not None for key in range(count)) == IDLE_PAGES
    assert pages.find(8) is None and pages.used == IDLE_PAGES


def test_pages_that_could_not_be_written_are_free_again(pages, layout):
    broken = values(layout, 2)
    broken[-1] = (torch.zeros(2, TOKENS, 1, 1, 1), broken[-1][1])
    with pytest.raises(RuntimeError):
        pages.add(["a", "b"], broken)
    assert pages.used == 0 and pages.find("a") is None
    pages.add([*range(FIRST_PAGES)], values(layout, FIRST_PAGES))
    assert len(pages) == FIRST_PAGES


# latents


@pytest.fixture
def slots():
    return LatentSlots((4, 3, 5), torch.device("cpu"))


def test_slots_are_handed_out_without_slot_zero_and_taken_back(slots):
    first = slots.take(torch.ones(3, 4, 3, 5))
    assert 0 not in first and slots.used == 3 and (slots.latents[first] == 1).all() and not slots.latents[0].any()
    slots.history[first], slots.anchor[first], slots.finite[first] = 2, 2, False
    slots.release(first)
    again = slots.take(torch.zeros(3, 4, 3, 5))
    assert sorted(again) == sorted(first)
    assert not slots.history[again].any() and not slots.anchor[again].any() and slots.finite[again].all()


def test_slots_grow_and_keep_what_they_hold(slots):
    first = slots.take(torch.randn(5, 4, 3, 5))
    before, generation = slots.latents[first].clone(), slots.generation
    more = slots.take(torch.randn(30, 4, 3, 5))
    assert torch.equal(slots.latents[first], before) and slots.generation > generation
    assert not set(first) & set(more) and slots.used == 35


@pytest.mark.parametrize("failing", range(4))
def test_slots_that_could_not_grow_are_as_they_were(slots, monkeypatch, failing):
    held = slots.take(torch.ones(3, 4, 3, 5))
    calls, new_zeros = [], torch.Tensor.new_zeros

    def out_of_memory(*arguments, **named):
        calls.append(1)
        if len(calls) == failing + 1:
            raise torch.OutOfMemoryError("no room")
        return new_zeros(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "new_zeros", out_of_memory)
        slots.take(torch.ones(30, 4, 3, 5))
    assert slots.used == 3
    later = slots.take(torch.ones(30, 4, 3, 5))
    assert slots.used == 33 and not set(held) & set(later) and len(slots.finite) == len(slots.latents)


def test_slots_whose_pictures_could_not_be_written_are_free_again(slots):
    with pytest.raises(RuntimeError):
        slots.take(torch.ones(2, 4, 3, 6))
    assert slots.used == 0
