"""The queue in front of the engine, on a stand-in for its process."""

import asyncio
import gc
import os
import threading
import time
import weakref
from functools import wraps

import pytest

from stylefast.errors import StyleFastError
from stylefast.serving import dispatcher as dispatching
from stylefast.serving.dispatcher import BROKEN, READY, STARTING, Dispatcher, EngineProcess
from stylefast.serving.media import Pixels
from stylefast.serving.messages import Cancel, Capacity, Done, Failed, Made, NotReady, Progress, Ready, Run, Stop
from stylefast.serving.replies import ApiError
from stylefast.serving.tickets import Ticket

PIXELS = Pixels(8, 8, bytes(8 * 8 * 3))


class Process:
    """Stand-in for the engine's process: notes what it is sent, and says what a test tells it to say."""

    def __init__(self, tell):
        self.say, self.sent = tell, []

    def send(self, message):
        self.sent.append(message)

    def end(self, seconds):
        self.sent.append("end")

    @property
    def runs(self):
        return [message.ticket for message in self.sent if isinstance(message, Run)]

    def done(self, *tickets):
        for ticket in tickets:
            self.say(Done(ticket, [Made(PIXELS, "{}", "", 1)], 0.5))


class Bench:
    """A dispatcher with its engines, the last of which runs."""

    def __init__(self, **options):
        self.engines, self.why = [], []

        def start(tell):
            self.engines.append(Process(tell))
            return self.engines[-1]

        options = {"max_running": 1, "max_waiting": 8, **options}
        self.dispatcher = Dispatcher(start, broken=self.why.append, **options)
        self.dispatcher.start()

    @property
    def engine(self):
        return self.engines[-1]

    def ready(self):
        self.engine.say(Ready({"model": "tiny"}))
        return self

    def submit(self, name, owner="a", pictures=1, **more):
        ticket = Ticket(name, owner, {"requests": [{"prompt": "x"}] * pictures}, **{"run": name, **more})
        self.dispatcher.submit(ticket)
        return ticket


def in_loop(test):
    """Run an async test."""

    @wraps(test)
    def run(*arguments, **fixtures):
        asyncio.run(test(*arguments, **fixtures))

    return run


@in_loop
async def test_nothing_is_accepted_before_the_model_is_loaded():
    bench = Bench()
    with pytest.raises(ApiError) as caught:
        bench.submit("1")
    assert (caught.value.status, caught.value.code) == (503, "starting")
    assert bench.dispatcher.state == STARTING and caught.value.headers()["retry-after"] == "5"
    bench.ready().submit("1")
    assert bench.dispatcher.state == READY and bench.engine.runs == ["1"]


@in_loop
async def test_the_expected_start_follows_from_the_steps_that_are_left():
    bench = Bench(max_running=2).ready()
    assert bench.dispatcher.expected_seconds() == 0
    bench.submit("1")
    bench.engine.say(Progress("1", 0, 50))
    bench.engine.say(Progress("1", 10, 50))
    running = bench.dispatcher.expected_seconds()
    bench.dispatcher.submit(Ticket("2", "a", {"requests": [{"steps": 20}, {"steps": "many"}]}, run="2"))
    assert bench.dispatcher.expected_seconds() == pytest.approx(running * (40 + 20 + 12) / 40)
    bench.engine.done("1", "2")
    for i in range(40):  # of steps that take a second each
        bench.submit(f"long{i}", steps=50)
        bench.engine.say(Done(f"long{i}", [Made(PIXELS, "{}", "", 1)], 50.0))
    bench.submit("last", steps=50)
    assert bench.dispatcher.expected_seconds() == pytest.approx(50 / 2, rel=0.01)


@in_loop
async def test_one_slot_and_eight_places_take_nine_of_sixty_four():
    bench, refused = Bench().ready(), []
    for i in range(64):
        try:
            bench.submit(str(i))
        except ApiError as error:
            refused.append(error)
    assert bench.dispatcher.running == 1 and bench.dispatcher.waiting == 8 and len(refused) == 55
    assert {(error.status, error.code) for error in refused} == {(429, "queue_full")}
    assert all(1 <= int(error.headers()["retry-after"]) <= 60 for error in refused)
    for i in range(9):
        bench.engine.done(str(i))
    assert bench.engine.runs == [str(i) for i in range(9)] and bench.dispatcher.running == 0


@in_loop
async def test_keys_take_turns_whatever_one_of_them_has_queued():
    bench = Bench(max_waiting=100).ready()
    for i in range(6):
        bench.submit(f"a{i}", "a")
    for i in range(2):
        bench.submit(f"b{i}", "b")
    for _ in range(8):
        bench.engine.done(bench.engine.runs[-1])
    assert bench.engine.runs == ["a0", "a1", "b0", "a2", "b1", "a3", "a4", "a5"]


@in_loop
async def test_pictures_and_not_requests_fill_the_engine():
    bench = Bench(max_running=4).ready()
    for i, pictures in enumerate((3, 1, 1, 9)):
        bench.submit(str(i), pictures=pictures)
    assert bench.engine.runs == ["0", "1"]
    bench.engine.done("0")
    assert bench.engine.runs == ["0", "1", "2"]  # nine never fit beside others
    bench.engine.done("1", "2")
    assert bench.engine.runs[-1] == "3"


@in_loop
async def test_a_key_has_so_many_pictures_on_their_way_and_no_more():
    bench = Bench(max_per_owner=2, max_running=8).ready()
    bench.submit("1", pictures=2)
    with pytest.raises(ApiError) as caught:
        bench.submit("2")
    assert (caught.value.status, caught.value.code) == (429, "quota_exceeded")
    bench.submit("3", "b")
    bench.engine.done("1")
    bench.submit("4")


@in_loop
async def test_a_deadline_that_passes_in_the_queue_costs_the_engine_nothing():
    bench = Bench().ready()
    bench.submit("1")
    late = bench.submit("2", seconds=0.01)
    with pytest.raises(ApiError) as caught:
        await late.wait()
    assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
    bench.engine.done("1")
    assert bench.engine.runs == ["1"]


@in_loop
async def test_an_engine_that_ignores_a_deadline_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(dispatching, "LATE_SECONDS", 0.01)
    bench = Bench().ready()
    late = bench.submit("1", seconds=0.01)
    with pytest.raises(ApiError) as caught:
        await late.wait()
    assert caught.value.status == 504 and bench.engine.sent[-1] == Cancel("1")
    assert bench.dispatcher.running == 1  # its place is free once the engine says so
    bench.engine.say(Failed("1", "JobCancelled", ""))
    assert bench.dispatcher.running == 0


@in_loop
async def test_cancelling_takes_a_request_out_of_the_queue_or_tells_the_engine():
    bench = Bench().ready()
    first, second = bench.submit("1"), bench.submit("2")
    assert bench.dispatcher.cancel(second) and not bench.dispatcher.cancel(second)
    assert second.status == "cancelled" and bench.dispatcher.waiting == 0
    assert bench.dispatcher.cancel(first) and bench.engine.sent[-1] == Cancel("1")
    third = bench.submit("3")
    assert third.status == "queued"  # until the step of the first is over
    bench.engine.say(Failed("1", "JobCancelled", ""))
    assert third.status == "in_progress"


@in_loop
async def test_a_request_may_have_the_id_of_one_that_the_engine_has_not_left_yet():
    bench = Bench(max_running=2).ready()
    first = bench.submit("1", run="one")
    bench.dispatcher.cancel(first)
    second = bench.submit("1", run="two")
    bench.engine.say(Failed("one", "JobCancelled", ""))
    assert not second.over and bench.dispatcher.running == 1
    bench.engine.done("two")
    assert (first.status, second.status) == ("cancelled", "completed") and not bench.dispatcher.running


@in_loop
async def test_those_in_progress_fail_with_a_dead_engine_and_those_that_wait_are_kept():
    bench = Bench().ready()
    running, waiting = bench.submit("1"), bench.submit("2")
    bench.engine.say(None)
    with pytest.raises(ApiError) as caught:
        await running.wait()
    assert (caught.value.status, caught.value.code) == (503, "engine_lost")
    assert waiting.status == "queued" and bench.dispatcher.state == STARTING and len(bench.engines) == 2
    bench.ready()
    assert bench.engine.runs == ["2"] and bench.dispatcher.restarts == 1
    bench.engine.done("2")
    assert (await waiting.wait())[0].pixels == PIXELS


@in_loop
async def test_an_engine_that_dies_again_and_again_is_given_up():
    bench = Bench().ready()
    bench.submit("1"), bench.submit("2"), bench.submit("3"), (last := bench.submit("4"))
    for _ in range(3):
        bench.engine.say(None)
        bench.ready() if bench.dispatcher.state == STARTING else None
    assert bench.dispatcher.state == BROKEN and len(bench.engines) == 3 and "3 times" in bench.why[0]
    with pytest.raises(ApiError) as caught:
        await last.wait()
    assert (caught.value.status, caught.value.code) == (503, "engine_broken")


@in_loop
async def test_a_model_that_can_not_be_loaded_is_said():
    bench = Bench()
    bench.engine.say(NotReady("there is no model"))
    assert bench.dispatcher.state == BROKEN and bench.why == ["there is no model"]


@in_loop
async def test_draining_finishes_what_is_on_its_way_and_takes_no_more():
    bench = Bench().ready()
    first, second = bench.submit("1"), bench.submit("2")
    draining = asyncio.ensure_future(bench.dispatcher.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as caught:
        bench.submit("3")
    assert (caught.value.status, caught.value.code) == (503, "draining")
    bench.engine.done("1")
    bench.engine.done("2")
    await draining
    assert [first.status, second.status] == ["completed"] * 2
    await bench.dispatcher.close()
    assert bench.engine.sent[-2:] == [Stop(), "end"]


@in_loop
async def test_what_is_not_done_when_the_grace_is_over_is_told():
    bench = Bench().ready()
    first, second = bench.submit("1"), bench.submit("2")
    await bench.dispatcher.drain(0.01)
    assert [first.error.code, second.error.code] == ["draining"] * 2


@in_loop
async def test_steps_are_passed_on_as_they_are_done():
    bench = Bench().ready()
    ticket, seen = bench.submit("1"), []

    async def read():
        async for progress in ticket.progress():
            seen.append(progress.step)

    reading = asyncio.ensure_future(read())
    await asyncio.sleep(0)
    for step in (1, 2):
        bench.engine.say(Progress("1", step, 2))
    assert ticket.shown()["progress"] == 1.0 and ticket.shown()["status"] == "in_progress"
    bench.engine.done("1")
    await reading
    assert seen == [1, 2]


@in_loop
async def test_news_of_a_request_that_is_over_changes_nothing():
    bench = Bench().ready()
    bench.submit("1")
    bench.engine.done("1")
    bench.engine.say(Progress("1", 1, 2))
    bench.engine.done("1")
    bench.engine.say(Failed("unknown", "JobCancelled", ""))
    assert bench.dispatcher.running == 0


@in_loop
async def test_an_engine_may_take_more_or_fewer_pictures_than_before():
    bench = Bench()
    bench.engine.say(Capacity(2))  # nothing is known of the model yet
    assert bench.dispatcher.state == STARTING
    bench.ready()
    for name in "abc":
        bench.submit(name)
    assert bench.engine.runs == ["a", "b"]
    bench.engine.say(Capacity(3))
    assert bench.engine.runs == ["a", "b", "c"]
    bench.engine.say(Capacity(0))
    bench.engine.done("a", "b", "c")
    waiting = bench.submit("d")
    assert bench.dispatcher.state == STARTING and "d" not in bench.engine.runs and not waiting.over
    bench.engine.say(Capacity(1))
    assert bench.dispatcher.state == READY and bench.engine.runs[-1] == "d"


@in_loop
async def test_pictures_that_come_for_a_cancelled_request_are_dropped():
    bench, drawn = Bench().ready(), []
    bench.dispatcher.drawn = drawn.append
    first = bench.submit("1")
    bench.dispatcher.cancel(first)
    bench.engine.done("1")
    assert first.status == "cancelled" and not first.pictures and not drawn and bench.dispatcher.running == 0
    second = bench.submit("2", seconds=1000)
    bench.engine.done("2")
    assert len(second.pictures) == len(drawn) == 1


@in_loop
async def test_nothing_keeps_a_request_that_has_ended():
    bench = Bench(max_running=8).ready()
    ended = [bench.submit(str(i), seconds=1000) for i in range(4)]
    uploads = [one.call for one in ended]
    bench.engine.done("0")
    bench.dispatcher.cancel(ended[1])
    bench.engine.say(Failed("1", "JobCancelled", ""))
    bench.engine.say(Failed("2", "ImageError", "no"))
    bench.engine.say(None)  # its process dies
    assert all(one.over and not one.call and one.count == 1 for one in ended) and all(uploads)
    remembered = [weakref.ref(one) for one in ended]
    del ended
    gc.collect()
    assert [one() for one in remembered] == [None] * 4


def _no_model():
    raise StyleFastError("there is no model")


def test_an_engine_that_has_ended_leaves_no_threads_and_no_files():
    async def run():
        told, loop = [], asyncio.get_running_loop()
        ended = loop.create_future()

        def tell(message):
            told.append(message)
            if message is None:
                ended.set_result(None)

        engine = EngineProcess(_no_model, False, tell)
        await ended
        assert isinstance(told[0], NotReady) and told[1:] == [None]
        engine._process.join()  # before the next one starts, as `multiprocessing` would

    def held():
        names = [one.name for one in threading.enumerate() if one.name.startswith("stylefast-engine")]
        return len(names), len(os.listdir("/proc/self/fd"))

    asyncio.run(run())  # the first also starts what all share
    before = held()
    asyncio.run(run())
    for _ in range(1000):
        gc.collect()
        if held()[0] == 0:
            break
        time.sleep(0.01)
    assert held()[0] == 0 and held()[1] <= before[1]
