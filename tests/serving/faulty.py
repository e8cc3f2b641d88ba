"""The real engine in its process, with steps that a test allows one by one and with faults that it can switch on.

`Switches` go to the process when it starts; `load` is what `engine_process.main` calls there.
"""

import multiprocessing
from functools import partial

_CONTEXT = multiprocessing.get_context("spawn")


class Switches:
    """What a test can set while the engine runs, and what it can read.

    shut: whether a step waits for `permits`. full: a batch of so many pictures finds no memory; 0: none does. sick: the
    next batch of so many pictures has one that is NaN. begun, steps: tries of steps, and those done. left: tensors of
    failed steps that something still holds.
    """

    def __init__(self):
        self.shut, self.permits = _CONTEXT.Value("b", 0), _CONTEXT.Semaphore(0)
        self.full, self.sick, self.begun, self.steps, self.left = (_CONTEXT.Value("i", 0) for _ in range(5))

    def allow(self, steps):
        """Let so many steps happen."""
        for _ in range(steps):
            self.permits.release()

    def close(self):
        """Hold each step from now on until it is allowed."""
        while self.permits.acquire(block=False):  # left by `open`
            pass
        self.shut.value = 1

    def open(self):
        """Let all steps happen."""
        self.shut.value = 0
        self.allow(1)  # for the one that waits, if any does

    def load(self):
        """Return what loads the engine, for another process."""
        return partial(load, self)


def load(switches):
    """Load the embedded model; all its batches have one number of rows, so that neighbours change no bit."""
    import weakref

    import torch

    import stylefast

    engine = stylefast.Engine.from_pretrained("tiny", device="cpu", batch_buckets=(16,))
    runner = engine.runner
    step, run = runner.step, runner.backend.run
    pictures, tensors = 0, []

    def counted(groups, features=None):
        nonlocal pictures
        pictures = sum(group.pictures for group in groups)
        return step(groups, features)

    def faulty(key, state, columns, inputs):
        switches.begun.value += 1
        if switches.shut.value:
            switches.permits.acquire()
        switches.left.value = sum(tensor() is not None for tensor in tensors)
        if 0 < switches.full.value <= pictures:
            workspace = torch.zeros(1000)
            tensors.append(weakref.ref(workspace))
            raise torch.OutOfMemoryError("CUDA out of memory")
        if switches.sick.value == pictures:
            state.latents[columns.slot[0]] = torch.nan
            switches.sick.value = 0
        run(key, state, columns, inputs)
        switches.steps.value += 1

    runner.step, runner.backend.run = counted, faulty
    return engine, {"model": "tiny"}
