"""LoRAs per row in an ONNX graph against the operation itself."""

import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn

from stylefast import kernels
from stylefast.export.onnx_writer import check_opset, onnx_model
from stylefast.export.unet_graph import Tensor
from tests.support.fp64 import close, measured

ROWS, UNITS, OUT = 3, 4, 6


class Layers(nn.Module):
    """Two layers with one input, whose rows have LoRAs of their own, and their sum."""

    def __init__(self, channels: int, convolution: tuple | None):
        super().__init__()
        make = (
            (lambda: nn.Linear(channels, OUT))
            if convolution is None
            else lambda: nn.Conv2d(channels, OUT, *convolution)
        )
        self.one, self.two = make(), make()
        self.layer = () if convolution is None else convolution[1:]

    def forward(self, x, down, up, unit, scale):
        ys = [self.one(x), self.two(x)]
        kernels.row_lora(x, ys, kernels.LoraPool(down, up), kernels.LoraRows(unit, scale), *self.layer)
        return ys[0] + ys[1] * 2


def in_pytorch(module, x, down, up, unit, scale):
    with torch.no_grad():
        return module(x, down, up, unit, scale.float())


def example(shape: tuple, taps: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    channels = shape[2] if len(shape) == 3 else shape[1]
    x, down, up = (torch.randn(s, generator=generator) for s in (shape, (UNITS, taps, channels, 16), (UNITS, 16, OUT)))
    down[0], up[0] = torch.nan, torch.nan
    unit = torch.tensor([[[1, 2], [3, -1], [-1, -1]], [[2, 2], [1, 0], [-1, 3]]])
    scale = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.7, 0.3]])
    return (x.to(dtype), (down / 8).to(dtype), (up / 4).to(dtype), unit, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape, convolution",
    [((ROWS, 5, 8), None), ((ROWS, 8, 6, 5), (3, 1, 1)), ((ROWS, 8, 6, 5), (3, 2, 1)), ((ROWS, 8, 6, 5), (1, 2, 0))],
    ids=["linear", "3 x 3", "stride 2", "1 x 1 of stride 2"],
)
def test_a_graph_with_loras_agrees_with_the_operation(shape, convolution, dtype):
    torch.manual_seed(0)
    module = Layers(shape[2] if convolution is None else shape[1], convolution).to(dtype)
    given = example(shape, 1 if convolution is None else convolution[0] ** 2, dtype)
    with torch.no_grad():
        program = torch.export.export(module, given)
    peer = measured(in_pytorch, module, *given)
    names = ("x", "down", "up", "unit", "scale")
    inputs = [Tensor(name, x.dtype, tuple(x.shape)) for name, x in zip(names, given, strict=True)]
    output = Tensor("out", dtype, tuple(peer.value.shape))
    model = onnx_model(program, inputs, output, check_opset(None, dtype))
    session = onnxruntime.InferenceSession(
        onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
    if dtype == torch.float32:
        close(torch.from_numpy(found), peer)
    else:
        torch.testing.assert_close(torch.from_numpy(found).double(), peer.exact, rtol=2e-2, atol=2e-2)
