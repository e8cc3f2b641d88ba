"""The model repository for Triton Inference Server: its configs as Triton reads them, its tree, and what it refuses."""

import dataclasses
import importlib.util
import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stylefast as sf
from stylefast.errors import (
    EngineMismatch,
    ExportError,
    ImageError,
    InvalidRequest,
    ModelNotFound,
    PromptError,
    StyleError,
)
from stylefast.export.manifest import MANIFEST, check_files, read_manifest
from stylefast.export.triton_repo import Serving, Shape, write_repository
from stylefast.export.triton_repo.write import (
    ModelConfig,
    QueuePolicy,
    TensorConfig,
    Warmup,
)
from stylefast.styles.style import Style
from tests.support.small_adapter import small_picture
from tests.support.small_graphs import translations, write_manifest  # noqa: F401

ONNX_TYPES = {1: "TYPE_FP32", 7: "TYPE_INT64", 9: "TYPE_BOOL"}
GRAPHS = ["unet-plain", "unet-banked", "text_encoder", "text_encoder_2", "vae_decoder", "image_encoder"]


def read_config(text: str) -> dict:
    """Return config.pbtxt as Triton's own schema reads it, which refuses unknown fields and wrong types."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import json_format, text_format

    return json_format.MessageToDict(text_format.Parse(text, schema.ModelConfig()), preserving_proto_field_name=True)


def tensors_of(entries: list[dict]) -> list[tuple]:
    return [(entry["name"], entry["data_type"], tuple(map(int, entry["dims"]))) for entry in entries]


# configs

CONFIG = ModelConfig(
    "unet_live",
    "onnxruntime_onnx",
    (TensorConfig("x", "TYPE_FP16", (-1, 4)), TensorConfig("m", "TYPE_BOOL", (-1,))),
    (TensorConfig("y", "TYPE_FP16", (-1, 4)),),
    "cuda",
    QueuePolicy(3, 5_000, "DELAY"),
    (Warmup("one", (TensorConfig("x", "TYPE_FP16", (2, 4)), TensorConfig("m", "TYPE_BOOL", (2,)))),),
    file="a.onnx",
)
TENSOR_X = {"name": "x", "data_type": "TYPE_FP16", "dims": ["-1", "4"]}
WARMUP = {
    "name": "one",
    "batch_size": 1,
    "inputs": {
        "x": {"data_type": "TYPE_FP16", "dims": ["2", "4"], "zero_data": True},
        "m": {"data_type": "TYPE_BOOL", "dims": ["2"], "zero_data": True},
    },
}
MESSAGE = {
    "name": "unet_live",
    "platform": "onnxruntime_onnx",
    "version_policy": {"latest": {"num_versions": 1}},
    "input": [TENSOR_X, {"name": "m", "data_type": "TYPE_BOOL", "dims": ["-1"]}],
    "output": [TENSOR_X | {"name": "y"}],
    "instance_group": [{"kind": "KIND_GPU", "count": 1}],
    "default_model_filename": "a.onnx",
    "dynamic_batching": {
        "default_queue_policy": {
            "timeout_action": "DELAY",
            "default_timeout_microseconds": "5000",
            "allow_timeout_override": True,
            "max_queue_size": 3,
        }
    },
    "model_warmup": [WARMUP],
}


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({}, {}),
        ({"platform": "tensorrt_plan", "warmups": ()}, {"platform": "tensorrt_plan", "model_warmup": None}),
        (
            {"platform": "python", "file": "", "decoupled": True, "parameters": {"a": '{"b": "\u00fc\n"}'}},
            {
                "platform": None,
                "backend": "python",
                "default_model_filename": None,
                "model_transaction_policy": {"decoupled": True},
                "parameters": {"a": {"string_value": '{"b": "\u00fc\n"}'}},
            },
        ),
        (
            {"inputs": (replace(CONFIG.inputs[0], optional=True),), "warmups": CONFIG.warmups * 2, "device": "cpu"},
            {
                "input": [TENSOR_X | {"optional": True}],
                "model_warmup": [WARMUP, WARMUP],
                "instance_group": [{"kind": "KIND_CPU", "count": 1}],
            },
        ),
    ],
    ids=["onnxruntime", "tensorrt", "python and decoupled", "optional input"],
)
def test_tritons_schema_reads_a_config_as_it_was_meant(change, wanted):
    expected = {name: value for name, value in (MESSAGE | wanted).items() if value is not None}
    assert read_config(replace(CONFIG, **change).to_pbtxt()) == expected


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_reads_back_from_a_config_as_it_was_written(key, value):
    parameters = read_config(replace(CONFIG, parameters={key: value}).to_pbtxt())["parameters"]
    assert {name: entry.get("string_value", "") for name, entry in parameters.items()} == {key: value}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../x"},
        {"platform": "pytorch"},
        {"outputs": CONFIG.inputs},
        {"inputs": ()},
    ],
)
def test_a_config_with_impossible_values_is_refused(change):
    with pytest.raises(InvalidRequest):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorConfig("x", "FP16", (1,)),
        lambda: TensorConfig("x", "TYPE_FP16", (-2,)),
        lambda: TensorConfig("x", "TYPE_FP16", ()),
        lambda: replace(CONFIG, device="tpu"),
        lambda: QueuePolicy(0),
        lambda: QueuePolicy(action="DROP"),
        lambda: Warmup("w", (TensorConfig("x", "TYPE_FP16", (-1,)),)),
        lambda: Shape(0, 64),
        lambda: Shape(64, 64, True),
        lambda: Serving("vllm"),
        lambda: Serving(device="tpu"),
        lambda: Serving("tensorrt"),
        lambda: Serving(slots=0),
        lambda: QueuePolicy(timeout_microseconds=True),
        lambda: Serving(engine={"backend": "torch"}),
        lambda: Serving(engine={"vae": object()}),
    ],
)
def test_a_setting_out_of_range_is_refused(make):
    with pytest.raises(InvalidRequest):
        make()


# repositories


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    pytest.importorskip("onnx")
    from tests.support.shared_exports import served_model

    return served_model(tmp_path_factory.mktemp("model"))[1]


@pytest.fixture(scope="module")
def export(source):
    """An ONNX export of a model of one attention layer: two flavours of its UNet and other parts."""
    pytest.importorskip("onnxscript")
    from tests.support.shared_exports import served_export

    return served_export(source)


@pytest.fixture
def altered(export, tmp_path):
    """A copy of the export, free to be damaged."""
    import shutil

    return shutil.copytree(export, tmp_path / "altered")


@pytest.mark.parametrize("runner, platform", [("python", "python"), ("onnxruntime", "onnxruntime_onnx")])
def test_names_types_and_dimensions_are_those_of_the_graphs(source, export, tmp_path, runner, platform):
    import onnx

    shapes = [Shape(64, 64), Shape(64, 96, 4)]
    out = tmp_path / "repository"
    written = write_repository(
        export, out, unet=source.unet, model="tiny", serving=Serving(runner), shapes=shapes, downscale=4
    )
    assert [graph.label for graph in written.graphs] == GRAPHS
    for graph in written.graphs:
        name = graph.label.replace("-", "_")
        config = read_config((out / name / "config.pbtxt").read_text())
        model = onnx.load(out / graph.file, load_external_data=False).graph
        assert (config["name"], config.get("platform", config.get("backend"))) == (name, platform)
        for tensors, values in ((config["input"], model.input), (config["output"], model.output)):
            found = [
                (
                    v.name,
                    ONNX_TYPES[v.type.tensor_type.elem_type],
                    tuple(-1 if d.dim_param else d.dim_value for d in v.type.tensor_type.shape.dim),
                )
                for v in values
            ]
            assert tensors_of(tensors) == found
        assert len(config["model_warmup"]) == (2 if graph.component in ("unet", "vae_decoder") else 1)
        declared = {tensor: (data_type, dims) for tensor, data_type, dims in tensors_of(config["input"])}
        for warmup in config["model_warmup"]:
            assert warmup["inputs"].keys() == declared.keys()
            for tensor, entry in warmup["inputs"].items():
                data_type, dims = declared[tensor]
                assert entry["data_type"] == data_type and entry["zero_data"]
                assert all(want in (-1, int(have)) for want, have in zip(dims, entry["dims"], strict=True))
    warmups = read_config((out / "unet_plain/config.pbtxt").read_text())["model_warmup"]
    assert {tuple(map(int, w["inputs"]["latents"]["dims"])) for w in warmups} == {(2, 4, 16, 16), (4, 4, 24, 16)}


@pytest.mark.parametrize("runner, python", [("python", {"model.py"}), ("onnxruntime", set())])
def test_the_tree_holds_each_graph_and_the_loop_and_the_hash_of_every_file(source, export, tmp_path, runner, python):
    out = tmp_path / "repository"
    written = write_repository(export, out, unet=source.unet, model="tiny", serving=Serving(runner))
    assert written == read_manifest(out) and written.kind == "triton-repo"
    check_files(out, written)
    tree = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert tree == {entry.name for entry in written.files} | {MANIFEST}
    graphs = {
        "unet_plain": {"unet-plain.onnx", "unet.weights"},
        "unet_banked": {"unet-banked.onnx", "unet.weights"},
        **{name: {f"{name}.onnx"} for name in GRAPHS[2:]},
    }
    expected = {f"{name}/1/{file}" for name, files in graphs.items() for file in files | python}
    expected |= {f"stylefast/1/{file}" for file in ("model.py", "json_request.py")}
    expected |= {f"{name}/config.pbtxt" for name in (*graphs, "stylefast")}
    assert tree == expected | {MANIFEST}
    # one file of weights on the disk, however many flavours there are
    assert (out / "unet_plain/1/unet.weights").samefile(out / "unet_banked/1/unet.weights")
    assert not (out / "unet_plain/1/unet.weights").samefile(export / "unet.weights")


def test_the_loop_is_decoupled_and_knows_its_model_and_limits(source, export, tmp_path):
    serving = Serving(slots=3, queue=QueuePolicy(5, 7_000), banks="/banks", engine={"max_batch_rows": 8})
    write_repository(export, tmp_path / "r", unet=source.unet, model="somebody/model", serving=serving)
    config = read_config((tmp_path / "r/stylefast/config.pbtxt").read_text())
    assert config["model_transaction_policy"] == {"decoupled": True}
    policy = config["dynamic_batching"]["default_queue_policy"]
    assert (policy["max_queue_size"], policy["default_timeout_microseconds"]) == (5, "7000")
    assert policy.get("timeout_action", "REJECT") == "REJECT"  # 0 is not written out
    parameters = {name: json.loads(entry["string_value"]) for name, entry in config["parameters"].items()}
    assert parameters["engine"] == {"device": "cpu", "dtype": "float32", "max_batch_rows": 8}
    assert (parameters["model"], parameters["slots"], parameters["banks"]) == ("somebody/model", 3, "/banks")
    assert list(parameters["graphs"]) == [name.replace("-", "_") for name in GRAPHS]


def test_a_repository_is_replaced_only_if_asked_and_by_a_whole_one(source, export, altered, tmp_path):
    out = tmp_path / "repository"
    first = write_repository(export, out, unet=source.unet, model="tiny")
    with pytest.raises(InvalidRequest, match="exists"):
        write_repository(export, out, unet=source.unet, model="tiny")
    weights = altered / "unet.weights"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ExportError, match="truncated"):
        write_repository(altered, out, unet=source.unet, model="tiny", overwrite=True)
    assert read_manifest(out) == first
    second = write_repository(export, out, unet=source.unet, model="other", overwrite=True)
    assert read_manifest(out) == second != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["altered", "repository"]


@pytest.mark.parametrize(
    "change, error, wanted",
    [
        ({"kind": "aoti"}, EngineMismatch, "stylefast export onnx"),
        ({"kind": "tensorrt", "toolchain": {"tensorrt_rtx": "1"}}, EngineMismatch, "choose tensorrt"),
        ({"fingerprint": "a+b"}, ExportError, "LoRAs"),
        ({"graphs": ()}, ExportError, "no UNet"),
    ],
)
def test_an_export_that_can_not_be_served_is_refused(source, altered, tmp_path, change, error, wanted):
    write_manifest(altered, replace(read_manifest(altered), **change))
    with pytest.raises(error, match=wanted):
        write_repository(altered, tmp_path / "out", unet=source.unet, model="tiny")
    assert not (tmp_path / "out").exists()


def test_engines_of_tensorrt_rtx_are_not_given_to_the_tensorrt_backend(source, altered, tmp_path):
    write_manifest(altered, replace(read_manifest(altered), kind="tensorrt", toolchain={"tensorrt_rtx": "1.7"}))
    serving = Serving("tensorrt", "cuda")
    with pytest.raises(EngineMismatch, match="tensorrt_rtx"):
        write_repository(altered, tmp_path / "out", unet=source.unet, model="tiny", serving=serving)
    write_manifest(altered, replace(read_manifest(altered), toolchain={"tensorrt": "10.9"}))
    write_repository(altered, tmp_path / "out", unet=source.unet, model="tiny", serving=serving)
    config = read_config((tmp_path / "out/unet_plain/config.pbtxt").read_text())
    assert (config["platform"], config["default_model_filename"]) == ("tensorrt_plan", "unet-plain.onnx")
    assert config["instance_group"] == [{"kind": "KIND_GPU", "count": 1}]


def test_a_folder_without_export_and_sizes_between_latents_are_refused(source, export, tmp_path):
    with pytest.raises(ModelNotFound):
        write_repository(tmp_path, tmp_path / "out", unet=source.unet, model="tiny")
    with pytest.raises(InvalidRequest, match="divisible by 4"):
        write_repository(export, tmp_path / "out", unet=source.unet, model="tiny", shapes=[Shape(66, 64)], downscale=4)
    assert list(tmp_path.iterdir()) == []


# requests


@pytest.fixture(scope="module")
def requests(checkout):
    """The module that reads requests in the server."""
    file = checkout / "export" / "triton_repo" / "models" / "json_request.py"
    spec = importlib.util.spec_from_file_location("json_request", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def read(requests, tmp_path):
    """Reads a request with one picture, on a server with the learned style "chalk" and no banks."""
    shelf = requests.Shelf(tmp_path, {"chalk": tmp_path / "chalk.safetensors"})

    def read(order, pictures=(b"picture",)):
        return requests.read_order(order if isinstance(order, bytes) else json.dumps(order).encode(), pictures, shelf)

    return read


def test_a_request_becomes_one_picture_per_prompt_with_seeds_that_count_up(read):
    order = read(
        {
            "prompt": ["a cat", "a dog"],
            "seed": 7,
            "steps": 4,
            "size": [64, 48],
            "preview_every": 2,
            "guidance_interval": [0, 0.5],
            "scheduler": "dpmpp_2m",
            "negative_prompt": "fog",
            "style": {"method": "aligned", "reference": 0, "adain": {"q": 0.5}, "window": [0, 0.5]},
        }
    )
    assert [(r.prompt, r.seed, r.steps, r.size, r.negative_prompt) for r in order.requests] == [
        ("a cat", 7, 4, (64, 48), "fog"),
        ("a dog", 8, 4, (64, 48), "fog"),
    ]
    assert order.preview_every == 2 and order.deadline is None
    # one object, so that the pictures of a request share its reference
    assert order.requests[0].reader is order.requests[1].reader
    assert order.requests[0].reader.reference == b"picture"


def test_a_request_takes_every_text_setting_but_no_lora_and_no_control(read, requests):
    given = {
        "prompt_2": "a star",
        "negative_prompt": "(fog:1.2)",
        "negative_prompt_2": "rain",
        "prompt_syntax": "a1111",
        "clip_skip": 1,
    }
    for request in read({"prompt": ["a (cat:1.2)", "a dog"], **given}).requests:
        assert {name: getattr(request, name) for name in given} == given
    # LoRAs and ControlNets lie in files, and the server's graphs have no inputs for them
    taken = set(requests._FIELDS) - {"preview_every", "deadline"}
    assert taken == {field.name for field in dataclasses.fields(sf.Request)} - {"loras", "control"}
    for name, value in {"loras": {"ink": 1.0}, "control": {"image": 0}}.items():
        with pytest.raises(InvalidRequest, match=f"the request has no '{name}'"):
            read({"prompt": "a cat", name: value})


def test_a_picture_to_begin_with_and_its_mask_are_named_by_number(requests):
    png = [small_picture(seed) for seed in range(2)]
    text = json.dumps({"prompt": "a", "image": 1, "mask": 0, "strength": 0.5}).encode()
    (request,) = requests.read_order(text, png, requests.Shelf(None, {})).requests
    assert (request.image, request.mask, request.strength) == (png[1], png[0], 0.5)
    with pytest.raises(ImageError, match="2 pictures were sent"):
        requests.read_order(b'{"prompt": "a", "image": 2}', png, requests.Shelf(None, {}))


def test_several_styles_and_pictures_find_their_places(requests):
    png = [small_picture(seed) for seed in range(3)]
    style = [{"method": "aligned", "prompt": "oil"}, {"method": "instant", "image": [2, 0], "mask": [1, 1]}]
    order = requests.read_order(json.dumps({"prompt": "a", "style": style}).encode(), png, requests.Shelf(None, {}))
    aligned, instant = order.requests[0].style
    assert aligned.prompt == "oil" and isinstance(instant, sf.InstantStyle)
    assert list(instant.image) == [png[2], png[0]] and list(instant.mask) == [png[1], png[1]]


def test_a_style_of_another_package_comes_over_the_server_too(read):
    @dataclass(frozen=True, eq=False)
    class TonedStyle(Style):
        words: str
        palette: object = None
        picture_fields: ClassVar[tuple[str, ...]] = ("palette",)

    (style,) = (
        read({"prompt": "a", "style": {"method": "toned_style", "words": "warm", "palette": 0}}).requests[0].style
    )
    assert type(style) is TonedStyle and style.words == "warm" and style.palette == b"picture"
    with pytest.raises(InvalidRequest, match="wrods"):
        read({"prompt": "a", "style": {"method": "toned_style", "wrods": "warm"}})


@pytest.mark.parametrize(
    "order, error, wanted",
    [
        (b"{", InvalidRequest, "not valid JSON"),
        (b"\xff\xfe", InvalidRequest, "not valid JSON"),
        (b"[" * 100_000, InvalidRequest, "nested too deep"),
        (b'{"prompt": "a"}' + b" " * 2**20, InvalidRequest, "bytes"),
        (b"[]", InvalidRequest, "object"),
        ({}, PromptError, "NoneType"),
        ({"prompt": []}, InvalidRequest, "0 prompts"),
        ({"prompt": ["a"] * 65}, InvalidRequest, "65 prompts"),
        ({"prompt": "a", "step": 3}, InvalidRequest, "'step'; it takes"),
        ({"prompt": "a", "steps": 0}, InvalidRequest, "steps is 0"),
        ({"prompt": "a", "seed": 0.5}, InvalidRequest, "seed"),
        ({"prompt": "a", "preview_every": -1}, InvalidRequest, "preview_every"),
        ({"prompt": "a", "style": "oil"}, StyleError, "method"),
        ({"prompt": "a", "style": {"method": "aligned", "reference": "/etc/passwd"}}, ImageError, "by number"),
        ({"prompt": "a", "style": {"method": "aligned", "reference": 1}}, ImageError, "1 pictures were sent"),
        ({"prompt": "a", "style": {"method": "aligned", "reference": True}}, ImageError, "by number"),
        ({"prompt": "a", "style": {"method": "aligned", "bank": "../x"}}, StyleError, "not on this server"),
        ({"prompt": "a", "style": {"method": "aligned", "bank": "x", "reference": 0}}, StyleError, "not both"),
        ({"prompt": "a", "style": {"method": "aligned", "scael": 1}}, InvalidRequest, "scael"),
        ({"prompt": "a", "style": {"method": "instant"}}, StyleError, "needs at least one picture"),
        ({"prompt": "a", "style": {"method": "instant", "image": 0, "negative_image": "x.png"}}, ImageError, "number"),
        ({"prompt": "a", "style": {"method": "learned", "name": "/etc/passwd"}}, StyleError, "chalk"),
        ({"prompt": "a", "style": {"method": "learned", "name": ["chalk"]}}, StyleError, "chalk"),
        ({"prompt": "a", "style": {"method": "learned", "embedding": {"path": "/etc/passwd"}}}, StyleError, "chalk"),
        ({"prompt": "a", "style": {"method": "learned", "path": "/etc/passwd"}}, StyleError, "chalk"),
        ({"prompt": "a", "style": {"method": "aligned", "reference": {"path": "/x.png"}}}, ImageError, "by number"),
        ({"prompt": "a", "style": {"method": "instant", "image_embeds": "/etc/passwd"}}, StyleError, "send a picture"),
        (
            {"prompt": "a", "style": {"method": "instant", "image": 0, "content": {"path": "/x"}}},
            StyleError,
            "send a picture",
        ),
        ({"prompt": "a", "style": {"method": "cubist"}}, StyleError, "'cubist' is unknown"),
        ({"prompt": "a", "style": {"method": 3}}, StyleError, "3 is unknown"),
        ({"prompt": "a", "style": {"method": "aligned", "kind": "InstantStyle"}}, InvalidRequest, "kind"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_by_name(read, order, error, wanted):
    with pytest.raises(error, match=wanted):
        read(order)


def test_pictures_are_cut_where_their_lengths_say(requests):
    assert requests.split_pictures(b"abcde", [2, 3]) == [b"ab", b"cde"] and requests.split_pictures(b"", []) == []
    for lengths in ([2], [2, 4], [6, -1], [0, 5]):
        with pytest.raises(ImageError, match="length"):
            requests.split_pictures(b"abcde", lengths)
