"""How a call of shared attention is launched in Triton: the choice between two forms, exp2 by a cubic, the plugin's."""

import contextvars
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

import triton
import triton.language as tl

from stylefast.errors import InvalidRequest
from stylefast.kernels.gpu import plugin_attention, shared_attention
from stylefast.kernels.gpu import shared_attention_hopper as hopper
from stylefast.kernels.gpu.exp2 import exp2
from stylefast.kernels.gpu.shared_attention import candidates, form_for
from stylefast.kernels.gpu.strides import span
from stylefast.kernels.shared_attention import CONCAT, FP8, PLAIN, SWAP, Affine, Pool, operation
from tests.kernels.conformance import INTERPRETED, NAN, each, equal, laid_out, normal
from tests.kernels.test_shared_attention import FORMS, POINTERS, adain, exact_of, near, pages, qkv, segments

pytestmark = list(INTERPRETED)
BOTH = [form for form in FORMS if form.name in ("triton-pointers", "triton-specialised")]
READS = ([[4], [5], [0], [-1]], [CONCAT, SWAP, CONCAT, CONCAT])


def sdxl(tokens=128, page_tokens=128, heads=1, width=64, dtype=torch.float16, fp8=False, bias=False, references=1):
    """A small call of the kind that SDXL makes."""
    q, k, v = normal(4, tokens, 3, heads, width, dtype=dtype).unbind(2)
    pool = Pool(*normal(2, page_tokens, 3, heads, width, seed=3, dtype=dtype).unbind(2)[:2])
    if fp8:
        pool = Pool(pool.k.to(FP8), pool.v.to(FP8), *torch.ones(2, 2, heads, width))
    table = segments([row * references for row in READS[0]], READS[1], bias=torch.zeros(6, 128) if bias else None)
    return q, k, v, table, None, pool


def form_of(case):
    q, k, v, references, _, pool = case
    return form_for(q, k, v, references, pool, torch.empty_like(q))


def test_sdxls_calls_take_the_committed_warp_specialised_form():
    case = sdxl()
    assert form_of(case) == ("warp_specialised", "")
    near(BOTH[0]._replace(config=None)(operation, *case), exact_of(*case))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"width": 40}, "40 channels"),
        ({"tokens": 100}, "100 tokens"),
        ({"page_tokens": 77}, "77 tokens of a page"),
        ({"bias": True}, "a bias per token"),
        ({"references": 2}, "2 pages a row"),
        ({"dtype": torch.float32}, "not a 16-bit type"),
        ({"fp8": True}, "no configuration"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_calls_take_pointers_and_say_why(change, reason):
    form, why = form_of(sdxl(**change))
    assert form == "pointers" and reason in why


def test_pages_whose_tokens_lie_elsewhere_apart_take_pointers():
    *case, pool = sdxl()
    form, why = form_of((*case, pool._replace(k=pool.k.contiguous())))
    assert form == "pointers" and "keys are not as far apart" in why


class FarTensor(torch.Tensor):
    """Memory that starts at `start`, as far away as expandable segments may put it."""

    start = 0

    def data_ptr(self):
        return self.start


def test_pages_that_no_tensor_map_reaches_take_pointers_and_that_is_said_once(caplog):
    *case, pool = sdxl()
    shared_attention._say_far.cache_clear()
    far = Pool(*(x.as_subclass(FarTensor) for x in pool[:2]))

    def form_at(distance):
        for x, own in ((far.k, case[1]), (far.v, case[2])):
            x.start = own.data_ptr() + distance
        return form_of((*case, far))

    with caplog.at_level(logging.WARNING):
        found = [form_at(2**40) for _ in range(3)]
    assert all(form == "pointers" and "no tensor map reaches" in why for form, why in found)
    assert len(caplog.records) == 1 and "expandable_segments" in caplog.text
    # what counts is the distance to the end of the last page
    assert form_at(2**40 - 4096)[0] == "pointers" and form_at(2**40 - 2**30)[0] == "warp_specialised"


def test_a_span_reaches_from_the_first_to_the_last_element_of_all():
    held = torch.empty(100, dtype=torch.float16)
    assert span(held[10:20]) == 9 * 2 and span(held[10:20], held[90:]) == 89 * 2
    assert span(held[80:], held[4:44].view(4, 10)[:, ::3]) == 95 * 2


def test_a_launch_leaves_the_applications_own_allocator_in_place(monkeypatch):
    """Triton's allocator is a context variable that a host application, or a compiled template, may have set."""
    seen, ours = [], lambda size, alignment, stream: None
    current = triton.runtime._allocation._allocator
    q = SimpleNamespace(is_cuda=True)

    def failing(*arguments):
        seen.append(current.get())
        raise RuntimeError("no")

    def launching():
        triton.set_allocator(ours)
        for fill in (lambda *arguments: seen.append(current.get()), failing):
            monkeypatch.setattr(hopper, "_fill", fill)
            with pytest.raises(RuntimeError, match="no") if fill is failing else nullcontext():
                hopper.launch(q, *[None] * 6, {})
            assert current.get() is ours

    contextvars.copy_context().run(launching)
    assert seen == [hopper._scratch] * 2


@each(BOTH)
def test_exp2_by_the_cubic_costs_less_than_half_a_bf16_rounding_and_hides_what_is_hidden(form):
    x = qkv(form)
    case = (*x, segments([[4], [5], [4], [5]], READS[1], shift=0.3), adain(), pages(x[0]))
    case[3].shift[0], case[3].shift[1] = -torch.inf, -torch.inf
    cubic, own = (form._replace(config=form.config | {"exp2": share})(operation, *case) for share in (8, 0))
    assert not equal(cubic, own) and (cubic[1] == 0).all()
    near(cubic, exact_of(*case), 3e-4)
    if form.types[0] == torch.float32:
        bias = torch.zeros(6, 16)
        bias[4:] = -torch.inf
        case = (*case[:3], case[3]._replace(bias=bias), *case[4:])
        near(form._replace(config=form.config | {"exp2": 4})(operation, *case), exact_of(*case), 3e-4)


def test_the_cubic_is_within_75e_6_of_exp2_and_takes_minus_infinity():
    @triton.jit
    def kernel(x, out, SHARE: tl.constexpr):
        i = tl.arange(0, 4096)
        tl.store(out + i, exp2(tl.load(x + i), SHARE))

    x = torch.cat([-torch.rand(4094) * 125, torch.tensor([0.0, -torch.inf])])
    out = torch.full_like(x, NAN)
    kernel[(1,)](x, out, 1)
    assert ((out[:-1] / torch.exp2(x[:-1].double())) - 1).abs().max() < 7.6e-5
    assert 0 <= out[-1] < 1.2e-38


@each(BOTH)
def test_outputs_may_be_strided_views_and_inputs_start_at_odd_elements(form):
    x = qkv(form)
    case, out = (*x, segments(*READS), adain(), pages(x[0])), torch.zeros(4, 16, 2, 2, 64, dtype=form.types[0])
    shared_attention.shared_attention(*case, out[:, :, 1], config=form.config)
    near(out[:, :, 1], exact_of(*case))
    assert (out[:, :, 0] == 0).all()
    if form.name == "triton-pointers":
        wide = torch.zeros(4, 16, 2, 67)
        odd = (*(laid_out(part, "padded") for part in x), *case[3:])
        shared_attention.shared_attention(*odd, wide[..., 1:65], config=form.config)
        near(wide[..., 1:65], exact_of(*case))
        assert (wide[..., 0] == 0).all() and (wide[..., 65:] == 0).all()


def test_forcing_what_does_not_fit_says_why():
    for case, reason in ((sdxl(width=40), "heads of 40 channels, not 64"), (sdxl(dtype=torch.bfloat16), "no bfloat16")):
        with pytest.raises(InvalidRequest, match=reason):
            BOTH[1](operation, *case)


def test_candidates_for_tuning_name_every_setting_of_a_configuration():
    for form in ("pointers", "warp_specialised"):
        for bits in (16, 32):
            found = candidates({"form": form, "d": 64, "bits": bits, "page": "native"})
            assert found and all(config.keys() == POINTERS.keys() for config in found)


# the kernel with the arguments of a TensorRT plugin: contiguous tensors, int32 tables

PLUGIN = POINTERS | {"block_n": 16, "num_stages": 1}


def plugin(case):
    q, k, v, references, affine, pool = case
    page, mode, scale, shift, _ = references
    tables = (page.int(), mode.int(), scale, shift, *affine, *(pool or (None, None))[:2])
    given = (None if x is None else x.contiguous() for x in (q, k, v, *tables))
    out = torch.full(q.shape, NAN, dtype=q.dtype)
    plugin_attention.launch(*given, out, PLUGIN)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("banked", [False, True], ids=["live", "banked"])
@pytest.mark.parametrize("tokens, width, parts", [(16, 64, 2), (19, 40, 3)])
def test_the_plugin_agrees_with_the_reference(dtype, banked, tokens, width, parts):
    x = normal(4, tokens, 3, 2, width, dtype=dtype).unbind(2)
    affine = Affine(*(normal(parts, 4, 2, width, seed=i) * 0.3 + one for i, one in ((1, 1), (2, 0))))
    read = [[4, 2], [-1, 5], [0, -1], [3, 1]] if banked else [[3, 2], [-1, 1], [0, -1], [3, 1]]
    case = (
        *x,
        segments(read, [CONCAT, SWAP, CONCAT, PLAIN], 0.6, 0.4),
        affine,
        pages(x[0], 2, tokens) if banked else None,
    )
    near(plugin(case), exact_of(*case), 1e-5)
    assert plugin_attention.is_even(PLUGIN, 32, 64) and not plugin_attention.is_even(PLUGIN, 64, 40)


def test_a_page_that_is_not_there_makes_its_row_nan_and_no_other_in_the_plugin():
    x = qkv(BOTH[0])
    case = (*x, segments([[4], [6], [0], [3]], [CONCAT] * 4), adain(), pages(x[0]))  # rows 0 to 3, pages 4 and 5
    found = plugin(case)
    assert found[1].isnan().all() and not found[[0, 2, 3]].isnan().any()
