"""Whole pictures through ONNX Runtime: as those of PyTorch, and an export that does not fit is refused."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import stylefast as sf
from stylefast.errors import (
    EngineClosed,
    EngineMismatch,
    ExportError,
    InvalidRequest,
    MissingDependency,
    ModelFormatError,
    ModelNotFound,
    UntrustedEngine,
)
from stylefast.export.manifest import MANIFEST, read_manifest
from stylefast.export.options import DIGEST
from stylefast.export.unet_graph import GraphShape
from stylefast.models.unet import UNet
from stylefast.runtime.backends import choice
from tests.support.scene import SIZE, half_mask, learned, psnr, small_picture
from tests.support.small_checkpoints import random_lora, write_peft_lora
from tests.support.small_graphs import TorchSession, export_folder, small_graph_pipeline, write_adapter, write_manifest
from tests.support.watch import WAIT, request

pytest.importorskip("onnxruntime")

PICTURE, OTHER = small_picture(1, (48, 40)), small_picture(2, (90, 70))
STYLE = ["up_blocks.1.attentions.1"]
SHAPES = (GraphShape("plain", segments=1), GraphShape("live", 2, 2), GraphShape("banked", 2, 2))


@pytest.fixture(scope="module")
def micro():
    return small_graph_pipeline()


@pytest.fixture(scope="module")
def adapter(micro, tmp_path_factory):
    return write_adapter(micro.unet, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def eager(micro, adapter):
    engine = sf.Engine.from_pipeline(micro)
    engine.load_adapter(adapter)
    return engine


@pytest.fixture(scope="module")
def folder(eager, tmp_path_factory):
    """An export of all flavours, made once."""
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("export") / "micro"
    export_folder(eager.unet, folder, SHAPES, fingerprint=eager.fingerprint)
    return folder


@pytest.fixture(scope="module")
def exported(micro, adapter, folder):
    with sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=folder) as engine:
        engine.load_adapter(adapter)
        yield engine


@pytest.fixture(scope="module")
def bank(eager):
    return eager.bake(sf.StyleAligned([PICTURE, OTHER]), steps=3, size=SIZE)


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the export to damage."""
    shutil.copytree(folder, tmp_path / "micro")
    return tmp_path / "micro"


@pytest.fixture(scope="module")
def requests(bank):
    shared = sf.StyleAligned(shift=0.4, share_group_norm=True)
    odd = (56, 40)  # the second level is 7x5
    return {
        "plain": [request("a cat", seed=1)],
        "plain, another sampler, an odd size": [request("a dog", size=odd, scheduler="euler_ancestral", guidance=1.0)],
        "two pictures in one style": [request(p, style=shared, seed=i) for i, p in enumerate(("a cat", "neon"))],
        "a live picture with AdaIN, swapped": [
            request(style=sf.StyleAligned(OTHER, mode="swap", adain={"q": 1.0, "k": 0.5, "v": 1.0}), seed=3)
        ],
        "a picture prompt under a mask": [request(style=sf.InstantStyle(PICTURE, "all", 0.7, mask=half_mask()))],
        "a bank of two references": [request(style=sf.StyleAligned(bank, shift=0.5, share_group_norm=True), seed=4)],
        "learned tokens": [request(style=sf.DreamStyler(learned()), seed=5)],
        "a bank, a picture and learned tokens": [
            request(style=[sf.StyleAligned(bank), sf.InstantStyle(OTHER, STYLE), sf.DreamStyler(learned())], seed=6)
        ],
    }


CASES = (
    "plain",
    "plain, another sampler, an odd size",
    "two pictures in one style",
    "a live picture with AdaIN, swapped",
    "a picture prompt under a mask",
    "a bank of two references",
    "learned tokens",
    "a bank, a picture and learned tokens",
)


@pytest.mark.parametrize("case", CASES)
def test_pictures_are_those_of_pytorch(eager, exported, requests, case):
    pictures, expected = (engine.generate(requests[case], output="np").images for engine in (exported, eager))
    assert psnr(pictures, expected) >= 60
    assert np.ptp(np.stack(expected)) > 0.1, "a picture of one colour hides mistakes"


def test_a_mixed_batch_is_one_call_a_step(eager, exported, requests):
    mixed = [one for case in CASES if "odd size" not in case for one in requests[case]]
    calls = exported.runner.calls
    pictures = exported.generate(mixed, output="np").images
    assert exported.runner.calls - calls == 3
    assert psnr(pictures, eager.generate(mixed, output="np").images) >= 60


def test_jobs_run_through_the_graphs_too(eager, exported, requests):
    shared = requests["two pictures in one style"]
    pictures = exported.submit(shared, output="np").result(WAIT).images
    assert psnr(pictures, eager.generate(shared, output="np").images) >= 60


def test_a_graph_is_loaded_when_it_is_wanted(micro, folder, requests):
    with sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=folder) as engine:
        assert engine.runner.backend.name == "onnxruntime" and engine.runner.backend.loaded == ()
        before = engine.memory()["graphs"]
        engine.generate(requests["plain"], output="latents")
        assert engine.runner.backend.loaded == ("plain",)
        assert engine.memory()["graphs"] >= before + 0.9 * sum(x.nbytes for x in engine.unet.parameters())


def test_another_flavour_than_those_exported_is_refused_and_the_others_go_on(micro, copy, requests, eager):
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, graphs=tuple(g for g in manifest.graphs if g.flavour != "banked")))
    with sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=copy) as engine:
        with pytest.raises(EngineMismatch, match=r"banked graph \(references: 2.*export onnx --flavour banked"):
            engine.submit(requests["a bank of two references"], output="np")
        job = engine.submit(requests["plain"], output="np")
        assert psnr(job.result(WAIT).images, eager.generate(requests["plain"], output="np").images) >= 60


def test_a_lora_makes_the_graphs_stale_until_it_is_taken_off(folder, tmp_path):
    pipe = small_graph_pipeline()  # whose weights change
    lora = write_peft_lora(random_lora(pipe, seed=1), tmp_path / "style.safetensors")
    with sf.Engine.from_pipeline(pipe, backend="onnxruntime", engines=folder) as engine:
        plain = engine.generate(request(), output="latents").latents[0]
        name = engine.load_lora(lora)
        told = "other weights than the model has now .(.{12}), \\1 with LoRAs .{12}.: LoRAs.*backend='torch'"
        with pytest.raises(EngineMismatch, match=told):
            engine.generate(request(), output="latents")
        engine.merged_loras.remove(name)
        assert torch.equal(engine.generate(request(), output="latents").latents[0], plain)


def test_graphs_of_a_model_with_a_lora_wait_for_the_lora(micro, copy):
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, fingerprint=manifest.fingerprint + "+0123456789abcdef"))
    with (
        sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=copy) as engine,
        pytest.raises(EngineMismatch, match="other weights"),
    ):
        engine.generate(request(), output="latents")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fingerprint": "0" * 64}, EngineMismatch, "made from other weights.*000000000000"),
        ({"dtype": "float16"}, EngineMismatch, "has dtype float16, the model float32"),
        ({"kind": "aoti"}, EngineMismatch, "kind aoti, not onnx"),
        ({"graphs": ()}, EngineMismatch, "no UNet graph"),
        ({"shape": {"flavour": "live"}}, ModelFormatError, "shape of unet-live .*export again"),
        ({"extra": {"weights": "no"}}, ModelFormatError, "weights in unet-.* 'no'.*true or false"),
        ({"profiles": {"unet-plain": 3}}, ModelFormatError, "profiles of unet-plain are 3.*export again"),
        ({"profiles": {"unet-plain": [{"rows": ["a", "b", "c"]}]}}, ModelFormatError, "profiles of unet-plain are"),
        ({"profiles": {"unet-plain": [{"rows": [1, 2]}]}}, ModelFormatError, "profiles of unet-plain are"),
    ],
    ids=[
        "another model",
        "another type",
        "another kind",
        "no graph",
        "another version",
        "weights that are neither",
        "profiles that are a number",
        "profiles of words",
        "profiles without a most",
    ],
)
def test_an_export_that_does_not_fit_is_refused_at_once(micro, copy, changes, error, message):
    manifest = read_manifest(copy)
    if changes.keys() & {"shape", "extra"}:
        changes = {"graphs": (replace(manifest.graphs[0], **changes),)}
    write_manifest(copy, replace(manifest, **changes))
    with pytest.raises(error, match=message):
        sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=copy)


def test_a_part_without_outputs_is_refused_at_once(micro, copy):
    manifest = read_manifest(copy)
    part = replace(manifest.graphs[0], component="vae_decoder", shape={}, outputs=())
    write_manifest(copy, replace(manifest, graphs=(*manifest.graphs, part)))
    with pytest.raises(ModelFormatError, match="outputs of vae_decoder are"):
        sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs[1:], r"gives its graphs latents as float32 .*no such input; export again"),
        (lambda inputs: [[inputs[0][0], "float64", inputs[0][2]], *inputs[1:]], r"the file has float64"),
        (lambda inputs: [[*inputs[0][:2], [*inputs[0][2][:1], 99, *inputs[0][2][2:]]], *inputs[1:]], r"'rows', 99"),
        (
            lambda inputs: [*inputs, ["strength", "float32", ["rows"]]],
            "has the input strength, which graphs no longer have",
        ),
    ],
    ids=["one input less", "another type", "another size", "one input more"],
)
def test_an_export_by_another_state_of_the_code_is_refused_at_once(micro, copy, change, message):
    manifest = read_manifest(copy)
    graph = replace(manifest.graphs[0], inputs=change(list(manifest.graphs[0].inputs)))
    write_manifest(copy, replace(manifest, graphs=(graph, *manifest.graphs[1:])))
    with pytest.raises(EngineMismatch, match=message):
        sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=copy)


@pytest.mark.parametrize("given", [{"trust": 5}, {"engines": 5}], ids=str)
def test_folders_and_digests_that_are_none_are_refused(micro, folder, given):
    with pytest.raises(InvalidRequest, match="is 5; give the"):
        sf.Engine.from_pipeline(micro, backend="onnxruntime", **{"engines": folder} | given)


def test_a_closed_engine_counts_no_graphs(micro, folder):
    engine = sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=folder)
    engine.generate(request(), output="latents")
    assert engine.memory()["graphs"] > 0
    engine.close()
    assert engine.memory()["graphs"] == 0


def test_pictures_on_their_way_when_the_engine_is_closed_end_with_that(micro, folder):
    engine = sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=folder)
    with pytest.raises(EngineClosed, match="was closed"):
        engine.generate(request(), callback=lambda *_: engine.close())


def test_a_cache_folder_that_can_not_be_made_is_named(micro, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("STYLEFAST_CACHE", str(tmp_path / "file"))
    with pytest.raises(ExportError, match="file/engines/.*STYLEFAST_CACHE"):
        sf.Engine.from_pipeline(micro, backend="onnxruntime")


def test_without_onnxruntime_the_extra_is_named_at_once(micro, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"pip install 'stylefast\[export\]'"):
        sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=folder)


def test_what_is_missing_or_truncated_is_refused_at_once(micro, copy):
    (file,) = (name for name in read_manifest(copy).graphs[0].files if not name.endswith(".onnx"))
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[:-100])
    with pytest.raises(ExportError, match="truncated: .* of .* bytes"):
        sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=copy)
    (copy / file).unlink()
    with pytest.raises(ExportError, match="missing external data"):
        sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(ModelNotFound, match="has no manifest.json"):
        sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=copy)


def test_what_was_altered_is_refused_before_it_is_loaded(micro, copy):
    file = copy / "unet-plain.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=copy) as engine:
        with pytest.raises(ExportError, match="altered: .*unet-plain.onnx has sha256"):
            engine.generate(request(), output="latents")
        assert engine.runner.pictures == 0 and engine.runner.backend.loaded == ()


def test_engines_from_elsewhere_need_the_digest(micro, copy):
    manifest = replace(read_manifest(copy), kind="aoti", target="cpu")
    write_manifest(copy, manifest)
    copy.chmod(0o777)
    with pytest.raises(UntrustedEngine, match="(?s)code.*others can write"):
        sf.Engine.from_pipeline(micro, backend="aoti", engines=copy)
    with pytest.raises(UntrustedEngine, match="the digest given"):
        sf.Engine.from_pipeline(micro, backend="aoti", engines=copy, trust="0" * 64)
    sf.Engine.from_pipeline(micro, backend="aoti", engines=copy, trust=manifest.digest).close()


def test_tensorrt_wants_a_gpu_and_a_folder(micro, copy):
    write_manifest(copy, replace(read_manifest(copy), kind="tensorrt", target="sm89"))
    with pytest.raises(EngineMismatch, match="NVIDIA GPUs"):
        sf.Engine.from_pipeline(micro, backend="tensorrt", engines=copy)
    with pytest.raises(InvalidRequest, match="needs engines=FOLDER"):
        sf.Engine.from_pipeline(micro, backend="tensorrt")


def test_without_a_folder_the_model_is_exported_once_and_found_again(micro, folder, monkeypatch, tmp_path):
    from stylefast.export import pipeline

    asked = []
    monkeypatch.setenv("STYLEFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(pipeline, "ensure", lambda *arguments: asked.append(arguments) or folder)
    for _ in range(2):
        with sf.Engine.from_pipeline(micro, backend="onnxruntime") as engine:
            engine.generate(request(), output="latents")
    (_, _, place), (source, options, again) = asked
    assert source.unet is engine.unet and source.fingerprint == engine.fingerprint
    assert (options.kind, options.dtype, options.components) == ("onnx", "float32", ("all",))
    assert place == again and place.parent == tmp_path / "engines"


class FollowingSession(TorchSession):
    """Computes with the weights that it was given last."""

    def set_weights(self, state):
        self.graph.unet = UNet.from_state(self.graph.unet.config, {k: v.clone() for k, v in state.items()})


def test_graphs_without_weights_of_their_own_follow_a_lora(folder, copy, monkeypatch, tmp_path):
    pipe, manifest = small_graph_pipeline(), read_manifest(copy)
    bare = tuple(replace(graph, extra={"weights": False}) for graph in manifest.graphs)
    write_manifest(copy, replace(manifest, kind="aoti", target="cpu", graphs=bare))
    lora = write_peft_lora(random_lora(pipe, seed=1), tmp_path / "style.safetensors")
    shapes = {graph.file: GraphShape.from_dict(graph.shape) for graph in bare}

    def expected():
        # of an engine that has seen no prompt with other weights
        return sf.Engine.from_pipeline(pipe).generate(request(), output="np").images

    unet = UNet.from_state(dict(pipe.unet.config), pipe.unet.state_dict())
    monkeypatch.setattr(choice, "open_session", lambda _, file, __: FollowingSession(unet, shapes[file.name]))
    with sf.Engine.from_pipeline(pipe, backend="aoti", engines=copy) as engine:
        before = engine.generate(request(), output="np").images
        assert psnr(before, expected()) >= 60
        name = engine.load_lora(lora)
        after = engine.generate(request(), output="np").images
        assert psnr(after, expected()) >= 60 > psnr(after, before)
        engine.merged_loras.remove(name)
        assert psnr(engine.generate(request(), output="np").images, before) >= 60


def test_a_fixed_size_takes_that_size_alone(micro, eager, tmp_path):
    fixed = {"rows": 2, "height": 8, "width": 12}
    export_folder(eager.unet, tmp_path, SHAPES[:1], fixed, eager.fingerprint)
    with sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=tmp_path) as engine:
        every = [request(seed=1), request(seed=2, guidance=1.0), request(seed=3)]
        assert psnr(engine.generate(every, output="np").images, eager.generate(every, output="np").images) >= 60
        with pytest.raises(EngineMismatch, match="2 rows at 16x8 latents.*width 16 is outside 12 to 12"):
            engine.generate(request(size=(64, 32)), output="latents")


def test_weights_that_the_fingerprint_does_not_look_at_are_told_from_those_exported(micro, folder, copy):
    manifest = read_manifest(copy)
    graphs = tuple(replace(graph, extra={DIGEST: "0" * 64}) for graph in manifest.graphs)
    write_manifest(copy, replace(manifest, graphs=graphs))
    with pytest.raises(EngineMismatch, match="made from other weights than the loaded ones, although"):
        sf.Engine.from_pipeline(micro, backend="onnxruntime", engines=copy)


def test_metadata_names_the_backend(exported, eager):
    found = [engine.generate("a cat", steps=2, output="latents").metadata[0]["backend"] for engine in (exported, eager)]
    assert found == ["onnxruntime", "torch"]
