"""The running batch: who joins when, whose turn it is, and what one job's failure means to the others."""

import threading
import weakref

import pytest
import torch

import stylefast as sf
from stylefast.errors import NumericsError, OutOfMemory
from stylefast.runtime.plan.sample import SampleGroup
from tests.support.fp64 import close
from tests.support.scene import SIZE, STEPS, small_picture
from tests.support.watch import WAIT, Watch, forget_idle, held, request, settled, submit, until

PICTURE = small_picture(1, (48, 40))
LARGE = (64, 64)


@pytest.fixture
def idle(engine, monkeypatch):
    return Watch(engine, monkeypatch, idle=True)


@pytest.fixture
def watch(engine, monkeypatch):
    return Watch(engine, monkeypatch)


@pytest.fixture
def rows_at_most(engine, monkeypatch):
    """Limit the rows of a call."""
    return lambda count: monkeypatch.setattr(engine.runner, "max_rows", count)


def calls_until_done(watch, jobs) -> dict:
    """Job -> number of UNet calls at its end, filled as they end."""
    ends = {}
    for job in jobs:
        job.add_done_callback(lambda job: ends.setdefault(job, watch.calls))
    return ends


def test_a_job_joins_at_the_next_step_and_leaves_after_its_last(engine, watch, drawn):
    expected = drawn("a cat", seed=1, steps=5), drawn("a dog", seed=2, steps=2)  # whose prompts are known from then on
    jobs, calls = [], watch.calls
    watch.at[calls + 1] = lambda: jobs.append(submit(engine, "a dog", seed=2, steps=2))
    first = submit(engine, seed=1, steps=5)
    latents = first.result(WAIT).latents
    assert watch.rows[calls:] == [2, 2, 4, 4, 2]
    close(jobs[0].result(WAIT).latents, expected[1])
    close(latents, expected[0])


def test_steps_go_on_while_a_request_that_joins_is_encoded(engine, watch, monkeypatch):
    forget_idle(engine.runner.conditions.text)
    encode, passed = engine.text_encoder.encode, threading.Event()

    def slow(prompts, *rest, **named):
        if any("dog" in (prompt.text or "") for prompt in prompts):
            assert passed.wait(WAIT)
        return encode(prompts, *rest, **named)

    monkeypatch.setattr(engine.text_encoder, "encode", slow)
    second = []
    watch.at[1] = lambda: second.append(submit(engine, "a dog", steps=2))
    watch.at[4] = passed.set
    first = submit(engine, steps=900)
    assert until(lambda: second) and second[0].result(WAIT)
    first.cancel()
    assert watch.rows[:5] == [2] * 5 and 4 in watch.rows and settled(engine)


def test_steps_go_on_while_a_finished_picture_is_decoded(engine, watch, monkeypatch):
    decode, passed = engine.decoder._decode, threading.Event()
    monkeypatch.setattr(engine.decoder, "_decode", lambda latents: passed.wait(WAIT) and decode(latents))
    first, second = watch.together(
        lambda: submit(engine, output="pil"), lambda: submit(engine, "a dog", steps=STEPS + 4, output="latents")
    )
    watch.at[STEPS + 2] = passed.set
    second.result(WAIT)
    assert first.result(WAIT).images[0].size == SIZE and settled(engine)


def test_sizes_take_turns_with_a_call_for_each(engine, idle):
    jobs = idle.together(
        lambda: submit(engine, steps=6), lambda: submit(engine, steps=6, size=LARGE), lambda: submit(engine, steps=6)
    )
    for job in jobs:
        job.result(WAIT)
    small, large = (8, 12), (16, 16)
    assert idle.sizes == [small, large] * 6 and idle.rows == [4, 2] * 6


def at_rest(scheduler) -> bool:
    return not scheduler._leaving and not any(one.waits for one in scheduler._joining.values())


def test_a_long_job_does_not_keep_short_ones_waiting(engine, idle, rows_at_most):
    rows_at_most(4)
    short, ends = [], []

    def arrive():
        short.extend(submit(engine, "a dog", seed=i, steps=3) for i in range(6))
        ends.append(calls_until_done(idle, short))

    idle.at[5] = arrive
    # the helper encodes what joins and decodes what leaves, however long that takes, before the next step
    idle.before = lambda latents: until(lambda: at_rest(engine.scheduler))
    with engine.scheduler.paused():
        long = submit(engine, steps=200)
        ends.append(calls_until_done(idle, [long]))
    for job in (long, *short):
        job.result(WAIT)
    # from when they meet, seven jobs share calls of two: 18 steps of the short ones, and the long one's in between
    assert max(ends[1].values()) <= idle.rows.index(4) + 7 * 3 // 2 + 2
    assert max(idle.rows) == 4 and ends[0][long] <= 200 + 18


def test_a_steady_stream_of_short_jobs_does_not_starve_a_long_one(engine, idle, rows_at_most):
    rows_at_most(4)
    steps, stream = 40, []

    def arrive(latents):
        if idle.calls % 2 and idle.calls < 400:
            stream.append(submit(engine, "a dog", steps=3))

    idle.before = arrive
    with engine.scheduler.paused():
        long = submit(engine, steps=steps)
        ends = calls_until_done(idle, [long])
    long.result(WAIT)
    # the stream wants three quarters of all places
    assert ends[long] <= 3 * steps
    for job in list(stream):
        job.result(WAIT)


def test_a_stream_of_one_size_does_not_starve_another(engine, idle, rows_at_most):
    rows_at_most(2)
    stream = []

    def arrive(latents):
        if idle.calls < 300:
            stream.append(submit(engine, "a dog", steps=1, size=LARGE))

    idle.before = arrive
    with engine.scheduler.paused():
        other = submit(engine, steps=10)
        ends = calls_until_done(idle, [other])
    other.result(WAIT)
    assert ends[other] <= 150
    idle.before = lambda latents: None
    for job in list(stream):
        job.result(WAIT)


def test_a_group_larger_than_the_limit_runs_alone(engine, idle, rows_at_most):
    rows_at_most(4)
    style = sf.StyleAligned()
    big, small = idle.together(
        lambda: engine.submit([request(p, style=style) for p in ("a cat", "a dog", "neon")], output="latents"),
        lambda: submit(engine),
    )
    big.result(WAIT), small.result(WAIT)
    assert idle.rows == [6, 2] * STEPS


def test_generate_keeps_the_limit_of_rows_too(pipe, monkeypatch):
    engine = sf.Engine.from_pipeline(pipe, max_batch_rows=4)
    watch = Watch(engine, monkeypatch, idle=True)
    engine.generate(["a cat"] * 5, size=SIZE, steps=1, output="latents")
    assert watch.rows == [4, 4, 2]


# memory


def out_of_memory_above(rows, error=torch.OutOfMemoryError):
    def check(latents):
        if len(latents) > rows:
            raise error("CUDA out of memory" if error is torch.OutOfMemoryError else "")

    return check


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError], ids=lambda error: error.__name__)
def test_out_of_memory_splits_the_batch_and_nobody_notices(engine, watch, drawn, error):
    prompts = ["a cat", "a dog", "a house", "neon", "oil"]
    options = {"scheduler": "euler_ancestral"}  # noise must be drawn once however often a step is tried
    expected = [drawn(prompt, seed=i, steps=STEPS, **options) for i, prompt in enumerate(prompts)]
    watch.before, calls = out_of_memory_above(4, error), watch.calls
    with engine.scheduler.paused():
        engine.runner.make_room()  # what other tests left would be freed, and the whole batch tried again
    jobs = watch.together(
        *(lambda prompt=prompt, i=i: submit(engine, prompt, seed=i, **options) for i, prompt in enumerate(prompts))
    )
    for job, latents in zip(jobs, expected):
        close(job.result(WAIT).latents, latents)
    assert watch.rows[calls:] == [10, 4, 6, 2, 4] * STEPS


def test_only_the_job_that_does_not_fit_alone_fails(engine, watch, drawn):
    expected = drawn("a dog", seed=2, steps=STEPS)
    style = sf.StyleAligned()
    watch.before = out_of_memory_above(4)
    big, small = watch.together(
        lambda: engine.submit([request(p, style=style) for p in ("a cat", "a dog", "neon")], output="latents"),
        lambda: submit(engine, "a dog", seed=2),
    )
    close(small.result(WAIT).latents, expected)
    with pytest.raises(OutOfMemory, match=r"picture\(s\) 0, 1, 2 don't fit into memory even alone \(6 rows at 12x8"):
        big.result(WAIT)
    assert settled(engine)


def test_a_step_that_is_tried_again_does_not_hold_what_the_failed_one_had(engine, watch):
    tensors, alive = [], []

    def check(latents):
        if len(latents) > 2:
            workspace = torch.zeros(1000)
            tensors.append(weakref.ref(workspace))
            raise torch.OutOfMemoryError("CUDA out of memory")
        alive.extend(tensor() is not None for tensor in tensors)

    watch.before = check
    for job in watch.together(lambda: submit(engine, steps=1), lambda: submit(engine, "a dog", steps=1)):
        job.result(WAIT)
    assert alive and not any(alive)


def test_a_job_that_finds_no_room_to_join_waits_for_the_others(engine, watch, monkeypatch, drawn):
    expected = drawn("a dog", seed=2, steps=STEPS)
    admit, refusals = engine.runner.admit, []

    def full(samples, *rest):
        if any(t.prompt == "a dog" for t in samples) and engine.scheduler.running > 1:
            refusals.append(1)
            engine.runner.conditions.release(rest[0])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return admit(samples, *rest)

    monkeypatch.setattr(engine.runner, "admit", full)
    first, second = watch.together(lambda: submit(engine), lambda: submit(engine, "a dog", seed=2))
    close(second.result(WAIT).latents, expected)
    assert first.done() and refusals


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError], ids=lambda error: error.__name__)
def test_a_job_that_can_not_even_join_an_empty_batch_fails(engine, monkeypatch, error):
    def full(*arguments):
        raise error("no room")

    monkeypatch.setattr(engine.runner.conditions, "gather", full)
    with pytest.raises(OutOfMemory, match="does not fit into memory.*no room"):
        submit(engine).result(WAIT)
    assert settled(engine)


def test_banks_that_do_not_all_fit_take_turns_and_one_too_large_alone_fails(pipe, monkeypatch, drawn):
    plenty = sf.Engine.from_pipeline(pipe)
    styles = [sf.StyleAligned(PICTURE), sf.StyleAligned(prompt="neon"), sf.StyleAligned([PICTURE, PICTURE])]
    banks = [plenty.bake(style, steps=STEPS, size=SIZE) for style in styles]
    expected = [drawn("a cat", style, using=plenty, steps=STEPS) for style in styles[:2]]
    plenty.generate("a cat", sf.StyleAligned(banks[0]), steps=STEPS, size=SIZE, output="latents")
    page = plenty.runner.bank_pages[8, 12].layout.nbytes
    engine = sf.Engine.from_pipeline(pipe, bank_memory=3 * page)  # two pages a job and step with guidance
    watch = Watch(engine, monkeypatch)
    jobs = watch.together(*(lambda bank=bank: submit(engine, style=sf.StyleAligned(bank)) for bank in banks))
    for job, latents in zip(jobs, expected):
        close(job.result(WAIT).latents, latents)
    with pytest.raises(OutOfMemory, match="4 pages of style banks.*3 fit.*bank_memory"):
        jobs[2].result(WAIT)
    assert held(engine) == dict.fromkeys(held(engine), 0)
    assert engine.runner.bank_pages[8, 12].slots == 3


@pytest.mark.parametrize("buckets", [(), (2, 4)], ids=["as they come", "buckets"])
def test_plain_requests_run_where_no_page_of_a_bank_fits(pipe, buckets):
    engine = sf.Engine.from_pipeline(pipe, bank_memory=1000, batch_buckets=buckets)
    submit(engine).result(WAIT)
    bank = engine.bake(sf.StyleAligned(PICTURE), steps=STEPS, size=SIZE)
    with pytest.raises(OutOfMemory, match="one page of a style bank takes .* raise bank_memory"):
        submit(engine, style=sf.StyleAligned(bank)).result(WAIT)
    submit(engine).result(WAIT)


# NaN


@pytest.fixture(scope="module")
def bucketed(pipe):
    return sf.Engine.from_pipeline(pipe, batch_buckets=(2, 4, 8, 16))


def poison(engine, monkeypatch, prompt):
    """NaN in the page of a prompt's keys and values."""
    admit = engine.runner.admit

    @torch.inference_mode()
    def poisoned(samples, *rest):
        group = admit(samples, *rest)
        for (t, branch), pages in group.conditions.text_pages.items():
            if branch == "full" and t.prompt == prompt:
                for k, v in engine.runner.conditions.text.layers:
                    k[pages], v[pages] = torch.nan, torch.nan
        return group

    monkeypatch.setattr(engine.runner, "admit", poisoned)


def test_nan_fails_the_request_alone_and_the_others_keep_every_bit(bucketed, monkeypatch, drawn):
    watch = Watch(bucketed, monkeypatch)

    def run(middle):
        jobs = watch.together(
            lambda: submit(bucketed, "a cat", seed=1, style=sf.StyleAligned(PICTURE)),
            lambda: submit(bucketed, middle, seed=2),
            lambda: submit(bucketed, "a house", seed=3, steps=2 * STEPS),
        )
        done = [job.result(WAIT).latents[0] for job in jobs if job is not jobs[1]]
        return jobs[1], done

    healthy, expected = run("a dog")
    healthy.result(WAIT)
    poison(bucketed, monkeypatch, "a sick dog")
    sick, actual = run("a sick dog")
    with pytest.raises(NumericsError, match=r"picture\(s\) 0 contain"):
        sick.result(WAIT)
    # the first has both in its bucket of 8 rows all the time
    assert torch.equal(actual[0], expected[0])
    # the last is alone with its own two rows for half of its steps
    close([actual[1]], drawn(request("a house", seed=3, steps=2 * STEPS), using=bucketed))
    assert settled(bucketed)
    forget_idle(bucketed.runner.conditions.text)


def test_a_reference_of_nan_fails_its_readers_only(engine, watch, monkeypatch, drawn):
    expected = drawn("a house", seed=3, steps=STEPS)
    poison(engine, monkeypatch, "a sick dog")
    sick, well = watch.together(
        lambda: submit(engine, style=sf.StyleAligned(prompt="a sick dog")), lambda: submit(engine, "a house", seed=3)
    )
    with pytest.raises(NumericsError, match="NaN"):
        sick.result(WAIT)
    close(well.result(WAIT).latents, expected)
    forget_idle(engine.runner.conditions.text)


def test_nan_in_one_request_of_a_job_names_its_picture(engine, monkeypatch):
    poison(engine, monkeypatch, "a sick dog")
    job = engine.submit([request(), request("a sick dog"), request("a house")], output="latents")
    with pytest.raises(NumericsError) as caught:
        job.result(WAIT)
    assert caught.value.pictures == (1,) and settled(engine)
    forget_idle(engine.runner.conditions.text)


def test_slots_that_held_nan_serve_the_next_request_well(engine, monkeypatch, drawn):
    expected = drawn("a house", seed=3, steps=STEPS)
    with monkeypatch.context() as patch:
        poison(engine, patch, "a sick dog")
        with pytest.raises(NumericsError):
            submit(engine, "a sick dog").result(WAIT)
    forget_idle(engine.runner.conditions.text)
    close(submit(engine, "a house", seed=3).result(WAIT).latents, expected)


# other failures


def test_an_exception_in_a_step_fails_the_jobs_of_its_batch_and_the_loop_lives_on(engine, watch, drawn):
    def boom():
        raise RuntimeError("boom")

    waiting = []
    watch.at[1] = lambda: (waiting.append(submit(engine, "a house", seed=3, size=LARGE)), boom())
    jobs = watch.together(lambda: submit(engine), lambda: submit(engine, "a dog"))
    for job in jobs:
        with pytest.raises(RuntimeError, match="boom"):
            job.result(WAIT)
    close(waiting[0].result(WAIT).latents, drawn("a house", seed=3, size=LARGE, steps=STEPS))
    close(submit(engine, seed=4).result(WAIT).latents, drawn("a cat", seed=4, steps=STEPS))


def test_an_exception_while_decoding_fails_its_job_alone(engine, watch, monkeypatch, draw):
    decode = engine.decoder._decode

    def broken(latents):
        if latents.shape == (4, 16, 16):
            raise RuntimeError("bad decoder")
        return decode(latents)

    monkeypatch.setattr(engine.decoder, "_decode", broken)
    bad, good = watch.together(
        lambda: submit(engine, size=LARGE, output="pil"), lambda: submit(engine, "a dog", output="pil")
    )
    with pytest.raises(RuntimeError, match="bad decoder"):
        bad.result(WAIT)
    assert good.result(WAIT).images[0].size == SIZE and settled(engine)


def test_an_exception_while_joining_fails_the_job_alone(engine, watch, monkeypatch, drawn):
    def gone(reference):
        raise sf.errors.ImageError("the picture was removed since the request was checked")

    monkeypatch.setattr(engine._planner, "read_picture", gone)
    style = sf.StyleAligned(small_picture(3))
    first, bad = watch.together(lambda: submit(engine, seed=1), lambda: submit(engine, style=style))
    with pytest.raises(sf.errors.ImageError, match="was removed"):
        bad.result(WAIT)
    close(first.result(WAIT).latents, drawn("a cat", seed=1, steps=STEPS))
    assert settled(engine)


def test_a_group_that_can_not_tell_its_rows_harms_nobody(engine, watch, monkeypatch, drawn):
    make = SampleGroup.__init__

    def broken(group, samples, *rest):
        if samples[0].prompt == "a dog":
            raise KeyError("rows")
        make(group, samples, *rest)

    monkeypatch.setattr(SampleGroup, "__init__", broken)
    good, bad = watch.together(lambda: submit(engine, seed=1), lambda: submit(engine, "a dog"))
    with pytest.raises(KeyError):
        bad.result(WAIT)
    close(good.result(WAIT).latents, drawn("a cat", seed=1, steps=STEPS))
    assert settled(engine)


# several threads


def test_generate_submit_and_bake_run_side_by_side_from_many_threads(engine, draw, drawn):
    expected = {prompt: drawn(prompt, seed=5, steps=STEPS) for prompt in ("a cat", "a dog", "a house", "neon")}
    solo = engine.bake(sf.StyleAligned(prompt="oil"), steps=STEPS, size=SIZE)
    outcomes, errors = {}, []

    def run(name, work):
        try:
            outcomes[name] = work()
        except Exception as error:
            errors.append(error)

    work = {("generate", p): lambda p=p: draw(p, seed=5, steps=STEPS) for p in expected}
    work |= {("submit", p): lambda p=p: submit(engine, p, seed=5).result(WAIT).latents for p in expected}
    work["bake", ""] = lambda: engine.bake(sf.StyleAligned(prompt="oil"), steps=STEPS, size=SIZE)
    threads = [threading.Thread(target=run, args=pair) for pair in work.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not errors and len(outcomes) == len(work)
    for prompt, latents in expected.items():
        close(outcomes["generate", prompt], latents)
        close(outcomes["submit", prompt], latents)
    baked = outcomes["bake", ""]
    # a bake's steps are its own whatever else runs
    assert all(torch.equal(baked.tensors[name], solo.tensors[name]) for name in solo.tensors)
    assert settled(engine)


def test_a_bake_gets_its_turns_beside_a_running_batch(engine):
    job = submit(engine, steps=100)
    bank = engine.bake(sf.StyleAligned(prompt="oil"), steps=6, size=SIZE)
    assert not job.done() and job.step <= 12 and bank.info.steps == 6
    job.cancel()
    assert settled(engine)
