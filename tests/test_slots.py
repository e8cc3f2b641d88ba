"""Free places of buffers, and entries in the order of their use."""

import pytest

from stylefast.slots import LruDict, Slots


def test_the_lowest_free_places_are_taken_first():
    slots = Slots(4, used=1)
    assert (slots.count, slots.used, slots.free) == (4, 1, 3)
    assert slots.lowest(2) == slots.take(2) == [1, 2]
    slots.release([2])
    slots.release([1])
    assert slots.take(3) == [1, 2, 3] and slots.free == 0


def test_more_places_come_after_those_there_are():
    slots = Slots(2)
    assert slots.take(1) == [0]
    slots.grow(4)
    assert slots.used == 1 and slots.take(3) == [1, 2, 3]
    slots.grow(3)
    assert slots.count == 4 and slots.free == 0


def test_no_place_is_taken_if_too_few_are_free():
    slots = Slots(2)
    with pytest.raises(IndexError, match="3 places are wanted, and 2 of 2 are free"):
        slots.take(3)
    assert slots.take(0) == [] and slots.take(2) == [0, 1]


def test_what_was_used_least_recently_goes_first():
    kept = LruDict(a=1, b=2, c=3)
    assert kept.use("a") == 1 and kept.use("d") is None and "d" not in kept
    assert kept["b"] == 2 and list(kept) == ["b", "c", "a"]  # reading is no use
    assert kept.oldest == "b" and kept.beyond(1) == ["b", "c"] and kept.beyond(3) == kept.beyond(5) == []
    assert LruDict().oldest is None
