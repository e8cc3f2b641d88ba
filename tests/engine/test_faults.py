"""Faults that once were: each of these gave a wrong picture, a broken engine or an error from the depth."""

import asyncio
import copy
import gc
import os
import pickle
import weakref

import pytest
import torch

import stylefast as sf
from stylefast.errors import DeadlineExceeded, EngineClosed, InvalidRequest, OutOfMemory, StyleError
from tests.support.fp64 import close
from tests.support.scene import SIZE, STEPS, sharp_pipeline, small_picture
from tests.support.small_checkpoints import random_lora, write_peft_lora
from tests.support.watch import WAIT, Clock

PICTURE = small_picture(1, (48, 40))
K = {"size": SIZE, "steps": STEPS}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An engine for what changes an engine, and a LoRA for it."""
    pipe = sharp_pipeline()
    folder = tmp_path_factory.mktemp("lora")
    return sf.Engine.from_pipeline(pipe), write_peft_lora(random_lora(pipe, seed=1), folder / "style.safetensors")


def draw(engine, *requests, **options):
    return engine.generate(list(requests), output="latents", **options).latents


def test_requests_of_other_spacings_share_no_reference(engine, drawn):
    style = sf.StyleAligned(prompt="a dog")
    requests = [sf.Request("a cat", style=style, seed=i, spacing=s, **K) for i, s in enumerate(("leading", "trailing"))]
    for request, together in zip(requests, draw(engine, *requests)):
        close([together], drawn(request))
    group = sf.StyleAligned()
    with pytest.raises(InvalidRequest, match="spacing"):
        draw(engine, *(sf.Request("a cat", style=group, spacing=s, **K) for s in ("leading", "trailing")))


def test_weights_do_not_change_under_pictures(own):
    engine, lora = own
    plain = draw(engine, sf.Request("a cat", seed=1, **K))
    with pytest.raises(InvalidRequest, match="1 pictures are in progress.*wait"):
        draw(engine, sf.Request("a cat", seed=1, **K), callback=lambda *_: engine.load_lora(lora))
    assert engine.merged_loras.scales == {}
    assert torch.equal(draw(engine, sf.Request("a cat", seed=1, **K))[0], plain[0])


def test_hidden_banks_are_projected_with_the_weights_that_are_on(own):
    engine, lora = own
    bank = engine.bake(sf.StyleAligned(PICTURE), **K, store="hidden")
    request = sf.Request("a cat", style=sf.StyleAligned(bank), seed=1, **K)
    before = draw(engine, request)
    name = engine.load_lora(lora)
    with pytest.raises(StyleError, match="no LoRA on the model"):
        draw(engine, request)
    engine.merged_loras.remove(name)
    assert torch.equal(draw(engine, request)[0], before[0])


@pytest.mark.parametrize("scale", ["x", float("nan"), True, None])
def test_a_lora_with_a_scale_that_is_none_leaves_nothing_behind(own, scale):
    engine, lora = own
    with pytest.raises(InvalidRequest, match="scale"):
        engine.load_lora(lora, scale)
    assert engine.merged_loras.scales == {}
    engine.merged_loras.remove(engine.load_lora(lora))


def test_a_request_that_is_too_large_leaves_a_limited_engine_as_it_was():
    held = sf.Engine.from_pipeline(sharp_pipeline()).memory()["held"]
    engine = sf.Engine.from_pipeline(sharp_pipeline(), memory_limit=held + (30 << 20))
    draw(engine, sf.Request("a cat", **K))
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            draw(engine, sf.Request("a cat", steps=1, size=(1024, 1024)))
        assert engine.memory()["held"] <= engine.budget.limit
        draw(engine, sf.Request("a cat", **K))


def test_latents_of_sizes_that_nobody_wants_are_given_back(own):
    engine, _ = own
    for width in range(32, 128, 8):
        draw(engine, sf.Request("a cat", steps=1, size=(width, 32)))
    assert len(engine.runner.latents) <= 5


def test_a_call_in_inference_mode_does_not_spoil_later_ones(own):
    engine, _ = own
    with torch.inference_mode():
        draw(engine, sf.Request("a cat", steps=1, size=(40, 40)))
    many = draw(engine, *(sf.Request("a cat", seed=i, steps=1, size=(40, 40)) for i in range(9)))
    assert not many[0].is_inference()


def test_the_default_type_of_others_does_not_change_pictures(own):
    engine, _ = own
    request = sf.Request("a cat", style=sf.StyleAligned(PICTURE), scheduler="euler_ancestral", **K)
    before = draw(engine, request)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(draw(engine, request)[0], before[0])
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_closed_engine_takes_no_work(tmp_path):
    pipe = sharp_pipeline()
    engine, file = sf.Engine.from_pipeline(pipe), write_peft_lora(random_lora(pipe, 1), tmp_path / "ink.safetensors")
    engine.loras.add(file)
    engine.load_lora(file)
    engine.close()
    calls = [
        lambda: engine.generate("a cat", **K),
        lambda: engine.submit(sf.Request("a cat", **K)),
        lambda: engine.bake(sf.StyleAligned(PICTURE), **K),
        lambda: engine.load_lora(file, name="other"),
        lambda: engine.loras.add(file, "other"),
        lambda: engine.loras.remove("ink"),
        lambda: engine.loras["ink"],
    ]
    for call in calls:
        with pytest.raises(EngineClosed):
            call()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_an_engine_says_so_in_a_forked_process(own):
    engine, _ = own
    child = os.fork()
    if child == 0:
        try:
            engine.submit(sf.Request("a cat", **K))
        except EngineClosed:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_path_to_a_bank_is_told_from_a_picture():
    with pytest.raises(StyleError, match=r"StyleBank.load\('brand.bank'\)"):
        sf.StyleAligned("brand.bank")


def test_banks_travel(engine, tmp_path):
    bank = engine.bake(sf.StyleAligned(PICTURE), **K)
    expected = draw(engine, sf.Request("a cat", style=sf.StyleAligned(bank), **K))
    saved = sf.StyleBank.load(bank.save(tmp_path / "brand.bank"))
    for other in (pickle.loads(pickle.dumps(bank)), pickle.loads(pickle.dumps(saved)), copy.deepcopy(saved)):
        style = copy.deepcopy(sf.StyleAligned(other))
        assert torch.equal(draw(engine, sf.Request("a cat", style=style, **K))[0], expected[0])
    assert pickle.loads(pickle.dumps(bank)).id != bank.id


def test_an_exit_in_a_callback_harms_no_other_job(engine):
    def leave(job):
        raise SystemExit(3)

    first = engine.submit(sf.Request("a cat", **K), output="latents")
    first.add_done_callback(leave)
    second = engine.submit(sf.Request("a dog", steps=6, size=SIZE), output="latents")
    assert second.result(WAIT).latents and first.result(WAIT).latents


def test_a_finished_job_does_not_keep_the_model():
    engine = sf.Engine.from_pipeline(sharp_pipeline())
    job = engine.submit(sf.Request("a cat", **K), output="latents")
    job.result(WAIT)
    engine.close()
    unet = weakref.ref(engine.unet)
    del engine
    gc.collect()
    assert unet() is None and job.status == "done" and not job.cancel()


def test_waiting_in_vain_leaves_no_watcher(engine):
    async def wait():
        for _ in range(5):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(job._as_future()), 0.001)

    with engine.scheduler.paused():  # without which no step is made
        job = engine.submit(sf.Request("a cat", steps=60, size=SIZE), output="latents")
        asyncio.run(wait())
        assert not job._watchers
        job.cancel()


def test_a_deadline_counts_while_others_work(engine, monkeypatch):
    late, clock = [], Clock(monkeypatch)

    def hold(step, steps, latents):
        if step == 1:
            late.append(engine.submit(sf.Request("a cat", **K), deadline=0.01))
        clock.pass_by(0.006)

    draw(engine, sf.Request("a dog", steps=12, size=(64, 64)), callback=hold)
    with pytest.raises(DeadlineExceeded):
        late[0].result(WAIT)


WRONG = {
    "a deadline in words": lambda e: e.submit(sf.Request("a cat", **K), deadline="soon"),
    "a deadline that is true": lambda e: e.submit(sf.Request("a cat", **K), deadline=True),
    "nothing to submit": lambda e: e.submit(None),
    "a callback that can't be called": lambda e: e.generate("a cat", **K, callback=5),
    "a scheduler in a list": lambda e: sf.Request("a cat", scheduler=["euler"]),
    "a bank's type in a list": lambda e: e.bake(sf.StyleAligned(PICTURE), **K, dtype=["fp8"]),
    "a bank's store": lambda e: e.bake(sf.StyleAligned(PICTURE), **K, store=None),
    "one bucket": lambda e: sf.EngineOptions(batch_buckets=5.0),
    "rows below one": lambda e: sf.EngineOptions(max_batch_rows=0),
    "an output": lambda e: e.generate("a cat", **K, output=["np"]),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_values_of_wrong_types_are_refused(engine, call):
    with pytest.raises(InvalidRequest):
        call(engine)
