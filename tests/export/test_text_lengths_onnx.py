"""Texts of unequal length in an ONNX graph against the operation itself."""

import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

from stylefast import kernels
from stylefast.export.onnx_writer import check_opset, onnx_model
from stylefast.export.unet_graph import Tensor
from tests.support.fp64 import close, measured

NAMES = ("q", "text_k", "text_v", "text_page", "text_lengths")
IMAGES = ("image_k", "image_v", "image_lengths", "image_page", "strength", "group")


class Call(nn.Module):
    def forward(self, *given):
        return kernels.gated_cross_attention(*given)


def in_pytorch(given):
    if "strength" in given:
        given = given | {"strength": given["strength"].float()}  # as in every type
    return kernels.gated_cross_attention(*given.values())


def example(dtype: torch.dtype, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    q, text_k, text_v, image_k, image_v = (
        torch.randn(count, tokens, 2, 32, generator=generator)
        for count, tokens in ((3, 9), (2, 20), (2, 20), (2, 4), (2, 4))
    )
    for page, length in enumerate(lengths):
        text_k[page, length:] = text_v[page, length:] = torch.nan
    text, images = (q, text_k, text_v), (image_k, image_v)
    return (
        *(x.to(dtype) for x in text),
        torch.tensor([0, 1, 0]),
        torch.tensor(lengths),
        *(x.to(dtype) for x in images),
        torch.tensor([4, 4]),
        torch.tensor([[0], [-1], [1]]),
        torch.tensor([[0.7], [1.0], [-0.4]]),
        torch.zeros(3, 1, dtype=torch.int64),
    )


@pytest.mark.parametrize("images", [False, True], ids=["text alone", "with pictures"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_graph_reads_as_many_tokens_of_each_text_as_the_operation(dtype, images):
    names = NAMES + (IMAGES if images else ())
    given = example(dtype, [20, 7])[: len(names)]
    with torch.no_grad():
        program = torch.export.export(Call(), given)
    inputs = [Tensor(name, x.dtype, tuple(x.shape)) for name, x in zip(names, given, strict=True)]
    model = onnx_model(program, inputs, Tensor("out", dtype, tuple(given[0].shape)), check_opset(None, dtype))
    session = onnxruntime.InferenceSession(
        onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for lengths in ([20, 7], [1, 20]):
        given = example(dtype, lengths)[: len(names)]
        (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        peer, found = measured(in_pytorch, dict(zip(names, given, strict=True))), torch.from_numpy(found)
        if dtype == torch.float32:
            close(found, peer)
        else:
            assert found.dtype == peer.value.dtype == dtype
            torch.testing.assert_close(found.double(), peer.exact, rtol=5e-3, atol=5e-3)
