"""AOTInductor packages: the same numbers as PyTorch, in a process that compiles nothing, and for no other machine."""

import errno
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
import torch._inductor.config as inductor

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, MissingDependency
from stylefast.export import aoti
from stylefast.export.aoti import AotiSession, export_aoti, package_facts
from stylefast.export.unet_graph import GraphShape, example_inputs, with_tokens
from stylefast.kernels.registry import operation
from stylefast.models.prepacked import pack
from stylefast.models.unet import UNet
from tests.support.fp64 import close
from tests.support.small_graphs import in_pytorch
from tests.support.small_sdxl import small_unet_config

# compiling a second level, which adds sampling to the code, takes as long as all else
FLAVOURS = [("banked", 1), *(pytest.param(f, 2, marks=pytest.mark.slow) for f in ("plain", "live", "banked"))]
ROWS, SIZES = (1, 3, 8), ((8, 8), (9, 14))


def micro_unet(seed=0, dtype=torch.float32, levels=1):
    """One attention layer in the middle; two levels, with three, hold every kind of code that there is to compile."""
    config = small_unet_config(
        widths=(32, 64)[:levels],
        depth=(1, 2)[:levels],
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
    )
    with torch.device("meta"):
        shapes = UNet(config).state_dict()
    draw, state = torch.Generator().manual_seed(seed), {}
    for name, x in shapes.items():
        noise = torch.randn(x.shape, generator=draw)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = (0.1 * noise + centre if x.ndim == 1 else noise * x[0].numel() ** -0.5).to(dtype)
    return UNet.from_state(config, state)


def inputs_of(unet, shape, rows, size=(8, 8), pages=2, seed=0):
    counts = {"rows": rows, "text_pages": rows, "image_pages": 2, "image_tokens": 4, "masks": 2, "pages": pages}
    sizes = with_tokens(unet, counts | {"height": size[0], "width": size[1]})
    return example_inputs(unet, shape, sizes, seed)


def error(result, reference):
    return (result.double() - reference).square().mean().sqrt().item()


def quickly(unet, shape, path, **options):
    """What calls the generated kernels needs no optimisation here."""
    with inductor.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        return export_aoti(unet, shape, path, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def package(folder):
    """(flavour, levels) -> a package without weights, made from a UNet without any."""

    @cache
    def package(flavour, levels):
        path = folder / f"{flavour}-{levels}.pt2"
        # what LoRAs and long texts add takes a second of the smaller model
        more = {"text_chunks": 2, "lora_rank": 32, "lora_slots": 2} if levels == 1 else {}
        shape = GraphShape(flavour, 2, 2, **more)
        quickly(micro_unet(levels=levels).to("meta"), shape, path, weights=False)
        return path

    return lambda flavour="banked", levels=1: package(flavour, levels)


@pytest.fixture
def session(package):
    opened = AotiSession(package())
    opened.set_weights(micro_unet().state_dict())
    yield opened
    opened.close()


def rewritten(package, path, **facts):
    """A copy of a package that says something else of itself."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("_metadata.json"):
                data = json.loads(data)
                data["stylefast"] = json.dumps(json.loads(data["stylefast"]) | facts)
                data = json.dumps(data).encode()
            new.writestr(name, data)
    return path


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("flavour", "levels"), FLAVOURS)
def test_a_package_errs_no_more_than_twice_as_much_as_pytorch(package, flavour, levels, rows, size):
    unet, opened = micro_unet(levels=levels), AotiSession(package(flavour, levels))
    opened.set_weights(unet.state_dict())
    inputs = inputs_of(unet, opened.shape, rows, size, pages=rows, seed=rows)
    close(opened.run(inputs)["output"], in_pytorch(unet, opened.shape, inputs))


def test_the_operations_are_calls_and_not_compiled(package):
    facts = package_facts(package())
    wanted = {"shared_attention", "gated_cross_attention", "adain_affine", "group_norm_silu", "geglu", "row_lora"}
    assert wanted <= facts["operations"].keys()
    assert facts["target"] == "cpu" and facts["toolchain"]["torch"] == torch.__version__
    assert package().stat().st_size < 20e6


def test_a_fresh_process_runs_a_package_without_any_compiler(package, tmp_path):
    unet = micro_unet()
    shape = GraphShape(**package_facts(package())["shape"])
    torch.save((unet.state_dict(), inputs_of(unet, shape, 3)), tmp_path / "given.pt")
    program = f"""
        import shutil, sys, torch
        from stylefast.export.aoti import AotiSession
        assert not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cc"))
        weights, inputs = torch.load({str(tmp_path / "given.pt")!r})
        session = AotiSession({str(package())!r})
        session.set_weights(weights)
        torch.save(session.run(inputs)["output"], {str(tmp_path / "made.pt")!r})
        assert "torch._inductor.compile_fx" not in sys.modules
    """
    (tmp_path / "empty").mkdir()
    cache = tmp_path / "cache"
    hidden = {"PATH": str(tmp_path / "empty"), "TORCH_COMPILE_DISABLE": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    bare = {name: value for name, value in os.environ.items() if name != "CXX"} | hidden
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, env=bare)
    assert not cache.exists() or not list(cache.iterdir())
    close(torch.load(tmp_path / "made.pt"), in_pytorch(unet, shape, inputs_of(unet, shape, 3)))


def test_other_weights_need_no_other_package(session):
    inputs = inputs_of(micro_unet(), session.shape, 2)
    first = session.run(inputs)["output"]
    other = micro_unet(seed=1)
    assert session.set_weights(other.state_dict()) == 0
    second = session.run(inputs)["output"]
    close(second, in_pytorch(other, session.shape, inputs))
    assert not torch.allclose(first, second, atol=0.1)


@pytest.mark.parametrize("name", ["conv_out.bias", "conv_in.weight", "mid_block.attentions.0.proj_in.weight"])
def test_what_is_written_to_shared_weights_counts_at_the_next_run(package, name):
    unet, opened = micro_unet(), AotiSession(package())
    opened.set_weights(unet.state_dict())
    inputs = inputs_of(unet, opened.shape, 2)
    before = opened.run(inputs)["output"]
    with torch.no_grad():
        unet.get_parameter(name).mul_(2.0)
    after = opened.run(inputs)["output"]
    close(after, in_pytorch(unet, opened.shape, inputs))
    assert not torch.allclose(after, before, atol=1e-3)


def test_weights_in_another_memory_layout_are_copied_and_counted(session):
    unet = micro_unet(seed=2)
    inputs = inputs_of(unet, session.shape, 2)
    wanted = in_pytorch(unet, session.shape, inputs)
    last = {"memory_format": torch.channels_last}
    state = {name: x.contiguous(**last) if x.ndim == 4 else x for name, x in unet.state_dict().items()}
    moved = sum(x.numel() * 4 for x in state.values() if not x.is_contiguous())
    assert session.set_weights(state) == moved > 0
    close(session.run(inputs)["output"], wanted)


def test_weights_of_another_model_are_refused(session):
    inputs = inputs_of(micro_unet(), session.shape, 1)
    before = session.run(inputs)["output"]
    state = micro_unet().state_dict()
    with pytest.raises(EngineMismatch, match="have no conv_in.bias"):
        session.set_weights({name: x for name, x in state.items() if name != "conv_in.bias"})
    with pytest.raises(EngineMismatch, match=r"conv_in.bias is float32 \[31\].*float32 \[32\]"):
        session.set_weights(state | {"conv_in.bias": torch.zeros(31)})
    with pytest.raises(EngineMismatch, match="conv_in.bias is float16"):
        session.set_weights(state | {"conv_in.bias": torch.zeros(32, dtype=torch.float16)})
    assert torch.equal(session.run(inputs)["output"], before)


def test_a_package_without_weights_says_so_when_it_is_run(package):
    opened = AotiSession(package())
    with pytest.raises(ExportError, match="set_weights"):
        opened.run(inputs_of(micro_unet(), opened.shape, 1))


def test_a_result_is_handed_over_or_copied_to_the_tensor_that_is_given(session):
    inputs = inputs_of(micro_unet(), session.shape, 3)
    made = session.run(inputs)["output"]
    given = torch.full_like(inputs["latents"], torch.nan)
    assert session.run(inputs, {"output": given})["output"] is given
    assert torch.equal(given, made)


def test_inputs_that_are_views_give_the_same_numbers(session):
    inputs = inputs_of(micro_unet(), session.shape, 3)
    wide = {name: torch.stack([x, x], -1)[..., 0] if x.ndim else x for name, x in inputs.items()}
    assert not wide["latents"].is_contiguous()
    assert torch.equal(session.run(wide)["output"], session.run(inputs)["output"])


def test_threads_take_turns(session):
    unet = micro_unet()
    cases = [inputs_of(unet, session.shape, rows, seed=rows) for rows in (1, 2, 3, 4)]
    alone = [in_pytorch(unet, session.shape, inputs) for inputs in cases]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda inputs: session.run(inputs)["output"], cases * 3))
    for one, expected in zip(together, alone * 3, strict=True):
        close(one, expected)


def _with(name, change):
    return lambda inputs: inputs | {name: change(inputs[name])}


@pytest.mark.parametrize(
    "change, kind, text",
    [
        (lambda x: {n: v for n, v in x.items() if n != "self_mode"}, InvalidRequest, "needs input 'self_mode'"),
        (lambda x: x | {"sigma": x["timestep"]}, InvalidRequest, "has no input 'sigma'"),
        (_with("latents", lambda x: x.half()), EngineMismatch, "latents is float16.*exported for float32"),
        (_with("timestep", lambda x: x[:1]), EngineMismatch, r"timestep has shape \[1\].*rows=2"),
        (_with("self_page", lambda x: x[:, :1]), EngineMismatch, r"self_page has shape \[2, 1\]"),
        (_with("text_page", lambda x: x + 9), InvalidRequest, "text_page holds"),
        (_with("adain_page", lambda x: x.fill_(4)), InvalidRequest, r"adain_page holds 4.*\[-1, 3\]"),
        (_with("image_lengths", lambda x: x.fill_(5)), InvalidRequest, "image_lengths holds 5"),
        (_with("text_lengths", lambda x: x.fill_(155)), InvalidRequest, "text_lengths holds 155"),
        (_with("lora_unit", lambda x: x.fill_(99)), InvalidRequest, "lora_unit holds 99"),
        (_with("lora_unit", lambda x: x.repeat(1, 1, 2)), EngineMismatch, "row_units=8"),
    ],
    ids=[
        "an input too few",
        "an input too many",
        "another type",
        "rows that differ",
        "columns that differ",
        "a text page out of range",
        "a style page out of range",
        "a length out of range",
        "a text's length out of range",
        "a unit out of range",
        "units that differ",
    ],
)
def test_bad_input_is_refused_and_the_session_goes_on(session, change, kind, text):
    inputs = inputs_of(micro_unet(), session.shape, 2)
    before = session.run(inputs)["output"]
    with pytest.raises(kind, match=text):
        session.run(change({name: x.clone() for name, x in inputs.items()}))
    assert torch.equal(session.run(inputs)["output"], before)


def test_an_operation_that_fails_is_an_error_and_the_session_goes_on(session, monkeypatch):
    def refuse(backend, arguments):
        raise InvalidRequest("not today")

    inputs = inputs_of(micro_unet(), session.shape, 2)
    before = session.run(inputs)["output"]
    with monkeypatch.context() as changed, pytest.raises(ExportError, match="banked-1.pt2 failed"):
        changed.setattr(operation("geglu"), "refuse", refuse)
        session.run(inputs)
    assert torch.equal(session.run(inputs)["output"], before)


def test_a_pool_that_grows_and_another_mix_need_no_other_package(session):
    unet = micro_unet()
    inputs = inputs_of(unet, session.shape, 2)
    before = session.run(inputs)["output"]
    for name in inputs:
        if name.startswith(("lora_down", "lora_up")):
            inputs[name] = torch.cat([inputs[name], torch.full_like(inputs[name], torch.nan)])
    assert torch.equal(session.run(inputs)["output"], before)
    inputs |= {"lora_unit": inputs["lora_unit"][:, :, :1], "lora_unit_scale": inputs["lora_unit_scale"][:, :1] + 0.5}
    found = session.run(inputs)["output"]
    close(found, in_pytorch(unet, session.shape, inputs))
    assert not torch.allclose(found, before, atol=1e-2)


def test_a_size_beyond_those_exported_is_refused(session):
    unet = micro_unet()
    with pytest.raises(EngineMismatch, match="width is 1026.*8 to 1024"):
        session.run(inputs_of(unet, session.shape, 1, (8, 1026), pages=1))


def test_an_output_of_another_shape_is_refused(session):
    inputs = inputs_of(micro_unet(), session.shape, 2)
    with pytest.raises(InvalidRequest, match="output is float32"):
        session.run(inputs, {"output": torch.zeros(3, 4, 8, 8)})
    with pytest.raises(InvalidRequest, match="no output 'noise'"):
        session.run(inputs, {"noise": torch.zeros(2, 4, 8, 8)})


def test_a_closed_session_says_so(package):
    opened = AotiSession(package())
    opened.set_weights(micro_unet().state_dict())
    assert opened.nbytes == package().stat().st_size
    opened.close()
    opened.close()
    assert opened.nbytes == 0
    with pytest.raises(ExportError, match="closed"):
        opened.run(inputs_of(micro_unet(), opened.shape, 1))


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_truncated_package_is_no_package(package, tmp_path, kept):
    whole, cut = package().read_bytes(), tmp_path / "cut.pt2"
    cut.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ExportError, match="truncated"):
        AotiSession(cut)


def test_files_that_stylefast_has_not_written_are_refused(tmp_path):
    with pytest.raises(ExportError, match="there is no package"):
        AotiSession(tmp_path / "nowhere.pt2")
    torch.save({"a": torch.zeros(3)}, tmp_path / "foreign.pt2")
    with pytest.raises(ExportError, match="not written"):
        AotiSession(tmp_path / "foreign.pt2")


def test_a_package_whose_code_is_damaged_is_an_export_error(package, tmp_path):
    with zipfile.ZipFile(package()) as old, zipfile.ZipFile(tmp_path / "damaged.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x7fELF" if name.endswith(".so") else old.read(name))
    with pytest.raises(ExportError, match="can't load damaged.pt2"):
        AotiSession(tmp_path / "damaged.pt2")


@pytest.mark.parametrize(
    "facts, text",
    [
        ({"toolchain": {"torch": "2.9.1"}}, "PyTorch 2.9.1"),
        ({"target": "sm90"}, "made for sm90"),
        ({"machine": "Linux riscv64"}, "made for Linux riscv64"),
        ({"instructions": ["avx2", "avx1024_f"]}, "a CPU with avx1024_f"),
        ({"operations": {"geglu": "stylefast::geglu(Tensor x, int halves) -> Tensor"}}, "whose geglu takes other"),
        ({"operations": {"tile_attention": ""}}, None),
        ({"format": 2}, "another version of stylefast"),
        ({"shape": {"flavour": "banked", "references": 2}}, "another version of stylefast"),
    ],
    ids=[
        "PyTorch",
        "a GPU",
        "a machine",
        "instructions",
        "operations",
        "operations that it lacks",
        "a format",
        "a graph's shape",
    ],
)
def test_a_package_for_another_machine_or_version_is_a_mismatch(package, tmp_path, facts, text):
    other = rewritten(package(), tmp_path / "other.pt2", **facts)
    if text is None:
        facts["operations"]["tile_attention"] = "stylefast::tile_attention(Tensor x) -> Tensor"
        other, text = rewritten(package(), tmp_path / "other.pt2", **facts), "whose tile_attention"
    with pytest.raises(EngineMismatch, match=text):
        AotiSession(other)


def test_a_package_for_a_cpu_does_not_go_on_a_gpu(package):
    with pytest.raises(EngineMismatch, match="made for cpu, and the device is cuda"):
        AotiSession(package(), "cuda")


@pytest.mark.parametrize(
    "failure, text",
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left"),
        (RuntimeError("the compiler\nhas crashed"), "the compiler has crashed"),
    ],
    ids=["a full disk", "a compiler that crashes"],
)
def test_what_fails_leaves_the_old_package_and_nothing_else(tmp_path, monkeypatch, failure, text):
    (tmp_path / "unet.pt2").write_bytes(b"old")

    def compile_and_package(program, package_path, inductor_configs):
        with open(package_path, "wb") as file:
            file.write(b"half of it")
        raise failure

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    with pytest.raises(ExportError, match=text):
        export_aoti(micro_unet(), GraphShape("plain"), tmp_path / "unet.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["unet.pt2"]
    assert (tmp_path / "unet.pt2").read_bytes() == b"old"


def test_without_a_compiler_the_message_names_some(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingDependency, match="no compiler was found"):
        export_aoti(micro_unet(), GraphShape("plain"), tmp_path / "unet.pt2")


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("unet.zip", {}, "ends in .pt2"),
        ("folder/unet.pt2", {}, "no folder"),
        ("unet.pt2", {"device": "mps"}, "'cpu' and 'cuda'"),
        ("unet.pt2", {"fixed": {"depth": 3}}, "no dimension 'depth'"),
    ],
    ids=["another ending", "a folder that is missing", "another device", "a dimension that does not exist"],
)
def test_requests_that_cannot_be_met_are_refused(tmp_path, name, options, text):
    with pytest.raises(InvalidRequest, match=text):
        export_aoti(micro_unet(), GraphShape("plain"), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_weights_cannot_come_from_the_meta_device(tmp_path):
    with pytest.raises(InvalidRequest, match="weights=False"):
        export_aoti(micro_unet().to("meta"), GraphShape("plain"), tmp_path / "unet.pt2")


def test_a_target_is_named_after_its_chip(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert aoti.target_of("cpu") == "cpu" and aoti.target_of("cuda:1") == "sm120"


@pytest.mark.slow
def test_a_package_may_hold_the_weights_and_fix_sizes(folder):
    unet, shape = micro_unet(), GraphShape("live", 1, 0)
    assert pack(unet)
    report = quickly(unet, shape, folder / "fixed.pt2", fixed={"height": 8, "width": 12})
    assert report.weights and report.bytes == (folder / "fixed.pt2").stat().st_size
    opened = AotiSession(folder / "fixed.pt2")
    inputs = inputs_of(unet, shape, 3, (8, 12))
    close(opened.run(inputs)["output"], in_pytorch(micro_unet(), shape, inputs))  # the same weights, not packed
    with pytest.raises(EngineMismatch, match=r"exported for \['rows', 4, 8, 12\]"):
        opened.run(inputs_of(unet, shape, 3, (12, 8)))
    other = micro_unet(seed=3)
    opened.set_weights(other.state_dict())
    close(opened.run(inputs)["output"], in_pytorch(other, shape, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_errs_no_more_than_twice_as_much_as_pytorch(folder, dtype):
    unet, shape = micro_unet(dtype=dtype), GraphShape("live", 1, 1)
    quickly(unet, shape, folder / f"{dtype}.pt2")
    opened, inputs = AotiSession(folder / f"{dtype}.pt2"), inputs_of(unet, shape, 3, (9, 14))
    peer = in_pytorch(unet, shape, inputs)
    assert error(opened.run(inputs)["output"], peer.exact) <= 2 * error(peer.value, peer.exact)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"]
)
def test_on_a_gpu_a_package_runs_on_the_current_stream_with_shared_weights(folder, dtype):
    unet = micro_unet(dtype=dtype).to("cuda")
    report = export_aoti(unet, GraphShape("banked", 2, 2), folder / f"gpu-{dtype}.pt2", device="cuda", weights=False)
    opened = AotiSession(report.path, "cuda")
    assert report.target.startswith("sm") and opened.set_weights(unet.state_dict()) == 0
    for rows, size in ((1, (8, 8)), (3, (9, 14)), (8, (16, 8))):
        inputs = inputs_of(unet, opened.shape, rows, size, seed=rows)
        peer = in_pytorch(unet, opened.shape, inputs)
        own = error(peer.value, peer.exact)
        with torch.cuda.stream(torch.cuda.Stream()):
            made = opened.run(inputs)["output"]
        torch.cuda.synchronize()
        assert error(made, peer.exact) <= 2 * own + 1e-6
