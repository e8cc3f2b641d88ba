"""`stylefast export`, up to where graphs are made, and what `info` and `generate` say of export folders."""

import argparse
import importlib.util
import json
import shlex
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

import stylefast.export
from stylefast.commands import generate
from stylefast.commands.generate import ModelChoice
from stylefast.engine import Engine
from stylefast.errors import ExportError, InvalidRequest
from stylefast.export.folder import publishing
from stylefast.export.manifest import GraphEntry, Manifest, read_manifest

KINDS = ("onnx", "tensorrt", "aoti", "triton-repo")


def export_files(source, folder, options, progress):
    """Stands in for the pipeline: small files in place of graphs, everything else as it is."""
    arguments = options.to_json() | source.identity()
    graphs = []
    with publishing(folder, options.overwrite, arguments=arguments, say=progress.say) as export:
        for i, shape in enumerate(options.shapes):
            file = f"unet-{shape.flavour}.{options.kind}"
            progress.graph(file, i, len(options.shapes))
            progress.phase(1, 2, "tracing")
            progress.phase(0, 0, "writing")
            if export.finished(file) is None:
                (export.path / file).write_bytes(file.encode())
                export.record(file, [file])
            if options.opset == 21:
                raise ExportError("the second graph can't be built")
            graphs.append(GraphEntry("unet", file, (file,), shape.to_dict(), fixed=source.fixed(options), opset=20))
        progress.graph("done", len(options.shapes), len(options.shapes))
        target = ",".join(options.targets) or "any"
        manifest = Manifest(
            options.kind,
            source.version,
            source.name,
            source.fingerprint,
            options.dtype,
            target,
            {"maker": "1.0"},
            tuple(graphs),
            export.files,
        )
        export.complete(manifest)
    return manifest


@pytest.fixture
def pipeline(monkeypatch):
    """The stand-in in the pipeline's place; it collects its calls."""
    calls = []

    def recorded(*call, keep_source=True):
        calls.append(call)
        return export_files(*call)

    names = ("export_onnx", "export_tensorrt", "export_aoti", "export_triton_repo")
    module = SimpleNamespace(calls=calls, silent_exporters=nullcontext, **{name: recorded for name in names})
    monkeypatch.setitem(sys.modules, "stylefast.export.pipeline", module)
    monkeypatch.setattr(stylefast.export, "pipeline", module, raising=False)
    return module


@pytest.fixture
def export(stylefast, model_folder, pipeline):
    """Runs `stylefast export` on the small model; (exit code, stdout, stderr)."""

    def run(kind, *words):
        return stylefast("export", kind, "--model", model_folder, *words)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_help_with_an_example(stylefast, kind):
    code, out, _ = stylefast("export", kind, "--help")
    assert code == 0 and f"  stylefast export {kind} " in out and "--overwrite" in out


@pytest.mark.parametrize(
    "kind, words",
    [("onnx", ()), ("tensorrt", ("--target", "sm89,sm120")), ("aoti", ("--target", "cpu")), ("triton-repo", ())],
)
def test_an_export_prints_its_folder_and_tells_what_was_made(export, pipeline, model_folder, tmp_path, kind, words):
    out_folder = tmp_path / "engines"
    code, out, err = export(kind, *words, "--out", out_folder)
    assert code == 0, err
    assert out.strip() == str(out_folder)
    manifest = read_manifest(out_folder)
    ((source, folder, options, _),) = pipeline.calls
    assert options.kind == manifest.kind == kind and folder == out_folder
    assert source.fingerprint == manifest.fingerprint and manifest.stylefast
    lines = err.splitlines()
    estimate = next(i for i, line in enumerate(lines) if line.startswith("estimate: "))
    assert "of memory" in lines[estimate] and "of disk" in lines[estimate]
    assert manifest.digest in err and "unet-live" in err
    use = "tritonserver --model-repository" if kind == "triton-repo" else "stylefast generate 'a fish' --backend"
    assert use in lines[-1] and str(out_folder) in lines[-1]


def test_the_last_line_is_a_command_that_generate_understands(export, model_folder, tmp_path):
    _, _, err = export("onnx", "--dtype", "bfloat16", "--out", tmp_path / "engines")
    words = shlex.split(err.splitlines()[-1])
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    choice = ModelChoice.of(parser.parse_args(words[2:]))
    assert (choice.options["backend"], choice.options["engines"]) == ("onnxruntime", str(tmp_path / "engines"))
    assert (choice.model, choice.options["dtype"]) == (str(model_folder), "bfloat16")


def test_options_reach_the_pipeline(export, pipeline, tmp_path):
    words = (
        "--flavour",
        "plain, live",
        "--references",
        2,
        "--segments",
        0,
        "--size",
        "64x128",
        "--dtype",
        "bfloat16",
        "--profile",
        "rows=1:2:4,size=64x64",
        "--profile",
        "rows=8",
        "--target",
        "sm86",
        "--opset",
        "22",
        "--lora-rank",
        "40",
        "--lora-slots",
        3,
        "--max-text-chunks",
        4,
    )
    code, _, err = export("tensorrt", *words, "--out", tmp_path / "engines", "--quiet")
    assert code == 0 and err == ""
    options = pipeline.calls[0][2]
    assert options.flavours == ("plain", "live") and (options.references, options.segments) == (2, 0)
    assert (options.lora_rank, options.lora_slots, options.max_text_chunks) == (48, 3, 4)
    assert options.size == (64, 128) and options.dtype == "bfloat16" and options.opset == 22
    assert options.components == ("unet",) and options.targets == ("sm86",)
    assert options.profiles == ("rows=1:2:4,size=64x64", "rows=8")
    words = ("--components", "unet, vae_decoder", "--out", tmp_path / "graphs", "--quiet")
    assert export("onnx", *words)[0] == 0 and pipeline.calls[1][2].components == ("unet", "vae_decoder")


def test_types_default_to_those_of_the_device(export, pipeline, tmp_path):
    for kind, *words in (("tensorrt", "--target", "sm89"), ("aoti", "--target", "cpu")):
        assert export(kind, *words, "--out", tmp_path / kind, "--quiet")[0] == 0
    assert [call[2].dtype for call in pipeline.calls] == ["float16", "float32"]


def test_the_folder_is_named_after_model_and_kind(stylefast, pipeline, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = stylefast("export", "onnx", "--model", model_folder, "--quiet", "--flavour", "live")
    assert code == 0, err
    assert out.strip() == str(tmp_path / f"{model_folder.name}-onnx")


@pytest.mark.parametrize(
    "kind, words, message",
    [
        ("onnx", ("--flavour", "dead"), "flavours is 'dead'"),
        ("onnx", ("--flavour", "live,"), "--flavour is 'live,'"),
        ("onnx", ("--size", "large"), "WIDTHxHEIGHT"),
        ("onnx", ("--size", "60x64"), "width is 60; it must be divisible by 8"),
        ("onnx", ("--target", "sm89"), "unrecognized arguments: --target"),
        ("onnx", ("--opset", "12"), "opset is 12"),
        ("onnx", ("--segments", "99"), "segments is 99"),
        ("onnx", ("--lora-rank", "256"), "lora_rank is 256"),
        ("onnx", ("--lora-slots", "2"), "lora_rank is 0 and lora_slots 2"),
        ("onnx", ("--max-text-chunks", "17"), "max_text_chunks is 17"),
        ("triton-repo", ("--lora-rank", "16"), "unrecognized arguments: --lora-rank"),
        ("tensorrt", ("--target", "4090"), "there is no target '4090'; there are sm75"),
        ("tensorrt", ("--target", "sm89", "--profile", "rows=9:1:1"), "9:1:1"),
        ("aoti", ("--target", "sm89"), "target is sm89; AOTInductor compiles for one of cpu, cuda"),
        ("triton-repo", ("--runner", "magic"), "invalid choice: 'magic'"),
        ("wasm", (), "invalid choice: 'wasm'"),
    ],
)
def test_bad_options_are_one_line_before_a_model_is_loaded(stylefast, pipeline, tmp_path, kind, words, message):
    code, out, err = stylefast("export", kind, *words, "--model", tmp_path / "gone", "--out", tmp_path / "engines")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "engines").exists() and not pipeline.calls


def test_a_target_is_demanded_where_no_gpu_tells_one(stylefast, pipeline, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = stylefast("export", "tensorrt")
    assert code == 2 and "--target sm89" in err


def test_an_export_that_exists_is_kept_before_a_model_is_loaded(stylefast, export, tmp_path):
    assert export("onnx", "--out", tmp_path / "engines", "--quiet")[0] == 0
    before = read_manifest(tmp_path / "engines")
    code, _, err = stylefast("export", "onnx", "--model", tmp_path / "gone", "--out", tmp_path / "engines")
    assert code == 2 and "--overwrite" in err and err.count("\n") == 1
    code, _, err = export("onnx", "--out", tmp_path / "engines", "--overwrite", "--flavour", "plain", "--quiet")
    assert code == 0 and read_manifest(tmp_path / "engines").digest != before.digest


def test_a_failed_export_is_one_line_and_goes_on_the_next_time(export, tmp_path, monkeypatch):
    code, out, err = export("onnx", "--opset", "21", "--out", tmp_path / "engines", "--quiet")
    assert (code, out) == (1, "") and err == "error: the second graph can't be built\n"
    assert not (tmp_path / "engines").exists()
    code, _, err = export("onnx", "--opset", "21", "--out", tmp_path / "engines")
    assert "goes on with" in err and "unet-live.onnx" in err


@pytest.mark.parametrize(
    "package, kind, words",
    [
        ("onnxscript", "onnx", ()),
        ("onnx", "tensorrt", ("--target", "sm89")),
        ("tensorrt_rtx", "tensorrt", ("--target", "sm89")),
    ],
)
def test_missing_packages_are_named_before_a_model_is_loaded(stylefast, monkeypatch, tmp_path, package, kind, words):
    find, load = importlib.util.find_spec, importlib.import_module

    def absent(name, *others):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return load(name, *others)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find(name))
    monkeypatch.setattr("importlib.import_module", absent)
    code, _, err = stylefast("export", kind, *words, "--model", tmp_path / "gone", "--out", tmp_path / "engines")
    assert package in err
    assert code == 1 and "pip install 'stylefast[export]'" in err


def test_engines_that_take_a_gpu_to_build_are_refused_before_a_model_is_loaded(stylefast, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ("--model", tmp_path / "gone", "--target", "sm89", "--refit", "--out", tmp_path / "engines")
    code, _, err = stylefast("export", "tensorrt", *words)
    assert code == 1 and "takes a GPU to build" in err and err.count("\n") == 1


def test_too_little_memory_is_a_warning(export, tmp_path, monkeypatch):
    monkeypatch.setattr("stylefast.models.weight_files.available_memory", lambda device: 3 * 10**7)
    code, _, err = export("onnx", "--out", tmp_path / "engines", "--dtype", "float32")
    warning = next(line for line in err.splitlines() if line.startswith("warning: "))
    assert code == 0 and "0.6 GB more memory" in warning and "0.03 GB are free" in warning


@pytest.fixture
def graphs(export, tmp_path):
    """An ONNX export to build from: live and plain, in bfloat16, with 3 references, 1 segment, 2 LoRAs of rank 16."""
    words = ("--dtype", "bfloat16", "--flavour", "live,plain", "--references", 3, "--segments", 1, "--lora-rank", 16)
    code, _, err = export("onnx", *words, "--out", tmp_path / "graphs", "--quiet")
    assert code == 0, err
    return tmp_path / "graphs"


def test_engines_from_graphs_take_over_what_these_settle(export, pipeline, graphs, tmp_path):
    words = ("--onnx", graphs, "--target", "sm89", "--out", tmp_path / "engines", "--quiet")
    code, _, err = export("tensorrt", *words)
    assert code == 0, err
    options = pipeline.calls[-1][2]
    assert options.dtype == "bfloat16" and options.flavours == ("live", "plain") and options.onnx == graphs
    assert (options.references, options.segments) == (3, 1)
    assert (options.lora_rank, options.lora_slots, options.max_text_chunks) == (16, 2, 1)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--dtype", "float16"), "has dtype bfloat16, the model float16"),
        (("--flavour", "banked"), "has no UNet of flavour banked; it has live, plain"),
        (("--references", "2"), "was exported with 3 references, not 2"),
        (("--lora-rank", "32"), "was exported with 16 ranks of a LoRA, not 32; drop --lora-rank"),
        (("--lora-slots", "1"), "was exported with 2 LoRAs per picture, not 1; drop --lora-slots"),
        (("--max-text-chunks", "2"), "was exported with 1 chunks of a text, not 2; drop --max-text-chunks"),
        (("--size", "64x64"), "are those of the graphs in onnx"),
    ],
)
def test_options_that_contradict_the_graphs_are_refused(stylefast, graphs, tmp_path, words, message):
    code, _, err = stylefast(
        "export",
        "tensorrt",
        "--model",
        tmp_path / "gone",
        "--onnx",
        graphs,
        "--target",
        "sm89",
        "--out",
        tmp_path / "engines",
        *words,
    )
    assert code in (1, 2) and message in err and err.count("\n") == 1


def test_graphs_of_another_model_are_refused(stylefast, graphs, tmp_path):
    code, _, err = stylefast(
        "export",
        "tensorrt",
        "--model",
        "tiny",
        "--onnx",
        graphs,
        "--target",
        "sm89",
        "--out",
        tmp_path / "engines",
        "--quiet",
    )
    assert code == 1 and "made from other weights" in err and not (tmp_path / "engines").exists()
    code, _, err = stylefast("export", "tensorrt", "--onnx", tmp_path / "gone", "--target", "sm89")
    assert code == 1 and "there is no export at" in err


def test_info_says_what_a_whole_export_holds(stylefast, export, tmp_path):
    folder = tmp_path / "engines"
    export("tensorrt", "--target", "sm89", "--size", "fixed", "--out", folder, "--quiet")
    code, out, _ = stylefast("info", "--engines", folder)
    manifest = read_manifest(folder)
    assert code == 0 and "all 2 unchanged since they were written" in out and "loads without --trust" in out
    assert manifest.digest in out and "unet-banked: unet-banked.tensorrt (20 bytes)" in out and "sm89" in out
    assert "only height 16, width 16" in out
    code, out, _ = stylefast("info", "--engines", folder, "--json")
    found = json.loads(out)
    assert code == 0 and found["unaltered"] and found["untrusted"] is None and found["digest"] == manifest.digest
    assert [graph["label"] for graph in found["manifest"]["graphs"]] == ["unet-live", "unet-banked"]


def test_info_says_which_loras_and_texts_a_graph_takes(stylefast, export, tmp_path):
    words = ("--lora-rank", 20, "--lora-slots", 1, "--max-text-chunks", 4, "--flavour", "live", "--quiet")
    assert export("onnx", *words, "--out", tmp_path / "engines")[0] == 0
    code, out, _ = stylefast("info", "--engines", tmp_path / "engines")
    assert code == 0 and "1 reference, 2 segments, 1 LoRA of rank 32, texts of 4 chunks" in out
    (graph,) = json.loads(stylefast("info", "--engines", tmp_path / "engines", "--json")[1])["manifest"]["graphs"]
    assert (graph["shape"]["lora_rank"], graph["shape"]["lora_slots"], graph["shape"]["text_chunks"]) == (32, 1, 4)


def test_info_names_every_file_that_is_not_as_it_was(stylefast, export, tmp_path):
    folder = tmp_path / "engines"
    export("tensorrt", "--target", "sm89", "--out", folder, "--quiet")
    (folder / "unet-live.tensorrt").write_bytes(b"unet-LIVE.tensorrt")
    (folder / "unet-banked.tensorrt").unlink()
    folder.chmod(0o777)
    code, out, _ = stylefast("info", "--engines", folder)
    assert code == 1 and "altered: " in out and "missing file: " in out and "others can write to" in out
    code, _, err = stylefast("info", "--engines", tmp_path / "gone")
    assert code == 1 and "there is no export at" in err
    code, _, err = stylefast("info", "--engines", folder, "--bank", "x.bank")
    assert code == 2 and "can't be combined" in err


def test_info_lists_the_runtimes(stylefast):
    packages = json.loads(stylefast("info", "--json")[1])["packages"]
    assert {"onnx", "onnxruntime", "tensorrt", "tensorrt-rtx"} <= set(packages)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--engines", "x"), "--engines is used by the backends onnxruntime, tensorrt, aoti; give --backend"),
        (("--engines", "x", "--backend", "compile"), "--engines is used by the backends"),
        (("--backend", "tensorrt"), "--backend tensorrt needs --engines FOLDER"),
        (("--backend", "onnxruntime", "--trust", "ab"), "--trust applies to the folder of --engines"),
        (("--backend", "aoti", "--engines", "x", "--trust", "ab"), "--trust is 'ab'; a digest is 64 hex digits"),
    ],
)
@pytest.mark.parametrize("command", [("generate", "a cat"), ("bake", "--style-prompt", "a cat"), ("demo",)], ids=str)
def test_engines_that_no_backend_reads_are_refused(stylefast, tmp_path, monkeypatch, command, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = stylefast(*command, *words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_engines_and_trust_reach_the_engine_only_when_given(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(Engine, "from_pretrained", lambda source, **options: asked.append(options))
    given = {"backend": "aoti", "engines": str(tmp_path), "trust": "ab" * 32}
    ModelChoice(options=given).load()
    ModelChoice(options={"backend": "onnxruntime"}).load()
    assert asked == [given, {"backend": "onnxruntime"}] and ModelChoice(options=given).recorded() == {"model": "tiny"}
    with pytest.raises(InvalidRequest):
        ModelChoice(options={"backend": "torch", "engines": str(tmp_path)})
