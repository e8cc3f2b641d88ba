"""Requests with nothing in common share UNet calls, and each gives what it gives alone."""

import threading
import time
from contextlib import ExitStack
from functools import partial
from itertools import count

import pytest
import torch

import stylefast as sf
from stylefast.sampling.guidance import StyleContextGuidance
from tests.support.fp64 import close, measured
from tests.support.oracle import generation
from tests.support.oracle.sampler import make_scheduler, sample
from tests.support.oracle.style_aligned import Sharing, guidance_layout, shared
from tests.support.scene import SIZE, STEPS, apart, encode, learned, small_picture
from tests.support.watch import WAIT, Watch, request, settled, submit

PICTURE, OTHER = small_picture(1, (48, 40)), small_picture(2, (90, 70))


@pytest.fixture
def watch(engine, monkeypatch):
    return Watch(engine, monkeypatch)


@pytest.fixture(scope="module")
def bank(engine):
    return engine.bake(sf.StyleAligned(PICTURE), steps=STEPS, size=SIZE)


def kinds(banked):
    """Requests of every style, strength, guidance, step count, sampler, seed and noise stage, and rows per step."""
    aligned = {"shift": 0.5, "share_group_norm": True}
    context = StyleContextGuidance(0.5, 3.0, 5.0)
    return {
        "plain": (request(seed=1), [2] * 3),
        "unguided, few steps": (request("a dog", guidance=1.0, steps=2, scheduler="lcm", seed=2), [1] * 2),
        "bank": (request(style=banked(**aligned), seed=3), [2] * 3),
        "the same bank, swapped and weaker": (
            request("neon", style=banked(mode="swap", scale=0.7), guidance=8.0, seed=2**40),
            [2] * 3,
        ),
        "live picture": (request(style=sf.StyleAligned(OTHER, **aligned), steps=4, scheduler="ddim"), [4] * 4),
        "live prompt": (request(style=sf.StyleAligned(prompt="oil"), steps=5, scheduler="dpmpp_2m_karras"), [4] * 5),
        "InstantStyle": (request(style=sf.InstantStyle([PICTURE, OTHER], "all", 0.6), scheduler="unipc"), [2] * 3),
        "DreamStyler at one step count": (request("a dog", style=sf.DreamStyler(learned())), [2] * 3),
        "DreamStyler at another, four branches": (
            request("a dog", style=sf.DreamStyler(learned(), guidance=context), steps=5),
            [4] * 5,
        ),
        "all three": (
            request(
                style=[banked(), sf.InstantStyle(PICTURE), sf.DreamStyler(learned())],
                guidance_rescale=0.5,
                scheduler="euler",
            ),
            [2] * 3,
        ),
        "guided in the middle": (request("a house", steps=5, guidance_interval=(0.2, 0.8)), [1, 2, 2, 2, 1]),
        "exponential": (request(scheduler="dpmpp_sde_exponential", seed=9), [2] * 3),
        "trailing": (request(scheduler="dpmpp_2m", spacing="trailing", seed=10), [2] * 3),
    }


@pytest.fixture(scope="module")
def different(bank):
    return kinds(partial(sf.StyleAligned, bank))


@pytest.fixture(scope="module")
def alone(different, drawn):
    """What each gives alone. A bank serves the model it is of; in its place a model in fp64 takes the picture."""
    live = kinds(partial(sf.StyleAligned, PICTURE, share_styles=False))
    return {name: drawn([one], in_fp64=[live[name][0]]) for name, (one, _) in different.items()}


def test_what_arrives_together_starts_together_whenever_its_inputs_become_ready(engine, watch, monkeypatch):
    scheduler, choose, beside = engine.scheduler, engine.scheduler._choose, engine.scheduler._beside
    numbers, others = count(), threading.Event()

    def first_at_once(wanted):
        # all calls but the first wait until the first job has joined
        return beside(wanted if next(numbers) == 0 else lambda: (others.wait(WAIT), wanted())[1])

    def after_all_calls():
        # as if the others' calls ended between the admission of jobs and the choice of groups
        if scheduler._jobs:
            others.set()
            for _ in range(WAIT * 100):
                if not any(joining.waits for joining in scheduler._joining.values()):
                    break
                time.sleep(0.01)
        return choose()

    monkeypatch.setattr(scheduler, "_beside", first_at_once)
    monkeypatch.setattr(scheduler, "_choose", after_all_calls)
    requests = [sf.Request(f"a cat number {i}", steps=2, guidance=1.0, size=SIZE) for i in range(3)]
    calls = watch.calls
    jobs = watch.together(*(lambda one=one: engine.submit(one, output="latents") for one in requests))
    for job in jobs:
        job.result(WAIT)
    assert watch.rows[calls:] == [3, 3]


def test_all_share_one_call_a_step_and_give_what_they_give_alone(engine, watch, different, alone):
    calls = watch.calls
    jobs = watch.together(*(lambda one=one: engine.submit(one, output="latents") for one, _ in different.values()))
    together = {name: job.result(WAIT).latents[0] for name, job in zip(different, jobs)}
    for name, latents in together.items():
        close([latents], alone[name])
    planned = [rows for _, rows in different.values()]
    longest = max(map(len, planned))
    assert watch.rows[calls:] == [sum(rows[i] for rows in planned if i < len(rows)) for i in range(longest)]
    assert settled(engine)


def test_each_may_join_at_any_step(engine, watch, different, alone):
    calls, jobs = watch.calls, {}
    for i, (name, (one, _)) in enumerate(different.items()):
        watch.at[calls + i] = lambda name=name, one=one: jobs.update({name: engine.submit(one, output="latents")})
    host = submit(engine, "oil", steps=len(different) + 8)
    host.result(WAIT)
    for name, job in jobs.items():
        close(job.result(WAIT).latents, alone[name])
    assert len(jobs) == len(different) and watch.calls - calls == len(different) + 8


# steps that are not like the others


def literal(pipe, prompts, within=None, sharing=None, *, steps, scheduler="euler", config=(), seed=0):
    """diffusers' UNet and scheduler in a loop that runs the null branch at the steps in `within` only."""
    null, full = encode(pipe, prompts)

    def predict(latents, timestep, step):
        guided = step in (range(steps) if within is None else within)
        states, pooled = (torch.cat(parts).to(pipe.unet.dtype) for parts in zip(*((null, full) if guided else (full,))))
        time_ids = torch.tensor([[SIZE[1], SIZE[0], 0, 0, SIZE[1], SIZE[0]]], dtype=torch.float32)
        conditions = {"text_embeds": pooled, "time_ids": time_ids.repeat(len(states), 1)}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if sharing is not None:
                layout = guidance_layout(len(prompts), 1 + guided)
                stack.enter_context(shared(pipe.unet, Sharing(layout, **sharing)))
            batch = latents.repeat(1 + guided, 1, 1, 1)
            output = pipe.unet(batch, timestep, states, added_cond_kwargs=conditions).sample
        return generation.classifier_free(5.0)(*output.chunk(2)) if guided else output

    noise_schedule = make_scheduler(scheduler, {**pipe.scheduler.config, **dict(config)})
    shape = (4, SIZE[1] // 4, SIZE[0] // 4)
    return sample(predict, noise_schedule, steps, shape, [seed + i for i in range(len(prompts))], dtype=pipe.unet.dtype)


INTERVALS = {"the end unguided": (0.0, 0.6), "the start unguided": (0.4, 1.0), "the middle guided": (0.2, 0.8)}


@pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS)
def test_outside_its_interval_a_request_runs_one_branch_as_a_literal_loop_does(pipe, engine, watch, interval):
    within = [i for i in range(5) if interval[0] <= i / 5 < interval[1]]
    latents = submit(engine, seed=7, steps=5, guidance_interval=interval).result(WAIT).latents
    assert watch.rows == [2 if i in within else 1 for i in range(5)]
    close(latents, measured(literal, pipe, ["a cat"], within, steps=5, seed=7))
    apart(latents, literal(pipe, ["a cat"], steps=5, seed=7))


def test_a_group_with_a_reference_keeps_an_interval_together(pipe, engine, watch):
    style = sf.StyleAligned(share_group_norm=True, shift=0.5)
    requests = [
        request(p, style=style, seed=i, steps=5, guidance_interval=(0.2, 0.8))
        for i, p in enumerate(("a cat", "a dog", "neon"))
    ]
    latents = engine.submit(requests, output="latents").result(WAIT).latents
    assert watch.rows == [3, 6, 6, 6, 3]
    sharing = {"share_group_norm": True, "shift": 0.5}
    close(latents, measured(literal, pipe, ["a cat", "a dog", "neon"], (1, 2, 3), sharing, steps=5))


def test_a_reference_runs_the_null_branch_as_long_as_one_of_its_readers_does(engine, watch, drawn):
    style = sf.StyleAligned(OTHER)
    requests = [
        request(style=style, steps=4, guidance_interval=(0.0, 0.5)),
        request("a dog", style=style, steps=4, seed=1, guidance_interval=(0.5, 1.0)),
    ]
    together = engine.submit(requests, output="latents").result(WAIT).latents
    assert watch.rows == [5, 5, 5, 5]
    for one, latents in zip(requests, together):
        close([latents], drawn([one]))


@pytest.mark.parametrize(
    ("scheduler", "steps", "as_diffusers"),
    [
        ("sdxl_lightning", 4, ("euler", {"timestep_spacing": "trailing"})),
        ("sdxl_turbo", 2, ("euler_ancestral", {"timestep_spacing": "trailing"})),
        ("lcm", 4, ("lcm", {})),
        ("hyper_sd", 2, ("ddim", {"timestep_spacing": "trailing"})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_few_step_models_run_one_branch_as_they_are_published(pipe, engine, watch, scheduler, steps, as_diffusers):
    latents = submit(engine, scheduler=scheduler, steps=steps, guidance=1.0, seed=3).result(WAIT).latents
    assert watch.rows == [1] * steps
    name, config = as_diffusers
    close(latents, measured(literal, pipe, ["a cat"], (), steps=steps, scheduler=name, config=config, seed=3))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_request_chooses_its_spacing(pipe, engine, spacing):
    latents = submit(engine, spacing=spacing, seed=3, steps=4).result(WAIT).latents
    close(latents, measured(literal, pipe, ["a cat"], steps=4, config={"timestep_spacing": spacing}, seed=3))
