"""Whole exports of a small model: every part and kind, stopped and gone on with, and made once for many processes."""

import copy
import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import stylefast as sf
from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, MissingDependency, ModelError
from stylefast.export import aoti, pipeline
from stylefast.export.aoti import AotiReport
from stylefast.export.folder import RECORD, publishing
from stylefast.export.manifest import MANIFEST, check_files, read_manifest
from stylefast.export.onnx_file import WEIGHTS
from stylefast.export.options import NATIVE, Options, Progress, Source
from stylefast.export.sessions import OrtSession
from stylefast.export.unet_graph import GraphShape, graph_inputs, graph_output
from stylefast.models.adapter_loading import load_adapter
from stylefast.models.checkpoint import from_pipeline
from stylefast.models.text import TextEncoder
from stylefast.models.unet import UNet
from stylefast.runtime.backends import choice
from tests.support import forked
from tests.support.fp64 import close, measured
from tests.support.scene import small_picture
from tests.support.small_graphs import nano_pipeline, one_layer_pipeline, translations, write_adapter  # noqa: F401
from tests.support.watch import request

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

TARGETS = ("sm89", "sm120")
OTHERS = ("vae_decoder", "text_encoder", "text_encoder_2", "text_projector", "image_encoder", "image_projector")
NAMES = {torch.float16: "HALF", torch.float32: "FLOAT", torch.int64: "INT64", torch.bool: "BOOL"}


def source_of(pipe, dtype=torch.float32, adapter: Path | None = None, name: str = "nano") -> Source:
    """What an engine would export, its UNet in a type of its own."""
    components = from_pipeline(pipe)
    unet = UNet.from_state(components.unet_config, {k: v.to(dtype) for k, v in components.unet_state.items()})
    text = TextEncoder(components.tokenizers, components.text_encoders, components.force_zeros)
    adapters = {} if adapter is None else {adapter.stem: load_adapter(adapter, None, components, unet)}
    return Source(name, components.fingerprint, unet, components.vae, text, adapters, sf.__version__)


def options(kind="onnx", **given) -> Options:
    return Options(kind, **given)


class Log(Progress):
    """Keeps what an export says of itself."""

    def __init__(self):
        self.graphs, self.phases, self.said = [], set(), []

    def graph(self, name, number, total):
        self.graphs.append((name, number, total))

    def phase(self, done, total, name):
        self.phases.add(name)

    def say(self, text):
        self.said.append(text)


class Runs(NamedTuple):
    """An export that was stopped twice: after each run the graphs made in it, what was left, and what it said."""

    folder: Path
    manifest: object
    made: list[list[str]]
    errors: list[BaseException]
    left: list[set[str]]
    logs: list[Log]


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def psnr(actual, expected) -> float:
    """Of pictures [height, width, 3] in 0..1, in dB."""
    error = np.mean((np.stack(actual).astype(np.float64) - np.stack(expected)) ** 2)
    return float(-10 * np.log10(max(error, 1e-20)))


def nothing_at(folder: Path) -> bool:
    """Neither an export nor the beginnings of one."""
    return not folder.exists() and not list(folder.parent.glob(f"{folder.name}.*"))


@pytest.fixture(scope="module")
def pipe():
    return one_layer_pipeline()


@pytest.fixture(scope="module")
def adapter(pipe, tmp_path_factory):
    return write_adapter(pipe.unet, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def source(pipe, adapter):
    return source_of(pipe, adapter=adapter)


@pytest.fixture(scope="module")
def half(pipe):
    return source_of(pipe, torch.float16)


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory) -> Runs:
    """An ONNX export of everything: stopped by Ctrl-C in its second graph, by a full disk in its sixth, then let be."""
    folder = tmp_path_factory.mktemp("onnx") / "nano"
    found = Runs(folder, None, [], [], [], [])
    unet_graph, component_graph = pipeline.export_unet, pipeline.export_component

    def counted(write, stop_at, stop):
        def written(*given, **named):
            if len(found.made[-1]) == stop_at:
                (folder.with_name("nano.part") / "half-written").write_bytes(b"x")
                raise stop
            entry = write(*given, **named)
            found.made[-1].append((entry[0] if isinstance(entry, tuple) else entry).label)
            return entry

        return written

    full = OSError(errno.ENOSPC, "No space left on device")
    for stop_at, stop in ((1, KeyboardInterrupt()), (4, full), (99, None)):
        found.made.append([])
        found.logs.append(Log())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "export_unet", counted(unet_graph, stop_at, stop))
            patch.setattr(pipeline, "export_component", counted(component_graph, stop_at, stop))
            try:
                manifest = pipeline.export_onnx(source, folder, options(), found.logs[-1])
            except (KeyboardInterrupt, ExportError) as error:
                found.errors.append(error)
                found.left.append(files_of(folder.parent))
    return found._replace(manifest=manifest)


def test_every_part_of_the_model_is_a_graph_of_the_manifest(runs, source):
    manifest = read_manifest(runs.folder)
    assert manifest == runs.manifest
    check_files(runs.folder, manifest)
    flavours = ("live", "banked", "plain")
    assert [graph.label for graph in manifest.graphs] == [*(f"unet-{f}" for f in flavours), *OTHERS]
    assert files_of(runs.folder) == {MANIFEST, WEIGHTS, *(f"{graph.label}.onnx" for graph in manifest.graphs)}
    assert {entry.name for entry in manifest.files} == files_of(runs.folder) - {MANIFEST}
    facts = (manifest.kind, manifest.model, manifest.fingerprint, manifest.dtype, manifest.target, manifest.stylefast)
    assert facts == ("onnx", "nano", source.fingerprint, "float32", "any", sf.__version__)
    assert manifest.toolchain.keys() == {"torch", "onnx", "onnxscript"}
    assert {graph.opset for graph in manifest.graphs} == {20} and not any(graph.fixed for graph in manifest.graphs)
    for flavour in flavours:
        graph = manifest.graph("unet", flavour)
        shape = GraphShape(flavour, 1, 2, 77)
        assert GraphShape.from_dict(graph.shape) == shape and graph.files == (f"unet-{flavour}.onnx", WEIGHTS)
        tensors = [*graph_inputs(source.unet, shape), graph_output(source.unet)]
        described = [(t.name, str(t.dtype).removeprefix("torch."), t.dims) for t in tensors]
        assert [*graph.inputs, *graph.outputs] == described


def test_every_graph_is_what_the_manifest_says_and_names_its_model(runs, source):
    pytest.importorskip("onnxruntime")
    for graph in runs.manifest.graphs:
        session = OrtSession(runs.folder / graph.file)
        for tensors, found in ((graph.inputs, session.inputs), (graph.outputs, session.outputs)):
            assert {name: dtype for name, dtype, _ in tensors} == {
                name: str(dtype).removeprefix("torch.") for name, (dtype, _) in found.items()
            }
        metadata = session._session.get_modelmeta().custom_metadata_map
        assert metadata["stylefast.fingerprint"] == source.fingerprint
        assert metadata["stylefast.component"] == graph.component and metadata["stylefast.model"] == "nano"
        session.close()


def test_a_stopped_export_leaves_what_is_finished_beside_the_target_and_nothing_at_it(runs):
    interrupt, full = runs.errors
    assert isinstance(interrupt, KeyboardInterrupt)
    assert isinstance(full, ExportError) and "is full; free some room and run the same command again" in str(full)
    first = {f"nano.part/{name}" for name in (RECORD, WEIGHTS, "unet-live.onnx")}
    second = first | {f"nano.part/{name}.onnx" for name in ("unet-banked", "unet-plain", "vae_decoder", "text_encoder")}
    assert runs.left == [first, second]
    assert files_of(runs.folder.parent) == {f"nano/{name}" for name in files_of(runs.folder)}


def test_an_export_goes_on_where_it_was_stopped(runs):
    assert runs.made == [
        ["unet-live"],
        ["unet-banked", "unet-plain", "vae_decoder", "text_encoder"],
        ["text_encoder_2", "text_projector", "image_encoder", "image_projector"],
    ]
    assert not runs.logs[0].said
    assert "goes on with" in runs.logs[1].said[0] and "unet-live" in runs.logs[1].said[0]
    assert "text_encoder" in runs.logs[2].said[0]
    names = ["unet-live", "unet-banked", "unet-plain", *OTHERS, ""]
    assert runs.logs[2].graphs == [(name, i, 9) for i, name in enumerate(names)]
    assert {"tracing", "writing weights (MiB)", "writing the graph"} <= runs.logs[0].phases


def test_pictures_through_graphs_that_were_gone_on_with_are_those_of_pytorch(runs, pipe, adapter):
    pytest.importorskip("onnxruntime")
    picture = small_picture(1, (48, 40))
    wanted = [
        [request("a cat", seed=1)],
        [request(style=sf.StyleAligned(picture), seed=2)],
        [request(style=sf.InstantStyle(picture, "all", 0.7), seed=3)],
    ]
    eager = sf.Engine.from_pipeline(pipe)
    with sf.Engine.from_pipeline(pipe, backend="onnxruntime", engines=runs.folder) as engine:
        for one in (eager, engine):
            one.load_adapter(adapter)
        wanted.append([request(style=sf.StyleAligned(eager.bake(sf.StyleAligned(picture), steps=3, size=(48, 32))))])
        for requests in wanted:
            expected = eager.generate(requests, output="np").images
            assert psnr(engine.generate(requests, output="np").images, expected) >= 60
        assert set(engine.runner.backend.loaded) == {"plain", "live", "banked"}


def test_float16_at_the_models_own_size(half, tmp_path):
    pytest.importorskip("onnxruntime")
    given = options(dtype="float16", flavours=("plain",), components=("unet", "vae_decoder"), size=NATIVE)
    manifest = pipeline.export_onnx(half, tmp_path / "half", given)
    assert manifest.dtype == "float16" and all(g.fixed == {"height": 16, "width": 16} for g in manifest.graphs)
    assert {graph.opset for graph in manifest.graphs} == {20}
    unet, decoder = (OrtSession(tmp_path / "half" / graph.file) for graph in manifest.graphs)
    assert unet.inputs["latents"] == (torch.float16, ("rows", 4, 16, 16))
    assert unet.inputs["text_kv_0"][0] == torch.float16 and unet.inputs["timestep"][0] == torch.float32
    # the VAE asks for float32, as the published one does
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    assert decoder.inputs["latents"][0] == torch.float32
    pixels = decoder.run({"latents": latents})["pixels"]
    assert pixels.shape == (2, 3, 64, 64)

    @torch.no_grad()
    def in_pytorch(vae, latents):
        return vae.decode(latents).sample

    close(pixels, measured(in_pytorch, half.vae, latents))
    with pytest.raises(EngineMismatch, match="latents"):
        decoder.run({"latents": torch.zeros(2, 4, 16, 8)})


def test_bfloat16_takes_the_opset_that_knows_it(pipe, tmp_path):
    import onnx

    source = source_of(pipe, torch.bfloat16)
    given = options(dtype="bfloat16", flavours=("plain",), components=("unet", "text_projector"), size=(40, 24))
    manifest = pipeline.export_onnx(source, tmp_path / "brain", given)
    assert manifest.dtype == "bfloat16" and [graph.opset for graph in manifest.graphs] == [22, 22]
    assert manifest.graphs[0].fixed == {"height": 6, "width": 10} and not manifest.graphs[1].fixed
    for graph in manifest.graphs:
        path = tmp_path / "brain" / graph.file
        onnx.checker.check_model(str(path))
        model = onnx.load(str(path))
        types = {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
        assert {types[name] for name, dtype, _ in graph.inputs if dtype == "bfloat16"} == {onnx.TensorProto.BFLOAT16}
        assert model.opset_import[0].version == 22


def test_the_texts_of_a_model_with_another_window_are_as_long(pipe, tmp_path):
    pytest.importorskip("onnxruntime")
    short = copy.copy(pipe)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = copy.deepcopy(getattr(pipe, name))
        tokenizer.model_max_length = 20
        setattr(short, name, tokenizer)
    source = source_of(short)
    given = options(flavours=("plain",), components=("unet", "text_projector"))
    manifest = pipeline.export_onnx(source, tmp_path / "short", given)
    unet, projector = manifest.graphs
    assert unet.shape["text_tokens"] == 20 and dict((n, d) for n, _, d in unet.inputs)["text_kv_0"][3] == 20
    assert projector.inputs[0][2] == ("text_pages", 20, 64)
    with sf.Engine.from_pipeline(short, backend="onnxruntime", engines=tmp_path / "short") as engine:
        ours = engine.generate("a cat in neon style", steps=2, size=(32, 48), output="np").images
    expected = sf.Engine.from_pipeline(short).generate("a cat in neon style", steps=2, size=(32, 48), output="np")
    assert psnr(ours, expected.images) >= 60


def counting(made: list):
    """`export_unet` that adds to `made` when it is called."""
    export_unet = pipeline.export_unet

    def counted(*given, **named):
        made.append(None)
        return export_unet(*given, **named)

    return counted


def one_of_two(folder: Path, end, err: Path) -> None:
    """Want an export at the same time as the test, and tell it whether this process made it; run in another process."""
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    source, made = source_of(one_layer_pipeline()), []
    pipeline.export_unet = counting(made)
    end.send("ready")
    end.recv()
    found = pipeline.ensure(source, options(flavours=("plain",), components=("unet",)), folder)
    end.send((len(made), found == folder))


def test_two_processes_that_want_the_same_export_make_it_once(source, tmp_path, monkeypatch, caplog):
    folder, err, made = tmp_path / "engines" / "nano", tmp_path / "err", []
    folder.parent.mkdir()
    end, its_end = forked.pipe()
    other = forked.process(one_of_two, folder, its_end, err)
    other.start()
    its_end.close()
    monkeypatch.setattr(pipeline, "export_unet", counting(made))
    given = options(flavours=("plain",), components=("unet",))
    try:
        assert end.recv() == "ready"
        end.send("go")
        assert pipeline.ensure(source, given, folder) == folder
        assert end.recv() == (1 - len(made), True)
        other.join(300)
    finally:
        other.kill()
        other.join()
    assert other.exitcode == 0
    # whoever came second
    assert "is exported once to" in err.read_text() or "is exported once to" in caplog.text
    caplog.clear()
    check_files(folder, read_manifest(folder))
    # once it is there, nothing is looked at but that
    monkeypatch.setitem(pipeline.EXPORTS, "onnx", None)
    for file in folder.iterdir():
        if file.name != pipeline.MANIFEST:
            file.unlink()
    assert pipeline.ensure(source, options(components=("unet",)), folder) == folder and not caplog.records


def quickly(source, folder, given, progress=None):
    """Stands in for `export_onnx`: an export without graphs."""
    with publishing(folder) as out:
        manifest = pipeline._manifest(source, given, out, [], "any", {})
        out.complete(manifest)
    return manifest


def test_an_export_that_another_process_finished_in_the_meantime_is_taken(source, tmp_path, monkeypatch):
    folder = tmp_path / "nano"

    def overtaken(*given):
        quickly(*given)
        return quickly(*given)  # finds what the other one made

    monkeypatch.setitem(pipeline.EXPORTS, "onnx", overtaken)
    assert pipeline.ensure(source, options(), folder) == folder and read_manifest(folder).graphs == ()


def test_who_waits_for_a_process_that_dies_makes_the_export_itself(source, tmp_path, monkeypatch):
    folder, lock = tmp_path / "nano", tmp_path / "nano.part.lock"
    holder = (
        "import fcntl, os, sys, time; d = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); fcntl.flock(d, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    tried = []

    def counted(*given):
        tried.append(None)
        return quickly(*given)

    monkeypatch.setitem(pipeline.EXPORTS, "onnx", counted)
    held = pipeline._held

    def held_by_one_that_dies_then(lock):
        answer = held(lock)
        process.kill()  # which leaves the lock's file behind
        process.wait()
        return answer

    monkeypatch.setattr(pipeline, "_held", held_by_one_that_dies_then)
    try:
        assert pipeline.ensure(source, options(), folder) == folder and len(tried) == 2
    finally:
        process.kill()
        process.communicate()


def test_an_export_that_fails_fails_at_once_and_with_its_own_error(source, tmp_path, monkeypatch):
    def refused(*given):
        raise ExportError("the graph is not valid")

    monkeypatch.setitem(pipeline.EXPORTS, "onnx", refused)
    (tmp_path / "nano.part.lock").touch()  # of a process that died long ago
    with pytest.raises(ExportError, match="the graph is not valid"):
        pipeline.ensure(source, options(), tmp_path / "nano")


@pytest.fixture(scope="module")
def engines(pipe, tmp_path_factory):
    """(folder, manifest, source, log): real engines for two chips, stopped before the second and gone on with."""
    pytest.importorskip("tensorrt_rtx")
    folder, log = tmp_path_factory.mktemp("tensorrt") / "nano", Log()
    source, build = source_of(pipe, torch.float16), pipeline.build_engine
    given = options("tensorrt", dtype="float16", targets=TARGETS, profiles=("rows=1:2:4,size=32x32:64x64:64x96",))
    built = []

    def stopping(graph, *rest, **named):
        if built:
            raise KeyboardInterrupt
        built.append(graph)
        return build(graph, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "build_engine", stopping)
        with pytest.raises(KeyboardInterrupt):
            pipeline.export_tensorrt(source, folder, given)
    assert not folder.exists() and source.unet.device.type == "cpu"
    left = files_of(folder.with_name("nano.part"))
    assert left == {RECORD, "unet-live.sm89-sm120.engine"}
    manifest = pipeline.export_tensorrt(source, folder, given, log, keep_source=False)
    return folder, manifest, source, log


def test_engines_for_two_chips_take_the_graphs_inputs_and_have_their_attention_fused(engines):
    folder, manifest, source, _ = engines
    layers = len(source.unet.layout.layers)
    for flavour in ("live", "banked"):
        graph = manifest.graph("unet", flavour)
        build, shape = graph.extra["build"], GraphShape(flavour, 1, 2, 77)
        assert {name: (kind, tuple(dims)) for name, kind, dims in build["network"]["inputs"]} == {
            x.name: (NAMES[x.dtype], tuple(-1 if isinstance(d, str) else d for d in x.dims))
            for x in graph_inputs(source.unet, shape)
        }
        # to rows and pages, to text, and to two pictures each
        assert build["network"]["attentions"] == 4 * layers and not build["network"]["plugins"]
        assert build["layers"]["fused_attentions"] >= 2 * layers and not build["layers"]["plugins"]
        assert build["targets"] == list(TARGETS) and build["package"] == "tensorrt_rtx"
        profile = graph.extra["profiles"][0]
        assert profile["rows"] == [1, 2, 4] and profile["height"] == [8, 16, 24] and profile["width"] == [8, 16, 16]
        assert graph.file == f"unet-{flavour}.sm89-sm120.engine"


def test_a_folder_of_engines_says_what_they_were_built_for(engines):
    folder, manifest, source, _ = engines
    assert read_manifest(folder).digest == manifest.digest
    check_files(folder, manifest)
    assert (manifest.kind, manifest.target, manifest.dtype) == ("tensorrt", "sm89,sm120", "float16")
    assert manifest.fingerprint == source.fingerprint and manifest.profiles.keys() == {"unet-live", "unet-banked"}
    assert manifest.profiles["unet-live"] == manifest.graphs[0].extra["profiles"]
    assert {"torch", "onnx", "tensorrt_rtx"} == manifest.toolchain.keys()
    names = {"unet-live.sm89-sm120.engine", "unet-banked.sm89-sm120.engine", pipeline.TIMING_CACHE}
    assert files_of(folder) == {MANIFEST, *names} and files_of(folder.parent) == {f"nano/{n}" for n in files_of(folder)}


def test_engines_gone_on_with_are_built_from_the_graphs_that_are_missing(engines):
    *_, log = engines
    assert "goes on with" in log.said[0] and "unet-live" in log.said[0]
    assert [name for name, *_ in log.graphs] == ["graph of unet-banked", "unet-live", "unet-banked", ""]


def test_a_source_that_is_not_kept_gives_its_weights_away_before_the_builder_starts(engines):
    assert {x.device.type for x in engines[2].unet.parameters()} == {"meta"}


def test_an_engine_is_built_from_graphs_that_are_there(runs, source, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    given = options("tensorrt", targets=("sm86",), flavours=("plain",), onnx=runs.folder)
    manifest = pipeline.export_tensorrt(source, tmp_path / "ampere", given)
    (graph,) = manifest.graphs
    assert manifest.target == "sm86" and graph.file == "unet-plain.sm86.engine" and graph.opset == 20
    assert manifest.profiles["unet-plain"][0]["width"] == [16, 16, 16]
    assert files_of(tmp_path / "ampere") == {MANIFEST, pipeline.TIMING_CACHE, graph.file}
    check_files(runs.folder, runs.manifest)


def test_graphs_that_do_not_fit_are_not_built_from(runs, source, half, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    given = options("tensorrt", targets=("sm89",), flavours=("live",), onnx=runs.folder)
    with pytest.raises(EngineMismatch, match="other weights"):
        pipeline.export_tensorrt(replace(source, fingerprint="0" * 64), tmp_path / "engines", given)
    with pytest.raises(EngineMismatch, match="has dtype float32, the model float16"):
        pipeline.export_tensorrt(half, tmp_path / "engines", replace(given, dtype="float16"))
    lone = tmp_path / "graphs"
    quickly(source, lone, options())
    with pytest.raises(EngineMismatch, match="has no UNet of flavour live; export it there first"):
        pipeline.export_tensorrt(source, tmp_path / "engines", replace(given, onnx=lone))
    assert nothing_at(tmp_path / "engines")


def compiled(unet, shape, path, *, fixed, device, weights):
    """Stands in for the compiler."""
    assert not weights and device == torch.device("cpu")
    path.write_bytes(shape.flavour.encode())
    inputs, outputs = tuple(graph_inputs(unet, shape)), (graph_output(unet),)
    return AotiReport(path, 5, 1.234, "cpu", {}, inputs, outputs, {"stylefast.geglu.default": 4}, weights)


def test_packages_share_the_models_weights_and_are_gone_on_with(source, tmp_path, monkeypatch):
    given = options("aoti", targets=("cpu",), size=NATIVE)
    monkeypatch.setattr(
        aoti,
        "export_aoti",
        lambda unet, shape, *rest, **named: (
            compiled(unet, shape, *rest, **named)
            if shape.flavour == "live"
            else (_ for _ in ()).throw(ExportError("no"))
        ),
    )
    with pytest.raises(ExportError, match="no"):
        pipeline.export_aoti(source, tmp_path / "packages", given)
    assert files_of(tmp_path) == {f"packages.part/{name}" for name in (RECORD, "unet-live.pt2")}
    made = []
    monkeypatch.setattr(
        aoti,
        "export_aoti",
        lambda unet, shape, *rest, **named: made.append(shape.flavour) or compiled(unet, shape, *rest, **named),
    )
    manifest = pipeline.export_aoti(source, tmp_path / "packages", given)
    assert made == ["banked", "plain"] and read_manifest(tmp_path / "packages") == manifest
    assert (manifest.kind, manifest.target) == ("aoti", "cpu") and manifest.toolchain == {"torch": torch.__version__}
    assert [graph.file for graph in manifest.graphs] == ["unet-live.pt2", "unet-banked.pt2", "unet-plain.pt2"]
    for graph in manifest.graphs:
        assert graph.extra["weights"] is False and graph.extra["seconds"] == 1.2
        assert graph.fixed == {"height": 16, "width": 16} and graph.shape["text_tokens"] == 77


OTHER_MACHINES = {
    "instructions": ("cpu_instructions", lambda: ["avx2"]),
    "a system": ("machine", lambda: "Linux riscv64"),
    "a chip": ("target_of", lambda device: "sm89"),
    "a compiler of kernels": ("versions", lambda *packages: {"triton": "0"}),
}


@pytest.mark.parametrize("fact, there", OTHER_MACHINES.values(), ids=OTHER_MACHINES)
def test_what_was_compiled_on_another_machine_is_neither_gone_on_with_nor_found(
    source, tmp_path, monkeypatch, fact, there
):
    monkeypatch.setenv("STYLEFAST_CACHE", str(tmp_path / "cache"))
    given, made, found = options("aoti", targets=("cpu",), flavours=("live", "plain")), [], []
    monkeypatch.setattr(pipeline, "ensure", lambda source, options, folder: folder)

    def compile_(unet, shape, *rest, **named):
        made.append(shape.flavour)
        if made == ["live", "plain"]:
            raise ExportError("stopped")
        return compiled(unet, shape, *rest, **named)

    monkeypatch.setattr(aoti, "export_aoti", compile_)
    with pytest.raises(ExportError, match="stopped"):
        pipeline.export_aoti(source, tmp_path / "packages", given)
    found += [choice._exported_folder(kind, source) for kind in ("aoti", "onnx")]
    monkeypatch.setattr(aoti, fact, there)
    pipeline.export_aoti(source, tmp_path / "packages", given)
    assert made == ["live", "plain", "live", "plain"]
    found += [choice._exported_folder(kind, source) for kind in ("aoti", "onnx")]
    # ONNX graphs are no code, and fit every machine
    assert found[0] != found[2] and found[1] == found[3]


def test_of_several_gpus_the_one_with_the_model_is_compiled_for(source, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    there = SimpleNamespace(identity=source.identity, unet=SimpleNamespace(device=torch.device("cuda", 1)))
    assert pipeline.identity(there, options("aoti", targets=("cuda",)))["made on"]["target"] == "sm90"
    assert asked == [torch.device("cuda", 1)]


@pytest.mark.slow
def test_a_real_package_makes_the_pictures_of_pytorch(tmp_path):
    pipe = nano_pipeline()
    manifest = pipeline.export_aoti(
        source_of(pipe), tmp_path / "packages", options("aoti", targets=("cpu",), flavours=("live",))
    )
    (graph,) = manifest.graphs
    assert any("shared_attention" in name for name in graph.extra["operations"]) and graph.extra["seconds"] > 0
    every = [request(p, seed=i, style=sf.StyleAligned()) for i, p in enumerate(("a cat", "a dog"))]
    with sf.Engine.from_pipeline(pipe, backend="aoti", engines=tmp_path / "packages") as engine:
        expected = sf.Engine.from_pipeline(pipe).generate(every, output="np").images
        assert psnr(engine.generate(every, output="np").images, expected) >= 60


@pytest.mark.parametrize(
    "kind, given, error, message",
    [
        ("onnx", {"components": ("image_encoder",)}, ModelError, "has no image_encoder; give an IP-Adapter"),
        ("onnx", {"references": 17}, InvalidRequest, "references is 17"),
        ("tensorrt", {"targets": ("sm89",), "profiles": ("rows=1:4:100000",)}, InvalidRequest, "not within 1 to"),
        ("tensorrt", {"targets": ("sm89",), "profiles": ("size=32x32:66x64:72x72",)}, InvalidRequest, "multiples of 4"),
        ("tensorrt", {"targets": ("sm89", "sm90")}, InvalidRequest, "the one GPU that is present"),
        ("tensorrt", {"targets": ("sm89",), "refit": True}, EngineMismatch, "takes a GPU to build"),
        ("aoti", {"targets": ("cuda",)}, InvalidRequest, "machine that has one, and this has none"),
    ],
    ids=[
        "a part that is missing",
        "too many references",
        "too many rows",
        "half a latent",
        "two packages at once",
        "weights that can be replaced",
        "a package for a GPU",
    ],
)
def test_what_can_not_be_leaves_nothing_behind(pipe, tmp_path, monkeypatch, kind, given, error, message):
    if kind == "tensorrt":
        pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(error, match=message):
        pipeline.EXPORTS[kind](source_of(pipe), tmp_path / "engines", options(kind, **given))
    assert nothing_at(tmp_path / "engines")


def test_a_chip_of_data_centres_takes_its_own_package_and_a_gpu(source, tmp_path, monkeypatch):
    given = options("tensorrt", targets=("sm90",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match="pip install tensorrt"):
        pipeline.export_tensorrt(source, tmp_path / "engines", given)
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(EngineMismatch, match="sm90 was asked for, and no GPU is present"):
        pipeline.export_tensorrt(source, tmp_path / "engines", given)
    assert nothing_at(tmp_path / "engines")


def test_too_little_room_on_the_disk_is_said_before_anything_is_made(source, tmp_path, monkeypatch):
    from stylefast.export import folder

    usage = folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(pipeline, "export_unet", None)
    with pytest.raises(ExportError, match="takes another .* GB, and the disk of"):
        pipeline.export_onnx(source, tmp_path / "graphs", options())
    assert nothing_at(tmp_path / "graphs")
