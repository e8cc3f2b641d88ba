"""A load test of hundreds of requests from several clients: memory must stay flat and every page be released."""

import gc
import random
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path

import stylefast as sf
from benchmarks.kernels.measure import Budget
from benchmarks.runtime.cases import Case, Figure, Outcome
from stylefast.errors import StyleFastError

# the matrix library caches prepared data for up to 1,024 shapes; memory grows until that cache is full
WARM_UP, STRETCH, CLIENTS = 400, 50, 4
REQUESTS = WARM_UP + 500
MOST_MEGABYTES = 20.0
BANK_STEPS = 4
PATIENCE = 300.0  # max seconds per request
PAGE_BYTES = 4096


@dataclass
class Tally:
    """Outcomes of the requests, and resident memory after every stretch, when no client is active."""

    ends: Counter = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)  # of requests that should have succeeded
    megabytes: list[float] = field(default_factory=list)
    seconds: float = 0.0


def cases(quick: bool) -> list[Case]:
    """Return the soak case."""
    count, warm_up, stretch = (9, 3, 3) if quick else (REQUESTS, WARM_UP, STRETCH)
    what = (
        f"{count} requests of random style, strength, guidance, steps, scheduler and size from {CLIENTS} clients, with "
        f"cancels and deadlines, on the embedded model; resident memory after every {stretch}, {warm_up} to warm up"
    )
    expected = (
        Figure("growth of memory", None, MOST_MEGABYTES, at_most=True, unit="MB"),
        Figure("pages and places held", None, 0, at_most=True),
        Figure("failed requests", None, 0, at_most=True),
    )

    def measure(budget: Budget) -> Outcome:
        engine = sf.Engine.from_pretrained("tiny", device="cpu")
        try:
            tally = soak(engine, count, stretch)
            kept = held(engine)
        finally:
            engine.close()
        values = (growth(tally.megabytes[warm_up // stretch - 1 :]), kept, len(tally.errors))
        figures = [Figure(e.what, value, e.goal, e.at_most, e.unit) for e, value in zip(expected, values, strict=True)]
        details = {
            "ends": dict(tally.ends),
            "errors": tally.errors[:10],
            "megabytes": tally.megabytes,
            "seconds": round(tally.seconds, 1),
        }
        return Outcome(figures=figures, details=details)

    return [Case("soak", what, measure, expected)]


def soak(engine, count: int, stretch: int, clients: int = CLIENTS, seed: int = 0) -> Tally:
    """Submit `count` requests; after every `stretch`, wait until all are done and read the memory."""
    mix = Mix(engine)
    tally, lock = Tally(), threading.Lock()
    start = time.perf_counter()
    for first in range(0, count, stretch):
        left = iter(range(first, min(first + stretch, count)))

        def client(left=left):
            while True:
                with lock:
                    number = next(left, None)
                if number is None:
                    return
                end, error = one_request(engine, mix, random.Random(f"{seed} {number}"))
                with lock:
                    tally.ends[end] += 1
                    tally.errors += [error] if error else []

        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        tally.megabytes.append(round(resident_megabytes(), 2))
    tally.seconds = time.perf_counter() - start
    return tally


def one_request(engine, mix: "Mix", choose: random.Random) -> tuple[str, str]:
    """Submit one request and wait for it; return how it ended, and an error message if that was wrong."""
    request = mix.request(choose)
    fate = choose.choices(("wait", "cancel", "deadline"), (8, 1, 1))[0]
    try:
        job = engine.submit(request, deadline=choose.uniform(0.001, 0.2) if fate == "deadline" else None)
        if fate == "cancel":
            time.sleep(choose.uniform(0.0, 0.1))
            job.cancel()
        job.result(timeout=PATIENCE)
    except (StyleFastError, CancelledError) as error:
        # a cancel or deadline may come too late, but nothing else may end a request
        return type(error).__name__, "" if fate != "wait" else f"{request}: {error}"
    except Exception as error:
        return type(error).__name__, f"{request}: {error}"
    return "finished", ""


class Mix:
    """Generator of random requests: every kind of style, alone and combined, with random other settings."""

    def __init__(self, engine):
        pictures, learned = engine.references(), engine.styles()
        live = [sf.StyleAligned(prompt=f"a fish in {name} style", seed=i) for i, name in enumerate(pictures)]
        self.size = engine.native_size
        self.sizes = [self.size, (self.size[0], self.size[1] // 2), (96, 64)]
        self.banks = [engine.bake(style, steps=BANK_STEPS, size=self.size) for style in live[:3]]
        self.styles = [
            None,
            *live,
            sf.StyleAligned(next(iter(pictures.values())), shift=0.5, share_group_norm=True),
            *[sf.InstantStyle(path, scale=0.3 + 0.2 * i) for i, path in enumerate(pictures.values())],
            *map(sf.DreamStyler, learned.values()),
            [live[0], sf.InstantStyle(pictures["glass"], scale=0.5)],
        ]

    def request(self, choose: random.Random) -> sf.Request:
        """Return one request; those that read a bank use its settings."""
        prompt = f"a {choose.choice(('cat', 'house', 'boat', 'mushroom'))}"
        seed = choose.randrange(1000)
        if choose.random() < 0.4:
            bank = choose.choice(self.banks)
            style = sf.StyleAligned(bank, scale=choose.uniform(0.5, 1.2), shift=choose.choice((0.0, 0.7)))
            return sf.Request(prompt, style=style, seed=seed, **bank.settings)
        return sf.Request(
            prompt,
            style=choose.choice(self.styles),
            steps=choose.randint(1, 6),
            size=choose.choice(self.sizes),
            guidance=choose.choice((0.0, 3.0, 5.0, 7.5)),
            guidance_rescale=choose.choice((0.0, 0.5)),
            seed=seed,
            scheduler=choose.choice(("euler", "ddim", "euler_ancestral", "dpmpp_2m", "unipc")),
        )


def growth(megabytes: list[float]) -> float:
    """Return the highest reading minus the first."""
    return max(megabytes) - megabytes[0]


def resident_megabytes() -> float:
    """Return this process's resident memory in units of 10^6 bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES / 1e6


def held(engine) -> int:
    """Count the bank pages and latent slots that requests still hold."""
    runner = engine.runner
    return sum(pages.stats().pinned for pages in runner.bank_pages.values()) + sum(
        places.used for places in runner.latents.values()
    )
