"""The lock that is given in the order in which it is asked for."""

import threading
import time

import pytest

from stylefast.runtime import fair_lock
from stylefast.runtime.fair_lock import FairLock


def started(work) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def waiting(lock: FairLock, count: int):
    end = time.monotonic() + 120
    while len(lock._waiting) != count:
        assert time.monotonic() < end, f"{len(lock._waiting)} wait, not {count}"
        time.sleep(0.001)


def test_waiting_threads_get_it_in_the_order_in_which_they_asked():
    lock, order, threads = FairLock(), [], []

    def work(number):
        with lock:
            order.append(number)

    with lock:
        for number in range(9):
            threads.append(started(lambda number=number: work(number)))
            waiting(lock, number + 1)
    for thread in threads:
        thread.join(10)
    assert order == list(range(9))


def test_a_thread_that_takes_it_again_and_again_lets_the_others_in():
    lock, order = FairLock(), []

    def modest():
        with lock:
            order.append("modest")

    for _ in range(5):
        with lock:
            thread = started(modest)
            waiting(lock, 1)  # it has asked
        with lock:  # at once, before the other thread has had time to wake
            order.append("greedy")
        thread.join(120)
    assert order == ["modest", "greedy"] * 5


def test_it_may_be_taken_again_by_its_owner_and_is_free_after_the_last():
    lock, entered = FairLock(), threading.Event()
    with lock:
        with lock:
            pass
        thread = started(lambda: lock.__enter__() and entered.set())
        assert not entered.wait(0.05)
    assert entered.wait(10)
    thread.join(10)


def test_no_two_threads_hold_it_at_once():
    lock, inside, seen = FairLock(), [], []

    def work():
        for _ in range(200):
            with lock:
                inside.append(1)
                seen.append(len(inside))
                inside.pop()

    for thread in [started(work) for _ in range(6)]:
        thread.join(30)
    assert seen == [1] * 1200


@pytest.mark.parametrize("moment", ["while it waits", "when it has been given the lock"])
def test_an_interrupt_leaves_the_lock_to_the_next(monkeypatch, moment):
    lock, outcome = FairLock(), {}
    given = threading.Event()

    class Interrupted(threading.Event().__class__):
        def wait(self, timeout=None):
            if threading.current_thread().name == "interrupted":
                if moment == "when it has been given the lock":
                    super().wait(10)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(fair_lock.threading, "Event", Interrupted)

    def interrupted():
        try:
            with lock:
                outcome["interrupted"] = "entered"
        except KeyboardInterrupt:
            outcome["interrupted"] = "left"

    with lock:
        first = threading.Thread(target=interrupted, name="interrupted", daemon=True)
        first.start()
        if moment == "while it waits":
            first.join(10)
        else:
            waiting(lock, 1)
        started(lambda: lock.__enter__() and given.set())
        waiting(lock, 1 if moment == "while it waits" else 2)
    first.join(10)
    assert given.wait(10) and outcome == {"interrupted": "left"}
