"""How work ends: after a fork, in callbacks, when an engine is closed or a call interrupted."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import stylefast as sf
from stylefast.errors import EngineClosed, ExportError, InvalidRequest
from stylefast.runtime.banks.copies import start_copies
from tests.support.fp64 import close
from tests.support.scene import SIZE, STEPS, small_picture
from tests.support.small_checkpoints import random_lora, write_peft_lora
from tests.support.watch import WAIT, Watch, forget_idle, held, request, settled, submit, until

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
PICTURE = small_picture(1, (48, 40))


@pytest.fixture
def watch(engine, monkeypatch):
    return Watch(engine, monkeypatch)


@pytest.fixture(scope="module")
def own(pipe):
    """An engine that a test may close."""
    return lambda: sf.Engine.from_pipeline(pipe)


def in_child(work) -> int:
    """The exit code of a forked process that runs `work`; one that hangs is killed and has -9."""
    child = os.fork()
    if child == 0:
        signal.alarm(3 * WAIT)  # also where Python code no longer runs
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refused(call) -> None:
    with pytest.raises(EngineClosed, match="another process"):
        call()


# forked processes


@needs_fork
def test_nothing_hangs_in_a_process_that_was_forked_from_a_busy_engine(engine, watch):
    over = submit(engine, "a dog")
    over.result(WAIT)
    # in the midst of a step, which has the turn
    reached, go = watch.gate(watch.calls)
    job = submit(engine)
    assert reached.wait(WAIT)

    def work():
        for call in (
            job.result,
            lambda: job.add_done_callback(print),
            lambda: submit(engine),
            lambda: engine.generate("a cat", steps=1, size=SIZE),
            lambda: engine.load_lora("x.safetensors"),
            lambda: engine.bake(sf.StyleAligned(PICTURE), steps=1, size=SIZE),
            lambda: engine.load_adapter("x.safetensors"),
        ):
            refused(call)
        assert not job.cancel() and over.result().latents
        with engine:
            engine.memory()
        engine.close()

    code = in_child(work)
    go.set()
    assert code == 0 and job.result(WAIT).latents and settled(engine)


def test_a_program_and_its_fork_end_with_jobs_on_their_way():
    program = """
        import os, signal, sys
        import stylefast as sf
        from tests.support.scene import sharp_pipeline
        from tests.support.watch import submit, until
        engine = sf.Engine.from_pipeline(sharp_pipeline())
        jobs = [submit(engine, seed=i, steps=500) for i in range(3)]
        assert until(lambda: jobs[-1].step)
        child = os.fork() if hasattr(os, "fork") else None
        if child == 0:
            signal.alarm(200)
            del engine, jobs
            sys.exit(7)
        print(7 if child is None else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * WAIT)
    assert (done.returncode, done.stdout.strip()) == (0, "7"), done.stderr


@needs_fork
def test_loras_are_refused_in_the_child_whoever_was_reading_one(own, pipe, tmp_path):
    file = write_peft_lora(random_lora(pipe, seed=1), tmp_path / "ink.safetensors")
    engine, holds, go = own(), threading.Event(), threading.Event()
    engine.loras.add(file)

    def hold():
        with engine.loras._lock:
            holds.set()
            go.wait(WAIT)

    def work():
        for call in (
            lambda: engine.loras.add(file, "other"),
            lambda: engine.loras.remove("ink"),
            lambda: engine.loras["ink"],
        ):
            refused(call)
        assert list(engine.loras) == ["ink"] and "ink" in engine.loras and len(engine.loras) == 1
        assert engine.memory() and engine.loras.nbytes > 0

    holder = threading.Thread(target=hold)
    holder.start()
    assert holds.wait(WAIT)
    code = in_child(work)
    go.set()
    holder.join(WAIT)
    assert code == 0 and engine.loras["ink"].name == "ink"
    engine.close()


@needs_fork
def test_threads_that_load_pages_are_left_alone_in_the_child():
    with ThreadPoolExecutor(2) as executor:
        start_copies(executor, [torch.ones(9)], [torch.zeros(9)])[0].result()
        assert in_child(executor.shutdown) == 0
        start_copies(executor, [torch.ones(9)], [torch.zeros(9)])[0].result()


# callbacks


def test_waiting_for_a_job_in_a_callback_of_its_engine_is_an_error_at_once(engine):
    caught, done = [], threading.Event()

    def again(job):
        try:
            submit(engine, "a dog").result()
        except InvalidRequest as error:
            caught.append(str(error))
        done.set()

    submit(engine).add_done_callback(again)
    assert done.wait(WAIT) and "for the thread that this callback runs in" in caught[0]
    late, done = submit(engine, deadline=1e-6), threading.Event()
    late.add_done_callback(again)
    assert done.is_set() or len(caught) >= 1
    assert settled(engine)


def test_the_result_of_a_finished_job_may_be_taken_in_its_callback(engine):
    found, done = [], threading.Event()
    submit(engine).add_done_callback(lambda job: (found.append(job.result()), done.set()))
    assert done.wait(WAIT) and len(found[0].latents) == 1


# closing and interrupting


@pytest.mark.parametrize("what", ["generate", "bake"])
def test_closing_ends_calls_of_other_threads_after_their_step(own, monkeypatch, what):
    engine = own()
    watch = Watch(engine, monkeypatch)
    reached, go = watch.gate(1)
    ends = []

    def call():
        with pytest.raises(EngineClosed, match="closed"):
            if what == "generate":
                engine.generate("a cat", steps=60, size=SIZE)
            else:
                engine.bake(sf.StyleAligned(PICTURE), steps=60, size=SIZE)
        ends.append(watch.calls)

    thread = threading.Thread(target=call)
    thread.start()
    assert reached.wait(WAIT)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert until(lambda: engine.runner.closed)
    go.set()
    thread.join(WAIT)
    closing.join(WAIT)
    assert ends == [2] and held(engine) == dict.fromkeys(held(engine), 0)


def test_closing_while_pictures_are_decoded_ends_the_call(own, monkeypatch):
    engine = own()
    decode = engine.decoder._decode
    monkeypatch.setattr(engine.decoder, "_decode", lambda latents: (engine.close(), decode(latents))[1])
    with pytest.raises(EngineClosed, match="closed"):
        engine.generate(["a cat", "a dog"], steps=1, size=SIZE)


@pytest.mark.parametrize("moment", ["step", "inversion", "encoding", "decoding"])
def test_an_interrupted_call_gives_back_all_it_holds(engine, watch, monkeypatch, moment):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    style = sf.StyleAligned(PICTURE, noise="ddim") if moment == "inversion" else None
    forget_idle(engine.runner.conditions.text)
    if moment == "encoding":
        monkeypatch.setattr(engine.text_encoder, "encode", interrupt)
    elif moment == "decoding":
        monkeypatch.setattr(engine.decoder, "_decode", interrupt)
    else:
        watch.at[1] = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.generate("a cat", style, steps=STEPS, size=SIZE, scheduler="ddim")
    assert not any(held(engine).values())
    monkeypatch.undo()
    assert submit(engine).result(WAIT).latents


class Damaged:
    """A decoder in place of the VAE's whose file can't be opened."""

    def open(self):
        raise ExportError("vae_decoder.onnx was altered")

    def __call__(self, latents):
        raise AssertionError("it was used without being opened")


def test_a_damaged_decoder_is_refused_before_any_step(engine, watch, monkeypatch):
    monkeypatch.setattr(engine.decoder, "_run", Damaged())
    for call in (lambda: engine.generate(request()), lambda: submit(engine, output="pil")):
        with pytest.raises(ExportError, match="altered"):
            call()
    assert watch.calls == 0 and len(submit(engine, output="latents").result(WAIT).latents) == 1


# inversions


def test_an_inversion_shares_calls_with_jobs_on_their_way_and_counts_no_steps(engine, watch, drawn):
    style = sf.StyleAligned(PICTURE, prompt="a fish", noise="ddim")
    expected = drawn("a cat", style, seed=1, scheduler="ddim", steps=STEPS), drawn("a dog", seed=2, steps=9)
    calls, seen = watch.calls, []
    first, second = watch.together(
        lambda: submit(engine, style=style, seed=1, scheduler="ddim"), lambda: submit(engine, "a dog", seed=2, steps=9)
    )
    first.add_done_callback(lambda job: seen.append(job.step))
    for job, latents in zip((first, second), expected):
        close(job.result(WAIT).latents, latents)
    # with the other job: three steps of the inversion, then three of the picture and its reference
    assert watch.rows[calls:] == [4] * 3 + [6] * 3 + [2] * 3 and seen == [STEPS] and settled(engine)


def test_a_job_that_is_cancelled_in_its_inversion_gives_back_all(engine, watch):
    jobs = []
    watch.at[1] = lambda: jobs[0].cancel()
    with engine.scheduler.paused():
        jobs.append(submit(engine, style=sf.StyleAligned(PICTURE, noise="ddim"), scheduler="ddim"))
    with pytest.raises(sf.errors.JobCancelled, match="step 0"):
        jobs[0].result(WAIT)
    assert watch.calls == 2 and settled(engine)


def test_an_inversion_that_fails_fails_its_job_alone(engine, watch, monkeypatch):
    forward = engine.unet.forward

    def sick(latents, embedding, text_kv, image_kv, rows, *rest, **named):
        output = forward(latents, embedding, text_kv, image_kv, rows, *rest, **named)
        return output * (float("nan") if watch.calls == 2 else 1)

    monkeypatch.setattr(engine.unet, "forward", sick)
    job = submit(engine, style=sf.StyleAligned(PICTURE, noise="ddim"), scheduler="ddim")
    with pytest.raises(sf.errors.NumericsError, match="reference"):
        job.result(WAIT)
    assert settled(engine) and submit(engine).result(WAIT).latents


def test_weights_do_not_change_while_a_request_is_about_to_join(engine, watch, monkeypatch):
    style, caught = sf.StyleAligned(PICTURE), []

    def try_it(t):
        with pytest.raises(InvalidRequest, match="about to join.*wait"), engine.scheduler.changing_weights():
            pass
        caught.append(1)
        return encode(t)

    encode = engine._planner.read_picture
    monkeypatch.setattr(engine._planner, "read_picture", try_it)
    engine.generate(request(style=style))
    assert caught == [1]
