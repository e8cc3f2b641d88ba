"""Engines in several processes behind one dispatcher, without a platform: what they say, and what becomes of a loss."""

import asyncio
import importlib
import json
import logging
import sys
from collections import defaultdict

import pytest

from stylefast.errors import MissingDependency, StyleFastError
from stylefast.integrations import replicas as module
from stylefast.integrations.replicas import EngineReplica, Heartbeat, Replicas, style_of
from stylefast.serving.dispatcher import READY, STARTING, Dispatcher
from stylefast.serving.media import Pixels
from stylefast.serving.messages import (
    Answer,
    Cancel,
    Capacity,
    Counts,
    Done,
    Failed,
    LoadStyle,
    Made,
    NotReady,
    Progress,
    Ready,
    Run,
    Stop,
)
from stylefast.serving.replies import ApiError
from stylefast.serving.tickets import Ticket
from tests.serving.test_dispatcher import Process, in_loop

FACTS = {"model": "tiny"}


async def started(**options):
    """Return a replica that is ready, its process, and the list of its losses."""
    processes, losses = [], []

    def start(tell):
        processes.append(Process(tell))
        return processes[-1]

    options = {"pictures": 4, "name": "r1", "stalled": 60.0, "lost": lambda: losses.append(1), **options}
    replica = EngineReplica(start, **options)
    starting = asyncio.ensure_future(replica.start())
    await asyncio.sleep(0)
    processes[0].say(Ready(FACTS))
    await starting
    return replica, processes[0], losses


async def collect(news):
    return [one async for one in news]


def run(ticket="a", style=None):
    return Run(ticket, {"requests": [{"prompt": "x"} | ({"style": [style]} if style else {})]})


def done(ticket="a"):
    return Done(ticket, [Made(Pixels(8, 8, bytes(8 * 8 * 3)), "{}", "", 1)], 0.5)


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
def drawn_log(caplog):
    caplog.set_level(logging.INFO, "stylefast.serving.replicas")
    return lambda: [record.getMessage() for record in caplog.records]


# a replica


@in_loop
async def test_a_replica_passes_on_what_becomes_of_a_call():
    replica, process, _ = await started()
    news = asyncio.ensure_future(collect(replica.run(run())))
    await settle()
    assert replica.heartbeat(3) == Heartbeat("r1", FACTS, 4, 1, Counts()) and replica.waiting == 3
    for message in (Progress("a", 1, 2), Progress("other", 1, 2), done()):
        process.say(message)
    assert await news == [Progress("a", 0, 0), Progress("a", 1, 2), done()] and process.sent == [run()]
    assert replica.heartbeat().ongoing == 0


@in_loop
async def test_the_log_names_a_request_by_the_id_that_its_client_knows(drawn_log):
    replica, _, _ = await started()
    drawing = asyncio.ensure_future(collect(replica.run(Run("run_1", {"requests": [{}]}, request="mine"))))
    await settle()
    (line,) = drawn_log()
    assert json.loads(line) == {"drawing": {"request_id": "mine", "replica": "r1", "style": ""}}
    drawing.cancel()


@in_loop
async def test_a_caller_that_leaves_cancels_its_call():
    replica, process, _ = await started()
    calling = asyncio.ensure_future(collect(replica.run(run())))
    await settle()
    calling.cancel()
    await asyncio.wait([calling])
    assert process.sent == [run(), Cancel("a")]
    process.say(done())  # too late, and of no use
    assert replica.heartbeat().ongoing == 0


@in_loop
async def test_a_replica_whose_process_dies_fails_its_calls_says_so_once_and_is_not_healthy():
    replica, process, losses = await started()
    replica.check()
    news = asyncio.ensure_future(collect(replica.run(run())))
    await settle()
    process.say(None)
    assert await news == [Progress("a", 0, 0), Failed("a", "EngineLost", "")] and losses == [1]
    assert await collect(replica.run(run("b"))) == [Failed("b", "EngineLost", "")]
    assert replica.heartbeat().pictures == 0
    with pytest.raises(RuntimeError, match="died"):
        replica.check()


@in_loop
async def test_calls_beyond_those_that_a_replica_may_have_wait_untaken():
    replica, process, _ = await started(pictures=2)
    first, second, third, fourth = (asyncio.ensure_future(collect(replica.run(run(name)))) for name in "abcd")
    await settle()
    baked = asyncio.ensure_future(collect(replica.run(LoadStyle("s", "neon"))))
    await settle()
    assert process.sent == [run("a"), run("b"), LoadStyle("s", "neon")]  # a style is no picture
    third.cancel()
    await settle()
    process.say(done("a"))
    assert await first == [Progress("a", 0, 0), done("a")]
    await settle()
    assert process.sent == [run("a"), run("b"), LoadStyle("s", "neon"), run("d")]
    process.say(None)  # those that it has are lost, and what waits was not taken
    waiting = asyncio.ensure_future(collect(replica.run(run("e"))))
    assert (await second)[-1] == Failed("b", "EngineLost", "") and (await fourth)[-1] == Failed("d", "EngineLost", "")
    assert await waiting == [Failed("e", "EngineLost", "")] and (await baked)[-1] == Failed("s", "EngineLost", "")


@in_loop
async def test_a_replica_that_is_closed_lost_nothing():
    replica, process, losses = await started()
    await replica.close()
    process.say(None)
    assert process.sent == [Stop(), "end"] and losses == []


@in_loop
async def test_a_model_that_cannot_be_loaded_fails_the_start():
    for last, words in ((NotReady("no such model"), "no such model"), (None, "died while it loaded")):
        processes = []
        replica = EngineReplica(lambda tell, p=processes: p.append(Process(tell)), pictures=1, name="r", stalled=1.0)
        starting = asyncio.ensure_future(replica.start())
        await asyncio.sleep(0)
        assert replica.heartbeat().pictures == 0
        processes[0].say(last)
        with pytest.raises(StyleFastError, match=words):
            await starting


@in_loop
async def test_an_engine_that_makes_no_step_is_stuck_only_while_it_has_calls(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    replica, process, _ = await started()
    now[0] += 1000
    replica.check()
    calling = asyncio.ensure_future(collect(replica.run(run())))
    await settle()
    now[0] += 59
    replica.check()
    process.say(Counts({"picture_steps": 1}))
    now[0] += 59
    replica.check()
    process.say(Counts({"picture_steps": 1}))  # nothing new
    now[0] += 2
    with pytest.raises(RuntimeError, match="no step for 61 seconds"):
        replica.check()
    process.say(done())
    await calling
    replica.check()


@in_loop
async def test_a_style_is_read_ahead_of_requests():
    replica, process, _ = await started()
    for answer, whole in ((Answer, True), (lambda ticket: Failed(ticket, "StyleError", "gone"), False)):
        loading = asyncio.ensure_future(replica.load_style("neon"))
        await settle()
        assert isinstance(process.sent[-1], LoadStyle) and process.sent[-1].name == "neon"
        process.say(answer(process.sent[-1].ticket))
        assert await loading is whole


def test_the_style_by_which_a_message_finds_its_replica():
    assert style_of(run(style="neon")) == "neon" and style_of(run()) == ""
    assert style_of(LoadStyle("t", "ours")) == "ours"
    inline = {"requests": [{"style": [{"kind": "InstantStyle"}]}, {"style": ["chalk", "neon"]}]}
    assert style_of(Run("t", inline)) == "chalk"


# the service's side


class Lost(Exception):
    """What a platform raises when a replica is gone."""


class Bug(Exception):
    """What it raises when our own code failed in a replica."""


class FakeStream:
    def __init__(self):
        self.news, self.cancelled = asyncio.Queue(), False

    async def __aiter__(self):
        while True:
            found = await self.news.get()
            if isinstance(found, BaseException):
                raise found
            yield found
            if not isinstance(found, Progress):
                return

    def cancel(self):
        self.cancelled = True
        self.news.put_nowait(Lost())


class Platform:
    """Stand-in for a platform, and the dispatcher in front of it."""

    def __init__(self, monkeypatch, **options):
        self.asked, self.styles, self.streams = [], {}, defaultdict(FakeStream)
        self.calls = 0
        self._beat, self.clock = asyncio.Queue(), monkeypatch
        monkeypatch.setattr(module, "BEAT_SECONDS", 0)
        options = {"max_running": 1, "max_waiting": 8, **options}
        self.dispatcher = Dispatcher(self._start, **options)
        self.dispatcher.start()

    def _start(self, tell):
        return Replicas(tell, call=self._call, ask=self._ask, waiting=lambda: self.dispatcher.waiting, bugs=Bug)

    def _call(self, message, style):
        self.calls += 1
        self.styles[message.ticket] = style
        return self.streams[message.ticket]

    async def _ask(self, waiting):
        self.asked.append(waiting)
        found = await self._beat.get()
        if isinstance(found, Exception):
            raise found
        return found

    async def beat(self, *found, error=None):
        """Answer the next question to all replicas."""
        self._beat.put_nowait(error or list(found))
        await settle()

    def submit(self, name, style=None):
        ticket = Ticket(name, "a", run(name, style).call, run=name)
        self.dispatcher.submit(ticket)
        return ticket

    async def close(self):
        await self.dispatcher.close(0)


def beating(name, pictures=2, **counts):
    return Heartbeat(name, FACTS, pictures, 0, Counts(counts, {"bank_bytes": 10.0}, [(0.5, pictures)]))


def platform_test(test):
    """Run an async test with a platform that it is given."""

    def outer(monkeypatch):
        async def inner():
            platform = Platform(monkeypatch)
            try:
                await test(platform)
            finally:
                await platform.close()

        asyncio.run(inner())

    outer.__name__ = test.__name__
    return outer


@platform_test
async def test_all_replicas_together_are_one_engine(platform):
    with pytest.raises(ApiError) as caught:
        platform.submit("early")
    assert caught.value.code == "starting"
    await platform.beat(beating("r1"), Lost(), beating("r2"))
    assert platform.dispatcher.state == READY and platform.dispatcher.max_running == 4
    tickets = [platform.submit(f"t{i}", "neon") for i in range(5)]
    await settle()
    assert list(platform.streams) == ["t0", "t1", "t2", "t3"] and set(platform.styles.values()) == {"neon"}
    await platform.beat(beating("r1"), beating("r2"))
    assert platform.asked[-1] == 1
    platform.streams["t2"].news.put_nowait(Progress("t2", 1, 4))
    platform.streams["t2"].news.put_nowait(done("t2"))
    assert len(await tickets[2].wait()) == 1
    await settle()
    assert "t4" in platform.streams


@platform_test
async def test_a_lost_replica_costs_its_requests_and_no_others(platform):
    await platform.beat(beating("r1"), beating("r2"))
    tickets = [platform.submit(f"t{i}") for i in range(5)]
    await settle()
    platform.streams["t0"].news.put_nowait(Progress("t0", 0, 0))
    platform.streams["t0"].news.put_nowait(Lost())
    with pytest.raises(ApiError) as caught:
        await tickets[0].wait()
    assert (caught.value.status, caught.value.code) == (503, "engine_lost")
    await platform.beat(beating("r2"), Lost())
    assert platform.dispatcher.max_running == 2
    for i in range(1, 5):
        platform.streams[f"t{i}"].news.put_nowait(done(f"t{i}"))
        assert await tickets[i].wait()


@platform_test
async def test_a_request_that_its_replica_never_took_goes_to_another_once(platform):
    await platform.beat(beating("r1"), beating("r2"))
    for ending, calls in (([done("a")], 2), ([Lost()], 2), ([Failed("c", "EngineLost", "")], 2)):
        name = "abc"[len(platform.streams)]
        before = platform.calls
        ticket = platform.submit(name)
        await settle()
        for news in ([Lost()], ending):
            for one in news:
                platform.streams[name].news.put_nowait(one)
        await asyncio.wait([asyncio.ensure_future(ticket.wait())])
        assert platform.calls - before == calls
        assert ticket.error is None if name == "a" else ticket.error.code == "engine_lost"


@platform_test
async def test_a_bug_in_a_replica_is_no_reason_to_send_the_request_again(platform):
    await platform.beat(beating("r1"))
    ticket = platform.submit("t")
    await settle()
    platform.streams["t"].news.put_nowait(Bug("with a secret"))
    with pytest.raises(ApiError) as caught:
        await ticket.wait()
    assert (caught.value.status, caught.value.retry) == (500, False) and "secret" not in caught.value.message


@platform_test
async def test_a_cancelled_request_ends_its_call_and_frees_its_place(platform):
    await platform.beat(beating("r1", pictures=1))
    first, second = platform.submit("t1"), platform.submit("t2")
    await settle()
    assert list(platform.streams) == ["t1"]
    assert platform.dispatcher.cancel(first) and platform.streams["t1"].cancelled
    await settle()
    assert list(platform.streams) == ["t1", "t2"] and not second.over


@platform_test
async def test_requests_wait_while_there_are_no_replicas(platform):
    await platform.beat(beating("r1"))
    assert platform.dispatcher.state == READY
    await platform.beat(Lost())
    assert platform.dispatcher.state == STARTING
    ticket = platform.submit("t")
    await settle()
    assert not platform.streams and not ticket.over
    await platform.beat(beating("r2"))
    assert platform.dispatcher.state == READY and list(platform.streams) == ["t"]


@platform_test
async def test_a_single_missing_answer_changes_nothing_but_long_silence_does(platform):
    await platform.beat(beating("r1"))
    await platform.beat(error=TimeoutError())
    assert platform.dispatcher.state == READY
    platform.clock.setattr(module, "SILENT_SECONDS", 0.0)
    await platform.beat(error=TimeoutError())
    assert platform.dispatcher.state == STARTING


@platform_test
async def test_counts_are_those_of_all_replicas_and_of_those_that_are_gone(platform):
    seen = defaultdict(float)
    platform.dispatcher.counted = lambda name, more: seen.__setitem__(name, seen[name] + more)
    await platform.beat(beating("r1", steps=5), beating("r2", steps=3))
    await platform.beat(beating("r2", steps=4), beating("r3", steps=1))
    assert dict(seen) == {"steps": 10}


@platform_test
async def test_what_replicas_hold_and_their_steps_are_those_of_the_ones_that_are_there(platform):
    steps = []
    platform.dispatcher.stepped = lambda seconds, pictures: steps.append((seconds, pictures))
    await platform.beat(beating("r1", pictures=1), beating("r2", pictures=2))
    assert platform.dispatcher.levels == {"bank_bytes": 20.0} and steps == [(0.5, 1), (0.5, 2)]
    await platform.beat(beating("r2", pictures=3), Lost())
    assert platform.dispatcher.levels == {"bank_bytes": 10.0} and steps[2:] == [(0.5, 3)]


@in_loop
async def test_a_heartbeat_says_each_step_once():
    replica, process, _ = await started()
    process.say(Counts({"picture_steps": 1}, {"bank_pages": 1}, [(0.1, 1)]))
    process.say(Counts({"picture_steps": 3}, {"bank_pages": 2}, [(0.2, 2)]))
    assert replica.heartbeat().counts == Counts({"picture_steps": 3}, {"bank_pages": 2}, ((0.1, 1), (0.2, 2)))
    assert replica.heartbeat().counts == Counts({"picture_steps": 3}, {"bank_pages": 2})


@in_loop
async def test_a_heartbeat_that_stops_is_noticed():
    told = []

    async def ask(waiting):
        return [beating("r1")]

    def tell(message):
        told.append(message)
        if isinstance(message, Capacity):
            raise ZeroDivisionError

    replicas = Replicas(tell, call=lambda message, style: FakeStream(), ask=ask, waiting=lambda: 0)
    replicas.check()
    await settle()
    with pytest.raises(RuntimeError, match="heartbeat has stopped"):
        replicas.check()


def test_without_ray_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "stylefast.integrations.ray_serve", raising=False)
    with pytest.raises(MissingDependency, match=r"stylefast\[ray\]"):
        importlib.import_module("stylefast.integrations.ray_serve")
