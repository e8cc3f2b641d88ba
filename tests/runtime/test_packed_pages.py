"""Pages lie packed, as exported graphs read them: one tensor for each level, and the kernels' views are parts of it."""

import math

import pytest
import torch

from stylefast.export.unet_graph import GraphShape, graph_inputs, with_tokens
from stylefast.models.unet import UNet
from stylefast.runtime.banks.bank_pages import BankPages
from stylefast.runtime.banks.page_pool import FP8, PageLayout
from stylefast.runtime.steps.conditions import FIRST_PAGES, KeyValuePages
from stylefast.styles.bank_size import page_bytes
from tests.support.small_sdxl import small_unet_config

LATENTS = (9, 14)  # odd sides, which strided convolutions round up
SLOTS = 3


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def unet(request):
    with torch.device("meta"):
        unet = UNet(small_unet_config())
    return unet.to_empty(device="cpu").to(getattr(torch, request.param)).requires_grad_(False)


@pytest.fixture
def text(unet):
    return KeyValuePages(unet.layout, 7, 3, unet.device, unet.dtype)


@pytest.fixture
def pool(unet):
    return BankPages(unet, LATENTS, SLOTS)


def declared(unet, prefix, **sizes):
    """Name -> (type, shape) of a banked graph's inputs, where `sizes` are the dimensions' sizes."""
    sizes = with_tokens(unet, {"height": LATENTS[0], "width": LATENTS[1]} | sizes)
    return {
        x.name: (x.dtype, tuple(sizes.get(d, d) for d in x.dims))
        for x in graph_inputs(unet, GraphShape("banked", 2, 2))
        if x.name.startswith(prefix)
    }


def found(tensors):
    return {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}


def test_text_and_pictures_have_the_shapes_that_graphs_declare(unet, text):
    packed = {f"image_kv_{level}": x for level, x in enumerate(text.by_level)}
    assert found(packed) == declared(unet, "image_kv_", image_pages=FIRST_PAGES, image_tokens=7)
    assert all(x.is_contiguous() for x in text.by_level)


def test_bank_pages_have_the_names_and_shapes_that_graphs_declare(unet, pool):
    assert found(pool.by_name) == declared(unet, "page_", pages=SLOTS)
    assert all(x.is_contiguous() for x in pool.by_name.values())


def test_a_layers_keys_and_values_are_contiguous_parts_of_its_level(unet, text):
    for level, packed in enumerate(text.by_level):
        for place, layer in enumerate(unet.layout.at_level(level)):
            for side, x in enumerate(text.layers[layer]):
                assert x.is_contiguous() and x.data_ptr() == packed[place, side].data_ptr()
                assert x.shape == packed[place, side].shape


def test_what_kernels_read_of_bank_pages_are_parts_of_the_packed_tensors(unet, pool):
    pages = pool.pages
    for name, x in pool.by_name.items():
        x.copy_(torch.arange(x.numel()).view(x.shape) % 251 + len(name))
    for level in range(unet.layout.levels):
        kv, stats = pool.by_name[f"page_kv_{level}"], pool.by_name[f"page_stats_{level}"]
        for place, layer in enumerate(unet.layout.at_level(level)):
            for side in range(2):
                assert torch.equal(pages.layers[layer][side], kv[:, place, side])
                assert pages.layers[layer][side].data_ptr() == kv[0, place, side].data_ptr()
                moments = (pages.means, pages.variances)[side][layer]  # [3, slots, heads, d]
                assert torch.equal(moments, stats[:, place, side].transpose(0, 1))
    for i, (means, variances) in enumerate(zip(pages.norm_means, pages.norm_variances)):
        assert torch.equal(means, pool.by_name["page_norms"][:, i, 0])
        assert torch.equal(variances, pool.by_name["page_norms"][:, i, 1])


@pytest.mark.parametrize("wider", [0, 5])
def test_growing_keeps_the_layout_and_what_is_stored(unet, text, wider):
    def values(count, tokens, start):
        return [
            tuple(
                torch.full((count, tokens, one.heads, one.channels // one.heads), float(start + 2 * i + side))
                for side in range(2)
            )
            for i, one in enumerate(unet.layout.layers)
        ]

    first = text.add([*range(FIRST_PAGES)], values(FIRST_PAGES, 7, 1))
    before = text.by_level
    (place,) = text.add(["more"], values(1, 7 + wider, 100))
    assert all(old is not new for old, new in zip(before, text.by_level))
    for i, (k, v) in enumerate(text.layers):
        for side, x in enumerate((k, v)):
            assert x.is_contiguous() and x.shape[:2] == (2 * FIRST_PAGES, 7 + wider)
            assert (x[first, :7] == 1 + 2 * i + side).all() and (x[place, : 7 + wider] == 100 + 2 * i + side).all()
    held = sum(x.nbytes for x in text.by_level) + text.lengths.nbytes + text.extra.nbytes
    assert text.nbytes == held


def test_a_pool_takes_as_many_bytes_as_a_page_is_said_to_take(unet, pool):
    dtype = str(unet.dtype).removeprefix("torch.")
    one = page_bytes(unet.config, LATENTS[::-1], dtype=dtype, pixels_per_latent=1)
    assert pool.nbytes == SLOTS * one == SLOTS * sum(part.nbytes for part in pool.layout.parts)
    assert one <= pool.layout.nbytes < one + 64 * len(pool.layout.parts)


@pytest.mark.parametrize(("store", "dtype"), [("kv", torch.float16), ("kv", FP8), ("hidden", FP8)], ids=str)
def test_a_block_in_host_memory_holds_the_parts_of_a_page_apart_from_one_another(unet, store, dtype):
    layout = PageLayout(unet, LATENTS, dtype, store)
    assert len(layout.parts) == (3 if dtype == FP8 else 2) * unet.layout.levels + 1
    assert len({part.name for part in layout.parts}) == len(layout.parts)
    end = 0
    for part, x in zip(layout.parts, layout.split(torch.zeros(2, layout.nbytes, dtype=torch.uint8)), strict=True):
        assert part.start % 64 == 0 and part.start >= end
        assert x.shape == (2, *part.shape) and x.dtype == part.dtype and x[1].is_contiguous()
        assert part.nbytes == math.prod(part.shape) * part.dtype.itemsize
        end = part.start + part.nbytes
    assert end <= layout.nbytes
