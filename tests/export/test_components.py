"""Components as ONNX against the classes that they are made of: transformers', diffusers' and stylefast's own."""

import copy
import sys
from functools import cache

import pytest
import torch

from stylefast.errors import ExportError, InvalidRequest, MissingDependency
from stylefast.export import components as exporting
from stylefast.export.components import (
    decoder_digest,
    decoder_dtype,
    export_component,
    image_encoder,
    image_projector,
    text_encoder,
    text_projector,
    vae_decoder,
)
from stylefast.models.digests import weights_digest
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.layout import AttentionLayout
from stylefast.models.unet import UNet
from tests.support.fp64 import close, measured
from tests.support.small_adapter import CROSS_DIM, global_adapter, plus_adapter, small_vision_model
from tests.support.small_graphs import micro_config, small_config, translations  # noqa: F401
from tests.support.small_sdxl import small_tiny_vae, small_vae_config
from tests.support.small_text import small_text_parts

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TEXT_SIZES = ({"prompts": 1, "vectors": 0}, {"prompts": 3, "vectors": 4}, {"prompts": 2, "vectors": 1})
MODULES = ("down_blocks.1.attentions.0", "up_blocks.0.attentions.1", "up_blocks.1.attentions.0")
# attends at two levels, with one and two layers in a place
PACKED = micro_config() | {"transformer_layers_per_block": (1, 2)}
LATENT_SIZES = ({"pictures": 1, "height": 5, "width": 7}, {"pictures": 3, "height": 9, "width": 4})


class Case:
    """A component of a model in PyTorch, and what the model's own code makes of the component's inputs.

    fixed: sizes that the exported graph has; sizes: of all dimensions, at which both are run.
    """

    def __init__(self, model, component, run, sizes, fixed=None):
        self.model, self.component, self.run, self.sizes, self.fixed = model, component, run, sizes, fixed or {}

    def outputs(self, inputs: dict, dtype: torch.dtype) -> list[torch.Tensor]:
        """Of the model in a type, for inputs that may be of another."""
        inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        with torch.no_grad():
            return self.run(copy.deepcopy(self.model).to(dtype), inputs)


def encoded(encoder, inputs):
    """transformers' own forward, with the learned vectors as further rows of its table."""
    table = encoder.get_input_embeddings()
    table.weight.data = torch.cat([table.weight, inputs["extra"]])
    out = encoder(inputs["ids"], output_hidden_states=True)
    if "position" not in inputs:
        return [out.hidden_states[-2]]
    last = out.last_hidden_state[torch.arange(len(inputs["ids"])), inputs["position"]]
    return [out.hidden_states[-2], encoder.text_projection(last)]


def packed(layout, pairs, like):
    """[layers of the level, 2, pages, tokens, heads, d] for each level."""
    found = []
    for level in range(layout.levels):
        members = [i for i, layer in enumerate(layout.layers) if layer.level == level]
        some = next(pair for pair in (pairs[i] for i in members) if pair is not None)
        blank = (torch.zeros_like(some[0]), torch.zeros_like(some[1]))
        found.append(torch.stack([torch.stack(pairs[i] or blank) for i in members]))
    return found


def seen(model, inputs):
    out = model(inputs["pixels"], output_hidden_states=True)
    return [out.image_embeds, out.hidden_states[-2]]


def projected_picture(adapter, inputs):
    pairs = adapter.key_values(adapter.tokens(inputs["features"]))
    return packed(adapter.layout, pairs, inputs["features"])


def small_vae():
    """Of two levels with one resnet each in its decoder; the tiny VAE enlarges twice."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        **small_vae_config(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
            layers_per_block=0,
        )
    ).eval()


@cache
def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """The model, the component's maker, the model's own code, and sizes to run both at.

    For 16-bit types the model has two layers where it has more in float32, and the sizes of latents are fixed: a type
    or a range that is wrong in one layer is wrong in all, and at every size.
    """
    torch.manual_seed(1)
    depth = 3 if dtype == torch.float32 else 2
    if name.startswith("text_encoder"):
        model = small_text_parts()[1][name == "text_encoder_2"]
        del getattr(model, "text_model", model).encoder.layers[depth:]
        return Case(model, text_encoder, encoded, TEXT_SIZES)
    if name == "text_projector":
        unet = UNet(small_config()).eval().requires_grad_(False)
        run = lambda unet, inputs: packed(unet.layout, unet.project_text(inputs["states"]), inputs["states"])  # noqa: E731
        return Case(unet, lambda u, dtype: text_projector(u, dtype, 24), run, ({"text_pages": 1}, {"text_pages": 5}))
    if name == "image_encoder":
        make, model = lambda model, dtype: image_encoder(ImageEncoder(model), dtype), small_vision_model()  # noqa: E731
        del model.vision_model.encoder.layers[depth:]
        return Case(model, make, seen, ({"pictures": 1}, {"pictures": 3}))
    if name.startswith("image_projector"):
        # packing many layers, and some of them without weights, is the same for either kind
        plus = name.endswith("plus")
        layout = AttentionLayout.from_config(small_config() if plus else PACKED)
        state = (plus_adapter if plus else global_adapter)(layout)
        # of the four layers that read patches, the first or the first two
        state["image_proj"] = {
            key: x
            for key, x in state["image_proj"].items()
            if not key.startswith("layers.") or int(key.split(".")[1]) < depth - 1
        }
        adapter = IPAdapter.load(state, layout, CROSS_DIM, modules=None if plus else MODULES)
        patches = {"patches": 17} if plus else {}
        sizes = ({"image_pages": 1} | patches, {"image_pages": 5} | patches)
        return Case(adapter, image_projector, projected_picture, sizes)
    vae = small_vae() if name == "vae_decoder" else small_tiny_vae()
    fixed = {} if dtype == torch.float32 else {"height": 9, "width": 4}
    sizes = tuple(size | fixed for size in LATENT_SIZES)
    return Case(vae, vae_decoder, lambda vae, inputs: [vae.decode(inputs["latents"]).sample], sizes, fixed)


# Values show in float32; a wrong type, or what overflows, in float16. Where two components share their code, each is
# exported in one of the types: the first text encoder in float16, without a projection, and the second in float32
F32, F16 = torch.float32, torch.float16
EXPORTS = (
    ("text_encoder", F16),
    ("text_encoder_2", F32),
    ("text_projector", F16),
    ("image_encoder", F32),
    ("image_encoder", F16),
    ("image_projector", F32),
    ("image_projector plus", F32),
    ("image_projector plus", F16),
    ("vae_decoder", F32),
    ("vae_decoder", F16),
    ("vae_decoder tiny", F32),
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(name, dtype) -> (component, file); each is exported once."""

    @cache
    def export(name: str, dtype: torch.dtype):
        this = case(name, dtype)
        component = this.component(this.model, dtype)
        folder = tmp_path_factory.mktemp("graphs")
        entry = export_component(component, folder, fixed=this.fixed, metadata={"fingerprint": "f00d"})
        assert entry.files == (f"{component.name}.onnx",) == tuple(file.name for file in folder.iterdir())
        return component, folder / entry.file

    return export


def inputs_of(component, sizes):
    """Random inputs that read every learned vector there is, and none that there isn't."""
    made = component.example_inputs(sizes, seed=7)
    if "extra" in made:
        vocabulary = component.facts["vocabulary"]
        made["ids"] %= vocabulary
        made["ids"][-1, 3 : 3 + sizes["vectors"]] = vocabulary + torch.arange(sizes["vectors"])
    return made


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


def error(found, exact) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("name", "dtype"), EXPORTS, ids=str)
def test_the_graphs_error_is_at_most_twice_that_of_pytorch_in_the_same_type(exported, name, dtype):
    this = case(name, dtype)
    component, path = exported(name, dtype)
    # weights rounded to the type are what both start from
    rounded = Case(copy.deepcopy(this.model).to(dtype), this.component, this.run, this.sizes)
    for sizes in this.sizes:
        inputs = inputs_of(component, sizes)
        exact, peer = rounded.outputs(inputs, torch.float64), rounded.outputs(inputs, dtype)
        found = run(path, inputs)
        assert len(found) == len(exact) == len(component.outputs)
        for tensor, ours, theirs, true in zip(component.outputs, found, peer, exact, strict=True):
            assert ours.dtype == dtype and ours.shape == true.shape
            assert error(ours, true) <= 2 * error(theirs, true), (tensor.name, sizes)


@pytest.mark.parametrize(("name", "dtype"), {name: (name, dtype) for name, dtype in EXPORTS[::-1]}.values(), ids=str)
def test_graphs_pass_the_checker_and_name_their_tensors_and_dimensions(exported, name, dtype):
    component, path = exported(name, dtype)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [
        ("", 20)
    ]
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert notes == {"stylefast.component": component.name, "stylefast.fingerprint": "f00d"}
    for values, tensors in ((model.graph.input, component.inputs), (model.graph.output, component.outputs)):
        assert [value.name for value in values] == [tensor.name for tensor in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            assert tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim) == tensor.dims


def test_a_projector_packs_layers_as_the_unets_graphs_read_them():
    unet = case("text_projector").model
    component = text_projector(unet, torch.float32, 24)
    for level, tensor in enumerate(component.outputs):
        assert tensor.name == f"text_kv_{level}"
        assert tensor.dims[0] == len(unet.layout.at_level(level))


def test_layers_that_an_adapter_was_loaded_without_read_zeros(exported):
    component, path = exported("image_projector", torch.float32)
    found = run(path, component.example_inputs({"image_pages": 2}))
    layout = case("image_projector").model.layout
    for level, kv in enumerate(found):
        members = [layer for layer in layout.layers if layer.level == level]
        assert [bool(kv[i].any()) for i in range(len(members))] == [layer.module in MODULES for layer in members]


def test_encoder_1_has_no_layer_that_nobody_reads():
    encoder = small_text_parts()[1][0]
    component = text_encoder(encoder, torch.float32)
    assert len(component.module.body.layers) == len(encoder.encoder.layers) - 1
    assert [tensor.name for tensor in component.outputs] == ["hidden"]


def test_a_component_in_another_type_leaves_the_model_as_it_is():
    encoder, vae = small_text_parts()[1][1], small_vae()
    before = {**encoder.state_dict(), **vae.state_dict()}
    for component in (text_encoder(encoder, torch.float16), vae_decoder(vae, torch.float16)):
        assert {p.dtype for p in component.module.parameters()} == {torch.float16}
    assert all(x.dtype == torch.float32 for x in before.values())
    shared = {p.data_ptr() for p in vae_decoder(vae, torch.float32).module.parameters()}
    assert shared <= {p.data_ptr() for p in vae.parameters()}
    # the decoder that PyTorch runs keeps its own enlarging layers
    assert "Upsample2D" in {type(module).__name__ for module in vae.decoder.modules()}


@pytest.fixture(scope="module")
def of_one_size(tmp_path_factory):
    """(component, folder, entry, fixed sizes) of a decoder of one size, with its weights in another file."""
    component, fixed = vae_decoder(small_tiny_vae(), torch.float32), {"height": 6, "width": 5}
    folder = tmp_path_factory.mktemp("one_size")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "LARGEST_FILE", 1000)
        return component, folder, export_component(component, folder, fixed=fixed), fixed


def test_fixed_sizes_are_numbers_in_the_graph(of_one_size):
    component, folder, entry, fixed = of_one_size
    assert entry.fixed == fixed
    assert entry.inputs == (("latents", "float32", ("pictures", 4, 6, 5)),)
    assert entry.outputs == (("pixels", "float32", ("pictures", 3, 24, 20)),)
    graph = onnx.load(folder / entry.file).graph
    for (value,), tensors in ((graph.input, entry.inputs), (graph.output, entry.outputs)):
        assert tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim) == tensors[0][2]
    inputs = component.example_inputs({"pictures": 2, **fixed})
    assert run(folder / entry.file, inputs)[0].shape == (2, 3, 24, 20)


def test_large_weights_go_into_a_file_beside_the_graph(of_one_size):
    component, folder, entry, fixed = of_one_size
    assert entry.files == ("vae_decoder.onnx", "vae_decoder.onnx.data")
    assert sorted(file.name for file in folder.iterdir()) == sorted(entry.files)
    inputs = component.example_inputs({"pictures": 1, **fixed})

    @torch.no_grad()
    def in_pytorch(module, inputs):
        return module(*inputs.values())

    close(run(folder / entry.file, inputs)[0], measured(in_pytorch, component.module, inputs))


@pytest.mark.parametrize("name", ["image_encoder", "vae_decoder"])
def test_bfloat16_is_written_with_operators_that_take_it(name, tmp_path):
    this = case(name, torch.bfloat16)
    component = this.component(this.model, torch.bfloat16)
    entry = export_component(component, tmp_path, fixed=this.fixed)
    assert entry.opset == 22
    model = onnx.load(tmp_path / entry.file)
    onnx.checker.check_model(model, full_check=True)
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {16}
    with pytest.raises(InvalidRequest, match="opset"):
        export_component(component, tmp_path, opset=20)


@pytest.mark.parametrize(
    "fixed, named",
    [({"rows": 2}, "rows"), ({"height": 1}, "height"), ({"width": True}, "width")],
    ids=["a dimension it lacks", "too small", "no number"],
)
def test_sizes_that_cannot_be_fixed_are_named(fixed, named):
    with pytest.raises(InvalidRequest, match=named):
        vae_decoder(small_tiny_vae(), torch.float32).trace(fixed)


def test_models_of_another_kind_are_refused():
    with pytest.raises(ExportError, match="Linear"):
        text_encoder(torch.nn.Linear(2, 2), torch.float32)


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependency, match=r"stylefast\[export\]"):
        export_component(vae_decoder(small_tiny_vae(), torch.float32), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_float16_model_decodes_in_float32_where_its_vae_overflows():
    stock, fixed = small_vae(), small_vae()
    fixed.register_to_config(force_upcast=False)
    assert decoder_dtype(stock, torch.float16) == torch.float32
    assert decoder_dtype(fixed, torch.float16) == torch.float16
    assert decoder_dtype(small_tiny_vae(), torch.float16) == torch.float16
    assert decoder_dtype(stock, torch.bfloat16) == torch.bfloat16


def test_digests_tell_weights_names_and_types_apart():
    state = {"a": torch.ones(2, 3), "b": torch.zeros(2)}
    others = [
        {"a": torch.ones(3, 2), "b": torch.zeros(2)},
        {"a": torch.ones(2, 3).half(), "b": torch.zeros(2)},
        {"a": torch.ones(2, 3), "c": torch.zeros(2)},
        {"a": torch.ones(2, 3), "b": torch.tensor([0, 1e-9])},
    ]
    assert weights_digest(dict(reversed(state.items()))) == weights_digest(state)
    assert len({weights_digest(other) for other in [state, *others]}) == 5
    vae = small_vae()
    before = decoder_digest(vae)
    with torch.no_grad():
        vae.encoder.conv_in.bias.add_(1)
    assert decoder_digest(vae) == before
    with torch.no_grad():
        vae.post_quant_conv.bias.add_(1)
    assert decoder_digest(vae) != before
