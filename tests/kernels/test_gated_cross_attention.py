"""Gated cross-attention in every form: the formula on drawn calls, and what strengths, masks and groups mean."""

import math

import pytest
import torch
import torch.nn.functional as F

from stylefast.errors import InvalidRequest
from stylefast.kernels.gated_cross_attention import ImageSegments, gated_cross_attention_ref, operation
from stylefast.kernels.shared_attention import HEAD_SIZES
from tests.kernels.conformance import (
    CPP,
    FLOATS,
    GPU,
    LAYOUTS,
    MATRICES,
    NAN,
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


def reference(q, text_k, text_v, text_page, text_lengths, images):
    return gated_cross_attention_ref(q, text_k, text_v, text_page, text_lengths, *(images or ()))


def exact_of(*case):
    """What the literal form gives in fp64."""
    return reference(*doubled(case))


ONLINE = {"queries": 16, "columns": 0, "segments": 0, "keys": 16, "num_warps": 4, "num_stages": 1}
ONE_TILE = ONLINE | {"columns": 128, "segments": 3}
FORMS = forms(reference, MATRICES, tile=ONE_TILE, online=ONLINE)
TOKENS = (1, 2, 7, 16, 33, 40, 63, 64, 65, 96, 97, 129)
SMALL = dict(tokens=(1, 5, 19), heads=(1, 2), rows=(3, 2), segments=(2, 3), pages=(2, 3))
LIMITS = {
    "triton-tile": SMALL | dict(texts=(1, 21, 77), images=(1, 4, 5)),
    "triton-online": SMALL | dict(texts=(1, 16, 21), images=(1, 4, 17)),
    "gpu": dict(tokens=(1, 19, 331, 1024)),
}
EXAMPLES = {"torch": 40, "cpp": 50, "triton": 5}


def drawn(
    seed,
    dtype,
    tokens=TOKENS,
    texts=(77, *TOKENS),
    images=(4, 16, *TOKENS),
    heads=(1, 2, 3),
    rows=(3, 2, 4, 1, 0),
    segments=(2, 1, 3, 0),
    pages=(2, 3, 1, 0),
):
    """Arguments with NaN in all that a call must not read."""
    draw = Draw(seed)
    rows, heads, width, segments, pages = map(draw.one, (rows, heads, HEAD_SIZES, segments, pages))
    tokens, text_pages, text_tokens = draw.one(tokens), draw.one((1, 2, 3)), draw.one(texts)
    image_tokens, masks = draw.one(images), draw.one((2, 1, 0))
    text_page = draw.some(rows, values=range(text_pages))
    q = draw.normal(rows, tokens, heads, width, dtype=dtype)
    text = [draw.normal(text_pages, text_tokens, heads, width, dtype=dtype) for _ in range(2)]
    text_lengths = [draw.one(range(1, text_tokens + 1)) for _ in range(text_pages)] if draw.one((True, False)) else None
    for x in text:
        for p in range(text_pages):
            x[p, (text_tokens if text_lengths is None else text_lengths[p]) if p in text_page else 0 :] = NAN
    whole = dict(dtype=torch.int64)
    laid = [laid_out(x, draw.one(LAYOUTS)) for x in (q, *text)]
    laid += [torch.tensor(text_page).long(), None if text_lengths is None else torch.tensor(text_lengths)]
    if not draw.one((True, True, True, False)):
        return (*laid, None)

    image = [draw.normal(pages, image_tokens, heads, width, dtype=dtype) for _ in range(2)]
    lengths = [draw.one(range(1, image_tokens + 1)) for _ in range(pages)]
    page = draw.some(rows, segments, values=range(-1, pages))
    strength = draw.some(rows, segments, values=(0.0, -0.0, 1.0, 0.6, -0.8, 2.5))
    mask, mask_index = draw.uniform(masks, tokens), draw.some(rows, segments, values=range(-1, masks))
    places = [(row, s) for row in range(rows) for s in range(segments)]
    active = [(row, s) for row, s in places if page[row][s] >= 0 and strength[row][s] != 0]
    read, seen = {page[row][s] for row, s in active}, {mask_index[row][s] for row, s in active}
    for x in image:
        for p in range(pages):
            x[p, lengths[p] if p in read else 0 :] = NAN
    mask[[m for m in range(masks) if m not in seen]] = NAN
    for row, s in places:
        strength[row][s] = NAN if page[row][s] < 0 else strength[row][s]
    return (
        *laid,
        ImageSegments(
            *(laid_out(x, draw.one(LAYOUTS)) for x in image),
            torch.tensor(lengths).long(),
            draw.table(page, rows, segments, **whole),
            draw.table(strength, rows, segments),
            draw.table(draw.some(rows, segments, values=(-5, -4)), rows, segments, **whole),
            torch.full((masks, 2 * tokens), NAN)[:, ::2].copy_(mask) if masks else None,
            draw.table(mask_index, rows, segments, **whole) if masks else None,
        ),
    )


def composed(q, text_k, text_v, text_page, text_lengths, images):
    """Attention to the text and to every group of images, added up in the input's type."""
    out = torch.zeros_like(q)
    for row, text in enumerate(text_page.tolist()):
        length = text_k.shape[1] if text_lengths is None else int(text_lengths[text])
        parts = (x.transpose(0, 1)[None] for x in (q[row], text_k[text, :length], text_v[text, :length]))
        out[row] = F.scaled_dot_product_attention(*parts)[0].transpose(0, 1)
        pages = images.page[row].tolist() if images is not None else []
        active = [s for s, p in enumerate(pages) if p >= 0 and images.strength[row, s] != 0]
        for number in {int(images.group[row, s]) for s in active}:
            members = [s for s in active if images.group[row, s] == number]
            lengths = [int(images.lengths[pages[s]]) for s in members]
            keys = torch.cat([images.k[pages[s], :n] for s, n in zip(members, lengths)])
            logits = torch.einsum("qhd,khd->hqk", q[row], keys) / math.sqrt(q.shape[-1])
            weights = torch.softmax(logits.float(), -1).to(q.dtype).split(lengths, -1)
            for s, n, weight in zip(members, lengths, weights):
                gate = images.strength[row, s].to(q.dtype).expand(q.shape[1])
                if images.mask_index is not None and images.mask_index[row, s] >= 0:
                    gate = gate * images.masks[images.mask_index[row, s]].to(q.dtype)
                out[row] += gate[:, None, None] * torch.einsum("hqk,khd->qhd", weight, images.v[pages[s], :n])
    return out


def check(form, *case):
    """Compare one call with fp64, and with PyTorch's own error."""
    # weights are rounded, so errors grow with the values that they average, however small the average comes out
    size = float(case[2].nan_to_num().abs().max()) if case[2].numel() else None
    found = form(operation, *case)
    assert_as_near_as_pytorch(found, composed(*case), exact_of(*case), size=size)


@each_type(FORMS)
def test_drawn_calls_are_as_near_to_the_formula_as_pytorch(form, dtype):
    for seed in range(EXAMPLES[form.kind]):
        check(form, *drawn(seed, dtype, **LIMITS.get(form.name, {})))


# below, four rows with up to three segments: alone, in one group, masked, negative, switched off


def mixed(tokens=19, text_tokens=21, image_tokens=5, dtype=torch.float32, width=32, heads=1):
    text = normal(3, text_tokens, 2, heads, width, seed=1, dtype=dtype).unbind(2)
    image = normal(4, image_tokens, 2, heads, width, seed=2, dtype=dtype).unbind(2)
    images = ImageSegments(
        *image,
        torch.tensor([4, image_tokens, 2, image_tokens]).clamp(max=image_tokens),
        torch.tensor([[0, 1, -1], [1, 2, 3], [3, 0, 2], [-1, 1, 1]]),
        torch.tensor([[0.7, 5.0, 1.0], [1.0, -0.4, 0.3], [0.5, 0.0, 1.5], [1.0, 2.0, 0.7]]),
        torch.tensor([[0, 1, 2], [7, 2, 7], [1, 1, 1], [0, 1, 1]]),
        normal(2, tokens, seed=5).abs(),
        torch.tensor([[-1, 0, 0], [1, -1, 0], [0, 0, 1], [0, 0, 0]]),
    )
    return normal(4, tokens, heads, width, dtype=dtype), *text, torch.tensor([0, 1, 2, 0]), None, images


def near(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def with_images(case, **changes):
    return (*case[:5], case[5]._replace(**changes))


def with_lengths(case, lengths, beyond=None):
    """The case with text pages of these lengths, and with `beyond` in the tokens behind them."""
    text = [x.clone() for x in case[1:3]]
    for x in text if beyond is not None else ():
        for page, length in enumerate(lengths):
            x[page, length:] = beyond
    return (case[0], *text, case[3], torch.tensor(lengths), case[5])


@each_type(FORMS)
def test_gates_groups_and_masks_together_are_as_near_to_the_formula_as_pytorch(form, dtype):
    check(form, *mixed(dtype=dtype))


@each_type(FORMS, kinds="torch cpp")
@pytest.mark.parametrize("text_tokens, image_tokens", [(1, 1), (95, 60), (97, 97), (154, 200), (2100, 257)])
def test_any_number_of_text_and_image_tokens_is_as_near_as_pytorch(form, dtype, text_tokens, image_tokens):
    check(form, *mixed(70, text_tokens, image_tokens, dtype, 40))


@each(FORMS)
def test_without_images_and_at_strength_zero_it_is_the_text_alone_to_the_bit(form):
    case = mixed()
    text = form(operation, *case[:5], None)
    near(text, exact_of(*case[:5], None))
    none = {name: getattr(case[5], name)[:, :0] for name in ("page", "strength", "group", "mask_index")}
    assert equal(form(operation, *with_images(case, **none)), text)
    k, v, masks = (torch.full_like(getattr(case[5], name), NAN) for name in ("k", "v", "masks"))
    idle = with_images(case, strength=torch.zeros(4, 3), k=k, v=v, masks=masks)
    assert equal(form(operation, *idle), text)


@each(FORMS)
def test_padding_beyond_a_pages_length_has_no_effect(form):
    case = mixed()
    expected = form(operation, *case)
    for page, length in enumerate(case[5].lengths.tolist()):
        case[5].k[page, length:] = case[5].v[page, length:] = NAN
    assert equal(form(operation, *case), expected)


TEXTS = {"short": (21, [21, 3, 16]), "77 and 154": (154, [154, 77, 1]), "2100": (2100, [2100, 77, 513])}


@each_type(FORMS)
@pytest.mark.parametrize("texts", TEXTS)
def test_texts_of_unequal_length_are_as_near_to_the_formula_as_pytorch_and_nan_beyond_them_is_not_read(
    form, dtype, texts
):
    text_tokens, lengths = TEXTS[texts]
    if form.kind == "triton" and form.device == "cpu":
        if text_tokens > 500:
            pytest.skip("takes the interpreter minutes")
        if text_tokens > 100:  # three tiles of the online form, one that ends a token into the third, in place of ten
            text_tokens, lengths = 48, [48, 33, 1]
    case = mixed(19, text_tokens, dtype=dtype)
    found = form(operation, *with_lengths(case, lengths))
    assert equal(form(operation, *with_lengths(case, lengths, NAN)), found)
    check(form, *with_lengths(case, lengths, NAN))
    check(form, *with_lengths(case, lengths, NAN)[:5], None)


@each(FORMS)
def test_a_row_reads_its_text_as_if_the_page_were_no_longer_than_it(form):
    case = mixed(text_tokens=154)
    found = form(operation, *with_lengths(case, [154, 77, 21], NAN))
    for row, page, length in ((0, 0, 154), (1, 1, 77), (2, 2, 21), (3, 0, 154)):
        text = [x[page : page + 1, :length] for x in case[1:3]]
        tables = {name: getattr(case[5], name)[row : row + 1] for name in ("page", "strength", "group", "mask_index")}
        alone = (case[0][row : row + 1], *text, torch.tensor([0]), None, case[5]._replace(**tables))
        near(found[row : row + 1], exact_of(*alone))
        near(form(operation, *alone), exact_of(*alone))


@each(FORMS, "reference cpp triton")
def test_lengths_of_whole_pages_give_the_same_bits_as_none(form):
    case = mixed(text_tokens=77)
    assert equal(form(operation, *with_lengths(case, [77, 77, 77])), form(operation, *case))


@each(FORMS, "cpp triton")
def test_pages_without_tokens_add_nothing(form):
    case = mixed()
    empty = with_images(case, lengths=torch.zeros(4, dtype=torch.int64))
    near(form(operation, *empty), exact_of(*case[:5], None))
    if form.kind == "cpp":
        text = [x[:, :0] for x in case[1:3]]
        assert equal(form(operation, *with_lengths(case, [0, 0, 0], NAN)), form(operation, case[0], *text, *case[3:]))
        near(form(operation, case[0], *text, *case[3:]), exact_of(*case) - exact_of(*case[:5], None))


@each(FORMS)
def test_strength_weighs_the_segments_output_linearly(form):
    case = mixed()
    cases = [with_images(case, strength=case[5].strength * factor) for factor in (0.0, 1.0, 2.0)]
    none, once, twice = (exact_of(*case) for case in cases)
    torch.testing.assert_close(twice - none, 2 * (once - none))
    for case, expected in zip(cases, (none, once, 2 * once - none)):
        near(form(operation, *case), expected)


@each(FORMS)
def test_segments_of_one_group_share_a_softmax_so_a_duplicate_changes_nothing(form):
    case = with_images(mixed(), strength=torch.full((4, 3), 0.7), masks=None, mask_index=None)
    twice = torch.tensor([[0, 0, -1]] * 4)
    single = exact_of(*with_images(case, page=torch.tensor([[0, -1, -1]] * 4)))
    merged = form(operation, *with_images(case, page=twice, group=torch.zeros(4, 3).long()))
    near(merged, single)
    separate = form(operation, *with_images(case, page=twice, group=torch.tensor([[0, 1, 2]] * 4)))
    assert (separate - single).abs().max() > 1e-3


@each(FORMS, "torch cpp triton")
def test_strided_tables_and_views_of_projections_give_the_same_bits(form):
    q, text_k, text_v, text_page, text_lengths, images = case = with_lengths(mixed(), [21, 3, 16])
    expected = form(operation, *case)

    def spread(x):
        return x.unsqueeze(-1).repeat(*[1] * x.ndim, 3)[..., 1]

    tables = {name: spread(x) for name, x in images._asdict().items() if name not in ("k", "v")}
    laid = {name: laid_out(getattr(images, name), "fused") for name in ("k", "v")}
    images = images._replace(**tables, **laid)
    text = (laid_out(x, layout) for x, layout in ((text_k, "padded"), (text_v, "transposed")))
    tables = (spread(text_page), spread(text_lengths))
    assert equal(form(operation, laid_out(q, "transposed"), *text, *tables, images), expected)


@each_type(CPP, kinds="cpp")
def test_one_thread_and_many_give_the_same_bits(form, dtype):
    same_bits_on_any_number_of_threads(form, operation, *mixed(1000, 77, 17, dtype, 64))


@each(FORMS, "torch cpp triton")
@pytest.mark.parametrize("rows, tokens", [(0, 5), (4, 0)])
def test_empty_batches_are_let_through(form, rows, tokens):
    q, text_k, text_v, text_page, text_lengths, images = with_lengths(mixed(tokens), [21, 3, 16])
    tables = {name: getattr(images, name)[:rows] for name in ("page", "strength", "group", "mask_index")}
    case = (q[:rows], text_k, text_v, text_page[:rows], text_lengths, images._replace(**tables))
    assert form(operation, *case).shape == (rows, tokens, 1, 32)


@each(FORMS, "cpp triton")
@pytest.mark.parametrize(
    "name, limit, refusal",
    [
        ("text_page", 3, "text_page is 3, but it must be from 0 to 2"),
        ("text_lengths", 22, "text_lengths is 22, but it must be from 0 to 21"),
        ("page", 4, "image_page is 4, but it must be from -1 to 3"),
        ("lengths", 6, "image_lengths is 6, but it must be from 0 to 5"),
        ("mask_index", 2, "mask_index is 2, but it must be from -1 to 1"),
    ],
)
def test_an_index_out_of_range_is_refused_or_makes_its_row_nan_and_no_other(form, name, limit, refusal):
    case = with_lengths(mixed(), [21, 21, 21])
    expected = exact_of(*case)
    table = {"text_page": case[3], "text_lengths": case[4]}.get(name)
    (getattr(case[5], name) if table is None else table)[1] = limit
    if form.kind == "cpp":
        with pytest.raises(ValueError, match=refusal):
            form(operation, *case)
        return
    found, others = form(operation, *case), [0, 2, 3]
    # a kernel reads no more than a page has, whatever its length says
    capped = name in ("lengths", "text_lengths")
    near(found if capped else found[others], expected if capped else expected[others])
    assert capped or found[1].isnan().all()


@each(FORMS[-3:-1])
def test_the_kernels_write_into_strided_outputs(form):
    from stylefast.kernels.gpu.gated_cross_attention import gated_cross_attention

    case, wide = mixed(), torch.full((4, 19, 1, 40), NAN)
    gated_cross_attention(*case, wide[..., :32], config=form.config)
    near(wide[..., :32], exact_of(*case))
    assert wide[..., 32:].isnan().all()


@each([form._replace(config=None) for form in FORMS[-3:-2]])
def test_more_keys_than_a_tile_holds_take_the_online_form_and_others_the_committed_tile(form):
    from stylefast.kernels.gpu.gated_cross_attention import one_tile_columns

    assert one_tile_columns(131, 3, 5) == (256, 8)
    assert one_tile_columns(77, 1, 16) == one_tile_columns(112, 1, 16) == (128, 16)
    for case in (mixed(3), mixed(3, 131)):
        near(form(operation, *case), exact_of(*case))
    with pytest.raises(InvalidRequest, match="no bfloat16 matrices"):
        form(operation, *mixed(dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("image_tokens", [4, 16, 257])
@pytest.mark.parametrize("tokens, heads, width", [(4096, 10, 64), (1024, 20, 64), (331, 5, 40), (515, 4, 128)])
def test_sdxls_calls_on_a_gpu_are_as_near_to_the_formula_as_pytorch(tokens, heads, width, image_tokens):
    for dtype in FLOATS:
        check(GPU, *mixed(tokens, 77, image_tokens, dtype, width, heads))


@pytest.mark.gpu
def test_captured_in_a_graph_it_follows_new_strengths_and_pages():
    case = mixed(1024, 77, 16, torch.bfloat16, 64, 10)
    replay, given = captured(operation, *case)
    near(replay(), exact_of(*case), 2e-2)
    changed = with_images(case, strength=case[5].strength * 0.5, page=torch.full((4, 3), 2))
    given[5].strength.copy_(changed[5].strength)
    given[5].page.copy_(changed[5].page)
    near(replay(), exact_of(*changed), 2e-2)


@pytest.mark.gpu
def test_captured_in_a_graph_it_follows_new_lengths():
    case = with_lengths(mixed(1024, 154, 16, torch.bfloat16, 64, 10), [154, 77, 154])
    replay, given = captured(operation, *case)
    near(replay(), exact_of(*case), 2e-2)
    given[4].copy_(torch.tensor([77, 154, 1]))
    near(replay(), exact_of(*with_lengths(case, [77, 154, 1])), 2e-2)
