"""What a submitted job is: waited for, cancelled, late, watched; and how an engine ends."""

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest
import torch

import stylefast as sf
from stylefast.errors import DeadlineExceeded, EngineClosed, InvalidRequest, JobCancelled, QueueFull
from stylefast.runtime import scheduler
from tests.support.fp64 import Twins, close
from tests.support.scene import SIZE, STEPS, small_picture
from tests.support.watch import WAIT, Clock, Watch, held, request, settled, submit, until

PICTURE = small_picture(1, (48, 40))


@pytest.fixture
def idle(engine, monkeypatch):
    """The engine with a UNet that predicts zeros at once."""
    return Watch(engine, monkeypatch, idle=True)


@pytest.fixture
def watch(engine, monkeypatch):
    return Watch(engine, monkeypatch)


@pytest.fixture(scope="module")
def bank(engine):
    return engine.bake(sf.StyleAligned(PICTURE), steps=STEPS, size=SIZE)


def test_a_job_gives_what_generate_gives(engine, drawn):
    job = submit(engine, seed=4, output="pil")
    result = job.result(WAIT)
    close(result.latents, drawn("a cat", seed=4, steps=STEPS))
    assert job.status == "done" and job.done() and job.step == job.steps == STEPS
    assert result.images[0].size == SIZE and result.metadata[0]["seed"] == 4


def test_several_requests_of_a_job_come_back_in_order_whatever_their_sizes_and_steps(engine, drawn):
    requests = [request("a dog", seed=1, steps=2), request("a cat", seed=2, size=(64, 64)), request(seed=3)]
    for one, latents in zip(requests, engine.submit(requests, output="latents").result(WAIT).latents):
        close([latents], drawn([one]))


def test_what_is_not_done_in_time_is_a_timeout_and_goes_on(engine, watch):
    _, go = watch.gate(1)
    job = submit(engine)
    with pytest.raises(TimeoutError, match=f"step . of {STEPS} after 0.05 seconds"):
        job.result(0.05)
    go.set()
    assert len(job.result(WAIT).latents) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"scheduler": "eule"},
        {"steps": 4, "guidance_interval": (0.55, 0.6)},
        {"spacing": "wide"},
        {"scheduler": "sdxl_turbo", "spacing": "leading"},
    ],
    ids=str,
)
def test_a_request_that_no_step_can_run_is_refused_at_the_door(engine, bad):
    with pytest.raises(InvalidRequest):
        submit(engine, **bad)
    assert settled(engine)


def test_submit_refuses_what_is_no_request(engine):
    for wrong in ("a cat", [], ["a cat"]):
        with pytest.raises(InvalidRequest, match="takes a Request"):
            engine.submit(wrong)
    for deadline in (0, -1.0, float("nan")):
        with pytest.raises(InvalidRequest, match="above 0"):
            submit(engine, deadline=deadline)


# cancelling


def test_cancelling_a_running_job_stops_it_within_a_step_and_frees_all_it_holds(engine, watch, bank):
    styles = [sf.StyleAligned(bank), sf.InstantStyle(PICTURE)]
    jobs = []
    watch.at[1] = lambda: jobs[0].cancel()
    with engine.scheduler.paused():
        jobs.append(submit(engine, style=styles))
    with pytest.raises(JobCancelled, match=f"step . of {STEPS}"):
        jobs[0].result(WAIT)
    assert jobs[0].status == "cancelled" and watch.calls == 2
    assert held(engine) == dict.fromkeys(held(engine), 0)


def test_cancelling_a_job_that_waits_takes_it_out_at_once(engine, watch, monkeypatch):
    monkeypatch.setattr(scheduler, "MOST_PICTURES", 1)
    reached, go = watch.gate(0)
    first = submit(engine)
    assert reached.wait(WAIT)
    second = submit(engine, "a dog")
    assert second.status == "queued" and second.cancel() and second.status == "cancelled" and second.done()
    go.set()
    first.result(WAIT)
    assert watch.rows == [2] * STEPS and settled(engine)


def test_a_job_that_is_over_can_not_be_cancelled(engine):
    job = submit(engine)
    job.result(WAIT)
    assert not job.cancel() and job.status == "done"
    with engine.scheduler.paused():
        cancelled = submit(engine)
        cancelled.cancel()
    with pytest.raises(JobCancelled):
        cancelled.result(WAIT)
    assert not cancelled.cancel()


def test_cancelling_in_the_last_step_is_still_cancelling(engine, watch):
    jobs, told = [], []
    watch.at[STEPS - 1] = lambda: told.append(jobs[0].cancel())
    with engine.scheduler.paused():
        jobs.append(submit(engine))
    with pytest.raises(JobCancelled):
        jobs[0].result(WAIT)
    assert told == [True] and settled(engine)


def test_the_others_do_not_notice_that_one_of_them_is_cancelled(engine, watch, drawn):
    expected = [drawn("a cat", seed=1, steps=STEPS), drawn("a house", seed=3, steps=STEPS)]
    calls = watch.calls
    first, second, third = watch.together(
        *(
            lambda prompt=prompt, seed=seed: submit(engine, prompt, seed=seed)
            for prompt, seed in (("a cat", 1), ("a dog", 2), ("a house", 3))
        )
    )
    watch.at[calls + 1] = second.cancel
    for job, alone in zip((first, third), expected):
        close(job.result(WAIT).latents, alone)
    assert second.status == "cancelled" and watch.rows[calls:] == [6, 6, 4]


def test_many_threads_may_cancel_the_same_and_other_jobs(engine, idle):
    jobs = [submit(engine, seed=i, steps=60) for i in range(12)]
    spared = jobs[::4]

    def cancel(offset):
        for job in jobs[offset:] + jobs[:offset]:
            if job not in spared:
                job.cancel()

    threads = [threading.Thread(target=cancel, args=(3 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    for job in spared:
        job.result(WAIT)
    assert {job.status for job in jobs if job not in spared} <= {"cancelled", "done"}
    assert settled(engine)


# deadlines and queues


def test_a_job_whose_deadline_passes_while_it_runs_fails_and_frees_all(engine, watch, monkeypatch):
    clock = Clock(monkeypatch)
    watch.at[2] = lambda: clock.pass_by(0.3)
    late, calm = watch.together(
        lambda: submit(engine, steps=40, deadline=0.2), lambda: submit(engine, "a dog", steps=8, deadline=60)
    )
    with pytest.raises(DeadlineExceeded, match=r"deadline of 0.2 seconds passed at step [23] of 40"):
        late.result(WAIT)
    assert len(calm.result(WAIT).latents) == 1 and late.status == "failed" and settled(engine)


def test_a_job_whose_deadline_passes_while_it_waits_fails_without_a_step(engine, watch, monkeypatch):
    monkeypatch.setattr(scheduler, "MOST_PICTURES", 1)
    reached, go = watch.gate(0)
    clock = Clock(monkeypatch)
    first = submit(engine)
    assert reached.wait(WAIT)
    late = submit(engine, deadline=0.01)
    clock.pass_by(0.02)
    go.set()
    with pytest.raises(DeadlineExceeded, match="step 0"):
        late.result(WAIT)
    first.result(WAIT)
    assert watch.rows == [2] * STEPS


def test_no_more_jobs_wait_than_allowed(engine, watch, monkeypatch):
    monkeypatch.setattr(scheduler, "MOST_PICTURES", 1)
    monkeypatch.setattr(engine.scheduler, "max_pending", 2)
    reached, go = watch.gate(0)
    running = submit(engine)
    assert reached.wait(WAIT)
    waiting = [submit(engine), submit(engine)]
    with pytest.raises(QueueFull, match="2 jobs are already waiting, and the limit is 2"):
        submit(engine)
    waiting.pop().cancel()
    waiting.append(submit(engine))
    go.set()
    for job in [running, *waiting]:
        job.result(WAIT)


# the end of an engine


def test_closing_fails_what_runs_and_what_waits_and_takes_no_more(pipe, monkeypatch):
    monkeypatch.setattr(scheduler, "MOST_PICTURES", 1)
    with sf.Engine.from_pipeline(pipe) as engine:
        watch = Watch(engine, monkeypatch)
        reached, go = watch.gate(1)
        running = submit(engine)
        assert reached.wait(WAIT)
        waiting = submit(engine)
        threading.Thread(target=lambda: until(lambda: engine.scheduler._closed) and go.set()).start()
    for job in (running, waiting):
        with pytest.raises(EngineClosed, match="closed before the job was done"):
            job.result(WAIT)
    assert watch.calls == 2 and held(engine) == dict.fromkeys(held(engine), 0)
    engine.close()
    with pytest.raises(EngineClosed, match="load another"):
        submit(engine)


def test_an_engine_can_be_closed_from_a_callback_of_its_own_job(pipe):
    engine = sf.Engine.from_pipeline(pipe)
    job, closed = submit(engine), threading.Event()
    job.add_done_callback(lambda _: (engine.close(), closed.set()))
    assert closed.wait(WAIT)
    with pytest.raises(EngineClosed):
        submit(engine)


def test_an_engine_that_was_dropped_leaves_no_thread(pipe, monkeypatch):
    monkeypatch.setattr(scheduler, "_IDLE_SECONDS", 0.1)
    engine = sf.Engine.from_pipeline(pipe)
    submit(engine).result(WAIT)
    thread, gone = engine.scheduler._thread, weakref.ref(engine.scheduler)
    del engine
    if thread is not None:
        thread.join(WAIT)
    gc.collect()
    assert gone() is None


def test_after_a_pause_the_next_job_starts_another_thread(pipe, monkeypatch):
    monkeypatch.setattr(scheduler, "_IDLE_SECONDS", 0.01)
    engine = sf.Engine.from_pipeline(pipe)
    for _ in range(3):
        submit(engine, steps=1).result(WAIT)
        assert until(lambda: engine.scheduler._thread is None)


# callbacks, await and previews


def test_callbacks_are_called_once_also_when_the_job_is_over(engine):
    job, seen = submit(engine), []
    job.add_done_callback(lambda job: seen.append(job.status))
    job.result(WAIT)
    job.add_done_callback(lambda job: seen.append(job.status))
    assert settled(engine) and seen == ["done", "done"]


def test_a_callback_that_raises_harms_nobody(engine, watch, drawn, caplog):
    def bad(job):
        raise ZeroDivisionError("mine")

    seen = []
    first, second = watch.together(lambda: submit(engine, steps=1), lambda: submit(engine, "a dog", seed=2))
    first.add_done_callback(bad)
    first.add_done_callback(lambda job: seen.append(job.status))
    assert len(first.result(WAIT).latents) == 1
    close(second.result(WAIT).latents, drawn("a dog", seed=2, steps=STEPS))
    assert seen == ["done"] and "ZeroDivisionError: mine" in caplog.text
    first.add_done_callback(bad)  # at once, and no more than that


def test_a_job_can_be_awaited_with_its_result_or_its_error(engine):
    async def main():
        with engine.scheduler.paused():
            good, bad = submit(engine), submit(engine, "a dog", steps=60)
            bad.cancel()
        result = await good
        with pytest.raises(JobCancelled):
            await bad
        return await good, result

    first, second = asyncio.run(main())
    assert first is second and len(first.latents) == 1


async def _previews(job, seen=None):
    seen = [] if seen is None else seen
    async for preview in job:
        seen.append(preview)
    return seen


def _watched_from_the_start(engine, watch, jobs, **options):
    """Submit a job whose first step waits until somebody watches it."""
    watch.at[watch.calls] = lambda: until(lambda: jobs and jobs[0].wants_previews)
    jobs.append(submit(engine, **options))
    return jobs[0]


def test_a_reader_who_keeps_up_sees_every_step_in_order(engine, watch):
    seen, jobs = [], []
    # every step waits until the one before has been seen
    watch.before = lambda latents: until(lambda: len(seen) >= watch.calls - 1)
    asyncio.run(_previews(_watched_from_the_start(engine, watch, jobs, steps=6), seen))
    assert [preview.step for preview in seen] == [1, 2, 3, 4, 5, 6]


def test_a_slow_reader_skips_previews_but_not_the_last(engine, idle):
    seen, jobs = [], []
    idle.at[10] = lambda: until(lambda: seen)

    async def main():
        async for preview in _watched_from_the_start(engine, idle, jobs, steps=80):
            seen.append(preview.step)
            if len(seen) == 1:  # busy with the first one until all is over
                await asyncio.to_thread(jobs[0].result, WAIT)

    asyncio.run(main())
    assert seen[0] <= 10 and seen[1:] == [80]


def test_the_last_preview_is_the_picture_in_small():
    tiny = sf.Engine.from_pretrained("tiny", device="cpu")

    request = sf.Request("a fish in neon style", steps=6, seed=5)

    async def main():
        job = tiny.submit(request, output="np")
        seen = await _previews(job)
        return seen[-1], (await job)

    preview, result = asyncio.run(main())
    close(preview.latents, Twins(tiny).drawn([request]))  # no noise is left after the last step
    tiny.close()
    image, (small,) = torch.from_numpy(result.images[0]), preview.images()
    small = torch.from_numpy(np.array(small.resize(image.shape[1::-1]))).float()
    assert torch.corrcoef(torch.stack([image.flatten(), small.flatten()]))[0, 1] > 0.8


def test_previews_of_a_failed_job_end_with_its_error(engine, watch):
    _, go = watch.gate(30)

    async def main():
        job = submit(engine, steps=60)
        async for preview in job:
            if preview.step >= 2:
                job.cancel()
                go.set()

    with pytest.raises(JobCancelled):
        asyncio.run(main())


def test_a_reader_that_leaves_stops_the_making_of_previews(engine, idle):
    _, go = idle.gate(100)

    async def main():
        job = submit(engine, steps=200)
        previews = aiter(job)
        await anext(previews)
        assert job.wants_previews
        await previews.aclose()
        assert not job.wants_previews
        job.cancel()
        go.set()

    asyncio.run(main())
    assert settled(engine)


def test_previews_leave_out_references_and_hold_all_pictures_of_the_job(engine):
    async def main():
        style = sf.StyleAligned(PICTURE)
        return await _previews(engine.submit([request(style=style), request("a dog", style=style)], output="latents"))

    assert [len(preview.latents) for preview in asyncio.run(main())][-1] == 2


def test_a_reader_whose_loop_ends_cancels_its_job_and_no_other(engine, watch):
    reached, go = watch.gate(1)
    job, other = watch.together(lambda: submit(engine), lambda: submit(engine, "a dog"))

    async def leave():
        asyncio.ensure_future(_previews(job))
        await asyncio.sleep(0)
        assert await asyncio.to_thread(reached.wait, WAIT)

    asyncio.run(leave())
    go.set()
    assert len(other.result(WAIT).latents) == 1
    with pytest.raises(JobCancelled):
        job.result(WAIT)


# a task that is cancelled


def test_a_task_that_gives_up_waiting_cancels_its_job(engine, watch):
    reached, go = watch.gate(1)
    job = submit(engine, steps=60)

    async def main():
        assert await asyncio.to_thread(reached.wait, WAIT)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(job, 0.01)

    asyncio.run(main())
    go.set()
    with pytest.raises(JobCancelled):
        job.result(WAIT)
    assert not job._watchers and watch.calls <= 3 and settled(engine)


def test_a_job_behind_a_shield_goes_on_when_its_waiter_is_cancelled(engine, watch):
    async def main():
        job = submit(engine)
        waiting = asyncio.shield(asyncio.ensure_future(job._as_future()))
        task = asyncio.ensure_future(asyncio.wait_for(waiting, WAIT))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await job

    assert len(asyncio.run(main()).latents) == 1


@pytest.mark.parametrize("busy", [False, True], ids=["while it waits for one", "while it does something with one"])
def test_a_reader_of_previews_that_is_cancelled_cancels_its_job(engine, watch, busy):
    _, go = watch.gate(2)
    job, seen = submit(engine, steps=60), []

    async def read():
        async for preview in job:
            seen.append(preview)
            if busy:
                await asyncio.sleep(WAIT)

    async def main():
        task = asyncio.ensure_future(read())
        while not seen:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    go.set()
    with pytest.raises(JobCancelled):
        job.result(WAIT)
    assert settled(engine)


def test_a_reader_that_breaks_off_may_still_wait_for_the_result(engine, watch):
    async def main():
        job = submit(engine, steps=6)
        async for _ in job:
            break
        return await job

    assert len(asyncio.run(main()).latents) == 1
