"""One driver for all callers: calls of `generate`, bakes and jobs share UNet calls, whichever thread runs the steps."""

import threading

import pytest
import torch

import stylefast as sf
from stylefast.errors import InvalidRequest
from tests.support.fp64 import close
from tests.support.scene import SIZE, STEPS, small_picture
from tests.support.watch import WAIT, Calls, Watch, held, latents, request, settled, submit, until

PICTURE = small_picture(1, (48, 40))
LARGE = (64, 64)


@pytest.fixture
def watch(engine, monkeypatch):
    return Watch(engine, monkeypatch)


def test_calls_of_many_threads_share_unet_calls(engine, watch, drawn):
    prompts = ["a cat", "a dog", "neon", "a fish", "a house", "a boat", "a tree", "a bird"]
    expected = [drawn(prompt, seed=i, steps=6) for i, prompt in enumerate(prompts)]
    calls = watch.calls
    # the first step waits until all calls are there
    watch.at[calls] = lambda: until(lambda: engine.scheduler.pending + engine.scheduler.running == len(prompts))
    made = Calls(*(lambda p=p, i=i: latents(engine, p, seed=i, steps=6) for i, p in enumerate(prompts))).wait()
    for one, alone in zip(made, expected):
        close(one, alone)
    assert watch.calls - calls <= 12 and settled(engine)


def test_a_call_and_jobs_share_unet_calls(engine, watch):
    reached, go = watch.gate(0)
    job = submit(engine, "a dog", steps=9)
    assert reached.wait(WAIT)
    call = Calls(lambda: latents(engine, seed=1, steps=3))
    assert until(lambda: engine.scheduler.pending)
    go.set()
    assert len(call.wait()[0]) == 1 and job.result(WAIT).latents
    assert watch.rows.count(4) == 3 and watch.calls <= 10 and settled(engine)


def test_a_callers_thread_runs_its_steps_and_those_of_jobs_that_join(engine, watch):
    threads, jobs = [], []
    watch.before = lambda latents: threads.append(threading.current_thread())
    watch.at[1] = lambda: jobs.append(submit(engine, "a dog", steps=3))
    latents(engine, steps=20)
    assert jobs[0].result(WAIT).latents and set(threads) == {threading.current_thread()}


def test_the_jobs_of_a_caller_that_is_done_go_on_without_it(engine, watch):
    jobs = []
    watch.at[1] = lambda: jobs.append(submit(engine, "a dog", steps=30))
    latents(engine, steps=4)
    assert jobs[0].result(WAIT).latents and settled(engine)


# callbacks


def test_steps_of_others_go_on_while_a_callback_runs(engine, watch):
    seen, beside = [], []

    def slow(step, steps, latents):
        seen.append(step)
        if step == 2:
            beside.append(submit(engine, "a dog", steps=30).result(WAIT))

    result = engine.generate(request(steps=4), callback=slow, output="latents")
    assert seen == [1, 2, 3, 4] and beside[0].latents and result.latents and settled(engine)


def test_a_callback_may_generate(engine, watch, drawn):
    expected, inner = drawn("a dog", seed=5, steps=STEPS), []

    def nested(step, steps, _):
        if step == 1:
            inner.append(latents(engine, "a dog", seed=5))

    assert engine.generate(request(), callback=nested, output="latents").latents
    close(inner[0], expected)


def test_a_callback_sees_all_pictures_of_a_size_at_one_step(engine, watch, monkeypatch):
    monkeypatch.setattr(engine.runner, "max_rows", 4)  # two pictures a call
    seen = []
    requests = [request(seed=i, steps=3) for i in range(3)] + [request(steps=2, size=LARGE)]
    engine.generate(requests, callback=lambda *args: seen.append(args), output="latents")
    small = [(step, steps, len(shown)) for step, steps, shown in seen if shown.shape[2:] == (8, 12)]
    large = [(step, steps, len(shown)) for step, steps, shown in seen if shown.shape[2:] == (16, 16)]
    assert small == [(1, 3, 3), (2, 3, 3), (3, 3, 3)] and large == [(1, 2, 1), (2, 2, 1)]


def test_what_a_callback_raises_ends_its_call_alone(engine, watch, drawn):
    expected, jobs = drawn("a dog", seed=2, steps=12), []
    watch.at[watch.calls + 1] = lambda: jobs.append(submit(engine, "a dog", seed=2, steps=12))

    def bad(step, steps, latents):
        if step == 3:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        engine.generate(request(steps=20), callback=bad)
    close(jobs[0].result(WAIT).latents, expected)
    assert settled(engine)


def test_nothing_is_made_in_a_thread_that_pictures_wait_for(engine):
    caught, done = [], threading.Event()

    def again(job):
        for call in (lambda: latents(engine), lambda: engine.bake(sf.StyleAligned(PICTURE), steps=1, size=SIZE)):
            try:
                call()
            except InvalidRequest as error:
                caught.append(str(error))
        done.set()

    submit(engine).add_done_callback(again)
    assert done.wait(WAIT) and len(caught) == 2 and all("in another thread" in message for message in caught)


# interruptions


def test_an_interrupted_call_lets_the_jobs_that_it_ran_begin_anew(engine, watch, drawn):
    expected, jobs = drawn("a dog", seed=2, steps=9), []

    def interrupt():
        raise KeyboardInterrupt

    watch.at[watch.calls + 1] = lambda: jobs.append(submit(engine, "a dog", seed=2, steps=9))
    watch.at[watch.calls + 5] = interrupt
    with pytest.raises(KeyboardInterrupt):
        latents(engine, steps=20)
    close(jobs[0].result(WAIT).latents, expected)
    assert settled(engine)


def test_a_caller_that_waits_for_its_turn_can_be_interrupted(engine, watch, monkeypatch):
    reached, go = watch.gate(0)
    job = submit(engine, "a dog")
    assert reached.wait(WAIT)
    waits = engine.scheduler._changed.wait_for

    def interrupted(*arguments):
        if threading.current_thread() is threading.main_thread() and not go.is_set():
            go.set()
            raise KeyboardInterrupt
        return waits(*arguments)

    monkeypatch.setattr(engine.scheduler._changed, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        latents(engine)
    assert job.result(WAIT).latents and settled(engine)


def test_an_unexpected_error_fails_the_jobs_of_all_callers(engine, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(engine.scheduler, "_choose", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        latents(engine)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        submit(engine).result(WAIT)
    monkeypatch.undo()
    assert latents(engine) and not any(held(engine).values())


# alone


def test_alone_shares_no_call_and_has_the_same_bits(engine, watch):
    options = {"seed": 3, "steps": STEPS}
    alone = engine.generate(request(**options), output="latents", alone=True).latents[0]
    reached, go = watch.gate(watch.calls)
    job = submit(engine, "a dog", steps=3 * STEPS)
    assert reached.wait(WAIT)
    calls = watch.calls
    call = Calls(lambda: engine.generate(request(**options), output="latents", alone=True).latents[0])
    assert until(lambda: engine.scheduler.pending)
    go.set()
    assert torch.equal(call.wait()[0], alone) and job.result(WAIT).latents
    assert set(watch.rows[calls:]) == {2} and watch.calls - calls == 4 * STEPS - 1 and settled(engine)


@pytest.mark.parametrize("value", [1, "yes", None])
def test_alone_is_a_flag(engine, value):
    with pytest.raises(InvalidRequest, match="alone is"):
        engine.generate("a cat", size=SIZE, steps=1, alone=value)


# baking


def test_a_bake_takes_turns_with_jobs_and_gives_the_same_bank(engine, watch):
    options = {"steps": STEPS, "size": SIZE}
    style = sf.StyleAligned([PICTURE, small_picture(2)])
    expected = engine.bake(style, **options)
    reached, go = watch.gate(watch.calls)
    job, told = submit(engine, "a dog", steps=20), []
    assert reached.wait(WAIT)
    bake = Calls(lambda: engine.bake(style, **options, callback=lambda *args: told.append(args)))
    assert until(lambda: engine.scheduler.pending)
    go.set()
    bank = bake.wait()[0]
    assert job.result(WAIT).latents and told == [(i + 1, STEPS) for i in range(STEPS)]
    for name in ("k", "v"):
        if name in expected.tensors:
            assert torch.equal(bank.tensors[name].float(), expected.tensors[name].float())
    assert settled(engine)


def test_a_bake_that_is_late_for_new_weights_is_refused(engine, watch, monkeypatch):
    run = engine.scheduler.run

    def late(job):
        monkeypatch.setattr(engine._planner, "fingerprint", lambda: "another")
        return run(job)

    monkeypatch.setattr(engine.scheduler, "run", late)
    with pytest.raises(sf.errors.StyleError, match="weights changed while the bake waited"):
        engine.bake(sf.StyleAligned(PICTURE), steps=1, size=SIZE)
