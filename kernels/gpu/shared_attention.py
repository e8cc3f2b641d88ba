"""Choice of form and configuration for shared self-attention on a GPU.

"warp_specialised" is for SDXL's calls on compute capability 9.0; "pointers" takes every call on every chip.
"""

import logging
import math
from functools import cache

import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels.configs import Config, Key, configurations
from stylefast.kernels.gpu import shared_attention_hopper as hopper
from stylefast.kernels.gpu import shared_attention_pointers as pointers
from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.launch import settings, specialisation
from stylefast.kernels.gpu.strides import ALIGN, is_aligned, span, strides
from stylefast.kernels.shared_attention import FP8, Affine, Pool, References

logger = logging.getLogger(__name__)

SPECIALISED_WIDTH = 64  # channels of a head


def shared_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    references: References,
    affine: Affine | None,
    pool: Pool | None,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Fill `out` [rows, tokens, heads, d]; arguments as the public operation's, already checked.

    An affine of two parts, which leaves the values as they are, is cheaper than one of three. A row with a page outside
    [-1, rows + pages) becomes NaN. Doesn't synchronise. Raises InvalidRequest if the form of a given configuration does
    not fit the call, and for bf16 in the interpreter.
    """
    if out.numel() == 0:
        return
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        raise InvalidRequest("Triton's interpreter multiplies no bfloat16 matrices; use float16 or float32 on the CPU")
    if config is None:
        form, _ = form_for(q, k, v, references, pool, out)
        config = settings("shared_attention", q, None, form=form, **_key(q, pool))
    elif config["form"] == "warp_specialised" and (reason := _misfit(q, k, v, references, pool, out, config)):
        raise InvalidRequest(f"the warp-specialised form of shared_attention does not take this call: {reason}")
    launch = hopper.launch if config["form"] == "warp_specialised" else pointers.launch
    launch(q, k, v, references, affine, pool, out, config)


def form_for(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, references: References, pool: Pool | None, out: torch.Tensor
) -> tuple[str, str]:
    """Return the form that runs a call, and why it is not the warp-specialised one ("" if it is)."""
    config = _specialised_config(q.device, tuple(_key(q, pool).items()))
    if config is None:
        return "pointers", "no configuration of the warp-specialised form for this chip, type and kind of page"
    reason = _misfit(q, k, v, references, pool, out, config)
    return ("pointers", reason) if reason else ("warp_specialised", "")


@cache
def _specialised_config(device: torch.device, key: tuple) -> Config | None:
    try:
        empty = torch.empty(0, device=device)
        return settings("shared_attention", empty, None, form="warp_specialised", **dict(key))
    except InvalidRequest:
        return None


def _misfit(q, k, v, references: References, pool: Pool | None, out, config: Config) -> str:
    """Return why the warp-specialised form can't take a call, "" if it can."""
    tokens, d = q.shape[1], q.shape[3]
    block_n = int(config["block_n"])
    if d != SPECIALISED_WIDTH:
        return f"heads of {d} channels, not {SPECIALISED_WIDTH}"
    if q.element_size() != 2:
        return f"{q.dtype}, not a 16-bit type"
    if references.page.shape[1] > 1:
        return f"{references.page.shape[1]} pages a row, more than 1"
    if references.bias is not None:
        return "a bias per token"
    if tokens % block_n:
        return f"{tokens} tokens are no multiple of {block_n}"
    tensors = [q, k, v, out]
    if pool is not None:
        if pool.k.dtype == FP8:
            return "pages in fp8"
        if pool.k.shape[1] % block_n:
            return f"{pool.k.shape[1]} tokens of a page are no multiple of {block_n}"
        for name, x, pages in (("keys", k, pool.k), ("values", v, pool.v)):
            if strides(pages)[1] != strides(x)[1]:
                return f"the tokens of the pages' {name} are not as far apart in memory as the rows' own"
            if span(x, pages) >= hopper.STRIDE_LIMIT:
                _say_far()
                return f"the pages' {name} lie a terabyte or more from the rows' own, which no tensor map reaches"
        tensors += [pool.k, pool.v]
    if not is_aligned(*tensors):
        return "tokens or heads that don't start on 16 bytes"
    return ""


@cache
def _say_far() -> None:
    # the only reason that depends on neither the model nor the request, and it may come and go
    logger.warning(
        "bank pages and activations lie more than a terabyte apart, as expandable segments of PyTorch's allocator may "
        'put them; shared_attention takes its slower form "pointers" for such calls. Without expandable_segments in '
        "PYTORCH_CUDA_ALLOC_CONF it does not happen"
    )


def _key(q: torch.Tensor, pool: Pool | None) -> Key:
    page = "fp8" if pool is not None and pool.k.dtype == FP8 else "native"
    return {"d": q.shape[3], "bits": 8 * q.element_size(), "page": page}


def candidates(key: Key) -> list[Config]:
    """Return the configurations worth timing for a key of the tuning files."""
    if key["form"] == "warp_specialised":
        shapes = [(128, 128, 2), (128, 128, 3), (128, 64, 2), (128, 64, 3), (256, 64, 2), (128, 256, 2)]
        return [_config(key["form"], m, n, 4, stages, exp2) for m, n, stages in shapes for exp2 in (0, 4, 8)]
    if key["bits"] == 32:
        shapes = [(m, n, warps, stages) for m in (32, 64) for n in (16, 32) for warps in (4, 8) for stages in (1, 2)]
        return [_config(key["form"], *shape, 0) for shape in shapes]
    shapes = [(64, 64, 4), (128, 64, 8), (128, 32, 8), (128, 128, 8), (64, 128, 4), (64, 32, 4), (256, 64, 8)]
    found = [
        _config(key["form"], *shape, stages, exp2) for shape in shapes for stages in (2, 3, 4) for exp2 in (0, 4, 8)
    ]
    # chips before 8.9 can't convert from fp8 and must decode it
    return found if key["page"] == "native" else found + [config | {"decode": True} for config in found]


def _config(form: str, block_m: int, block_n: int, num_warps: int, num_stages: int, exp2: int) -> Config:
    return {
        "form": form,
        "block_m": block_m,
        "block_n": block_n,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "exp2": exp2,
    }


def specialisations(capability: int) -> list[Specialisation]:
    """List every committed configuration with the kinds of call it must serve."""
    compiles = []
    for key, config in configurations("shared_attention", capability):
        if key["form"] == "warp_specialised":
            compiles += _specialised(config)
            continue
        native = "native" if key["page"] == "native" else "codes" if config.get("decode", False) else "fp8"
        main = "fp32" if key["bits"] == 32 else "bf16"
        kinds = [(main, 3, native, False), (main, 3, native, True)]
        if (key["d"], main, native) == (SPECIALISED_WIDTH, "bf16", "native"):
            kinds += [("bf16", 0, "none", False), ("fp16", 2, "native", False)]
        compiles += [_pointers(key["d"], *kind, config) for kind in kinds]
    return compiles


def _pointers(d: int, dtype: str, tensors: int, pool: str, bias: bool, config: Config) -> Specialisation:
    stored = {"none": "none", "native": f"*{dtype}", "fp8": "*fp8e4nv", "codes": "*u8"}[pool]
    scales = "*fp32" if pool in ("fp8", "codes") else "none"
    affine = "*fp32" if tensors else "none"
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | {"page": "*i64", "mode": "*i64"}
    types |= {"scale": "*fp32", "shift": "*fp32", "gain": affine, "offset": affine, "bias": "*fp32" if bias else "none"}
    types |= {"pool_k": stored, "pool_v": stored, "pool_k_scale": scales, "pool_v_scale": scales}
    constants = {
        "D": d,
        "FACTOR": math.log2(math.e) / math.sqrt(d),
        "TENSORS": tensors,
        "POOL": pool,
        "HAS_BIAS": bias,
        "EVEN": not bias,
        "ALIGN": ALIGN,
        "BLOCK_M": config["block_m"],
        "BLOCK_N": pointers.masked_block(config["block_n"]) if bias else config["block_n"],
        "BLOCK_D": pointers.padded(d),
        "EXP2": config["exp2"],
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    name = f"shared_attention {dtype} d={d} adain={tensors} pages={pool}{' bias, masked' * bias}"
    return specialisation(
        name,
        pointers.pointers_kernel,
        types,
        constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def _specialised(config: Config) -> list[Specialisation]:
    compiles, d = [], SPECIALISED_WIDTH
    factor = math.log2(math.e) / math.sqrt(d)
    kinds = [(0, False, False), (0, True, True), (2, True, True), (3, True, True), (3, True, False)]
    for dtype in ("bf16", "fp16"):
        for tensors, paged, pool in kinds:
            affine, stored = ("*fp32" if tensors else "none"), (f"*{dtype}" if pool else "none")
            types = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | {"page": "*i64", "mode": "*i64"}
            types |= {"scale": "*fp32", "shift": "*fp32", "pool_k": stored, "pool_v": stored}
            types |= dict.fromkeys(("gain", "offset", "constant"), affine)
            constants = {
                "D": d,
                "FACTOR": factor,
                "HAS_PAGE": paged,
                "HAS_POOL": pool,
                "TENSORS": tensors,
                "BLOCK_M": config["block_m"],
                "BLOCK_N": config["block_n"],
                "EXP2": config["exp2"],
            }
            compiles.append(
                specialisation(
                    f"shared_attention warp-specialised {dtype} adain={tensors} page={paged} pool={pool}",
                    hopper.warp_specialised_kernel,
                    types,
                    constants,
                    num_warps=config["num_warps"],
                    num_stages=config["num_stages"],
                )
            )
        types = {"q": f"*{dtype}", "page": "*i64", "mode": "*i64"}
        types |= dict.fromkeys(("gain", "offset", "constant"), "*fp32")
        constants = {"D": d, "FACTOR": factor, "BLOCK_M": 64}
        compiles.append(
            specialisation(f"shared_attention query constant {dtype}", hopper.query_constant_kernel, types, constants)
        )
    return compiles
