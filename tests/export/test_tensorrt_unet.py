"""Real TensorRT-RTX engines of whole UNets, built without a GPU for two chips, and what is in them."""

import pytest
import torch

from stylefast.export.tensorrt_build import build_engine
from stylefast.export.tensorrt_profiles import Profile
from stylefast.export.unet_graph import GraphShape, graph_inputs
from stylefast.models.unet import UNet
from tests.support.small_graphs import small_config

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("tensorrt_rtx")

NAMES = {torch.float16: "HALF", torch.float32: "FLOAT", torch.int64: "INT64", torch.bool: "BOOL"}


def small():
    """Two levels, both of which attend."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(**small_config()).requires_grad_(False)
    return UNet.from_state(dict(model.config), {name: x.half() for name, x in model.state_dict().items()})


def embedded():
    from stylefast.engine import Engine
    from stylefast.models.prepacked import unpack

    found = Engine.from_pretrained("tiny").unet
    unpack(found)
    return found.half()


# test_pipeline.py builds both flavours of a smaller model for two chips, and asks the same of what is in the engines
@pytest.mark.slow
@pytest.mark.parametrize(("model", "flavour"), [(small, "banked"), (embedded, "live"), (embedded, "banked")])
def test_a_model_builds_for_two_chips_with_its_style_attention_fused(model, flavour, tmp_path):
    from stylefast.export.onnx_file import export_unet

    unet, shape = model(), GraphShape(flavour)
    graph, _ = export_unet(unet, shape, tmp_path)
    profile = Profile.parse("rows=1:4:8,size=32x32:64x64:64x96,pages=1:2:8", scale=4)
    inputs = graph_inputs(unet, shape)
    shapes, phases = profile.shapes(inputs, unet.attention_sizes), set()
    report = build_engine(
        tmp_path / graph.file,
        tmp_path / "unet.engine",
        ["sm89", "sm120"],
        [shapes],
        progress=lambda done, total, phase: phases.add(phase),
    )
    found = {name: (kind, dims) for name, kind, dims in report.network.inputs}
    assert found == {
        tensor.name: (NAMES[tensor.dtype], tuple(-1 if isinstance(d, str) else d for d in tensor.dims))
        for tensor in inputs
    }
    assert report.network.outputs == (("output", "HALF", (-1, 4, -1, -1)),)
    # every layer attends to its own and other rows, to text, and to each of two pictures
    layers = len(unet.layout.layers)
    assert report.network.attentions == layers * (2 + shape.segments)
    # those to rows and pages, and to text, became one kernel each
    assert report.layers.fused_attentions >= 2 * layers
    assert report.network.plugins == report.layers.plugins == ()
    assert report.layers.kinds["correlation"] > 0
    assert report.bytes > sum(p.numel() * p.element_size() for p in unet.parameters())
    assert len(phases) > 3
