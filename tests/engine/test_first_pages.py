"""What a request needs for its first step is brought to the device before it joins, while others go on."""

import threading

import pytest

import stylefast as sf
from stylefast.errors import DeadlineExceeded, JobCancelled, OutOfMemory, StyleError
from stylefast.runtime.banks import bank_pages, host_pages
from tests.support.scene import SIZE, STEPS, small_picture
from tests.support.watch import WAIT, Clock, Watch, held, request, settled, submit, until

PICTURE = small_picture(1, (48, 40))


@pytest.fixture
def style(engine, tmp_path):
    path = tmp_path / "brand.bank"
    engine.bake(sf.StyleAligned(PICTURE), steps=STEPS, size=SIZE, path=path)
    return sf.StyleAligned(sf.StyleBank.load(path))


@pytest.fixture
def idle(engine, style, monkeypatch):
    """The engine with a UNet that predicts zeros at once."""
    return Watch(engine, monkeypatch, idle=True)


class SlowFile:
    """Stands before the copying of a bank's pages: the first one waits for `go`, or raises `error` then."""

    def __init__(self, monkeypatch, error=None):
        self.begun, self.go, self.threads, self.error = threading.Event(), threading.Event(), [], error
        copy_all = bank_pages._copy_all

        def slow(*lists):
            self.threads.append(threading.current_thread().name)
            if not self.begun.is_set():
                self.begun.set()
                self.go.wait(WAIT)
                if self.error is not None:
                    raise self.error
            copy_all(*lists)

        monkeypatch.setattr(bank_pages, "_copy_all", slow)


class Running:
    """A long job whose steps wait for leave, so that it is still running whatever the machine does."""

    def __init__(self, engine, idle):
        self.engine, self.idle, self._leave = engine, idle, threading.Semaphore(1)
        idle.before = lambda latents: self._leave.acquire(timeout=WAIT)
        self.job = submit(engine, steps=900)
        assert until(lambda: self.job.step == 1)

    def go_on(self, steps: int) -> bool:
        """Let it make some steps; whether it made them."""
        wanted = self.job.step + steps
        self._leave.release(steps)
        return until(lambda: self.job.step == wanted)

    def until(self, event: threading.Event) -> None:
        """Let it make steps until an event of a job that joins meanwhile."""
        joining = self.engine.scheduler._joining
        while not event.is_set():
            assert self.go_on(1)
            assert until(lambda: event.is_set() or not any(one.waits for one in list(joining.values())))

    def end(self) -> None:
        self.job.cancel()
        self.let_go()
        assert settled(self.engine) and loading(self.engine) == 0

    def let_go(self) -> None:
        self.idle.before = lambda latents: None
        self._leave.release(1)


def loading(engine):
    return sum(pool.stats().loading for pool in engine.runner.bank_pages.values())


def test_other_jobs_go_on_while_the_first_pages_of_a_bank_are_read(engine, idle, style, monkeypatch):
    file, running = SlowFile(monkeypatch), Running(engine, idle)
    job = submit(engine, style=style)
    running.until(file.begun)
    assert running.go_on(3) and job.step == 0 and not job.done()
    file.go.set()
    running.let_go()
    assert len(job.result(WAIT).latents) == 1
    # two pages of the first step; those of the others are read as steps need them
    assert file.threads[:2] == ["stylefast-helper"] * 2 and len(file.threads) == 2 * STEPS
    running.end()


def test_a_job_that_is_cancelled_meanwhile_leaves_nothing(engine, idle, style, monkeypatch):
    file, job = SlowFile(monkeypatch), submit(engine, style=style)
    assert file.begun.wait(WAIT)
    job.cancel()
    with pytest.raises(JobCancelled):
        job.result(WAIT)
    assert held(engine) == dict.fromkeys(held(engine), 0)
    file.go.set()
    assert until(lambda: loading(engine) == 0)


def test_a_job_that_is_late_meanwhile_leaves_nothing(engine, idle, style, monkeypatch):
    clock, file = Clock(monkeypatch), SlowFile(monkeypatch)
    job = submit(engine, style=style, deadline=5.0)
    assert file.begun.wait(WAIT)
    clock.pass_by(6.0)
    with pytest.raises(DeadlineExceeded, match="step 0"):
        job.result(WAIT)
    file.go.set()
    assert settled(engine) and until(lambda: loading(engine) == 0)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StyleError("brand.bank is gone"), StyleError),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), OutOfMemory),
    ],
    ids=["a file that can't be read", "no memory"],
)
def test_a_job_whose_first_pages_can_not_be_read_fails_alone(engine, idle, style, monkeypatch, error, told):
    file = SlowFile(monkeypatch, error)
    monkeypatch.setattr(engine.runner, "make_room", lambda: False)
    file.go.set()
    with pytest.raises(told):
        submit(engine, style=style).result(WAIT)
    assert settled(engine) and loading(engine) == 0
    assert len(submit(engine, style=style).result(WAIT).latents) == 1


def test_what_can_not_be_read_now_is_tried_again_beside_other_jobs(engine, idle, style, monkeypatch):
    file = SlowFile(monkeypatch, RuntimeError("DefaultCPUAllocator: not enough memory"))
    running, job = Running(engine, idle), submit(engine, style=style)
    running.until(file.begun)
    file.go.set()
    running.let_go()
    assert len(job.result(WAIT).latents) == 1
    running.end()


def test_other_jobs_go_on_while_later_pages_are_read(engine, idle, style, monkeypatch):
    """With a tier in host memory, as on a GPU, pages are read ahead; a job whose pages are late waits alone."""
    monkeypatch.setattr(type(engine.runner.budget), "host_room", lambda *_: 2**24)
    engine.runner.bank_pages.clear()
    copy_blocks, calls, begun, go = host_pages.copy_blocks, [], threading.Event(), threading.Event()

    def slow(*lists):
        calls.append(lists)
        if len(calls) > 4:  # after those of the first two steps
            begun.set()
            go.wait(WAIT)
        copy_blocks(*lists)

    monkeypatch.setattr(host_pages, "copy_blocks", slow)
    both = engine.submit([request(style=style), request("a dog", steps=STEPS)], output="latents")
    other = submit(engine, steps=900)
    assert begun.wait(WAIT) and until(lambda: both.step == 2) and until(lambda: other.step > 5)
    assert both.step == 2, "the pictures of a job wait for one another"
    go.set()
    assert len(both.result(WAIT).latents) == 2
    other.cancel()
    assert settled(engine)
    engine.runner.bank_pages.clear()
