"""The register of requests: what is found, by whom, for how long, and what it holds."""

import pytest

from stylefast.serving import tickets
from stylefast.serving.media import Pixels
from stylefast.serving.messages import Made
from stylefast.serving.replies import ApiError, engine_lost
from stylefast.serving.tickets import CANCELLED, DONE, FAILED, Register, Ticket

MADE = Made(Pixels(8, 8, bytes(192)), "{}", "", 1)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(tickets.time, "monotonic", clock)
    return clock


def ticket(name, owner="a", arrived=100.0):
    return Ticket(name, owner, {"requests": [{}]}, arrived=arrived)


def status_of(call, *arguments):
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    return caught.value.status, caught.value.code


def test_a_ticket_is_found_by_its_owner_and_by_admins(clock):
    register = Register(600)
    register.add(one := ticket("1"))
    assert register.find("1", "a") is register.find("1", None) is one
    assert status_of(register.find, "1", "b") == status_of(register.find, "2", "a") == (404, "not_found")
    assert status_of(register.add, ticket("1")) == (409, "duplicate_id")


def test_an_id_may_be_used_again_by_its_owner_once_its_request_ended_without_pictures(clock):
    register = Register(600)
    for ending, owner, taken in ((FAILED, "a", False), (CANCELLED, "a", False), (FAILED, "b", True), (DONE, "a", True)):
        number = f"{ending}-{owner}"
        register.add(first := ticket(number))
        first.finish(ending)
        if taken:
            assert status_of(register.add, ticket(number, owner)) == (409, "duplicate_id")
        else:
            register.add(second := ticket(number, owner))
            assert register.find(number, owner) is second
    assert len(register) == 4


def test_a_request_whose_pictures_were_refused_has_failed(clock):
    one, error = ticket("1"), ApiError(400, "no", code="content_policy_violation")
    one.refuse(error)
    assert one.shown()["status"] == "queued"  # there is nothing to refuse yet
    one.unchecked, one.pictures = True, [MADE]
    one.finish(DONE)
    assert one.shown()["status"] == "in_progress" and one.over
    one.unchecked = False
    assert one.shown()["status"] == "completed"
    one.refuse(error)
    assert one.shown()["status"] == "failed" and one.shown()["error"]["code"] == error.code and not one.pictures


def test_tickets_are_forgotten_some_time_after_their_end(clock):
    register = Register(600)
    register.add(first := ticket("1"))
    register.add(ticket("2"))
    first.finish(DONE)
    clock.now += 599
    assert register.find("1", "a") is first
    clock.now += 2
    assert status_of(register.find, "1", "a") == (404, "not_found")
    assert register.find("2", "a")  # it is not over


def test_the_oldest_ended_ones_of_too_many_are_forgotten(clock):
    register = Register(600, most=3)
    for i in range(5):
        register.add(one := ticket(str(i)))
        one.finish(DONE)
    assert len(register) <= 4 and status_of(register.find, "0", "a") == (404, "not_found")
    assert register.find("4", "a")


def test_a_repeated_key_finds_its_request_and_no_other(clock):
    register = Register(600)
    register.add(one := ticket("1"), "k", "digest")
    assert register.repeated("a", "k", "digest") is one
    assert register.repeated("b", "k", "digest") is None
    assert status_of(register.repeated, "a", "k", "other") == (409, "idempotency_key_reused")


@pytest.mark.parametrize("status", [FAILED, CANCELLED])
def test_a_request_that_failed_is_made_again(clock, status):
    register = Register(600)
    register.add(one := ticket("1"), "k", "digest")
    one.finish(status, engine_lost())
    assert register.repeated("a", "k", "digest") is None
    register.add(two := ticket("2"), "k", "digest")
    assert register.repeated("a", "k", "digest") is two


def test_pictures_are_kept_for_repeated_requests_within_limits(clock):
    register = Register(600, most_bytes=2 * 192)
    for i in range(4):
        register.add(one := ticket(str(i)), f"k{i}", "digest")
        one.pictures = [MADE]
        one.finish(DONE)
    assert register.repeated("a", "k0", "digest") is None and register.repeated("a", "k3", "digest").pictures == [MADE]


def test_pictures_that_are_being_sent_are_not_taken_away(clock):
    register = Register(600, most_bytes=1)
    for name, key in (("plain", None), ("keyed", "k")):
        register.add(one := ticket(name), key, "digest")
        one.askers = 1
        one.pictures = [MADE]
        one.finish(DONE)
        assert register.find(name, "a").pictures == [MADE]
        one.askers = 0
        assert register.find(name, "a").pictures == ()
    assert register.repeated("a", "k", "digest") is None


def test_what_a_request_was_made_from_is_dropped_at_its_end():
    one = Ticket("1", "a", {"requests": [{"prompt": "a fish"}] * 3}, [b"picture"])
    one.finish(FAILED, engine_lost())
    assert one.call == {} and one.uploads == () and one.shown()["n"] == one.count == 3
