"""Shared attention in C++ against its formula, on every instruction set that this CPU has."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.cpp_attention_cases import (
    CONCAT,
    DTYPES,
    HIDDEN,
    PLAIN,
    SWAP,
    WIDTHS,
    assert_near,
    mixed_case,
    normal,
    shared,
    shared_formula,
)
from tests.kernels.near_fp64 import NEEDS_EXTENSION

pytestmark = NEEDS_EXTENSION


@pytest.mark.parametrize("tokens", [1, 7, 65, 129])
@pytest.mark.parametrize("width", WIDTHS, ids="{} wide".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modes_pages_adain_and_bias_together_equal_the_formula(instruction_set, dtype, width, tokens):
    case = mixed_case(dtype, width, tokens)
    assert_near(shared(**case), shared_formula(**case), dtype)


@pytest.mark.parametrize("references", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_references_equals_the_formula(instruction_set, dtype, references):
    case = mixed_case(dtype, 64, 33)
    case |= {name: case[name][:, :references] for name in ("page", "scale", "shift")}
    assert_near(shared(**case), shared_formula(**case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_queries_and_keys_equal_the_formula(instruction_set, dtype):
    q, k, v = (normal(1, 1100, 1, 64, seed=i, dtype=dtype) for i in range(3))
    pool = (*(normal(1, 700, 1, 64, seed=i, dtype=dtype) for i in (3, 4)), None, None)
    case = dict(q=q, k=k, v=v, page=[[1]], mode=[CONCAT], pool=pool)
    assert_near(shared(**case), shared_formula(**case), dtype)


@pytest.mark.parametrize("width", [40, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_pages_count_as_their_value_times_the_channels_scale(instruction_set, dtype, width):
    case = mixed_case(dtype, width, 65)
    scales = [torch.rand(3, 2, width, generator=torch.Generator().manual_seed(i)) + 0.5 for i in (1, 2)]
    case["pool"] = (*(x.to(torch.float8_e4m3fn) for x in case["pool"][:2]), *scales)
    assert_near(shared(**case), shared_formula(**case), dtype)


def test_every_fp8_code_is_read_as_pytorch_reads_it(instruction_set):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)  # with NaN at 0x7f and 0xff
    pool_v = codes.reshape(8, 1, 1, 32)
    pool_k, ones = torch.zeros_like(pool_v), torch.ones(8, 1, 32)
    q = torch.zeros(8, 1, 1, 32)
    pages, swap = torch.arange(8, 16)[:, None], torch.full((8,), SWAP)
    found = shared(q, q, q, pages, swap, pool=(pool_k, pool_v, ones, ones))
    torch.testing.assert_close(found, pool_v.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_a_fused_projection_are_read_in_place(instruction_set, dtype):
    fused = normal(2, 37, 3, 2, 64, seed=0, dtype=dtype)
    q, k, v = fused.unbind(2)
    out = torch.full((2, 2, 37, 64), math.nan, dtype=dtype).transpose(1, 2)
    gain = normal(3, 2, 64, 2, seed=1).transpose(2, 3)
    offset = normal(3, 2, 2, 128, seed=2)[..., ::2]
    case = dict(q=q, k=k, v=v, page=[[-1, 1], [0, -1]], mode=[CONCAT, SWAP], gain=gain, offset=offset)
    case |= dict(scale=normal(2, 2, seed=3).t(), shift=normal(4, 2, seed=4)[::2], bias=normal(2, 80, seed=5)[:, ::2])
    assert shared(**case, out=out) is out
    assert_near(out, shared_formula(**case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_hidden_page_goes_nowhere_but_adain_still_applies(instruction_set, dtype):
    case = mixed_case(dtype, 64, 19)
    case |= dict(page=torch.tensor([[5], [6], [4], [-1], [-1]]), mode=torch.tensor([CONCAT] * 5))
    case["scale"] = torch.ones(5, 1)
    case["shift"] = torch.tensor([[HIDDEN], [HIDDEN], [HIDDEN], [0.0], [0.0]])
    for x in case["pool"][:2]:
        x[:2] = math.nan
    case["k"][4] = case["v"][4] = math.nan
    found, expected = shared(**case), shared_formula(**case)
    assert_near(found[:4], expected[:4], dtype)
    assert found[4].isnan().all()
    without = shared(**(case | dict(gain=None, offset=None)))
    assert not torch.allclose(found[0], without[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_sees_no_token_gives_zero(instruction_set, dtype):
    case = mixed_case(dtype, 40, 21)
    case |= dict(page=torch.tensor([[0], [5], [6], [7], [-1]]), mode=torch.tensor([SWAP] * 4 + [SWAP]))
    case |= dict(scale=torch.ones(5, 1), shift=torch.tensor([[HIDDEN], [HIDDEN], [0.0], [0.0], [HIDDEN]]))
    case["bias"][7] = HIDDEN  # hidden token by token
    found = shared(**case)
    assert (found[[0, 1, 3]] == 0).all()
    assert_near(found, shared_formula(**case), dtype)  # row 4 reads no page and is plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_first_tile_hidden_token_by_token_leaves_the_rest(instruction_set, dtype):
    q = normal(1, 5, 1, 32, seed=0, dtype=dtype)
    pool = (*(normal(1, 400, 1, 32, seed=i, dtype=dtype) for i in (1, 2)), None, None)
    bias = torch.zeros(2, 400)
    bias[1, :300] = HIDDEN
    case = dict(q=q, k=q, v=q, page=[[1]], mode=[SWAP], pool=pool, bias=bias)
    assert_near(shared(**case), shared_formula(**case), dtype)


@pytest.mark.parametrize("size", [-300.0, -90.0, 90.0, 300.0])
def test_large_logits_neither_overflow_nor_vanish(instruction_set, size):
    q, k, v = (normal(1, 9, 1, 32, seed=i) for i in range(3))
    pool = (*(normal(1, 130, 1, 32, seed=i) for i in (3, 4)), None, None)
    case = dict(q=q, k=k, v=v, page=[[1]], mode=[CONCAT], pool=pool, shift=torch.tensor([[size]]))
    assert_near(shared(**case), shared_formula(**case))
    case["q"] = q * size
    found, expected = shared(**case), shared_formula(**case)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)  # rounding of logits near 10^3


def test_nan_in_a_key_reaches_the_rows_that_see_it_and_no_other(instruction_set):
    q, k, v = (normal(3, 150, 2, 32, seed=i) for i in range(3))
    k[0, 3, 1, 5] = math.nan
    found = shared(q, k, v, [[-1], [0], [-1]], [PLAIN, CONCAT, PLAIN])
    assert found[:2, :, 1].isnan().all()
    assert not found[:2, :, 0].isnan().any() and not found[2].isnan().any()


def test_pages_without_tokens_and_empty_batches_are_let_through(instruction_set):
    q, k, v = (normal(2, 9, 2, 32, seed=i) for i in range(3))
    empty = (torch.zeros(1, 0, 2, 32), torch.zeros(1, 0, 2, 32), None, None)
    found = shared(q, k, v, [[2], [2]], [CONCAT, SWAP], pool=empty)
    assert_near(found[:1], shared_formula(q[:1], k[:1], v[:1], [[-1]], [PLAIN]))
    assert (found[1] == 0).all()
    for shape in ((0, 9, 2, 32), (2, 0, 2, 32), (2, 9, 0, 32)):
        nothing = torch.zeros(shape)
        page, mode = torch.full((shape[0], 1), -1), torch.zeros(shape[0]).long()
        assert shared(nothing, nothing, nothing, page, mode).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_thread_and_many_give_the_same_bits(instruction_set, dtype):
    case = mixed_case(dtype, 64, 700)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = shared(**case)
        torch.set_num_threads(5)
        together = shared(**case)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_another_order_give_the_same_bits(instruction_set, dtype):
    case = mixed_case(dtype, 64, 65)
    order = torch.tensor([3, 0, 4, 2, 1])
    place = torch.argsort(order)  # where an old row has gone
    page = case["page"][order]
    moved = {name: case[name][order] for name in ("q", "k", "v", "mode", "scale", "shift")}
    moved |= {name: case[name][:, order] for name in ("gain", "offset")}
    moved["bias"] = torch.cat([case["bias"][:5][order], case["bias"][5:]])
    moved["page"] = torch.where((page >= 0) & (page < 5), place[page.clamp(0, 4)], page)
    assert torch.equal(shared(**moved, pool=case["pool"]), shared(**case)[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_at_most_twice_that_of_pytorchs_own_path(instruction_set, dtype):
    q, k, v, page_k, page_v = (normal(1, 512, 2, 64, seed=i, dtype=dtype) for i in range(5))
    gain, offset = normal(3, 1, 2, 64, seed=5) * 0.3 + 1, normal(3, 1, 2, 64, seed=6) * 0.3
    case = dict(q=q, k=k, v=v, page=[[1]], mode=[CONCAT], gain=gain, offset=offset, pool=(page_k, page_v, None, None))
    a, b, c = (x * gain[i, :, None].to(dtype) + offset[i, :, None].to(dtype) for i, x in enumerate((q, k, v)))
    heads_first = (x.transpose(1, 2) for x in (a, torch.cat([b, page_k], 1), torch.cat([c, page_v], 1)))
    theirs = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    expected = shared_formula(**case)
    mine = shared(**case)
    assert (mine - expected).square().mean().sqrt() <= 2 * (theirs - expected).square().mean().sqrt()
    assert (mine - expected).abs().max() <= 2 * (theirs - expected).abs().max()


def test_other_python_threads_run_while_it_computes():
    q = normal(1, 2048, 4, 64, seed=0)
    shared(q, q, q, [[-1]], [PLAIN])

    def turns() -> int:
        worker, count = threading.Thread(target=shared, args=(q, q, q, [[-1]], [PLAIN])), 0
        worker.start()
        while worker.is_alive():
            count += 1
        return count

    # on a busy machine this thread may sleep through some of the calls
    assert any(turns() > 100 for _ in range(20))


@pytest.mark.parametrize(
    "page, mode, message",
    [
        (5, CONCAT, "page is 5, but it must be from -1 to 4"),
        (-2, CONCAT, "page is -2"),
        (2**40, PLAIN, "page is 1099511627776"),
        (1, 3, "mode is 3, but it must be from 0 to 2"),
        (1, -1, "mode is -1"),
    ],
)
def test_an_index_out_of_range_is_refused_with_its_limit(page, mode, message):
    q = torch.zeros(2, 3, 1, 32)
    pool = (torch.zeros(3, 3, 1, 32), torch.zeros(3, 3, 1, 32), None, None)
    with pytest.raises(ValueError, match=message):
        shared(q, q, q, [[-1], [page]], [PLAIN, mode], pool=pool)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=torch.zeros(2, 3, 1, 48), k=torch.zeros(2, 3, 1, 48), v=torch.zeros(2, 3, 1, 48)), "head size is 48"),
        (dict(k=torch.zeros(2, 4, 1, 32)), "k does not have the shape"),
        (dict(v=torch.zeros(2, 3, 1, 32, dtype=torch.float16)), "v does not have the type"),
        (dict(q=torch.zeros(2, 3, 1, 64)[..., ::2]), "stride 2 between channels"),
        (dict(q=torch.zeros(2, 3, 1, 32, dtype=torch.float64)), "Double"),
        (
            dict(pool=(torch.zeros(1, 3, 1, 32, dtype=torch.float8_e4m3fn),) * 2 + (None, None)),
            "pool_k_scale is missing",
        ),
        (dict(bias=torch.zeros(2, 2)), "bias must be"),
        (dict(gain=torch.ones(3, 2, 1, 32)), "offset is missing"),
    ],
)
def test_tensors_that_no_kernel_takes_are_refused(change, message):
    q = torch.zeros(2, 3, 1, 32)
    with pytest.raises(ValueError, match=message):
        shared(**(dict(q=q, k=q, v=q, page=[[-1], [-1]], mode=[PLAIN, PLAIN]) | change))
