"""Real TensorRT-RTX engines of whole UNets, built without a GPU for two chips, and what is in them."""

import pytest
import torch

from stylefast.export.tensorrt import RTX, forwarder, load_package, summarise_network
from stylefast.export.tensorrt_build import _add_profiles, build_engine, parse
from stylefast.export.tensorrt_profiles import Profile
from stylefast.export.unet_graph import GraphShape, graph_inputs, shape_ranges
from stylefast.models.unet import UNet
from tests.support.small_graphs import one_layer_config, small_config

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("tensorrt_rtx")

NAMES = {torch.float16: "HALF", torch.float32: "FLOAT", torch.int64: "INT64", torch.bool: "BOOL"}


WITH_LORAS = GraphShape("banked", text_chunks=3, lora_rank=32, lora_slots=2)


def small(config=None):
    """Two levels, both of which attend."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(**config or small_config()).requires_grad_(False)
    return UNet.from_state(dict(model.config), {name: x.half() for name, x in model.state_dict().items()})


def least():
    """One layer that attends."""
    return small(one_layer_config())


def embedded():
    from stylefast.engine import Engine
    from stylefast.models.prepacked import unpack

    found = Engine.from_pretrained("tiny").unet
    unpack(found)
    return found.half()


def test_inputs_of_loras_and_of_long_texts_are_read_by_tensorrt_and_fit_its_profiles(tmp_path):
    """Up to the build, which takes half a minute."""
    from stylefast.export.onnx_file import export_unet

    unet, trt = least(), load_package(RTX)
    graph, _ = export_unet(unet, WITH_LORAS, tmp_path)
    logger, inputs = forwarder(trt), graph_inputs(unet, WITH_LORAS)
    builder = trt.Builder(logger)
    network, config = parse(trt, logger, builder, tmp_path / graph.file), builder.create_builder_config()
    profile = Profile.parse("rows=1:4:8,size=32x32:64x64:64x96,pages=1:2:8", scale=4)
    _add_profiles(
        builder, network, config, [profile.shapes(inputs, unet.attention_sizes, shape_ranges(unet, WITH_LORAS))]
    )
    assert config.num_optimization_profiles == 1
    read = summarise_network(trt, network)
    assert {name for name, _, _ in read.inputs} == {tensor.name for tensor in inputs} and not read.plugins
    assert read.attentions == len(unet.layout.layers) * (2 + WITH_LORAS.segments)


# test_pipeline.py builds both flavours of a smaller model for two chips, and asks the same of what is in the engines
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (small, GraphShape("banked")),
        (embedded, GraphShape("live")),
        (embedded, GraphShape("banked")),
        (least, WITH_LORAS),
    ],
    ids=["small", "embedded, live", "embedded, banked", "LoRAs and long texts"],
)
def test_a_model_builds_for_two_chips_with_its_style_attention_fused(model, shape, tmp_path):
    from stylefast.export.onnx_file import export_unet

    unet = model()
    graph, _ = export_unet(unet, shape, tmp_path)
    profile = Profile.parse("rows=1:4:8,size=32x32:64x64:64x96,pages=1:2:8", scale=4)
    inputs = graph_inputs(unet, shape)
    shapes, phases = profile.shapes(inputs, unet.attention_sizes, shape_ranges(unet, shape)), set()
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
