"""The UNet's ONNX graphs against the UNet itself."""

from functools import cache

import onnx
import onnxruntime
import pytest
import torch

from stylefast.errors import ExportError, InvalidRequest
from stylefast.export.onnx_file import WEIGHTS, export_unet, refit_weights
from stylefast.export.onnx_writer import check_opset
from stylefast.export.unet_graph import (
    GraphShape,
    UNetGraph,
    example_inputs,
    example_sizes,
    graph_inputs,
    trace,
    with_tokens,
)
from stylefast.models.unet import UNet
from tests.export.bfloat16 import emulated
from tests.support.fp64 import close
from tests.support.small_families import family_config
from tests.support.small_graphs import in_pytorch, small_config
from tests.support.small_sdxl import small_unet_config
from tests.support.small_unet import sharpen

SHAPES = (
    GraphShape("plain", segments=0),
    GraphShape("plain", segments=2),
    GraphShape("live", 2, 3),
    GraphShape("banked", 1, 1),
    GraphShape("banked", 2, 2, text_chunks=3, lora_rank=32, lora_slots=2),
)
NAMES = ("plain without pictures", "plain", "live", "banked", "banked with LoRAs and long texts")
# (rows, height, width) in latents: odd ones, one row, the least size
SIZES = ((4, 12, 10), (3, 9, 13), (1, 8, 8), (7, 11, 8))


def least_config(levels: int) -> dict:
    """Two attention layers, all else as little as can be, and no middle.

    Two levels, each with one of the layers, make every operator of a graph; one makes nothing smaller or larger.
    """
    down, up = ("CrossAttnDownBlock2D", "UpBlock2D") if levels == 2 else ("DownBlock2D", "CrossAttnUpBlock2D")
    return small_unet_config(
        widths=(32, 64)[:levels],
        head_width=16,
        depth=(1, 1)[:levels],
        layers_per_block=1,
        mid_block_type=None,
        down_block_types=(down,) * levels,
        up_block_types=(up,) * levels,
    )


@cache
def unet_for(shape: GraphShape, dtype: torch.dtype) -> UNet:
    """The model that a kind of graph is made of. Tracing takes long, so few of them are of a larger one.

    The shape that has every operator has all of them in every type, and in float32 the middle too. What the other
    shapes lack or have less of lies in their attention.
    """
    if shape != SHAPES[-1]:
        return random_unet(least_config(1), dtype)
    return random_unet(small_config() if dtype == torch.float32 else least_config(2), dtype)


def random_unet(config: dict, dtype: torch.dtype) -> UNet:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(5)
    model = UNet2DConditionModel(**config).requires_grad_(False)
    sharpen(model, 5)
    return UNet.from_state(dict(model.config), {name: x.to(dtype) for name, x in model.state_dict().items()})


@pytest.fixture(scope="module")
def two_flavours(tmp_path_factory):
    """(folder, entries, when their weights were written after each): a plain and a banked graph in one folder."""
    folder, entries, written, weights = tmp_path_factory.mktemp("two"), [], [], None
    for shape in (GraphShape("plain", segments=0), GraphShape("banked", 1, 1)):
        given = {} if weights is None else {"weights": weights}
        entry, weights = export_unet(
            unet_for(shape, torch.float32), shape, folder, metadata={"fingerprint": "abc"}, **given
        )
        entries.append(entry)
        written.append((folder / WEIGHTS).stat().st_mtime_ns)
    return folder, entries, written


@pytest.fixture(scope="module")
def exported(two_flavours, tmp_path_factory):
    """(shape, type) -> the graph's file."""
    folder, entries, _ = two_flavours
    made = {(GraphShape.from_dict(entry.shape), torch.float32): folder / entry.file for entry in entries}

    def export(shape: GraphShape, dtype: torch.dtype):
        key = (shape, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("graphs")
            entry, _ = export_unet(unet_for(shape, dtype), shape, folder, metadata={"fingerprint": "abc"})
            made[key] = folder / entry.file
        return made[key]

    return export


def inputs_of(unet: UNet, shape: GraphShape, size: tuple[int, int, int], seed: int) -> dict[str, torch.Tensor]:
    rows, *latents = size
    sizes = example_sizes(unet, tuple(latents)) | {"rows": rows, "pages": 3}
    inputs = example_inputs(unet, shape, with_tokens(unet, sizes), seed)
    if shape.lora_slots:  # of rank 16 in the first row, none in the second, two in others
        inputs["lora_unit"][:, 0, 1:] = inputs["lora_unit"][:, 1:2] = -1
    return inputs


@cache  # loading takes longer than running
def session_of(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model, inputs) -> torch.Tensor:
    session = session_of(model)
    return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0]).float()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).pow(2).mean().sqrt())


# the last shape has every operator of the others, so 16-bit types are run on it; float16 on the plainest too, whose
# operators lack inputs: a result in the wrong type shows in one type as in the other
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [pytest.param(shape, torch.float32, id=f"{name}-float32") for name, shape in zip(NAMES, SHAPES)]
    + [
        pytest.param(SHAPES[i], dtype, id=f"{NAMES[i]}-{str(dtype)[6:]}")
        for i, dtype in ((0, torch.float16), (-1, torch.float16), (-1, torch.bfloat16))
    ],
)
def test_the_error_is_at_most_twice_that_of_pytorch_in_the_same_type(exported, shape, dtype):
    path, unet = exported(shape, dtype), unet_for(shape, dtype)
    model = emulated(path) if dtype == torch.bfloat16 else str(path)
    for seed, size in enumerate(SIZES):
        inputs = inputs_of(unet, shape, size, seed)
        given = {name: x.float() if dtype == torch.bfloat16 and x.dtype == dtype else x for name, x in inputs.items()}
        found, peer = run(model, given), in_pytorch(unet, shape, inputs)
        if dtype == torch.float32:
            close(found, peer)
        else:
            assert error(found, peer.exact) <= 2 * error(peer.value, peer.exact), size
            assert error(found, peer.exact) < 0.05 * float(peer.exact.std()), size


@pytest.mark.parametrize("seed", range(3))
def test_random_tables_of_styles_agree(exported, seed):
    shape, unet = SHAPES[-1], unet_for(SHAPES[-1], torch.float32)
    inputs = inputs_of(unet, shape, (5, 10, 9), 100 + seed)
    close(run(str(exported(shape, torch.float32)), inputs), in_pytorch(unet, shape, inputs))


def test_another_style_another_strength_and_another_page_change_the_picture(exported):
    shape, unet = GraphShape("banked", 1, 1), unet_for(GraphShape("banked", 1, 1), torch.float32)
    path = str(exported(shape, torch.float32))
    inputs = inputs_of(unet, shape, (2, 10, 10), 3)
    inputs["self_page"][:], inputs["adain_page"][:], inputs["norm_page"][:] = 2, 2, 2  # the first page of the pool
    inputs["self_mode"][:], inputs["self_layers"][:], inputs["adain_strength"][:] = 1, True, 1.0
    inputs["image_page"][:], inputs["image_mask"][:], inputs["image_strength"][:] = 0, -1, 1.0
    before = run(path, inputs)
    for name, value in (
        ("self_page", 3),
        ("self_shift", 1.5),
        ("self_scale", 0.3),
        ("self_mode", 2),
        ("adain_page", 3),
        ("adain_strength", 0.2),
        ("norm_page", -1),
        ("image_strength", 0.1),
        ("image_page", 1),
        ("image_mask", 0),
        ("text_page", 2),
    ):
        changed = inputs | {name: torch.full_like(inputs[name], value)}
        assert (run(path, changed) - before).abs().max() > 1e-3, name


def test_a_model_without_a_middle_block_is_written_too(tmp_path):
    # the attention modules of its first level have no layers, that of the second has two
    config = least_config(2) | {"transformer_layers_per_block": [0, 2]}
    unet, shape = random_unet(config, torch.float32), GraphShape("live", 1, 1)
    entry, _ = export_unet(unet, shape, tmp_path)
    inputs = inputs_of(unet, shape, SIZES[0], 3)
    close(run(tmp_path / entry.file, inputs), in_pytorch(unet, shape, inputs))


def test_a_model_whose_middle_would_be_a_single_value_is_refused_by_name():
    with torch.device("meta"):
        unet = UNet(family_config("four_blocks", cross_attention_dim=48))
    with pytest.raises(ExportError, match="halves its feature maps 3 times"):
        trace(unet, GraphShape("plain"))


def test_loras_of_other_rows_change_no_bit_and_their_order_and_places_do_not_matter(exported):
    shape, unet = SHAPES[-1], unet_for(SHAPES[-1], torch.float32)
    path, inputs = str(exported(shape, torch.float32)), inputs_of(unet, shape, (3, 9, 9), 11)
    inputs["self_page"][:], inputs["adain_page"][:], inputs["norm_page"][:] = -1, -1, -1
    first, expected = run(path, inputs), in_pytorch(unet, shape, dict(inputs))
    for name in inputs:
        if name.startswith(("lora_down", "lora_up")):  # a unit more before all others, of which nobody uses any number
            inputs[name] = torch.cat([torch.full_like(inputs[name][:1], torch.nan), inputs[name]])
    inputs["lora_unit"] = torch.where(inputs["lora_unit"] >= 0, inputs["lora_unit"] + 1, -1).flip(2)
    inputs["lora_unit_scale"] = inputs["lora_unit_scale"].flip(1)
    moved = run(path, inputs)
    assert torch.equal(moved[1], first[1])
    close(moved, expected)
    inputs["lora_unit_scale"][2] = 0
    without = run(path, inputs)
    assert torch.equal(without[:2], moved[:2]) and (without[2] - moved[2]).abs().max() > 1e-2


def test_tokens_beyond_a_texts_length_are_not_read(exported):
    shape, unet = SHAPES[-1], unet_for(SHAPES[-1], torch.float32)
    path, inputs = str(exported(shape, torch.float32)), inputs_of(unet, shape, (3, 9, 9), 12)
    inputs["text_lengths"] = torch.tensor([77, 154, 100])
    first = run(path, inputs)
    for name in ("text_kv_0", "text_kv_1"):
        for page, length in enumerate(inputs["text_lengths"].tolist()):
            inputs[name][:, :, page, length:] = torch.nan
    assert torch.equal(run(path, inputs), first)


def test_what_is_not_a_number_in_one_picture_stays_there(exported):
    shape, unet = GraphShape("banked", 1, 1), unet_for(GraphShape("banked", 1, 1), torch.float32)
    inputs = inputs_of(unet, shape, (4, 9, 9), 7)
    inputs["self_page"][:, 0] = torch.tensor([-1, 0, 6, -1])
    inputs["adain_page"][:], inputs["norm_page"][:] = inputs["self_page"][:, 0], inputs["self_page"][:, 0]
    good = run(str(exported(shape, torch.float32)), inputs)
    inputs["latents"][3] = torch.nan
    inputs["page_kv_0"][0] = torch.nan  # which nobody reads
    found = run(str(exported(shape, torch.float32)), inputs)
    assert found[3].isnan().all()
    assert torch.equal(found[:3], good[:3])


def test_plain_rows_of_a_live_graph_are_those_of_a_plain_one(exported):
    live, plain = GraphShape("live", 2, 3), GraphShape("plain", segments=2)
    unet = unet_for(live, torch.float32)
    inputs = inputs_of(unet, live, (3, 9, 11), 2)
    inputs["self_page"][:], inputs["norm_page"][:], inputs["image_page"][:] = -1, -1, -1
    alone = {name: inputs[name] for name in UNetGraph(unet, plain).names}
    alone |= {
        name: x[:, :2].contiguous()
        for name, x in alone.items()
        if name.startswith("image_") and x.ndim > 1 and x.shape[:2] == (3, 3)
    }
    found, expected = run(str(exported(live, torch.float32)), inputs), in_pytorch(unet, plain, alone)
    close(found, expected)
    close(run(str(exported(plain, torch.float32)), alone), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_a_graph_says_what_it_is_and_passes_the_checker(exported, dtype):
    shape = SHAPES[-1]
    path = exported(shape, dtype)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["stylefast.fingerprint"] == "abc" and facts["stylefast.flavour"] == "banked"
    assert [entry.version for entry in model.opset_import] == [check_opset(None, dtype)]
    assert not model.functions
    for value, tensor in zip(model.graph.input, graph_inputs(unet_for(shape, dtype), shape), strict=True):
        dims = tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        assert (value.name, dims) == (tensor.name, tensor.dims)


def test_no_operation_is_left_that_onnx_does_not_have(exported):
    for shape in SHAPES:
        model = onnx.load(str(exported(shape, torch.float32)), load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}


def test_flavours_share_one_file_of_weights(two_flavours):
    folder, (first, second), (written, later) = two_flavours
    assert first.files == ("unet-plain.onnx", WEIGHTS) and second.files == ("unet-banked.onnx", WEIGHTS)
    assert later == written
    shape, unet = GraphShape("banked", 1, 1), unet_for(GraphShape("banked", 1, 1), torch.float32)
    inputs = inputs_of(unet, shape, (2, 9, 8), 1)
    close(run(str(folder / second.file), inputs), in_pytorch(unet, shape, inputs))


def test_weights_are_found_under_the_names_of_the_model(exported):
    path = exported(SHAPES[-1], torch.float16)
    model, unet = onnx.load(str(path)), unet_for(SHAPES[-1], torch.float16)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    held = refit_weights(unet, list(stored))
    parameters = unet.state_dict().keys()
    unread = {name for name in parameters if ".attn2.to_k." in name or ".attn2.to_v." in name}
    assert set(held) == parameters - unread
    for name, weight in held.items():
        assert (torch.from_numpy(stored[name].copy()) == weight).all(), name


def test_a_fixed_size_leaves_no_name_for_it(tmp_path):
    shape, unet = GraphShape("banked"), random_unet(least_config(2), torch.float32)
    entry, _ = export_unet(unet, shape, tmp_path, fixed={"height": 9, "width": 10, "rows": 2})
    assert entry.fixed == {"height": 9, "width": 10, "rows": 2}
    model = onnx.load(str(tmp_path / entry.file), load_external_data=False)
    dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert dims["latents"] == [2, 4, 9, 10] and dims["page_kv_0"][3] == 90 and dims["page_kv_0"][0] == "pages"
    assert dims["page_kv_1"][3] == 25
    inputs = inputs_of(unet, shape, (2, 9, 10), 1)
    close(run(str(tmp_path / entry.file), inputs), in_pytorch(unet, shape, inputs))


@pytest.mark.parametrize(
    "opset, dtype", [(19, torch.float32), (24, torch.float16), (21, torch.bfloat16), (True, torch.float32)]
)
def test_an_opset_that_can_not_hold_the_graph_is_refused(opset, dtype):
    with pytest.raises(InvalidRequest, match="are written in opsets"):
        check_opset(opset, dtype)


@pytest.mark.parametrize("opset", (23,))
def test_later_opsets_agree(tmp_path, opset):
    shape, unet = GraphShape("live"), random_unet(least_config(2), torch.float32)
    entry, _ = export_unet(unet, shape, tmp_path, opset=opset)
    inputs = inputs_of(unet, shape, (3, 9, 10), 4)
    close(run(str(tmp_path / entry.file), inputs), in_pytorch(unet, shape, inputs))


def test_a_model_without_weights_is_written_from_a_state(tmp_path):
    unet, shape = unet_for(SHAPES[0], torch.float32), SHAPES[0]
    with torch.device("meta"):
        empty = UNet(unet.config).eval()
    entry, _ = export_unet(empty, shape, tmp_path, state=unet.state_dict(), fixed={"height": 9, "width": 8})
    inputs = inputs_of(unet, shape, (2, 9, 8), 1)
    close(run(str(tmp_path / entry.file), inputs), in_pytorch(unet, shape, inputs))


@pytest.mark.parametrize(
    "changes",
    [
        {"flavour": "bank"},
        {"references": 0},
        {"references": 17},
        {"segments": -1},
        {"segments": True},
        {"lora_rank": 129, "lora_slots": 1},
        {"lora_rank": 16},
        {"lora_slots": 1},
        {"lora_rank": 16, "lora_slots": 33},
        {"text_chunks": 0},
        {"text_chunks": 17},
    ],
    ids=str,
)
def test_a_shape_out_of_range_is_refused(changes):
    with pytest.raises(InvalidRequest):
        GraphShape(**{"flavour": "live"} | changes)


def test_a_shape_without_loras_and_long_texts_is_written_as_before_there_were_any():
    plain = {"flavour": "live", "references": 1, "segments": 2, "text_tokens": 77}
    assert GraphShape().to_dict() == plain and GraphShape.from_dict(plain) == GraphShape()
    more = GraphShape(text_chunks=2, lora_rank=20, lora_slots=3)
    assert more.to_dict() == plain | {"text_chunks": 2, "lora_rank": 32, "lora_slots": 3}
    assert GraphShape.from_dict(more.to_dict()) == more and more.row_units == 6


def test_a_trace_that_fails_leaves_pytorchs_settings_as_they_were(monkeypatch):
    from torch._dynamo import config as dynamo
    from torch.fx import config as fx

    def settings():
        return dynamo.fake_tensor_cache_enabled, getattr(fx, "do_not_emit_stack_traces", False)

    before, during = settings(), []

    def fails(*given, **named):
        during.append(settings())
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "export", fails)
    with pytest.raises(KeyboardInterrupt):
        trace(unet_for(SHAPES[0], torch.float32), GraphShape("plain"))
    assert settings() == before == (True, False) and during == [(False, True)]


def test_a_dimension_that_there_is_not_can_not_be_fixed():
    with pytest.raises(InvalidRequest, match="there is no dimension 'batch'"):
        trace(unet_for(SHAPES[0], torch.float32), GraphShape("plain"), {"batch": 2})
