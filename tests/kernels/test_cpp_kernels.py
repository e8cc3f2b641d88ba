"""The C++ kernels for CPUs against formulas in double precision, on every instruction set that this CPU has."""

import math
import os
import threading

import pytest
import torch
import torch.nn.functional as F

from stylefast._extension import extension, extension_error

# only a build that was switched off on purpose excuses its absence; a failed one must show
switched_off = extension() is None and os.environ.get("STYLEFAST_EXTENSION") == "0"
pytestmark = pytest.mark.skipif(switched_off, reason=extension_error() or "built")

SETS = ("avx2", "avx512", "avx512_bf16")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (32, 40, 64, 80, 128)
# largest error that rounding explains here: values are of order 1
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
PLAIN, CONCAT, SWAP = 0, 1, 2
HIDDEN = -math.inf


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    usable = SETS[: SETS.index(extension().instruction_set()) + 1] if extension().instruction_set() else ()
    if request.param not in usable:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("STYLEFAST_CPU", request.param)
    return request.param


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found, expected, dtype=None):
    tolerance = TOLERANCE[dtype or found.dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)




def shared(q, k, v, page, mode, scale=None, shift=None, gain=None, offset=None, pool=(None,) * 4, bias=None, out=None):
    """The kernel's result; NaN wherever it wrote nothing."""
    page, mode = torch.as_tensor(page), torch.as_tensor(mode)
    scale = torch.ones(page.shape) if scale is None else scale
    shift = torch.zeros(page.shape) if shift is None else shift
    out = torch.full(q.shape, math.nan, dtype=q.dtype) if out is None else out
    extension().shared_attention(q, k, v, page, mode, scale, shift, gain, offset, *pool, bias, out)
    return out


def shared_formula(q, k, v, page, mode, scale=None, shift=None, gain=None, offset=None, pool=(None,) * 4, bias=None):
    """The same in double precision, one row at a time, all logits in memory."""
    rows = len(q)
    pool_k, pool_v, k_scale, v_scale = [x if x is None else x.double() for x in pool]
    if k_scale is not None:
        pool_k, pool_v = pool_k * k_scale[:, None], pool_v * v_scale[:, None]
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for row in range(rows):
        used = [(r, int(p)) for r, p in enumerate(torch.as_tensor(page)[row]) if p >= 0]
        used = [] if int(mode[row]) == PLAIN else used
        query, own_k, own_v = q[row], k[row], v[row]
        if used and gain is not None:
            query, own_k, own_v = (
                x * gain[i, row].double() + offset[i, row].double() for i, x in enumerate((query, own_k, own_v))
            )
        parts = [] if used and int(mode[row]) == SWAP else [(query_logits(query, own_k), own_v)]
        for r, p in used:
            added = 0.0 if shift is None else float(shift[row, r])
            if added == HIDDEN:
                continue
            page_k, page_v = (k[p], v[p]) if p < rows else (pool_k[p - rows], pool_v[p - rows])
            logits = query_logits(query, page_k) * (1.0 if scale is None else float(scale[row, r])) + added
            if bias is not None:
                logits = logits + bias[p, : len(page_k)].double()
            parts.append((logits, page_v))
        if parts:
            weights = torch.softmax(torch.cat([logits for logits, _ in parts], -1), -1).nan_to_num(0.0)
            out[row] = torch.einsum("hqk,khd->qhd", weights, torch.cat([values for _, values in parts]))
    return out


def query_logits(query, keys):
    return torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(query.shape[-1])


def mixed_case(dtype, width, tokens, page_tokens=23, heads=2):
    """Five rows of all modes with live and pool pages, AdaIN and a bias."""
    q, k, v = (normal(5, tokens, heads, width, seed=i, dtype=dtype) for i in range(3))
    pool_k, pool_v = (normal(3, page_tokens, heads, width, seed=i, dtype=dtype) for i in (3, 4))
    page = torch.tensor([[-1, -1, -1], [0, 5, -1], [7, 7, 3], [2, 6, 5], [-1, 1, -1]])
    mode = torch.tensor([CONCAT, CONCAT, SWAP, PLAIN, CONCAT])
    return dict(
        q=q, k=k, v=v, page=page, mode=mode, scale=normal(5, 3, seed=5), shift=normal(5, 3, seed=6),
        gain=normal(3, 5, heads, width, seed=7) * 0.3 + 1, offset=normal(3, 5, heads, width, seed=8) * 0.3,
        pool=(pool_k, pool_v, None, None), bias=normal(8, max(tokens, page_tokens), seed=9),
    )  # fmt: skip


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
    worker = threading.Thread(target=shared, args=(q, q, q, [[-1]], [PLAIN]))
    turns = 0
    worker.start()
    while worker.is_alive():
        turns += 1
    assert turns > 100


@pytest.mark.parametrize("page, mode, message", [
    (5, CONCAT, "page is 5, but it must be from -1 to 4"),
    (-2, CONCAT, "page is -2"),
    (2**40, PLAIN, "page is 1099511627776"),
    (1, 3, "mode is 3, but it must be from 0 to 2"),
    (1, -1, "mode is -1"),
])  # fmt: skip
def test_an_index_out_of_range_is_refused_with_its_limit(page, mode, message):
    q = torch.zeros(2, 3, 1, 32)
    pool = (torch.zeros(3, 3, 1, 32), torch.zeros(3, 3, 1, 32), None, None)
    with pytest.raises(ValueError, match=message):
        shared(q, q, q, [[-1], [page]], [PLAIN, mode], pool=pool)


@pytest.mark.parametrize("change, message", [
    (dict(q=torch.zeros(2, 3, 1, 48), k=torch.zeros(2, 3, 1, 48), v=torch.zeros(2, 3, 1, 48)), "head size is 48"),
    (dict(k=torch.zeros(2, 4, 1, 32)), "k does not have the shape"),
    (dict(v=torch.zeros(2, 3, 1, 32, dtype=torch.float16)), "v does not have the type"),
    (dict(q=torch.zeros(2, 3, 1, 64)[..., ::2]), "stride 2 between channels"),
    (dict(q=torch.zeros(2, 3, 1, 32, dtype=torch.float64)), "Double"),
    (dict(pool=(torch.zeros(1, 3, 1, 32, dtype=torch.float8_e4m3fn),) * 2 + (None, None)), "pool_k_scale is missing"),
    (dict(bias=torch.zeros(2, 2)), "bias must be"),
    (dict(gain=torch.ones(3, 2, 1, 32)), "offset is missing"),
])  # fmt: skip
def test_tensors_that_no_kernel_takes_are_refused(change, message):
    q = torch.zeros(2, 3, 1, 32)
    with pytest.raises(ValueError, match=message):
        shared(**(dict(q=q, k=q, v=q, page=[[-1], [-1]], mode=[PLAIN, PLAIN]) | change))



GATED = ("q", "text_k", "text_v", "text_page", "image_k", "image_v", "image_lengths", "image_page", "strength", "group",
         "masks", "mask_index")  # fmt: skip


def gated(**case):
    q = case["q"]
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    extension().gated_cross_attention(*(case.get(name) for name in GATED), out)
    return out


def gated_formula(q, text_k, text_v, text_page, image_k=None, image_v=None, image_lengths=None, image_page=None,
                  strength=None, group=None, masks=None, mask_index=None):  # fmt: skip
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(len(q)):
        query, page = q[row].double(), int(text_page[row])
        weights = torch.softmax(query_logits(query, text_k[page].double()), -1)
        out[row] = torch.einsum("hqk,khd->qhd", weights, text_v[page].double())
        segments = range(image_page.shape[1]) if image_page is not None else ()
        active = [s for s in segments if image_page[row, s] >= 0 and strength[row, s] != 0]
        for number in {int(group[row, s]) for s in active}:
            members = [(s, int(image_page[row, s])) for s in active if group[row, s] == number]
            keys = torch.cat([image_k[p, : image_lengths[p]].double() for _, p in members])
            weights = torch.softmax(query_logits(query, keys), -1)
            parts = weights.split([int(image_lengths[p]) for _, p in members], -1)
            for (s, p), part in zip(members, parts, strict=True):
                gate = strength[row, s].double().expand(q.shape[1])
                if mask_index is not None and mask_index[row, s] >= 0:
                    gate = gate * masks[mask_index[row, s]].double()
                values = torch.einsum("hqk,khd->qhd", part, image_v[p, : image_lengths[p]].double())
                out[row] += gate[:, None, None] * values
    return out


def gated_case(dtype, width=64, tokens=65, text_tokens=77, image_tokens=17, heads=2):
    """Four rows, up to three segments: alone, in one group, masked, negative, switched off."""
    text = [normal(2, text_tokens, heads, width, seed=i, dtype=dtype) for i in (1, 2)]
    image = [normal(4, image_tokens, heads, width, seed=i, dtype=dtype) for i in (3, 4)]
    lengths = torch.tensor([4, 16, 3, image_tokens]).clamp(max=image_tokens)
    for x in image:
        for page, length in enumerate(lengths):
            x[page, length:] = math.nan  # padding
    return dict(
        q=normal(4, tokens, heads, width, seed=0, dtype=dtype), text_k=text[0], text_v=text[1],
        text_page=torch.tensor([0, 1, 1, 0]), image_k=image[0], image_v=image[1], image_lengths=lengths,
        image_page=torch.tensor([[0, -1, -1], [1, 2, 3], [3, 0, 2], [2, 1, 1]]),
        strength=torch.tensor([[0.7, 5.0, 1.0], [1.0, -0.4, 0.3], [0.5, 0.0, 1.5], [0.0, 0.0, 0.0]]),
        group=torch.tensor([[0, 0, 0], [7, 2, 7], [1, 1, 1], [0, 1, 2]]),
        masks=normal(2, tokens, seed=5), mask_index=torch.tensor([[-1, 0, 0], [1, -1, 0], [0, 0, 1], [0, 0, 0]]),
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 7, 65, 129])
@pytest.mark.parametrize("width", WIDTHS, ids="{} wide".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_groups_and_masks_together_equal_the_formula(instruction_set, dtype, width, tokens):
    case = gated_case(dtype, width, tokens)
    assert_near(gated(**case), gated_formula(**case), dtype)


@pytest.mark.parametrize(
    "text_tokens, image_tokens", [(1, 1), (64, 4), (95, 60), (96, 96), (97, 97), (154, 200), (2100, 257)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_text_and_image_tokens_equals_the_formula(instruction_set, dtype, text_tokens, image_tokens):
    case = gated_case(dtype, 40, 70, text_tokens, image_tokens)
    assert_near(gated(**case), gated_formula(**case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_segments_it_is_attention_to_the_text(instruction_set, dtype):
    case = {name: x for name, x in gated_case(dtype).items() if name in ("q", "text_k", "text_v", "text_page")}
    assert_near(gated(**case), gated_formula(**case), dtype)
    case |= {name: gated_case(dtype)[name][:, :0] for name in ("image_page", "strength", "group")}
    case |= {name: gated_case(dtype)[name] for name in ("image_k", "image_v", "image_lengths")}
    assert_near(gated(**case), gated_formula(**case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_segment_of_strength_zero_is_not_read_and_leaves_its_group(instruction_set, dtype):
    case = gated_case(dtype)
    case["strength"][:, 1] = 0.0
    case["image_page"][:] = torch.tensor([0, 1, 2])
    case["group"][:] = 0
    case["image_k"][1] = case["image_v"][1] = math.nan
    assert_near(gated(**case), gated_formula(**case), dtype)


def test_strided_tables_and_fused_keys_and_values_are_taken_as_they_are(instruction_set):
    case = gated_case(torch.float32)
    expected = gated(**case)
    for name in ("strength", "masks"):
        case[name] = case[name].repeat_interleave(2, 1)[:, ::2]
    for name in ("image_page", "group", "mask_index"):
        case[name] = case[name].t().contiguous().t()
    case["text_k"], case["text_v"] = torch.stack([case["text_k"], case["text_v"]], 2).unbind(2)
    case["q"] = case["q"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gated(**case), expected)


def test_text_or_images_without_tokens_add_nothing(instruction_set):
    case = gated_case(torch.float32)
    case["image_lengths"][:] = 0
    assert_near(gated(**case), gated_formula(**(case | dict(image_page=torch.full((4, 3), -1)))))
    case = gated_case(torch.float32)
    with_text = gated_formula(**case)
    text_alone = gated_formula(**(case | dict(image_page=torch.full((4, 3), -1))))
    case["text_k"], case["text_v"] = case["text_k"][:, :0], case["text_v"][:, :0]
    assert_near(gated(**case), with_text - text_alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_attention_gives_the_same_bits_on_one_thread_and_on_many(instruction_set, dtype):
    case = gated_case(dtype, tokens=1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gated(**case)
        torch.set_num_threads(5)
        together = gated(**case)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("name, value, message", [
    ("text_page", 2, "text_page is 2, but it must be from 0 to 1"),
    ("image_page", 4, "image_page is 4, but it must be from -1 to 3"),
    ("image_lengths", 18, "image_lengths is 18, but it must be from 0 to 17"),
    ("mask_index", 2, "mask_index is 2, but it must be from -1 to 1"),
])  # fmt: skip
def test_gated_attention_refuses_an_index_out_of_range_with_its_limit(name, value, message):
    case = gated_case(torch.float32)
    case[name].view(-1)[-1] = value
    with pytest.raises(ValueError, match=message):
        gated(**case)




def statistics(*xs):
    mean, variance = (torch.full((len(xs), xs[0].shape[0], *xs[0].shape[2:]), math.nan) for _ in range(2))
    extension().token_stats(list(xs), mean, variance)
    return mean, variance


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("width", WIDTHS, ids="{} wide".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_equal_the_formula(instruction_set, dtype, width, tokens):
    xs = normal(2, tokens, 3, 3, width, seed=0, dtype=dtype).unbind(2)
    mean, variance = statistics(*xs)
    for i, x in enumerate(xs):
        torch.testing.assert_close(mean[i].double(), x.double().mean(1), rtol=1e-6, atol=1e-6)
        expected = x.double().var(1) if tokens > 1 else torch.zeros(2, 3, width, dtype=torch.float64)
        torch.testing.assert_close(variance[i].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_mean_far_from_zero_and_a_first_token_far_from_the_mean_keep_the_variance(instruction_set):
    x = normal(1, 4096, 1, 64, seed=0) * 0.01 + 1000.0
    mean, variance = statistics(x)
    torch.testing.assert_close(variance[0].double(), x.double().var(1), rtol=1e-4, atol=0)
    x = normal(1, 4096, 1, 64, seed=1)
    x[:, 0] = 1e4
    mean, variance = statistics(x)
    torch.testing.assert_close(variance[0].double(), x.double().var(1), rtol=1e-5, atol=0)


def test_statistics_of_a_constant_channel_are_exact(instruction_set):
    mean, variance = statistics(torch.full((1, 333, 1, 40), 0.1))
    torch.testing.assert_close(mean, torch.full_like(mean, 0.1), rtol=3e-7, atol=0)
    assert (variance < 1e-14).all()




def test_the_features_found_contain_what_the_kernels_use():
    features = extension().cpu_features()
    assert set(features) <= {"avx2", "fma", "f16c", "avx512", "avx512_bf16"}
    assert extension().instruction_set() in ("", *features)


@pytest.mark.parametrize("name", ["sse", "avx512_bf17", "AVX2"])
def test_an_unknown_instruction_set_is_refused_with_those_there_are(monkeypatch, name):
    usable = extension().instruction_set()
    monkeypatch.setenv("STYLEFAST_CPU", name)
    with pytest.raises(ValueError, match=f"STYLEFAST_CPU is '{name}'.*{usable or 'none'}"):
        extension().instruction_set()
    q = torch.zeros(1, 1, 1, 32)
    with pytest.raises(ValueError, match="STYLEFAST_CPU"):
        shared(q, q, q, [[-1]], [PLAIN])
