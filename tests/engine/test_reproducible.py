"""The same request gives the same picture: nearly so in any batch, and to the bit within one bucket of rows."""

from functools import partial

import pytest
import torch

import stylefast as sf
from stylefast.kernels import registry
from stylefast.sampling.guidance import StyleContextGuidance
from tests.support.fp64 import close
from tests.support.scene import learned, small_picture
from tests.support.watch import WAIT, Watch, submit
from tests.support.watch import request as request_of_steps

PICTURE, OTHER = small_picture(1, (48, 40)), small_picture(2, (90, 70))
BUCKETS = (2, 4, 8, 16)
STEPS = 1  # a step decides each bit from its own rows, as every other does
request = partial(request_of_steps, steps=STEPS)


def bucketed_engine(pipe, adapter_files):
    engine = sf.Engine.from_pipeline(pipe, batch_buckets=BUCKETS)
    engine.load_adapter(adapter_files[0])
    return engine


@pytest.fixture(scope="module")
def bucketed(pipe, adapter_files):
    return bucketed_engine(pipe, adapter_files)


@pytest.fixture(scope="module")
def banks(bucketed):
    return [bucketed.bake(sf.StyleAligned(one), steps=STEPS, size=(48, 32)) for one in (PICTURE, [PICTURE, OTHER])]


def neighbours(kind, banks) -> list[sf.Request]:
    """Requests of a kind that make a batch of eight rows, or a little less, with a guided request of two."""
    bank, two = banks
    context = StyleContextGuidance(0.5, 3.0, 5.0)
    prompts = ("a dog", "a house", "neon")

    def all_of(style, **options):
        return [request(prompt, style=style, seed=70 + i, **options) for i, prompt in enumerate(prompts)]

    return {
        "plain": lambda: all_of(None),
        "fewer than the bucket holds": lambda: all_of(None)[:2],
        "unguided": lambda: all_of(None, guidance=1.0),
        "of other samplers": lambda: all_of(None, scheduler="euler_ancestral"),
        "live": lambda: [*all_of(sf.StyleAligned(OTHER))[:1], request("neon")],
        "live with two pictures": lambda: all_of(sf.StyleAligned([PICTURE, OTHER]))[:1],
        "banks": lambda: all_of(sf.StyleAligned(bank)),
        "banks of two pictures, norms shared": lambda: all_of(sf.StyleAligned(two, share_group_norm=True)),
        "InstantStyle": lambda: all_of(sf.InstantStyle(PICTURE)),
        "InstantStyle with two pictures": lambda: all_of(sf.InstantStyle([PICTURE, OTHER], "all")),
        "led by the first": lambda: all_of(sf.StyleAligned()),
        "mutual": lambda: all_of(sf.StyleAligned(full_attention_share=True)),
        "DreamStyler in four branches": lambda: all_of(sf.DreamStyler(learned(), guidance=context))[:1],
        "InstantStyle on a bank": lambda: all_of([sf.StyleAligned(bank), sf.InstantStyle(OTHER, "all")]),
    }[kind]()


KINDS = [
    "plain",
    "fewer than the bucket holds",
    "unguided",
    "of other samplers",
    "live",
    "live with two pictures",
    "banks",
    "banks of two pictures, norms shared",
    "InstantStyle",
    "InstantStyle with two pictures",
    "led by the first",
    "mutual",
    "DreamStyler in four branches",
    "InstantStyle on a bank",
]
TARGETS = {
    "plain": lambda banks: None,
    "bank": lambda banks: sf.StyleAligned(banks[0]),
    "bank, swapped, norms shared": lambda banks: sf.StyleAligned(banks[0], mode="swap", share_group_norm=True),
    "bank of two pictures": lambda banks: sf.StyleAligned(banks[1], shift=0.4),
    "InstantStyle": lambda banks: sf.InstantStyle(PICTURE, "all"),
    "DreamStyler": lambda banks: sf.DreamStyler(learned()),
}


@pytest.fixture
def in_a_bucket_of_8(bucketed, monkeypatch):
    """Latents of a request among others, at a place in the batch."""
    watch = Watch(bucketed, monkeypatch)

    def run(target, others, place):
        before = watch.calls
        requests = [*others[:place], target, *others[place:]]
        latents = bucketed.generate(requests, output="latents").latents[place]
        assert watch.rows[before:] == [8] * STEPS
        return latents

    return run


@pytest.mark.parametrize(
    ("target", "backend"), [*((target, "cpp") for target in TARGETS), ("bank, swapped, norms shared", "torch")]
)
def test_within_a_bucket_every_bit_is_the_same_whatever_the_neighbours_and_the_place(
    banks, in_a_bucket_of_8, target, backend
):
    wanted = request(style=TARGETS[target](banks), seed=3)
    with registry.using(backend):
        expected = in_a_bucket_of_8(wanted, neighbours("plain", banks), 0)
        for kind in KINDS:
            others = neighbours(kind, banks)
            place = len(others) if len(kind) % 2 else 0
            actual = in_a_bucket_of_8(wanted, others, place)
            assert torch.equal(actual, expected), f"beside {kind} at place {place}"


@pytest.mark.parametrize("kind", ["live with two pictures", "InstantStyle", "mutual"])
def test_every_place_in_a_batch_gives_the_same_bits(banks, in_a_bucket_of_8, kind):
    wanted = request(style=sf.StyleAligned(banks[0]), seed=3)
    expected = in_a_bucket_of_8(wanted, neighbours("plain", banks), 0)
    others = neighbours(kind, banks)
    for place in range(len(others) + 1):
        assert torch.equal(in_a_bucket_of_8(wanted, others, place), expected)


def test_what_ran_before_does_not_change_a_bit(pipe, adapter_files, bucketed, banks):
    """Prompts encoded in other company, and columns that came to be, leave the bits alone."""
    fresh = bucketed_engine(pipe, adapter_files)
    first = fresh.generate([request(seed=3), request("a dog")], output="latents").latents[0]
    bucketed.generate(neighbours("InstantStyle on a bank", banks), output="latents")
    bucketed.generate([request(), request("neon"), request("oil")], output="latents")
    again = bucketed.generate([request("a house"), request(seed=3)], output="latents").latents[1]
    assert torch.equal(first, again)


def test_joining_at_any_step_changes_no_bit_within_a_bucket(bucketed, monkeypatch):
    style = sf.StyleAligned(bucketed.bake(sf.StyleAligned(PICTURE), steps=2, size=(48, 32)))
    watch = Watch(bucketed, monkeypatch)
    results = []
    for at in range(3):
        jobs, calls = [], watch.calls
        watch.at[calls + at] = lambda jobs=jobs: jobs.append(submit(bucketed, style=style, seed=3, steps=2))
        hosts = watch.together(
            *(
                lambda p=p, at=at: submit(bucketed, p, steps=6, seed=at, scheduler="ddim")
                for p in ("a dog", "neon", "oil")
            )
        )
        for host in hosts:
            host.result(WAIT)
        assert watch.rows[calls:] == [8] * 6
        results.append(jobs[0].result(WAIT).latents[0])
    assert all(torch.equal(latents, results[0]) for latents in results)


@pytest.mark.parametrize("buckets", [(), BUCKETS], ids=["as they come", "buckets"])
def test_alone_and_in_batches_of_all_sizes_a_picture_is_nearly_the_same(engine, bucketed, banks, buckets, drawn):
    using = bucketed if buckets else engine
    wanted = request(style=[sf.StyleAligned(PICTURE), sf.InstantStyle(OTHER)], seed=3)
    alone = drawn(wanted, using=using)
    for others in (1, 2, 5):
        requests = [wanted, *(request("a dog", seed=i) for i in range(others))]
        close(using.generate(requests, output="latents").latents[:1], alone)
        close(using.generate(requests[::-1], output="latents").latents[-1:], alone)


def test_the_same_batch_twice_gives_the_same_bits_without_buckets_too(engine):
    requests = [request(style=sf.StyleAligned(PICTURE), seed=3), request("a dog", steps=5)]
    first, second = (engine.generate(requests, output="latents").latents for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
