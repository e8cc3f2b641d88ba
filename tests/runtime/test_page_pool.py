"""The page pool: each of its promises by name."""

import threading
import time

import numpy as np
import pytest

from stylefast.errors import InvalidRequest, StyleFastError
from stylefast.runtime.banks import page_pool
from stylefast.runtime.banks.page_pool import Page, PageBooksRef, PagePool, PoolFull
from tests.support.cpp_forms import backends, pool_of
from tests.support.watch import WAIT


def of(*steps, style=0):
    """Keys of one style's first branch and reference."""
    return [(style, step, 0, 0) for step in steps]


def filled(slots, *steps, backend, style=0):
    """A pool whose pages lie there without pins, the first one least recently used."""
    pool = pool_of(slots, backend)
    pool.filled(pool.prefetch(of(*steps, style=style)).slots)
    return pool


@backends
def test_a_key_given_twice_is_pinned_twice_and_claimed_once(backend):
    pool = pool_of(2, backend)
    claim = pool.acquire(of(4, 4))
    assert claim.claimed.tolist() == [True, False] and claim.slots[0] == claim.slots[1]
    pool.filled(claim.slots[:1])
    assert pool.pages() == [Page(0, 4, 0, 0, int(claim.slots[0]), "resident", 2, False)]


@backends
def test_the_least_recently_released_page_gives_way_first(backend):
    pool = filled(3, 0, 1, 2, backend=backend)
    pool.acquire(of(0, 1))
    pool.release(of(1, 0))
    assert [page.step for page in pool.pages()] == [2, 1, 0]
    pool.filled(pool.acquire(of(7)).slots)
    pool.filled(pool.acquire(of(8)).slots)
    assert [page.step for page in pool.pages()][0] == 0
    assert pool.stats() == (3, 3, 0, 2, 2, 2, 2)


@backends
def test_a_full_pool_says_what_was_asked_what_there_is_and_what_is_pinned(backend):
    pool = filled(3, 0, 1, 2, backend=backend)
    pool.acquire(of(0))
    message = "4 pages were asked for, 3 of them absent, but of 3 slots 1 are pinned and 0 are being loaded; use fewer"
    with pytest.raises(PoolFull, match=message) as caught:
        pool.acquire(of(1, 5, 6, 7))
    assert isinstance(caught.value, StyleFastError)
    assert [page.step for page in pool.pages()] == [1, 2, 0]


@backends
def test_a_page_that_is_being_loaded_never_gives_way(backend):
    pool = pool_of(1, backend)
    pool.prefetch(of(0))
    with pytest.raises(PoolFull, match="1 are being loaded"):
        pool.acquire(of(1))
    assert pool.prefetch(of(1)).slots.tolist() == [-1]


@backends
def test_prefetch_takes_the_slots_of_what_is_needed_last(backend):
    pool = filled(3, 1, 5, 9, backend=backend)
    # 9 is not in the list and goes first; then 5, which is its last page
    claim = pool.prefetch(of(0, 1, 2, 5))
    assert claim.claimed.tolist() == [True, False, True, False]
    assert claim.slots[3] == -1 and claim.slots[1] >= 0


@backends
def test_a_dropped_page_that_is_pinned_stays_until_released_and_its_key_gets_a_new_page(backend):
    pool = pool_of(3, backend)
    old = pool.acquire(of(0, 1)).slots
    pool.filled(old)
    pool.release(of(1))
    assert pool.drop(0) == 1
    new = pool.acquire(of(0))
    assert new.claimed.all() and new.slots[0] != old[0]
    pool.filled(new.slots)
    pool.release(of(0))
    assert len(pool.pages()) == 2, "one holder is left, and nobody knows of which of the two"
    pool.release(of(0))
    assert pool.pages() == [Page(0, 0, 0, 0, int(new.slots[0]), "resident", 0, False)]


@backends
def test_a_page_dropped_while_it_is_loaded_keeps_its_slot_until_filled(backend):
    pool = pool_of(1, backend)
    slots = pool.prefetch(of(0)).slots
    assert pool.drop(0) == 1 and pool.drop(3) == 0
    with pytest.raises(PoolFull):
        pool.acquire(of(0))
    pool.filled(slots)
    assert pool.pages() == [] and pool.acquire(of(0)).claimed.all()


@backends
def test_a_failed_page_can_be_claimed_again_while_others_still_hold_it(backend):
    pool = pool_of(2, backend)
    first = pool.acquire(of(0))
    pool.failed(first.slots)
    assert pool.wait(first.slots) is False
    again = pool.acquire(of(0))
    assert again.claimed.all() and again.slots[0] != first.slots[0]
    pool.filled(again.slots)
    assert pool.wait(again.slots) is True


@backends
@pytest.mark.parametrize("report, ready", [("filled", True), ("failed", False)])
def test_waiters_in_other_threads_are_told_how_a_load_ended(backend, report, ready):
    pool = pool_of(2, backend)
    claim = pool.acquire(of(0, 1))
    answers = []

    def wait():
        answers.append(pool.wait(pool.acquire(of(0, 1)).slots))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    while pool.stats().hits < 6:
        time.sleep(0.001)
    pool.filled(claim.slots[1:])
    time.sleep(0.02)
    assert answers == []
    getattr(pool, report)(claim.slots[:1])
    for thread in threads:
        thread.join(WAIT)
    assert answers == [ready] * 3


@backends
@pytest.mark.parametrize(
    "misuse, error, message",
    [
        (lambda pool: pool.filled([1]), RuntimeError, "slot 1 is not being loaded"),
        (lambda pool: pool.failed([0]), RuntimeError, "slot 0 is not being loaded"),
        (lambda pool: pool.filled([2, 2]), RuntimeError, "slot 2 is not being loaded"),
        (lambda pool: pool.wait([0]), RuntimeError, "slot 0 is not pinned"),
        (lambda pool: pool.wait([3]), IndexError, "slot 3 is not one of the pool's 3"),
        (lambda pool: pool.filled([-1]), IndexError, "slot -1 is not one of the pool's 3"),
        (lambda pool: pool.release(of(0)), RuntimeError, "style 0, step 0, branch 0, reference 0 is released more"),
        (lambda pool: pool.release(of(5)), RuntimeError, "step 5, branch 0, reference 0 is released more"),
        (lambda pool: pool.acquire([(0, 1, 2)]), InvalidRequest, "keys have shape"),
        (lambda pool: pool.acquire([(0, 1, 2, 0.5)]), InvalidRequest, "keys must be int64 numbers"),
        (lambda pool: pool.acquire([(0, 1, 2, 2**63)]), InvalidRequest, "keys must be int64 numbers"),
        (lambda pool: pool.acquire([(0, 1, 2, 3), (0,)]), InvalidRequest, "rows of one length"),
        (lambda pool: pool.filled(["x"]), InvalidRequest, "slots must be int64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misuse_is_named_and_changes_nothing(backend, misuse, error, message):
    pool = filled(3, 0, backend=backend)
    assert pool.prefetch(of(1, 2)).slots.tolist() == [1, 2]
    pool.filled([1])
    before = pool.pages()
    with pytest.raises(error, match=message):
        misuse(pool)
    assert pool.pages() == before


@backends
def test_empty_lists_and_a_pool_without_slots_are_allowed(backend):
    pool = pool_of(0, backend)
    assert pool.acquire([]).slots.shape == pool.prefetch([]).claimed.shape == (0,)
    assert pool.wait([]) is True
    pool.filled([])
    pool.release(np.empty((0, 4), np.int64))
    assert pool.prefetch(of(0, 1)).slots.tolist() == [-1, -1]
    assert pool.stats() == (0,) * 7


@backends
def test_keys_of_any_int64_are_told_apart(backend):
    pool = pool_of(64, backend)
    values = [-(2**63), -1, 0, 2**63 - 1]
    keys = [(a, b, c, a) for a in values for b in values for c in values]
    assert len(set(pool.acquire(keys).slots.tolist())) == 64
    assert not pool.acquire(np.array(keys)[::-1]).claimed.any()


@backends
def test_threads_that_share_a_pool_never_see_a_page_of_another_key(backend):
    pool, rounds = pool_of(6, backend), 150
    content = [None] * 6
    wrong = []

    def work(seed):
        random = np.random.default_rng(seed)
        for _ in range(rounds):
            keys = [tuple(key) for key in random.integers(0, 3, (2, 4)).tolist()]
            try:
                claim = pool.acquire(keys)
            except PoolFull:
                continue
            for key, slot, claimed in zip(keys, claim.slots, claim.claimed):
                if claimed:
                    content[slot] = key
                    pool.filled([slot])
            if not pool.wait(claim.slots) or [content[slot] for slot in claim.slots] != keys:
                wrong.append(keys)
            pool.release(keys)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert wrong == [] and pool.stats().pinned == 0


def test_a_negative_size_is_refused():
    with pytest.raises(InvalidRequest, match="slots is -1"):
        PagePool(-1)


def test_without_the_extension_the_reference_keeps_the_books(monkeypatch):
    monkeypatch.setattr(page_pool, "extension", lambda: None)
    assert isinstance(PagePool(1)._books, PageBooksRef)
