"""The UNet on the fused kernels: as near to fp64 as on PyTorch's own attention, and equal to diffusers where plain."""

import pytest
import torch

from stylefast.kernels import registry
from tests.support.fp64 import close, measured
from tests.support.oracle import instant_style as ip
from tests.support.oracle.style_aligned import Sharing
from tests.support.rows import image_columns, plain_rows, run, share
from tests.support.small_unet import forward, random_inputs

SIZES = {"square": (8, 8), "wide": (8, 16), "tall and odd": (13, 6)}
SHARINGS = {
    "the paper's settings": Sharing((0, 0, 0)),
    "shift and scale": Sharing((0, 0, 1), shift=0.7, scale=0.8),
    "group norms too": Sharing((0, 0, 0), share_group_norm=True),
    "swap": Sharing((0, 0, 0), mode="swap"),
    "AdaIN alone": Sharing((0, 0, 0), share_attention=False),
}


def assert_as_near_as_pytorch(ours, inputs, table, image_kv=None, masks=()):
    """The fused forms' error against fp64 is at most twice that of PyTorch's forms."""

    def in_pytorch(unet, inputs, image_kv):
        with registry.using("torch"):
            return run(unet, inputs, table, image_kv, masks)

    with registry.using("cpp"):
        found = run(ours, inputs, table, image_kv, masks)
    close(found, measured(in_pytorch, ours, inputs, image_kv))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_plain_rows_equal_diffusers(theirs, ours, size):
    inputs = random_inputs(3, 1, *size, timestep=None)
    with registry.using("cpp"):
        actual = run(ours, inputs, plain_rows(ours.layout, 3))
    close(actual, measured(forward, theirs, inputs))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("sharing", SHARINGS.values(), ids=SHARINGS)
def test_shared_attention_is_as_near_to_fp64_as_pytorchs(ours, sharing, size):
    inputs = random_inputs(3, 2, *size)
    assert_as_near_as_pytorch(ours, inputs, share(plain_rows(ours.layout, 3), ours.layout, sharing))


@pytest.mark.parametrize("groups", [None, [0, 0]], ids=["a softmax each", "one softmax"])
@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
def test_gated_cross_attention_is_as_near_to_fp64_as_pytorchs(theirs, ours, masked, groups):
    size = (8, 16)
    inputs = random_inputs(2, 3, *size)
    adapter = ip.random_adapter(theirs, 16, 5)
    embeds = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(40))
    masks = torch.zeros(2, 8 * size[0], 8 * size[1])
    masks[0, :, : 4 * size[1] - 5], masks[1, 7:] = 1, 1
    strengths = {module: torch.full((2,), 0.9) for module in ours.layout.modules}
    segments = [
        ip.Segment(adapter, ip.image_tokens(adapter, embeds[:, i]), strengths, masks[i] if masked else None)
        for i in range(2)
    ]
    table = plain_rows(ours.layout, 2, segments=2)
    columns = image_columns(table, ours.layout, ours, segments, ours.attention_sizes(*size), groups)
    assert_as_near_as_pytorch(ours, inputs, *columns)
