"""The engine on a GPU: banks through pinned memory, captured steps, and batches of any mix."""

import pytest
import torch

import stylefast as sf
from tests.support.scene import near, sharp_pipeline, small_picture
from tests.support.watch import WAIT

pytestmark = pytest.mark.gpu
PICTURE = small_picture(1, (48, 40))
SETTINGS = {"steps": 4, "size": (48, 32)}
# fp32 without TF32; matrix libraries choose other algorithms for other batches
TOLERANCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def engine(**options) -> sf.Engine:
    return sf.Engine.from_pipeline(sharp_pipeline().to("cuda"), **options)


@pytest.fixture(scope="module")
def plain():
    return engine()


def latents(engine, style=None, prompts=("a cat", "a dog"), **options):
    result = engine.generate(list(prompts), style, output="latents", seed=3, **SETTINGS | options)
    return [x.cpu() for x in result.latents]


@pytest.mark.parametrize("store", ["kv", "hidden", "latents"])
@pytest.mark.parametrize("source", [{"reference": PICTURE}, {"prompt": "a dog", "seed": 5}], ids=["picture", "prompt"])
def test_cached_equals_batched(plain, source, store):
    bank = plain.bake(sf.StyleAligned(**source), **SETTINGS, store=store)
    live = latents(plain, sf.StyleAligned(**source, share_group_norm=True))
    near(latents(plain, sf.StyleAligned(bank, share_group_norm=True)), live, TOLERANCE)


def test_pages_that_stream_equal_pages_that_stay(plain, tmp_path):
    bank = plain.bake(sf.StyleAligned(PICTURE), **SETTINGS, path=tmp_path / "brand.bank")
    page = plain.runner.bank_pages[(8, 12)].layout.nbytes if plain.runner.bank_pages else 2**20
    # room for the two pages of a step and the two of the next
    narrow = engine(bank_memory=4 * page + 1)
    expected = latents(plain, sf.StyleAligned(bank))
    for _ in range(3):
        near(latents(narrow, sf.StyleAligned(bank)), expected, TOLERANCE)
    torch.cuda.synchronize()
    assert narrow.runner.bank_pages[(8, 12)].stats().pinned == 0


def test_captured_steps_equal_steps_that_run(plain):
    from stylefast.runtime.backends.compiled import CompileBackend

    captured = engine()
    captured.runner.backend = CompileBackend(captured.unet, cache=None, compiler="eager")
    captured.runner.buckets = captured.runner.backend.buckets
    bank = plain.bake(sf.StyleAligned(PICTURE), **SETTINGS)
    for style in (None, sf.StyleAligned(PICTURE), sf.StyleAligned(bank), sf.StyleAligned(bank, scale=0.5, shift=1.0)):
        near(latents(captured, style), latents(plain, style), TOLERANCE)
    assert captured.runner.backend.captures > 0


@pytest.mark.parametrize("scheduler", ["euler_ancestral", "dpmpp_2m", "unipc"])
def test_a_request_is_the_same_alone_and_in_company(plain, scheduler):
    style = sf.StyleAligned(PICTURE)
    alone = latents(plain, style, ["a cat"], scheduler=scheduler)
    jobs = [
        plain.submit(
            sf.Request(p, style=style if i % 2 else None, seed=3 + i, scheduler=scheduler, **SETTINGS), output="latents"
        )
        for i, p in enumerate(["neon", "oil", "a fish"])
    ]
    again = plain.submit(sf.Request("a cat", style=style, seed=3, scheduler=scheduler, **SETTINGS), output="latents")
    near([again.result(WAIT).latents[0].cpu()], alone, TOLERANCE)
    for job in jobs:
        job.result(WAIT)
    plain.close()
