"""What goes wrong between two steps ends one job, and nobody waits for ever."""

import os
import signal
import threading
import time

import pytest
import torch

import stylefast as sf
from stylefast.errors import DeadlineExceeded, EngineClosed, InvalidRequest, OutOfMemory
from stylefast.runtime import endings, scheduler
from stylefast.runtime.runner import Runner
from tests.support.fp64 import close
from tests.support.scene import SIZE, sharp_pipeline, small_picture
from tests.support.watch import WAIT, Calls, Clock, Watch, latents, request, settled, submit, until


@pytest.fixture
def own(pipe):
    """An engine that a test may break."""
    engine = sf.Engine.from_pipeline(pipe)
    yield engine
    engine.close()


def together(engine, *calls):
    """Calls in threads that meet in one batch."""
    with engine.scheduler.paused():
        made = Calls(*calls)
        assert until(lambda: engine.scheduler.pending == len(calls))
    return made.wait()


def once(monkeypatch, owner, name, error, when=lambda: True):
    """The first call of a method where `when` raises."""
    method, raised = getattr(owner, name), []

    def fails(*arguments, **options):
        if not raised and when():
            raised.append(1)
            raise error
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, fails)


def in_main():
    return threading.current_thread() is threading.main_thread()


def test_a_device_that_stays_broken_keeps_nobody_waiting(own, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("step", "retire"):
        monkeypatch.setattr(Runner, name, broken)
    found = together(own, lambda: submit(own).result(WAIT), lambda: latents(own, "a dog"))
    assert [type(error) for error in found] == [RuntimeError] * 2
    with pytest.raises(RuntimeError, match="illegal memory access"):
        submit(own).result(WAIT)


@pytest.mark.parametrize("name", ["shown_of", "results_of"])
def test_no_memory_for_what_one_call_wants_starts_it_again(engine, monkeypatch, drawn, name):
    expected, wanted = drawn("a dog", seed=2, steps=9), drawn([request()])
    once(monkeypatch, Runner, name, torch.OutOfMemoryError("CUDA out of memory"))
    call, job = together(
        engine,
        lambda: engine.generate(request(), callback=lambda *_: None, output="latents"),
        lambda: submit(engine, "a dog", seed=2, steps=9).result(WAIT).latents,
    )
    close(call.latents, wanted)
    close(job, expected)
    once(monkeypatch, Runner, name, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(OutOfMemory):
        engine.generate(request(), callback=lambda *_: None, output="latents")
    assert settled(engine)


def test_an_error_while_a_result_is_handed_over_ends_the_job(engine, monkeypatch):
    once(monkeypatch, type(engine.runner.stream), "mark", RuntimeError("CUDA error: event record"))
    with pytest.raises(RuntimeError, match="event record"):
        latents(engine)
    assert settled(engine)


@pytest.mark.parametrize("moment", ["planning", "handing over"])
def test_ctrl_c_while_another_job_joins_or_leaves_loses_it_not(engine, monkeypatch, moment):
    watch, jobs = Watch(engine, monkeypatch), []
    watch.at[1] = lambda: jobs.append(submit(engine, "a dog", steps=2))
    owner, name = (engine._planner, "fingerprint") if moment == "planning" else (engine.scheduler._helper, "run")
    ready = (lambda: in_main() and jobs) if moment == "planning" else (lambda: in_main() and jobs and jobs[0].step == 2)
    once(monkeypatch, owner, name, KeyboardInterrupt(), ready)
    with pytest.raises(KeyboardInterrupt):
        latents(engine, steps=20)
    assert jobs[0].result(WAIT).latents and settled(engine)


def test_ctrl_c_that_breaks_off_no_step_ends_no_other_call(engine, monkeypatch):
    reached, go = threading.Event(), threading.Event()
    style = sf.StyleAligned(small_picture(1, (48, 40)))
    bake = Calls(lambda: engine.bake(style, steps=3, size=SIZE, callback=lambda *_: (reached.set(), go.wait(WAIT))))
    assert reached.wait(WAIT)
    once(monkeypatch, engine.scheduler, "_wait", KeyboardInterrupt(), in_main)
    with pytest.raises(KeyboardInterrupt):
        latents(engine, "words that nobody has encoded yet")
    go.set()
    assert isinstance(bake.wait()[0], sf.StyleBank) and settled(engine)


@pytest.mark.parametrize("name", ["stylefast-steps", "stylefast-helper"])
def test_a_thread_that_can_not_be_started_is_an_error_once(own, monkeypatch, name):
    start, failed = threading.Thread.start, []

    def no_more(thread):
        if thread.name == name and not failed:
            failed.append(1)
            raise RuntimeError("can't start new thread")
        return start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with pytest.raises(RuntimeError, match="new thread"):
        submit(own).result(WAIT)
    assert submit(own).result(WAIT).latents and latents(own, "a dog")


@pytest.mark.parametrize("again", range(5))
def test_two_jobs_whose_callbacks_close_the_engine_do_not_wait_for_each_other(pipe, again):
    engine = sf.Engine.from_pipeline(pipe)
    with engine.scheduler.paused():
        jobs = [submit(engine, steps=1), submit(engine, "a dog", steps=60)]
        for job in jobs:
            job.add_done_callback(lambda _: engine.close())
    assert until(lambda: all(job.done() for job in jobs) and engine.scheduler._thread is None)


@pytest.mark.parametrize("moment", ["a step", "a pause"])
def test_closing_in_a_signals_handler_is_done_when_the_turn_ends(own, monkeypatch, moment):
    closed, backend = [], own.runner.backend.close
    monkeypatch.setattr(own.runner.backend, "close", lambda: (closed.append(1), backend()))
    if moment == "a step":
        Watch(own, monkeypatch).at[1] = own.close
        with pytest.raises(EngineClosed):
            latents(own)
    else:
        with own.scheduler.paused():
            job = submit(own)
            own.close()
        with pytest.raises(EngineClosed):
            job.result(WAIT)
    assert until(lambda: closed)


def test_a_full_batch_whose_callback_generates_goes_on(engine, monkeypatch):
    monkeypatch.setattr(scheduler, "MOST_PICTURES", 2)
    inner = []
    requests = [request(), request("a dog")]
    engine.generate(requests, output="latents", callback=lambda *_: inner.append(latents(engine, "a dog", steps=1)))
    assert len(inner) == requests[0].steps and settled(engine)


def test_a_callback_in_a_callers_thread_is_refused_to_wait_as_well(engine, monkeypatch):
    watch, jobs, caught = Watch(engine, monkeypatch), [], []

    def wait(job):
        with pytest.raises(InvalidRequest, match="in another thread"):
            jobs[1].result(WAIT)
        caught.append(in_main())

    def begin():
        jobs.extend(submit(engine, "a dog", steps=30) for _ in range(2))
        jobs[0].add_done_callback(wait)

    watch.at[1], watch.at[4] = begin, lambda: [job.cancel() for job in jobs]
    latents(engine, steps=9)
    assert caught == [True] and settled(engine)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_callback_that_forks_ends_the_call_in_the_child(engine):
    children = []

    def fork(step, steps, _):
        if step == 2:
            children.append(os.fork())

    try:
        engine.generate(request(), callback=fork, output="latents")
    except BaseException as error:
        if children == [0]:
            os._exit(7 if isinstance(error, EngineClosed) else 8)
        raise
    if children == [0]:
        os._exit(9)
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        done, status = os.waitpid(children[0], os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 7
            return
        time.sleep(0.01)
    os.kill(children[0], signal.SIGKILL)
    pytest.fail("the child hangs")


@pytest.mark.parametrize("setting", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")])
def test_what_a_callers_thread_has_set_does_not_reach_other_jobs(engine, monkeypatch, drawn, setting):
    expected = drawn("a dog", seed=2, steps=6)
    watch, jobs = Watch(engine, monkeypatch), []
    watch.at[1] = lambda: jobs.append(submit(engine, "a dog", seed=2, steps=6))
    with setting():
        latents(engine, steps=20)
    close(jobs[0].result(WAIT).latents, expected)


def test_a_deadline_ends_the_decoding_too(engine, monkeypatch):
    clock, decode = Clock(monkeypatch), engine.decoder._decode
    monkeypatch.setattr(engine.decoder, "_decode", lambda latents: (clock.pass_by(0.6), decode(latents))[1])
    job = engine.submit([request(seed=i) for i in range(4)], deadline=1.0)
    with pytest.raises(DeadlineExceeded):
        job.result(WAIT)
    assert settled(engine)


def test_waiting_for_an_encoder_beside_an_inversion_costs_no_time(own, monkeypatch):
    """The loop must sleep where nothing can be done."""
    picture = small_picture(1, (48, 40))
    inverted = request(style=sf.StyleAligned(picture, noise="ddim"), scheduler="ddim")
    own.generate(inverted, output="latents")  # all its prompts are known
    states, reached, go = own.runner.conditions._text_states, threading.Event(), threading.Event()

    def slow(*arguments):
        reached.set()
        assert go.wait(WAIT)
        return states(*arguments)

    monkeypatch.setattr(own.runner.conditions, "_text_states", slow)
    steps, step = [], own.scheduler.step
    monkeypatch.setattr(own.scheduler, "step", lambda: (steps.append(1), step())[1])
    with own.scheduler.paused():
        jobs = [own.submit(inverted, output="latents"), submit(own, "words that take long")]
    assert reached.wait(WAIT)
    before, began = len(steps), time.monotonic()
    time.sleep(0.5)
    # turns a second, however late this thread goes on
    busy = (len(steps) - before) / (time.monotonic() - began)
    go.set()
    assert all(job.result(WAIT).latents for job in jobs) and busy < 400


def test_new_prompts_that_keep_coming_do_not_hold_up_the_first_step(own, monkeypatch):
    watch, states, jobs = Watch(own, monkeypatch), own.runner.conditions._text_states, []

    def another(*arguments):
        if len(jobs) < 40 and not watch.calls:
            jobs.append(submit(own, f"prompt number {len(jobs)}", steps=1))
        return states(*arguments)

    monkeypatch.setattr(own.runner.conditions, "_text_states", another)
    submit(own, "the first of all", steps=1).result(WAIT)
    assert len(jobs) < 10 and all(job.result(WAIT) for job in jobs)


def test_an_engine_that_only_generates_is_closed_when_python_ends():
    engine = sf.Engine.from_pipeline(sharp_pipeline())
    latents(engine, steps=1)
    assert engine.scheduler in endings.started
