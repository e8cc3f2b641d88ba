"""The kernel of shared attention as PTX: compiled for chips that are not here, and launched where one is."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest
from stylefast.export.tensorrt_plugin import PLUGINS, compile_ptx, without_scratch
from tests.kernels.conformance import moved, normal
from tests.kernels.test_shared_attention import CONCAT, SWAP, adain, pages, reference, segments

# in a process of its own, as kernels are interpreted in this one; the bundled assembler stands for the driver's
COMPILE = """
import json, re, subprocess, tempfile
from pathlib import Path
import torch, triton
from stylefast.export.tensorrt_plugin import compile_ptx

tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

def assembled(kernel):
    target = re.search(r"[.]target (\\S+)", kernel.ptx)[1]
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(kernel.ptx)
        file.flush()
        command = [tools / "ptxas", "-v", "--gpu-name", target, file.name, "-o", file.name + ".cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    Path(file.name + ".cubin").unlink(missing_ok=True)
    return done.returncode, done.stderr

found = {}
for case, (chip, dtype, d, more) in json.loads(input()).items():
    try:
        kernel = compile_ptx(chip, getattr(torch, dtype), d, **more)
    except Exception as error:
        found[case] = {"error": type(error).__name__, "message": str(error)}
        continue
    code, said = assembled(kernel)
    fields = {name: getattr(kernel, name) for name in kernel.__dataclass_fields__}
    found[case] = fields | {"code": code, "said": said}
print(json.dumps(found))
"""
CASES = {
    **{
        f"{chip} banked": (chip, "float16", 64, {"banked": True, "even": 1024})
        for chip in ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")
    },
    "live, older PTX": ("sm89", "bfloat16", 64, {"parts": 2, "ptx_version": 86}),
    "fp32, odd heads": ("sm89", "float32", 40, {"banked": True}),
    "little shared memory": ("sm89", "float16", 64, {"even": 1024, "shared_limit": 24 * 1024}),
    "no shared memory": ("sm89", "float16", 64, {"shared_limit": 100}),
}


@pytest.fixture(scope="module")
def compiled(checkout):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(checkout)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("chip", ["sm80", "sm86", "sm89", "sm90", "sm100", "sm120"])
def test_ptx_of_sdxls_heads_assembles_without_spilling_for(compiled, chip):
    kernel = compiled[f"{chip} banked"]
    assert kernel["code"] == 0, kernel["said"]
    assert "0 bytes stack frame" in kernel["said"] and "0 bytes spill stores" in kernel["said"]
    assert f".target {chip.replace('sm', 'sm_')}" in kernel["ptx"]
    assert f".reqntid {32 * kernel['warps']}" in kernel["ptx"]
    assert 0 < kernel["shared"] <= 48 * 1024


def test_the_entry_takes_inputs_then_numbers_then_the_output_and_nothing_else(compiled):
    kernel = compiled["sm89 banked"]
    numbers = ["rows", "tokens", "heads", "references", "pages", "page_tokens"]
    assert kernel["arguments"] == [*PLUGINS["shared_attention_banked"], *numbers, "out"]
    head = kernel["ptx"].split(f".entry {kernel['name']}(")[1].split(")")[0]
    kinds = [line.split()[1] for line in head.strip().split(",\n")]
    assert kinds == [".u64"] * 11 + [".u32"] * 6 + [".u64"]


def test_a_live_kernel_has_no_arguments_for_a_pool(compiled):
    kernel = compiled["live, older PTX"]
    assert kernel["code"] == 0, kernel["said"]
    numbers = ["rows", "tokens", "heads", "references"]
    assert kernel["arguments"] == [*PLUGINS["shared_attention"], *numbers, "out"]


def test_fp32_and_heads_of_40_channels_compile(compiled):
    assert compiled["fp32, odd heads"]["code"] == 0, compiled["fp32, odd heads"]["said"]


def test_a_lower_limit_of_shared_memory_takes_fewer_stages_or_smaller_tiles(compiled):
    kernel, usual = compiled["little shared memory"], compiled["sm89 banked"]
    assert kernel["shared"] <= 24 * 1024 < usual["shared"]
    assert kernel["config"] != usual["config"] and kernel["block_m"] == kernel["config"]["block_m"]


def test_a_limit_that_nothing_fits_is_an_error_that_names_both(compiled):
    found = compiled["no shared memory"]
    assert found["error"] == "ExportError" and "the limit is 100" in found["message"]


def test_the_version_of_ptx_is_that_asked_for(compiled):
    assert ".version 8.8" in compiled["sm89 banked"]["ptx"] and ".version 8.6" in compiled["live, older PTX"]["ptx"]


def test_ptx_names_no_files_of_the_machine_that_compiled_it(compiled, checkout):
    assert all(str(checkout) not in kernel["ptx"] for kernel in compiled.values() if "ptx" in kernel)


@pytest.mark.parametrize(
    "arguments, more, error, words",
    [
        (("sm75", torch.float16, 64), {}, EngineMismatch, "7.5"),
        (("hopper", torch.float16, 64), {}, InvalidRequest, "hopper"),
        (("sm89", torch.float64, 64), {}, InvalidRequest, "float64"),
        (("sm89", torch.float16, 48), {}, InvalidRequest, "48 channels"),
        (("sm89", torch.float16, 64), {"parts": 4}, InvalidRequest, "parts is 4"),
        (("sm89", torch.float16, 64), {"even": -1}, InvalidRequest, "even is -1"),
    ],
    ids=["an old chip", "no chip", "fp64", "heads of no known size", "four parts", "a negative divisor"],
)
def test_ptx_is_refused_for(arguments, more, error, words):
    with pytest.raises(error, match=words):
        compile_ptx(*arguments, **more)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
def test_interpreted_kernels_have_no_ptx():
    with pytest.raises(ExportError, match="TRITON_INTERPRET"):
        compile_ptx("sm89", torch.float16, 64)


ENTRY = ".visible .entry f(\n\t.param .u64 f_param_0,\n\t.param .u64 f_param_1\n)\n{{ ld.param.b64 %a, [{}]; }}"


def test_unread_parameters_go():
    assert "f_param_1" not in without_scratch(ENTRY.format("f_param_0"), "f", 1)


@pytest.mark.parametrize(
    "ptx, count, words",
    [(ENTRY.format("f_param_1"), 1, "scratch memory f_param_1"), (ENTRY, 3, "declares 2"), ("", 1, "no entry f")],
    ids=["read", "missing", "of another kernel"],
)
def test_parameters_are_an_error_that_are(ptx, count, words):
    with pytest.raises(ExportError, match=words):
        without_scratch(ptx, "f", count)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, even", [(128, 128), (77, 0)], ids=["whole tiles", "a masked tail"])
def test_the_driver_runs_the_ptx_from_these_arguments_alone(tokens, even):
    x = normal(4, tokens, 3, 2, 64, dtype=torch.float16).unbind(2)
    call = (
        *x,
        segments([[4], [5], [0], [3]], [CONCAT, SWAP, CONCAT, CONCAT], 0.8, 0.4),
        adain(),
        pages(x[0], 2, tokens),
    )
    q, k, v, references, affine, pool = moved(call, "cuda")
    case = {"q": q, "k": k, "v": v, **references._asdict(), **affine._asdict(), "pool_k": pool.k, "pool_v": pool.v}
    case = {name: x if x is None else x.contiguous() for name, x in case.items()}
    major, minor = torch.cuda.get_device_capability()
    kernel = compile_ptx(f"sm{10 * major + minor}", torch.float16, 64, banked=True, even=even)
    rows, tokens, heads, _ = case["q"].shape
    case |= {"page": case["page"].int(), "mode": case["mode"].int(), "out": torch.full_like(case["q"], float("nan"))}
    numbers = {
        "rows": rows,
        "tokens": tokens,
        "heads": heads,
        "references": case["page"].shape[1],
        "pages": case["pool_k"].shape[0],
        "page_tokens": case["pool_k"].shape[1],
    }
    values = [
        ctypes.c_int(numbers[name]) if name in numbers else ctypes.c_void_p(case[name].data_ptr())
        for name in kernel.arguments
    ]

    driver = ctypes.CDLL("libcuda.so.1")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(kernel.ptx.encode())) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, ctypes.c_char_p(kernel.name.encode())) == 0
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.byref(x), ctypes.c_void_p) for x in values))
    blocks = -(-tokens // kernel.block_m) * rows * heads
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    grid, block = (blocks, 1, 1), (32 * kernel.warps, 1, 1)
    code = driver.cuLaunchKernel(function, *grid, *block, kernel.shared, stream, pointers, None)
    assert code == 0
    torch.cuda.synchronize()
    assert (case["out"].cpu().double() - reference(*call)).abs().max().item() < 4e-3
    assert driver.cuModuleUnload(module) == 0
