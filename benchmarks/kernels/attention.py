"""shared_attention at SDXL's shapes: every row attends to its own tokens and to one page of the pool.

The comparison favours the peers: the page's statistics are cached, and "K/V concatenated" excludes the time of the
concatenation.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels import plain
from benchmarks.kernels.cases import Case, Entrants, Share, Versus, cache_bytes, input_sets, normal
from stylefast.errors import InvalidRequest
from stylefast.kernels import adain_affine, shared_attention, token_stats
from stylefast.kernels.configs import Config, configuration
from stylefast.kernels.gpu.timing import one_line
from stylefast.kernels.shared_attention import CONCAT, Pool, References

WIDTH = 64
LAYERS = ((4096, 10), (1024, 20))  # tokens and heads of SDXL's two attention resolutions at 1024 x 1024 pixels
QUICK = ((128, 2),)

WITH_STATISTICS, ATTENTION = "statistics, AdaIN, attention", "attention with AdaIN"
NO_ADAIN, FP8, SEPARATE = "attention without AdaIN", "attention, fp8 pages", "attention, pool in a buffer of its own"
PLAIN_PATH, CONCATENATED = "AdaIN, expand, cat, SDPA", "SDPA, K/V concatenated"
CUDNN_PATH, CUDNN = "AdaIN, expand, cat, cuDNN", "cuDNN SDPA, K/V concatenated"
FLASH, FA3, FA4 = "PyTorch's flash SDPA", "FlashAttention-3", "FlashAttention-4"


def cpu_cases(quick: bool, features: list[str]) -> list[Case]:
    """Return cases of two rows on one page, fp32 and bf16."""
    without_bf16 = "" if "avx512_bf16" in features else "this CPU has no AVX512-BF16"
    cases = []
    for dtype, path_goal, goal, waived in ((torch.float32, 1.1, 0.95, ""), (torch.bfloat16, 2.5, None, without_bf16)):
        for tokens, heads in QUICK if quick else LAYERS:
            comparisons = [
                Versus(WITH_STATISTICS, PLAIN_PATH, path_goal, waived),
                Versus(ATTENTION, CONCATENATED, goal),
                Share(ATTENTION, "matmul"),
            ]
            scene = _Scene(tokens, heads, rows=2, pages=1, dtype=dtype, device="cpu")
            cases.append(scene.case(comparisons, _cpu_entrants))
    return cases


def cuda_cases(quick: bool, device: str = "cuda") -> list[Case]:
    """Return cases of n targets with CFG: 2n rows on two cached pages, bf16."""
    cases = []
    for targets in (1, 2) if quick else (1, 2, 4, 8):
        for tokens, heads in QUICK if quick else LAYERS:
            comparisons = [
                Versus(WITH_STATISTICS, CUDNN_PATH, 1.9),
                Versus(ATTENTION, CUDNN, 1.3),
                Versus(ATTENTION, FLASH),
                Versus(ATTENTION, FA3, 1.15),
                Versus(ATTENTION, FA4, 1.15),
                Share(ATTENTION, "matmul", 0.7 if targets >= 2 else None),
                # "costs at most 2 %" as a ratio of times
                Versus(ATTENTION, NO_ADAIN, round(1 / 1.02, 3), errors=False),
                Versus(FP8, ATTENTION, 1.0, errors=False),
                Versus(SEPARATE, ATTENTION),
            ]
            scene = _Scene(tokens, heads, rows=2 * targets, pages=2, dtype=torch.bfloat16, device=device)
            cases.append(scene.case(comparisons, _cuda_entrants, f"n={targets} "))
    return cases


def form_cases(quick: bool, device: str = "cuda") -> list[Case]:
    """Compare this GPU's committed configurations of each kernel form, with each way to compute exp2, at n = 2."""
    forms = _forms()
    comparisons = []
    for first, *others in forms.values():
        comparisons += [Versus(other, first, errors=False) for other in others]
    firsts = [names[0] for names in map(list, forms.values())]
    comparisons += [Versus(firsts[0], other, errors=False) for other in firsts[1:]]
    cases = []
    for tokens, heads in QUICK if quick else LAYERS:
        scene = _Scene(tokens, heads, rows=4, pages=2, dtype=torch.bfloat16, device=device)
        if comparisons:
            cases.append(scene.case(comparisons, lambda scene: _configured(scene, forms), "n=2 forms "))
    return cases


class _Scene:
    """Inputs of one shape. K, V and the pool share one buffer [rows + pages, ...], as in the runtime."""

    def __init__(self, tokens: int, heads: int, rows: int, pages: int, dtype: torch.dtype, device: str):
        self.tokens, self.heads, self.rows, self.pages, self.dtype, self.device = (
            tokens,
            heads,
            rows,
            pages,
            dtype,
            device,
        )

    def case(self, comparisons: list, entrants: Callable[["_Scene"], Entrants], prefix: str = "") -> Case:
        shape = f"{prefix}{self.rows}x{self.tokens}x({self.tokens}+{self.tokens})x{self.heads}x{WIDTH}"
        flop = 4.0 * self.rows * self.heads * self.tokens * 2 * self.tokens * WIDTH
        return Case("shared_attention", shape, self.dtype, comparisons, lambda: entrants(self), flop=flop)

    def inputs(self, seed: int) -> dict[str, Any]:
        """Return one input set; styles differ in mean and deviation, so that AdaIN changes the values."""
        shape = (self.rows, self.tokens, self.heads, WIDTH)
        both = (self.rows + self.pages, *shape[1:])
        q, k, v = (
            normal(*size, dtype=self.dtype, device=self.device, seed=3 * seed + i)
            for i, size in enumerate((shape, both, both))
        )
        page_q = normal(self.pages, *shape[1:], dtype=self.dtype, device=self.device, seed=1000 + seed)
        page_q, k[self.rows :] = page_q * 1.3 + 0.2, k[self.rows :] * 0.8 - 0.1
        pool_mean, pool_variance = token_stats(page_q, k[self.rows :])
        pages = torch.arange(self.pages, device=self.device).repeat_interleave(self.rows // self.pages) + self.rows
        ones = torch.ones(self.rows, 1, device=self.device)
        return {
            "q": q,
            "k": k[: self.rows],
            "v": v[: self.rows],
            "pool_k": k[self.rows :],
            "pool_v": v[self.rows :],
            "page": pages[:, None],
            "mode": torch.full((self.rows,), CONCAT, device=self.device),
            "scale": ones,
            "shift": torch.zeros_like(ones),
            "page_q": page_q,
            "strength": torch.ones(self.rows, 2, device=self.device),
            "pool_mean": pool_mean,
            "pool_variance": pool_variance,
        }

    def input_sets(self) -> list[dict[str, Any]]:
        size = torch.empty(0, dtype=self.dtype).element_size()
        each = (4 * self.rows + 2 * self.pages) * self.tokens * self.heads * WIDTH * size
        return [self.inputs(seed) for seed in range(input_sets(each, cache_bytes(self.device)))]


def affine_of(s: dict[str, Any]):
    """Return AdaIN's affine form from the statistics of queries and keys, as in the paper."""
    mean, variance = token_stats(s["q"], s["k"])
    return adain_affine(mean, variance, s["page"][:, 0], s["strength"], s["pool_mean"], s["pool_variance"])


def attend(s: dict[str, Any], affine=None, **pool):
    """Call our kernel once; `pool` replaces the bf16 pages."""
    pool = pool or {"pool_k": s["pool_k"], "pool_v": s["pool_v"]}
    return shared_attention(s["q"], s["k"], s["v"], s["page"], s["mode"], s["scale"], s["shift"], affine, **pool)


def exact(s: dict[str, Any], heads: list[int], queries: slice) -> torch.Tensor:
    """Return the result for some heads and queries in fp64: [rows, queries, heads, d]."""
    cut = {name: s[name][:, :, heads].double() for name in ("q", "k", "v", "pool_k", "pool_v", "page_q")}
    pages = s["page"][:, 0] - len(s["q"])
    q = plain.adain(cut["q"], *(x[pages] for x in plain.page_statistics(cut["page_q"])))
    k = plain.adain(cut["k"], *(x[pages] for x in plain.page_statistics(cut["pool_k"])))
    k, v = torch.cat([k, cut["pool_k"][pages]], 1), torch.cat([cut["v"], cut["pool_v"][pages]], 1)
    logits = torch.einsum("rqhd,rkhd->rhqk", q[:, queries], k) / WIDTH**0.5
    return torch.einsum("rhqk,rkhd->rqhd", torch.softmax(logits, -1), v)


class _Prepared(NamedTuple):
    """Precomputed values, for each input set, that a contestant may use."""

    sets: list[dict[str, Any]]
    affines: list
    targets: list  # mean and deviation of the page's q and k, in the type of q
    joined: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # q, k, v after AdaIN and concatenation


def _prepare(scene: _Scene) -> _Prepared:
    sets = scene.input_sets()
    targets = [(plain.page_statistics(s["page_q"]), plain.page_statistics(s["pool_k"])) for s in sets]
    joined = []
    for s, target in zip(sets, targets):
        q, k = (plain.adain(s[x], *(plain.expand(t, scene.rows) for t in stats)) for x, stats in zip("qk", target))
        joined.append((q, plain.with_page(k, s["pool_k"]), plain.with_page(s["v"], s["pool_v"])))
    return _Prepared(sets, [affine_of(s) for s in sets], targets, joined)


def _common(scene: _Scene, given: _Prepared, sdpa: Callable, path: str, concatenated: str) -> Entrants:
    def plain_path(i):
        s = given.sets[i]
        return plain.style_aligned(s["q"], s["k"], s["v"], s["pool_k"], s["pool_v"], *given.targets[i], attend=sdpa)

    # a sample of heads and queries: fp64 for all would take longer than the benchmark
    heads, queries = [0, scene.heads - 1], slice(None, None, max(1, scene.tokens // 64))
    return Entrants(
        calls={
            WITH_STATISTICS: lambda i: attend(given.sets[i], affine_of(given.sets[i])),
            path: plain_path,
            ATTENTION: lambda i: attend(given.sets[i], given.affines[i]),
            concatenated: lambda i: sdpa(*given.joined[i]),
        },
        sets=len(given.sets),
        exact=lambda: exact(given.sets[0], heads, queries),
        pick=lambda out: out[:, queries][:, :, heads].double(),
    )


def _cpu_entrants(scene: _Scene) -> Entrants:
    return _common(scene, _prepare(scene), plain.attention, PLAIN_PATH, CONCATENATED)


def _cuda_entrants(scene: _Scene) -> Entrants:
    given = _prepare(scene)
    entrants = _common(scene, given, with_backend(SDPBackend.CUDNN_ATTENTION), CUDNN_PATH, CUDNN)
    pools = [fp8_pool(s["pool_k"], s["pool_v"]) for s in given.sets]
    separate = [{"pool_k": s["pool_k"].clone(), "pool_v": s["pool_v"].clone()} for s in given.sets]
    flash = with_backend(SDPBackend.FLASH_ATTENTION)
    entrants.calls |= {
        NO_ADAIN: lambda i: attend(given.sets[i]),
        FP8: lambda i: attend(given.sets[i], given.affines[i], **pools[i]),
        SEPARATE: lambda i: attend(given.sets[i], given.affines[i], **separate[i]),
        FLASH: lambda i: flash(*given.joined[i]),
    }
    for name, module in ((FA3, "flash_attn_interface"), (FA4, "flash_attn.cute")):
        try:
            function = import_module(module).flash_attn_func
        except Exception as error:  # absent, or built for another torch, which fails in many ways
            entrants.absent[name] = f"{module}: {one_line(error)}"
            continue
        entrants.calls[name] = lambda i, function=function: _first(function(*given.joined[i]))
    return entrants


def with_backend(backend: SDPBackend) -> Callable:
    """Return `plain.attention` restricted to one SDPA backend."""

    def attention(q, k, v):
        with sdpa_kernel(backend):
            return plain.attention(q, k, v)

    return attention


def fp8_pool(k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return pages in fp8 e4m3 with a scale per (page, head, channel): value = fp8 * scale."""
    pool = {}
    for name, x in (("k", k), ("v", v)):
        scale = x.float().abs().amax(1).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
        pool[f"pool_{name}"] = (x.float() / scale[:, None]).to(torch.float8_e4m3fn)
        pool[f"pool_{name}_scale"] = scale
    return pool


def _first(result):
    return result[0] if isinstance(result, tuple) else result


def _forms() -> dict[str, dict[str, Config]]:
    """Map form -> name -> configuration: this GPU's committed one first, then the same with exp2 computed otherwise."""
    major, minor = torch.cuda.get_device_capability()
    gpu, forms = torch.cuda.get_device_name(), {}
    for form in ("warp_specialised", "pointers"):
        try:
            key = {"form": form, "d": WIDTH, "bits": 16, "page": "native"}
            committed = configuration("shared_attention", 10 * major + minor, gpu, **key)
        except InvalidRequest:
            continue
        shares = dict.fromkeys((committed["exp2"], 0, 8, 4))
        words = {0: "exp2 on the MUFU"}
        forms[form] = {
            f"{form}, {words.get(share, f'1/{share} of exp2 on FMA')}": {**committed, "exp2": share} for share in shares
        }
    return forms


def _configured(scene: _Scene, forms: dict[str, dict[str, Config]]) -> Entrants:
    launch = import_module("stylefast.kernels.gpu.shared_attention").shared_attention
    sets = scene.input_sets()
    affines = [affine_of(s) for s in sets]

    def call(i, config):
        s, out = sets[i], torch.empty_like(sets[i]["q"])
        references = References(*(s[name] for name in ("page", "mode", "scale", "shift")))
        launch(s["q"], s["k"], s["v"], references, affines[i], Pool(s["pool_k"], s["pool_v"]), out, config=config)
        return out

    named = [pair for configs in forms.values() for pair in configs.items()]
    return Entrants({name: lambda i, config=config: call(i, config) for name, config in named}, sets=len(sets))
