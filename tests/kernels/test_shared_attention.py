"""Shared attention in every form: the formula on drawn calls, the identities of the papers, and what may not leak."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F

from stylefast.kernels.adain import adain_affine, token_stats
from stylefast.kernels.shared_attention import (
    CONCAT,
    FP8,
    HEAD_SIZES,
    PLAIN,
    SWAP,
    Affine,
    Pool,
    References,
    operation,
    shared_attention,
    shared_attention_ref,
)
from tests.kernels.conformance import (
    CPP,
    FLOATS,
    GPU,
    HIDDEN,
    LAYOUTS,
    MATRICES,
    NAN,
    TORCH,
    Draw,
    assert_as_near_as_pytorch,
    captured,
    doubled,
    each,
    each_type,
    equal,
    forms,
    laid_out,
    normal,
    same_bits_on_any_number_of_threads,
)


def reference(q, k, v, references, affine, pool):
    """The literal form with the arguments of the others."""
    page, mode, scale, shift, bias = references
    pool_k, pool_v, *scales = pool or (None,) * 4
    return shared_attention_ref(q, k, v, page, mode, scale, shift, affine, pool_k, pool_v, bias, *scales)


def exact_of(*case):
    """What the literal form gives in fp64."""
    return reference(*doubled(case))


POINTERS = {"form": "pointers", "block_m": 16, "block_n": 32, "num_warps": 4, "num_stages": 2, "exp2": 0}
CONFIGS = {
    "pointers": POINTERS,
    "decoding": POINTERS | {"decode": True, "block_n": 16},
    "specialised": POINTERS | {"form": "warp_specialised", "block_n": 16},
}
FORMS = [
    form._replace(types=(torch.float16,)) if form.name == "triton-specialised" else form
    for form in forms(reference, MATRICES, **CONFIGS)  # the interpreter multiplies no matrices of bfloat16
]
# what the warp-specialised form takes, and the interpreter in reasonable time
LIMITS = {
    "triton-specialised": dict(
        tokens=(16, 48, 32), widths=(64,), references=(1, 1, 0), layouts=("fused",), simple=True
    ),
    "triton-pointers": dict(tokens=(1, 16, 19, 33), heads=(1,), rows=(3, 2)),
    "triton-decoding": dict(tokens=(5, 17), heads=(1,), rows=(2,), widths=(32, 40)),
    "gpu": dict(tokens=(128, 256, 19, 331), layouts=("fused", "fused", "padded", "transposed")),
}
EXAMPLES = {"torch": 40, "cpp": 50, "triton": 4}
ROWS, TOKENS, HEADS, WIDTH = 4, 16, 2, 64  # of the cases below, which both Triton forms take


def drawn(
    seed,
    dtype,
    tokens=(1, 2, 7, 16, 33, 40, 63, 64, 65, 96, 97, 129, 193),
    widths=HEAD_SIZES,
    references=(2, 1, 3, 0),
    heads=(1, 2, 3),
    rows=(3, 2, 4, 1, 0),
    layouts=LAYOUTS,
    simple=False,
):
    """Arguments with NaN in all that a call must not read. simple: neither bias nor fp8, and pages laid out as rows."""
    draw = Draw(seed)
    rows, heads, width, count = draw.one(rows), draw.one(heads), draw.one(widths), draw.one(references)
    own_tokens, page_tokens, pages = draw.one(tokens), draw.one(tokens), draw.one((2, 3, 1, 0))
    fp8, parts = not simple and pages > 0 and draw.one((True, False)), draw.one((3, 2, 0))
    far = draw.one((True, False))
    mode = draw.some(rows, values=(PLAIN, CONCAT, SWAP))
    page = draw.some(rows, count, values=range(-1, rows + pages))
    scale = draw.some(rows, count, values=(1.0, 0.0, -0.7, 0.5, 3.0, *((40.0,) if far else ())))
    shift = draw.some(rows, count, values=(0.0, HIDDEN, -0.5, 1.25, *((-2000.3, -60.1, 90.7, 1000.4) if far else ())))
    q, k, v = (draw.normal(rows, own_tokens, heads, width, dtype=dtype) for _ in range(3))
    stored = [draw.normal(pages, page_tokens, heads, width, dtype=FP8 if fp8 else dtype) for _ in range(2)]
    scales = [draw.uniform(pages, heads, width) + 0.5 for _ in range(2)]
    bias = draw.normal(rows + pages, max(own_tokens, page_tokens) + draw.one(range(4)))
    bias[draw.uniform(*bias.shape) < draw.one((0.0, 0.3, 1.0))] = HIDDEN
    gain, offset = (draw.normal(max(parts, 1), rows, heads, width) * 0.3 + one for one in (1, 0))

    read, own = set(), set(range(rows))
    for row in range(rows):
        refers = mode[row] != PLAIN and any(p >= 0 for p in page[row])
        if not refers:
            gain[:, row] = offset[:, row] = NAN
        elif mode[row] == SWAP:
            own.remove(row)
        for r, p in enumerate(page[row]):
            if p >= 0 and refers and shift[row][r] != HIDDEN:
                read.add(p)
                continue
            scale[row][r] = NAN
            if p < 0 or not refers:  # otherwise the shift is what hides it
                shift[row][r] = NAN
    for x in (k, v):
        x[[row for row in range(rows) if row not in own | read]] = NAN
    for x in (*stored, *scales):
        for i in set(range(pages)) - {p - rows for p in read}:
            x[i] = NAN
    for p in range(rows + pages):
        bias[p, (own_tokens if p < rows else page_tokens) if p in read else 0 :] = NAN

    layout = draw.one(layouts)
    q, k, v = (laid_out(x, layout if simple else draw.one(layouts)) for x in (q, k, v))
    if rows > 1 and not simple and draw.one((True, False)):
        q = q[:1].expand(rows, -1, -1, -1)
    stored = [laid_out(x, layout if simple else "contiguous" if fp8 else draw.one(layouts)) for x in stored]
    table = draw.table(page, rows, count, dtype=torch.int64)
    tables = (draw.table(x, rows, count) for x in (scale, shift))
    modes = torch.tensor(mode).long().repeat_interleave(2)[::2]
    with_bias = not simple and draw.one((True, False))
    return (
        *(q, k, v),
        References(table, modes, *tables, bias if with_bias else None),
        Affine(gain, offset.transpose(1, 2).contiguous().transpose(1, 2)) if parts else None,
        Pool(*stored, *(scales if fp8 else (None, None))) if pages else None,
    )


def composed(q, k, v, references, affine, pool):
    """What one writes without this operation: AdaIN, concatenation and PyTorch's attention, in the input's type."""
    rows, out = len(q), torch.zeros_like(q)
    page, mode, scale, shift, bias = references
    for row in range(rows):
        used = [(r, p) for r, p in enumerate(page[row].tolist()) if p >= 0 and mode[row] != PLAIN]
        own = [q[row], k[row], v[row]]
        if used and affine is not None:
            for i, (gain, offset) in enumerate(zip(*affine, strict=True)):
                own[i] = own[i] * gain[row].to(q.dtype) + offset[row].to(q.dtype)
        keys, values, added = [], [], []
        if not used or mode[row] != SWAP:
            keys, values, added = [own[1]], [own[2]], [torch.zeros(len(own[1]))]
        for r, p in used:
            if shift[row, r] == HIDDEN:
                continue
            page_k, page_v = (k[p], v[p]) if p < rows else (pool.k[p - rows], pool.v[p - rows])
            if p >= rows and pool.k_scale is not None:
                page_k = (page_k.float() * pool.k_scale[p - rows]).to(q.dtype)
                page_v = (page_v.float() * pool.v_scale[p - rows]).to(q.dtype)
            keys.append(page_k * scale[row, r].to(q.dtype))
            values.append(page_v)
            added.append(shift[row, r] + (bias[p, : len(page_k)] if bias is not None else torch.zeros(len(page_k))))
        if keys and not torch.isneginf(torch.cat(added)).all():
            mask = torch.cat(added).expand(q.shape[1], -1)
            parts = (x.transpose(0, 1)[None] for x in (own[0], torch.cat(keys), torch.cat(values)))
            out[row] = F.scaled_dot_product_attention(*parts, attn_mask=mask)[0].transpose(0, 1)
    return out


def check(form, *case):
    """Compare one call with fp64, and with PyTorch's own error."""
    references, largest = case[3], 1.0
    for x, factor in ((references.shift, 1), (references.scale, 5)):
        largest = max([largest, *(factor * x[x.isfinite()].abs()).tolist()])
    found = form(operation, *case)
    assert_as_near_as_pytorch(found, composed(*case), exact_of(*case), largest)


@each_type(FORMS)
def test_drawn_calls_are_as_near_to_the_formula_as_pytorch(form, dtype):
    for seed in range(EXAMPLES[form.kind]):
        check(form, *drawn(seed, dtype, **LIMITS.get(form.name, {})))


@each_type(FORMS, kinds="torch cpp")
def test_many_queries_and_keys_are_as_near_to_the_formula_as_pytorch(form, dtype):
    q, k, v = (normal(1, 1100, 1, 64, seed=i, dtype=dtype) for i in range(3))
    pool = Pool(*(normal(1, 700, 1, 64, seed=i, dtype=dtype) for i in (3, 4)))
    check(form, q, k, v, segments([[1]], [CONCAT]), None, pool)


# below, calls that every form takes


def qkv(form, rows=ROWS, tokens=TOKENS, width=WIDTH):
    """Queries, keys and values as views of one projection, in the type that the form computes with most digits."""
    return normal(rows, tokens, 3, HEADS, width, dtype=form.types[0]).unbind(2)


def segments(pages, mode, scale=1.0, shift=0.0, bias=None):
    page = torch.tensor(pages)
    return References(page, torch.tensor(mode), torch.full(page.shape, scale), torch.full(page.shape, shift), bias)


def adain(rows=ROWS, parts=3):
    gain, offset = (normal(parts, rows, HEADS, WIDTH, seed=i) * 0.3 + one for i, one in ((1, 1), (2, 0)))
    return Affine(gain, offset)


def pages(like, count=2, tokens=TOKENS):
    return Pool(*normal(count, tokens, 3, *like.shape[2:], seed=3, dtype=like.dtype).unbind(2)[:2])


def near(found, expected, tolerance=2e-5):
    tolerance = 4e-3 if torch.float16 in (found.dtype, expected.dtype) else tolerance
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


FIRST = ([[-1], [0], [0], [0]], [PLAIN, CONCAT, SWAP, CONCAT])  # the others read row 0
# converts fp8 by its bits, which needs no pool here
ALL = [form for form in FORMS if form.name != "triton-decoding"]


@each(ALL)
def test_a_shift_of_log_2_equals_listing_the_reference_twice(form):
    x = qkv(form)
    once = form(operation, *x, segments(*FIRST, shift=math.log(2)), None, None)
    twice = segments([[-1, -1], [0, 0], [0, 0], [0, 0]], FIRST[1])
    near(once, exact_of(*x, twice, None, None))
    if form.name != "triton-specialised":  # one page a row
        near(form(operation, *x, twice, None, None), exact_of(*x, twice, None, None))


@each(ALL)
def test_a_hidden_page_is_not_read_but_adain_applies(form):
    x, affine = qkv(form), adain()
    pool = pages(x[0])
    for part in pool[:2]:
        part[:] = NAN
    hidden = form(operation, *x, segments([[4], [5], [4], [-1]], [CONCAT] * 4, shift=HIDDEN), affine, pool)
    moved = [part * affine.gain[i, :, None] + affine.offset[i, :, None] for i, part in enumerate(x)]
    plain = segments([[-1]] * 4, [PLAIN] * 4)
    near(hidden[:3], exact_of(*(part.to(x[0].dtype) for part in moved), plain, None, None)[:3])
    near(hidden[3], exact_of(*x, plain, None, None)[3])


@each(ALL)
def test_an_affine_of_two_parts_leaves_the_values_as_they_are(form):
    x, (gain, offset) = qkv(form), adain()
    gain[2], offset[2] = 1, 0
    table = segments(*FIRST, 0.8, 0.1)
    two = form(operation, *x, table, Affine(gain[:2], offset[:2]), None)
    near(form(operation, *x, table, Affine(gain, offset), None), exact_of(*x, table, Affine(gain, offset), None))
    near(two, exact_of(*x, table, Affine(gain, offset), None))


@each(ALL)
def test_scale_zero_gives_reference_tokens_a_logit_of_zero_and_does_not_switch_them_off(form):
    q, k, v = qkv(form)
    out = form(operation, q, k, v, segments(*FIRST, scale=0.0), None, None)
    keys, values = torch.cat([k[1], torch.zeros_like(k[0])]).double(), torch.cat([v[1], v[0]]).double()
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", q[1].double(), keys) / math.sqrt(WIDTH), -1)
    near(out[1], torch.einsum("hqk,khd->qhd", weights, values))


@each(ALL)
def test_attending_to_itself_as_a_reference_changes_nothing(form):
    x = qkv(form)
    alone = exact_of(*x, segments([[-1]] * 4, [PLAIN] * 4), None, None)
    near(form(operation, *x, segments([[0], [1], [2], [3]], [CONCAT] * 4, shift=1.5), None, None), alone)
    near(form(operation, *x, segments([[-1]] * 4, [PLAIN] * 4), None, None), alone)


@each(ALL, "torch cpp triton")
def test_a_row_depends_on_those_that_it_reads_and_on_no_other(form):
    x = qkv(form)
    whole = form(operation, *x, segments(*FIRST), None, None)
    pair = [part[[0, 3]] for part in x]
    assert equal(form(operation, *pair, segments([[-1], [0]], [PLAIN, CONCAT]), None, None)[1], whole[3])
    x[1][2, 3], x[2][2] = NAN, NAN  # row 2 swaps its own tokens for those of row 0
    assert equal(form(operation, *x, segments(*FIRST), None, None), whole)
    x[1][0, 3, 1] = NAN
    out = form(operation, *x, segments([[-1], [0], [-1], [3]], [PLAIN, CONCAT, PLAIN, PLAIN]), None, None)
    assert out[:2, :, 1].isnan().all() and out[2].isnan().all()
    assert out[:2, :, 0].isfinite().all() and out[3].isfinite().all()


@each(ALL)
def test_a_row_that_sees_no_token_gives_zero(form):
    x = qkv(form)
    out = form(
        operation, *x, segments([[0], [0], [-1], [4]], [CONCAT, SWAP, SWAP, SWAP], shift=HIDDEN), None, pages(x[0])
    )
    assert (out[[1, 3]] == 0).all()
    near(out[[0, 2]], exact_of(*x, segments([[-1]] * 4, [PLAIN] * 4), None, None)[[0, 2]])
    if form.name != "triton-specialised":  # which takes no bias
        bias = torch.zeros(ROWS, TOKENS)
        bias[0] = HIDDEN
        out = form(operation, *x, segments(*FIRST, bias=bias), None, None)
        assert (out[2] == 0).all() and (out[1] != 0).any()


@each([form for form in ALL if form.name != "triton-specialised"])
def test_a_first_tile_hidden_token_by_token_leaves_the_rest(form):
    q, bias = normal(1, 5, 1, 32), torch.zeros(2, 400)
    bias[1, :300] = HIDDEN
    pool = Pool(*(normal(1, 400, 1, 32, seed=i) for i in (1, 2)))
    case = (q, q, q, segments([[1]], [SWAP], bias=bias), None, pool)
    near(form(operation, *case), exact_of(*case))


@each(ALL)
@pytest.mark.parametrize("size", [-300.0, -90.0, 90.0, 300.0])
def test_large_logits_neither_overflow_nor_vanish(form, size):
    q, k, v = qkv(form)
    case = (q, k, v, segments(*FIRST, shift=size), None, None)
    near(form(operation, *case), exact_of(*case))
    case = (q * size / 10, k, v, segments(*FIRST, shift=size), None, None)
    torch.testing.assert_close(form(operation, *case).double(), exact_of(*case), rtol=2e-3, atol=2e-3)


@each_type(ALL)
@pytest.mark.parametrize("shift", [1e5, -1e5])
def test_a_shift_beyond_the_types_range_leaves_nothing_but_its_side(form, dtype, shift):
    x = [part.to(dtype) for part in qkv(form)]
    out = form(operation, *x, segments(FIRST[0], [PLAIN] + [CONCAT] * 3, shift=shift), None, None)
    side = SWAP if shift > 0 else PLAIN
    # next to 1e5 a logit of fp32 has 7 bits left behind the point
    expected = exact_of(*x, segments(FIRST[0], [PLAIN] + [side] * 3), None, None)
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05)


@each_type([TORCH, *CPP])
def test_adain_keeps_its_digits_where_the_mean_is_large(form, dtype):
    x = [(part * 0.02 + 5).to(dtype) for part in qkv(form)]
    affine = adain_affine(*token_stats(*x), torch.zeros(ROWS).long(), torch.ones(ROWS, 3))
    case = (*x, segments([[0]] * 4, [CONCAT] * 4), affine, None)
    exact = exact_of(*case)
    error = form(operation, *case).double() - exact
    assert error.abs().max() <= 5 * torch.finfo(dtype).eps * exact.abs().max()


@each([form for form in FORMS if form.kind in ("torch", "cpp") or form.name == "triton-decoding"])
def test_every_fp8_code_is_read_as_pytorch_reads_it(form):
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).reshape(8, 1, 1, 32)  # with NaN at 0x7f and 0xff
    q, ones = torch.zeros(8, 1, 1, 32), torch.ones(8, 1, 32)
    ones[:, :, 3] = torch.tensor(0.5)
    table = segments([[p] for p in range(8, 16)], [SWAP] * 8)
    found = form(operation, q, q, q, table, None, Pool(torch.zeros_like(codes), codes, ones, ones))
    assert equal(found, codes.float() * ones[:, None])


def test_a_scale_of_fp8_pages_may_be_the_same_for_all():
    x = normal(ROWS, TOKENS, 3, HEADS, WIDTH).unbind(2)
    stored = [normal(2, 7, HEADS, WIDTH, seed=i).to(FP8) for i in (1, 2)]
    scales = normal(2, HEADS, WIDTH, seed=3).abs() + 0.5
    table = segments([[4], [5], [0], [5]], [CONCAT, SWAP, CONCAT, CONCAT])[:4]
    shared = shared_attention(*x, *table, None, *stored, None, *scales)
    each_page = scales[:, None].expand(-1, 2, -1, -1)
    assert equal(shared, shared_attention(*x, *table, None, *stored, None, *each_page))


@each(ALL)
def test_pages_without_tokens_and_empty_batches_are_let_through(form):
    if form.kind in ("torch", "cpp"):
        x = normal(2, 9, 3, 2, 32).unbind(2)
        empty = Pool(*torch.zeros(2, 1, 0, 2, 32))
        found = form(operation, *x, segments([[2], [2]], [CONCAT, SWAP]), None, empty)
        near(found[:1], exact_of(*(part[:1] for part in x), segments([[-1]], [PLAIN]), None, None))
        assert (found[1] == 0).all()
    for shape in ((0, 9, 2, 32), (2, 0, 2, 32), (2, 9, 0, 32)):
        nothing = torch.zeros(shape)
        table = References(torch.full((shape[0], 1), -1), torch.zeros(shape[0]).long(), *torch.zeros(2, shape[0], 1))
        assert form(operation, nothing, nothing, nothing, table, None, None).shape == shape


def mixed(dtype, tokens):
    """Return five rows of all modes with live and pool pages, AdaIN and a bias."""
    q, k, v = (normal(5, tokens, HEADS, WIDTH, seed=i, dtype=dtype) for i in range(3))
    page = torch.tensor([[-1, -1, -1], [0, 5, -1], [7, 7, 3], [2, 6, 5], [-1, 1, -1]])
    tables = (normal(5, 3, seed=i) for i in (5, 6))
    mode = torch.tensor([CONCAT, CONCAT, SWAP, PLAIN, CONCAT])
    return q, k, v, References(page, mode, *tables, normal(8, tokens, seed=9)), adain(5), pages(q, 3, 9)


@each_type(FORMS)
def test_modes_pages_adain_and_bias_together_are_as_near_to_the_formula_as_pytorch(form, dtype):
    *case, pool = mixed(dtype, 19)
    if form.name == "triton-specialised":
        x = qkv(form)
        case, pool = (*x, segments([[4], [5], [0], [3]], [CONCAT, SWAP, CONCAT, PLAIN], 0.6, 0.4), adain()), pages(x[0])
    elif form.name == "triton-decoding":
        scales = (normal(3, HEADS, WIDTH, seed=i).abs() + 0.5 for i in (7, 8))
        pool = Pool(pool.k.to(FP8), pool.v.to(FP8), *scales)
    check(form, *case, pool)


@each_type(CPP, kinds="cpp")
def test_one_thread_and_many_give_the_same_bits(form, dtype):
    same_bits_on_any_number_of_threads(form, operation, *mixed(dtype, 600))


@each_type(CPP, kinds="cpp")
def test_rows_in_another_order_give_the_same_bits(form, dtype):
    *x, table, affine, pool = mixed(dtype, 65)
    order = torch.tensor([3, 0, 4, 2, 1])
    place, page = torch.argsort(order), table.page[order]
    page = torch.where((page >= 0) & (page < 5), place[page.clamp(0, 4)], page)
    bias = torch.cat([table.bias[:5][order], table.bias[5:]])
    changed = References(page, *(part[order] for part in table[1:4]), bias)
    turned = Affine(*(part[:, order] for part in affine))
    found = form(operation, *(part[order] for part in x), changed, turned, pool)
    assert equal(found, form(operation, *x, table, affine, pool)[order])


@each(CPP[-1:])
def test_other_python_threads_run_while_it_computes(form):
    q, table = normal(1, 2048, 4, 64), segments([[-1]], [PLAIN])

    def turns() -> int:
        worker, count = threading.Thread(target=form, args=(operation, q, q, q, table, None, None)), 0
        worker.start()
        while worker.is_alive():
            count += 1
        return count

    # on a busy machine this thread may sleep through some of the calls
    assert any(turns() > 100 for _ in range(20))


@each(ALL, "cpp triton")
@pytest.mark.parametrize("bad", [6, -2, 2**40], ids=["past the pool", "below -1", "far beyond memory"])
def test_a_page_out_of_range_is_refused_or_makes_its_row_nan_and_no_other(form, bad):
    x = qkv(form)
    case = (*x, segments([[4], [5], [0], [3]], [CONCAT, SWAP, CONCAT, PLAIN]), None, pages(x[0]))
    expected = exact_of(*case)
    case[3].page[1] = bad
    if form.kind == "cpp":
        with pytest.raises(ValueError, match=f"page is {bad}, but it must be from -1 to 5"):
            form(operation, *case)
        return
    case[3].page[3] = 77  # a row in plain mode may name any page
    found = form(operation, *case)
    assert found[1].isnan().all()
    near(found[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.gpu
@pytest.mark.parametrize("affine", [0, 2, 3], ids="AdaIN of {} parts".format)
@pytest.mark.parametrize("tokens, heads", [(4096, 10), (1024, 20), (1008, 20)])
def test_sdxls_calls_on_a_gpu_are_as_near_to_the_formula_as_pytorch(tokens, heads, affine):
    for dtype in FLOATS:
        q, k, v = normal(4, tokens, 3, heads, 64, dtype=dtype).unbind(2)
        gain, offset = (normal(3, 4, heads, 64, seed=i)[:affine] * 0.3 + one for i, one in ((1, 1), (2, 0)))
        table = segments([[4], [5], [0], [3]], [CONCAT, SWAP, CONCAT, CONCAT], 0.8, 0.4)
        check(GPU, q, k, v, table, Affine(gain, offset) if affine else None, pages(q, 2, tokens))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1024, 1008])
def test_a_captured_graph_follows_pages_scales_and_shifts(tokens):
    x = normal(4, tokens, 3, 4, 64, dtype=torch.bfloat16).unbind(2)
    affine = Affine(*(normal(3, 4, 4, 64, seed=i) * 0.3 + one for i, one in ((1, 1), (2, 0))))
    pool = pages(x[0], 2, tokens)
    replay, given = captured(operation, *x, segments([[4], [5], [0], [-1]], [CONCAT] * 4), affine, pool)
    changed = segments([[0], [-1], [5], [4]], [CONCAT, SWAP, CONCAT, PLAIN], 0.7, 0.2)
    for there, new in zip(given[3][:4], changed):
        there.copy_(new)
    torch.testing.assert_close(replay().double(), exact_of(*x, changed, affine, pool), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31_elements_reach_their_page():
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB of device memory")
    q, k, v = (normal(2, 128, 10, 128, seed=i, dtype=torch.float16).cuda() for i in range(3))
    stored = torch.zeros(2, 420, 4096, 10, 128, dtype=torch.float16, device="cuda")
    stored[:, -1] = normal(2, 4096, 10, 128, seed=3).half()
    small = Pool(*(part[-1:] for part in stored))
    want = exact_of(
        *(part.cpu().double() for part in (q, k, v)),
        segments([[2], [-1]], [CONCAT] * 2),
        None,
        Pool(*(part.cpu().double() for part in small[:2])),
    )
    table = References(*(part.cuda() for part in segments([[421], [-1]], [CONCAT] * 2)[:4]))
    found = operation.run(q, k, v, table, None, Pool(*stored), form="triton")
    torch.testing.assert_close(found.cpu().double(), want, rtol=5e-3, atol=5e-3)
