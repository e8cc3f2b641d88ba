"""The UNet's calls as a test sees them: counted, replaced, or with something happening in their midst."""

import threading
import time

import torch

import stylefast as sf
from stylefast.runtime import jobs, scheduler
from tests.support.scene import SIZE, STEPS

WAIT = 180  # seconds, for what takes one on a machine with nothing else to do; a test that hangs should fail


def until(condition) -> bool:
    """Wait for a condition that another thread makes true; False if it never comes."""
    end = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


class Clock:
    """What jobs and their loop take for the time: it stands still but for `pass_by`."""

    def __init__(self, monkeypatch):
        self._now = time.monotonic()
        for module in (scheduler, jobs):
            monkeypatch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self._now

    def pass_by(self, seconds: float) -> None:
        self._now += seconds


class Watch:
    """Stands before `engine.unet.forward`.

    `rows` and `sizes` of every call, (h, w) of the latents; `at[n]` is called in call n, counted from 0, and
    `before(latents)` in every call. `idle`: predictions are zeros and cost nothing.
    """

    def __init__(self, engine, monkeypatch, idle=False):
        settled(engine)  # a job that the last test cancelled may still have a step to go
        self.engine, self.rows, self.sizes, self.at, self.before = engine, [], [], {}, lambda latents: None
        forward = engine.unet.forward

        def watched(latents, *rest, **named):
            call = len(self.rows)
            self.rows.append(len(latents))
            self.sizes.append(tuple(latents.shape[2:]))
            self.at.get(call, lambda: None)()
            self.before(latents)
            return torch.zeros_like(latents) if idle else forward(latents, *rest, **named)

        monkeypatch.setattr(engine.unet, "forward", watched)

    @property
    def calls(self) -> int:
        return len(self.rows)

    def together(self, *jobs):
        """Submit callables such that what they submit meets in one batch; what they return."""
        with self.engine.scheduler.paused():  # keeps the loop from its next step
            return [job() for job in jobs]

    def gate(self, call: int) -> tuple[threading.Event, threading.Event]:
        """(reached, go): the call with this number sets the first and waits for the second."""
        reached, go = threading.Event(), threading.Event()
        self.at[call] = lambda: (reached.set(), go.wait(WAIT))
        return reached, go


class Calls:
    """Calls made in threads of their own; `results` in their order, an exception for one that raised it."""

    def __init__(self, *calls):
        self.results = [None] * len(calls)
        self._threads = [threading.Thread(target=self._run, args=numbered) for numbered in enumerate(calls)]
        for thread in self._threads:
            thread.start()

    def _run(self, number, call):
        try:
            self.results[number] = call()
        except BaseException as error:
            self.results[number] = error

    def wait(self):
        for thread in self._threads:
            thread.join(WAIT)
        return self.results


def request(prompt="a cat", **options) -> sf.Request:
    """A small request of few steps unless told otherwise."""
    return sf.Request(prompt, **{"size": SIZE, "steps": STEPS} | options)


def submit(engine, prompt="a cat", *, deadline=None, output="latents", **options):
    return engine.submit(request(prompt, **options), deadline=deadline, output=output)


def latents(engine, prompt="a cat", **options):
    return engine.generate(request(prompt, **options), output="latents").latents


def held(engine) -> dict[str, int]:
    """What jobs hold of an engine: all zeros once they are over."""
    runner, images = engine.runner, engine.runner.conditions.images
    return {
        "text": runner.conditions.text.used,
        "images": 0 if images is None else images.used,
        "latents": sum(slots.used for slots in runner.latents.values()),
        "pinned": sum(pool.stats().pinned for pool in runner.bank_pages.values()),
        "running": engine.scheduler.running,
        "pending": engine.scheduler.pending,
    }


def settled(engine) -> bool:
    """Whether nothing is held once the loop has had its turn."""
    return until(lambda: not any(held(engine).values()))


def forget_idle(pages) -> None:
    """Drop the pages of a `KeyValuePages` that no request uses, as if others had needed the room."""
    for page in list(pages._idle):
        pages._forget(page)
