"""The page pool in C++ and in Python against a plain model of it, over random mixes of requests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stylefast.runtime.banks.page_pool import PoolFull
from tests.support.cpp_forms import backends, pool_of


class Model:
    """What a pool promises, with lists and no slots: generations of pages by key, and pins by key."""

    def __init__(self, room):
        self.room, self.clock, self.evictions = room, 0, 0
        self.pages = []  # the youngest last
        self.made = 0
        self.pins = {}

    def fresh(self, key):
        return next((page for page in self.pages if page["key"] == key and page["fresh"]), None)

    def idle(self):
        """Pages that may give way, the first one first."""
        idle = [page for page in self.pages if page["state"] == "resident" and not self.pins.get(page["key"])]
        return sorted(idle, key=lambda page: page["used"])

    def touch(self, page):
        self.clock += 1
        page["used"] = self.clock

    def make(self, key):
        if len(self.pages) == self.room:
            self.pages.remove(self.idle()[0])
            self.evictions += 1
        self.pages.append({"number": self.made, "key": key, "state": "loading", "fresh": True, "alone": False})
        self.made += 1

    def acquire(self, keys):
        absent = {key for key in keys if not self.fresh(key)}
        movable = [page for page in self.idle() if page["key"] not in keys]
        if len(absent) > self.room - len(self.pages) + len(movable):
            return "full"
        for key in keys:
            if key not in absent:
                self.pins[key] = self.pins.get(key, 0) + 1
        results = []
        for key in keys:
            results.append("there" if self.fresh(key) else "claimed")
            if results[-1] == "claimed":
                self.make(key)
            if key in absent:
                self.pins[key] = self.pins.get(key, 0) + 1
        return results

    def prefetch(self, keys):
        first_place = {key: keys.index(key) for key in keys if self.fresh(key)}
        # the first key's page ends as the last one used
        for key in sorted(first_place, key=first_place.get, reverse=True):
            self.touch(self.fresh(key))
        results = []
        for i, key in enumerate(keys):
            if self.fresh(key):
                results.append("there")
                continue
            first = next(iter(self.idle()), None)
            gives_way = first is not None and first_place.get(first["key"], len(keys)) > i
            results.append("claimed" if gives_way or len(self.pages) < self.room else "none")
            if results[-1] == "claimed":
                self.make(key)
        return results

    def end_load(self, number, state):
        page = next(page for page in self.pages if page["number"] == number)
        page["state"] = state
        page["fresh"] = page["fresh"] and state == "resident"
        self.touch(page)
        self.tidy()

    def release(self, keys):
        if any(keys.count(key) > self.pins.get(key, 0) for key in keys):
            return "bug"
        for key in keys:
            self.pins[key] -= 1
            for page in self.pages:
                if page["key"] == key and not self.pins[key]:
                    self.touch(page)
        self.tidy()
        return "released"

    def forget(self, style):
        for page in self.pages:
            page["fresh"] = page["fresh"] and style not in (None, page["key"][0])
        self.tidy()
        return sum(style in (None, page["key"][0]) for page in self.pages)

    def tidy(self):
        """What nobody will ask for again leaves once its pins have gone, though a load ends first."""
        for page in self.pages:
            page["alone"] |= not page["fresh"] and not self.pins.get(page["key"])
        self.pages = [page for page in self.pages if not page["alone"] or page["state"] == "loading"]

    def view(self):
        idle = self.idle()
        held = [
            (page["key"], page["state"], not page["fresh"], bool(self.pins.get(page["key"])) and not page["alone"])
            for page in self.pages
            if page not in idle
        ]
        return [page["key"] for page in idle], sorted(held)


def view(pool):
    """The same of a pool; also that no slot is given to two pages."""
    pages = pool.pages()
    assert len({page.slot for page in pages}) == len(pages)
    idle = [page for page in pages if page.state == "resident" and page.pins == 0]
    assert pages[: len(idle)] == idle
    held = sorted((page[:4], page.state, page.stale, page.pins > 0) for page in pages[len(idle) :])
    return [page[:4] for page in idle], held


def compare(room, operations, backend):
    pool, model = pool_of(room, backend), Model(room)
    pinned, outcomes = [], []
    loading = {}  # slot -> the model's number of the page
    for operation, value in operations:
        if operation in ("acquire", "prefetch"):
            number = model.made
            expected = getattr(model, operation)(value)
            if expected == "full":
                before = pool.pages()
                with pytest.raises(PoolFull):
                    pool.acquire(value)
                assert pool.pages() == before
                continue
            slots, claimed = (array.tolist() for array in getattr(pool, operation)(value))
            assert expected == [
                "claimed" if new else "none" if slot == -1 else "there" for slot, new in zip(slots, claimed)
            ]
            for slot in (slot for slot, new in zip(slots, claimed) if new):
                assert slot not in loading
                loading[slot] = number
                number += 1
            if operation == "acquire":
                pinned += value
                outcomes += expected
        elif operation in ("filled", "failed"):
            if loading:
                slot = list(loading)[value % len(loading)]
                getattr(pool, operation)([slot])
                model.end_load(loading.pop(slot), "resident" if operation == "filled" else "failed")
        elif operation in ("release", "acquired"):
            value = pinned[:value] if operation == "acquired" else value
            if model.release(value) == "bug":
                before = pool.pages()
                with pytest.raises(RuntimeError, match="released more often"):
                    pool.release(value)
                assert pool.pages() == before
                continue
            pool.release(value)
            for key in value:
                pinned.remove(key)
        elif operation == "drop":
            assert pool.drop(value) == model.forget(value)
        else:
            assert pool.clear() == model.forget(None)
        assert view(pool) == model.view()

    stats = pool.stats()
    counts = outcomes.count("there"), outcomes.count("claimed"), model.evictions
    assert (stats.slots, stats.hits, stats.misses, stats.evictions) == (room, *counts)
    # everything comes back
    pool.filled(list(loading))
    pool.release(pinned)
    assert pool.clear() == 0 and pool.pages() == []
    assert sorted(pool.acquire([(9, i, 0, 0) for i in range(room)]).slots.tolist()) == list(range(room))


keys = st.tuples(st.integers(0, 2), st.integers(0, 2), st.just(0), st.just(0))
lists = st.lists(keys, max_size=5)
operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["acquire", "prefetch", "release"]), lists),
        # so many of the pages that are pinned, or the page that has been loading so long
        st.tuples(st.sampled_from(["acquired", "filled", "filled", "failed"]), st.integers(0, 5)),
        st.tuples(st.just("drop"), st.integers(0, 2)),
        st.tuples(st.just("clear"), st.none()),
    ),
    max_size=60,
)


@backends
@settings(max_examples=150)
@given(room=st.integers(0, 7), operations=operations)
def test_a_pool_does_what_the_plain_model_does(backend, room, operations):
    compare(room, operations, backend)


@backends
@pytest.mark.parametrize("room", [1, 5, 17, 40])
def test_a_pool_does_what_the_plain_model_does_over_a_long_mix(backend, room):
    random = np.random.default_rng(room)
    names = ["acquire", "prefetch", "acquired", "acquired", "filled", "failed", "release", "drop", "clear"]
    chances = [0.2, 0.12, 0.12, 0.13, 0.34, 0.03, 0.03, 0.025, 0.005]
    operations = []
    for name in random.choice(names, size=2500, p=chances):
        count = int(random.integers(0, 3 + room // 3))
        drawn = [tuple(key) for key in random.integers(0, [4, 5, 2, 2], (count, 4)).tolist()]
        values = {"acquire": drawn, "prefetch": drawn, "release": drawn[:1], "drop": count % 4, "clear": None}
        operations.append((str(name), values.get(name, count)))
    compare(room, operations, backend)
