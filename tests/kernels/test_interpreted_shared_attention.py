"""Both forms of shared attention in Triton, run in its interpreter, against the literal reference in fp64."""

import contextvars
import logging
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

import triton
import triton.language as tl

from stylefast.errors import InvalidRequest
from stylefast.kernels.gpu import shared_attention
from stylefast.kernels.gpu import shared_attention_hopper as hopper
from stylefast.kernels.gpu.exp2 import exp2
from stylefast.kernels.gpu.shared_attention import candidates, form_for
from stylefast.kernels.gpu.strides import span
from stylefast.kernels.shared_attention import CONCAT, SWAP
from tests.support.shared_attention_cases import MIXES, expected, grouped, make_case, run, sdpa_error

POINTERS = {"form": "pointers", "block_m": 16, "block_n": 32, "num_warps": 4, "num_stages": 2, "exp2": 0}
SPECIALISED = POINTERS | {"form": "warp_specialised", "block_n": 16}
FORMS = {"pointers": POINTERS, "warp-specialised": SPECIALISED}
SINGLE = [name for name in MIXES if not name.startswith("two")]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a CUDA device is")


def _assert_close(case, config, tolerance=2e-6, out=None):
    torch.testing.assert_close(run(case, config, out).double(), expected(case), rtol=tolerance, atol=tolerance)


def _fits(**more):
    """A case that both forms take, whose 16-bit type has the finer mantissa."""
    return make_case(**({"width": 64, "dtype": torch.float16, "tokens": 32, "page_tokens": 16} | more))


# which rows read what is told by tables, how many tensors AdaIN changes by the code: not every pair is another case
def _with_affine(mixes):
    names = {0: "no AdaIN", 2: "AdaIN of queries and keys", 3: "AdaIN of values too"}
    pairs = [(mix, affine) for mix in mixes for affine in (0, 3)] + [(mixes[-1], 2)]
    return pytest.mark.parametrize(
        "mix, affine", [pytest.param(mix, affine, id=f"{mix}-{names[affine]}") for mix, affine in pairs]
    )


@_with_affine(list(MIXES))
def test_the_pointer_form_equals_the_reference(mix, affine):
    _assert_close(make_case(mix, affine=affine), POINTERS)


@_with_affine(SINGLE)
def test_the_warp_specialised_form_equals_the_reference(mix, affine):
    _assert_close(_fits(mix=mix, affine=affine), SPECIALISED, 3e-3)


# channels and tokens are masked apart, so one of the two varies at a time
@pytest.mark.parametrize(
    "tokens, page_tokens, width",
    [(1, 7, 32), (32, 64, 32), (33, 5, 32), (47, 32, 32), (33, 5, 40), (33, 5, 64), (17, 5, 80)],
)
def test_any_token_count_and_head_size_is_taken(tokens, page_tokens, width):
    _assert_close(make_case("two references, some missing", tokens, page_tokens, 1, width), POINTERS)


@pytest.mark.parametrize("mix", ["rows read the pool, the batch and themselves", "two references, some missing"])
def test_a_bias_per_token_is_added_to_a_pages_tokens_alone(mix):
    _assert_close(make_case(mix, bias=True), POINTERS)


@pytest.mark.parametrize("decode", [False, True], ids=["converted", "decoded from their bits"])
@pytest.mark.parametrize("width", [32, 40])
def test_fp8_pages_come_in_by_their_scales(width, decode):
    case = make_case("two references, some missing", width=width, fp8=True)
    case["pool_v_scale"][:, :, 3] = 0  # a channel without values
    _assert_close(case, POINTERS | {"decode": decode}, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_exp2_by_the_cubic_costs_less_than_half_a_bf16_rounding(form):
    case = _fits() if form != "pointers" else make_case()
    cubic, exact = (run(case, FORMS[form] | {"exp2": share}).double() for share in (8, 0))
    assert not torch.equal(cubic, exact)
    tolerance = 3e-4 if form == "pointers" else 2e-3
    torch.testing.assert_close(cubic, exact, rtol=tolerance, atol=tolerance)


def test_the_cubic_is_within_75e_6_of_exp2_and_takes_minus_infinity():
    @triton.jit
    def kernel(x, out, SHARE: tl.constexpr):
        i = tl.arange(0, 4096)
        tl.store(out + i, exp2(tl.load(x + i), SHARE))

    x = torch.cat([-torch.rand(4094) * 125, torch.tensor([0.0, -math.inf])])
    out = torch.full_like(x, math.nan)
    kernel[(1,)](x, out, 1)
    assert ((out[:-1] / torch.exp2(x[:-1].double())) - 1).abs().max() < 7.6e-5
    assert 0 <= out[-1] < 1.2e-38


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("exp2", [0, 4], ids=["exact", "by the cubic"])
def test_a_hidden_page_is_not_read_but_adain_applies(form, exp2):
    case = _fits()
    case["page"] = torch.tensor([[4], [5], [4], [5]])
    case["mode"] = torch.tensor([CONCAT, CONCAT, CONCAT, SWAP])
    case["shift"] = torch.tensor([[-math.inf], [0.3], [-math.inf], [0.0]])
    want = expected(case)
    for name in ("pool_k", "pool_v"):
        case[name][0] = math.nan
    got = run(case, FORMS[form] | {"exp2": exp2}).double()
    torch.testing.assert_close(got, want, rtol=4e-3, atol=4e-3)
    plain = expected(case | {"page": torch.full((4, 1), -1)})
    assert not torch.allclose(got[0], plain[0], atol=0.05)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_sees_nothing_gives_0(form):
    case = _fits(mix="concat, swap and plain rows of live references")
    case["shift"] = torch.full((4, 1), -math.inf)
    got = run(case, FORMS[form])
    assert (got[2] == 0).all() and (got[[0, 1, 3]] != 0).any(-1).all()


@pytest.mark.parametrize("exp2", [0, 4], ids=["exact", "by the cubic"])
def test_a_row_whose_every_token_has_a_bias_of_minus_infinity_gives_0(exp2):
    case = make_case("concat, swap and plain rows of live references", bias=True)
    case["bias"][0] = -math.inf
    got = run(case, POINTERS | {"exp2": exp2})
    assert (got[2] == 0).all()
    torch.testing.assert_close(got.double(), expected(case), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [6, -2, 2**40], ids=["past the pool", "below -1", "far beyond memory"])
def test_a_page_out_of_range_makes_its_row_nan_and_no_other(form, bad):
    case = _fits()
    want = expected(case)
    case["page"][1] = bad
    got = run(case, FORMS[form])
    assert got[1].isnan().all()
    torch.testing.assert_close(got[[0, 2, 3]].double(), want[[0, 2, 3]], rtol=4e-3, atol=4e-3)


def test_a_row_in_plain_mode_may_name_any_page():
    case = make_case("concat, swap and plain rows of live references")
    case["page"][3] = 77
    assert run(case, POINTERS)[3].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_in_a_row_stays_in_the_rows_that_attend_to_it(form):
    case = _fits(mix="concat, swap and plain rows of live references")
    case["v"][3, 5] = math.nan
    got = run(case, FORMS[form])
    assert got[3].isnan().any() and got[:3].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_out_may_be_a_strided_view(form):
    case = _fits()
    out = torch.zeros(4, 32, 2, 2, 64, dtype=torch.float16)
    torch.testing.assert_close(run(case, FORMS[form], out[:, :, 1]).double(), expected(case), rtol=4e-3, atol=4e-3)
    assert (out[:, :, 0] == 0).all()


def test_views_that_start_at_odd_elements_are_taken():
    case = make_case()
    for name in ("q", "k", "v", "pool_k", "pool_v"):
        wide = torch.zeros(*case[name].shape[:3], 37)
        wide[..., 3:35] = case[name]
        case[name] = wide[..., 3:35]
    out = torch.zeros(4, 19, 2, 35)
    _assert_close(case, POINTERS, out=out[..., 1:33])
    assert (out[..., 0] == 0).all() and (out[..., 33:] == 0).all()


@pytest.mark.parametrize("rows, tokens, heads", [(0, 5, 2), (4, 0, 2), (4, 5, 0)])
def test_nothing_to_do_is_no_work(rows, tokens, heads):
    empty = torch.zeros(rows, tokens, heads, 32)
    page = torch.zeros(rows, 1, dtype=torch.int64)
    case = dict.fromkeys(make_case())
    case |= {"q": empty, "k": empty, "v": empty, "page": page, "mode": page[:, 0]}
    case |= {"scale": page.float(), "shift": page.float()}
    assert run(case).shape == empty.shape


@pytest.mark.parametrize("form", FORMS)
def test_the_error_is_at_most_twice_that_of_pytorch_in_the_same_type(form):
    case = _fits(tokens=64, page_tokens=64)
    exact = expected(case)
    error = (run(case, FORMS[form] | {"exp2": 4}).double() - exact).abs().max().item()
    assert error <= 2 * sdpa_error(case, exact)


def _form(**more):
    case = make_case(**({"width": 64, "dtype": torch.float16, "tokens": 128, "page_tokens": 128, "heads": 1} | more))
    return case, _form_for(case)


def _form_for(case):
    q, k, v, references, _, pool = grouped(case)
    return form_for(q, k, v, references, pool, torch.empty_like(q))


def test_sdxls_calls_take_the_committed_warp_specialised_form():
    case, (form, reason) = _form(mix="concat, swap and plain rows of live references")
    assert (form, reason) == ("warp_specialised", "")
    torch.testing.assert_close(run(case).double(), expected(case), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"width": 40}, "40 channels"),
        ({"tokens": 100}, "100 tokens"),
        ({"page_tokens": 77}, "77 tokens of a page"),
        ({"bias": True}, "a bias per token"),
        ({"mix": "two references, some missing"}, "2 pages a row"),
        ({"dtype": torch.float32}, "not a 16-bit type"),
        ({"fp8": True}, "no configuration"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_calls_take_pointers_and_say_why(change, reason):
    _, (form, why) = _form(**change)
    assert form == "pointers" and reason in why


def test_pages_whose_tokens_lie_elsewhere_apart_take_pointers():
    case, _ = _form()
    case["pool_k"] = case["pool_k"].contiguous()
    form, why = _form_for(case)
    assert form == "pointers" and "keys are not as far apart" in why


class FarTensor(torch.Tensor):
    """Memory that starts at `start`, as far away as expandable segments may put it."""

    start = 0

    def data_ptr(self):
        return self.start


def test_pages_that_no_tensor_map_reaches_take_pointers_and_that_is_said_once(caplog):
    case, near = _form()
    assert near[0] == "warp_specialised"
    shared_attention._say_far.cache_clear()
    for name in ("k", "v"):
        case[f"pool_{name}"] = case[f"pool_{name}"].as_subclass(FarTensor)
        case[f"pool_{name}"].start = case[name].data_ptr() + 2**40
    with caplog.at_level(logging.WARNING):
        found = [_form_for(case) for _ in range(3)]
    assert all(form == "pointers" and "no tensor map reaches" in why for form, why in found)
    assert len(caplog.records) == 1 and "expandable_segments" in caplog.text
    # what counts is the distance to the end of the last page
    for name in ("k", "v"):
        case[f"pool_{name}"].start -= 4096
    assert _form_for(case)[0] == "pointers"
    for name in ("k", "v"):
        case[f"pool_{name}"].start -= 2**30
    assert _form_for(case)[0] == "warp_specialised"


def test_a_span_reaches_from_the_first_to_the_last_element_of_all():
    held = torch.empty(100, dtype=torch.float16)
    assert span(held[10:20]) == 9 * 2 and span(held[10:20], held[90:]) == 89 * 2
    assert span(held[80:], held[4:44].view(4, 10)[:, ::3]) == 95 * 2


def test_a_launch_leaves_the_applications_own_allocator_in_place(monkeypatch):
    """Triton's allocator is a context variable that a host application, or a compiled template, may have set."""
    seen, ours = [], lambda size, alignment, stream: None
    current = triton.runtime._allocation._allocator
    monkeypatch.setattr(hopper, "_fill", lambda *arguments: seen.append(current.get()))
    q = SimpleNamespace(is_cuda=True)

    def launching():
        triton.set_allocator(ours)
        hopper.launch(q, *[None] * 6, SPECIALISED)
        assert current.get() is ours

        def failing(*arguments):
            raise RuntimeError("no")

        monkeypatch.setattr(hopper, "_fill", failing)
        with pytest.raises(RuntimeError, match="no"):
            hopper.launch(q, *[None] * 6, SPECIALISED)
        assert current.get() is ours

    contextvars.copy_context().run(launching)
    assert seen == [hopper._scratch]


def test_forcing_a_form_that_does_not_fit_says_why():
    with pytest.raises(InvalidRequest, match="heads of 40 channels, not 64"):
        run(make_case(width=40), SPECIALISED)


def test_bfloat16_is_refused_as_the_interpreter_multiplies_none():
    with pytest.raises(InvalidRequest, match="no bfloat16 matrices"):
        run(make_case(dtype=torch.bfloat16), POINTERS)


def test_candidates_for_tuning_name_every_setting_of_a_configuration():
    for form in ("pointers", "warp_specialised"):
        for bits in (16, 32):
            found = candidates({"form": form, "d": 64, "bits": bits, "page": "native"})
            assert found and all(config.keys() == POINTERS.keys() for config in found)
