"""Search for launch configurations on the local GPU: run by `stylefast bench --tune`, never by a server.

For each committed key of an operation, the committed configurations of all chips are timed at SDXL's shapes, then the
neighbours of the best, one setting at a time, until none is faster. A module of this folder may define
`candidates(key) -> list[dict]` to list the configurations itself. A configuration whose result differs from that of the
committed one is never taken.
"""

import importlib
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels import configs
from stylefast.kernels.configs import Config, Key
from stylefast.kernels.gated_cross_attention import ImageSegments
from stylefast.kernels.gpu.timing import Times, graph_milliseconds
from stylefast.kernels.group_norm_silu import Norm, NormPages
from stylefast.kernels.guided_step import Branches, SamplerStep
from stylefast.kernels.registry import tensors_in
from stylefast.kernels.shared_attention import Affine, Pool, References

Timer = Callable[[Mapping[str, Callable[[int], object]], int], Times]

# launcher to time an operation by, where module and function don't have its name
LAUNCHERS = {"row_lora": ("tune", "add_row_lora"), "layer_norm": ("layer_norm", "add_layer_norm")}
# ordered so that adjacent values are neighbours; exp2 0 is in the middle because both others start from it
CHOICES: dict[str, tuple] = {"num_warps": (1, 2, 4, 8, 16), "exp2": (4, 0, 8), "num_stages": (1, 2, 3, 4, 5)}
TOGETHER, FINALISTS = 8, 4  # configurations timed in turns
FASTER = 0.99  # a neighbour must take at most this share of the best time to replace it


class Size(NamedTuple):
    """Shapes to time at: by default SDXL at 1024 x 1024 pixels, four images with CFG."""

    rows: int = 8
    tokens: int = 4096
    heads: int = 10
    side: int = 128


def tune(
    operations: Sequence[str] | None = None,
    minutes: float = 10.0,
    *,
    device: str = "cuda",
    timer: Timer = graph_milliseconds,
    size: Size | None = None,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Search configurations and return the content of a tuning file for this GPU.

    operations: names, or None for all that have committed configurations. Keys not started within `minutes` keep their
    committed configuration and get no time. Raises InvalidRequest without a CUDA device and for an operation that has
    no configurations.
    """
    gpu, capability = _gpu(device)
    known = sorted({name for tuning in configs.tunings() for name in tuning.operations})
    chosen = list(operations) if operations else known
    if unknown := sorted(set(chosen) - set(ARGUMENTS)):
        raise InvalidRequest(f"there is nothing to tune for {', '.join(unknown)}; there is for {', '.join(ARGUMENTS)}")
    end = clock() + 60 * minutes
    entries: dict[str, list[dict[str, Any]]] = {}
    milliseconds: dict[str, list[float | None]] = {}
    for operation in chosen:
        entries[operation], milliseconds[operation] = [], []
        for key in _keys(operation, capability):
            committed = configs.configuration(operation, capability, gpu, **key)
            best, took = committed, None
            if clock() < end:
                best, took, tried = _search(operation, key, committed, device, timer, size or Size(), end, clock)
                say(f"{operation} {key}: {took} ms of {tried} configurations: {best}")
            else:
                say(f"{operation} {key}: not measured, {minutes:g} minutes are over")
            entries[operation].append({"key": key, "config": best})
            milliseconds[operation].append(took)
    measured = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "cuda": torch.version.cuda,
        # in the order of the operation's entries; null: not timed
        "milliseconds": milliseconds,
    }
    return {"gpu": gpu, "capability": capability, "measured": measured, "operations": entries}


def write(content: dict[str, Any], folder: Path) -> Path:
    """Write the content to <gpu>.json in a folder, one entry per line. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', content['gpu'].lower()).strip('-')}.json"
    operations = ",\n".join(
        f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(entry)}" for entry in entries) + "\n    ]"
        for name, entries in content["operations"].items()
    )
    head = ",\n".join(f"  {json.dumps(key)}: {json.dumps(content[key])}" for key in ("gpu", "capability", "measured"))
    path.write_text(f'{{\n{head},\n  "operations": {{\n{operations}\n  }}\n}}\n', encoding="utf-8")
    return path


def neighbours(config: Config) -> list[Config]:
    """Return configurations that differ in one setting: adjacent values for those in CHOICES, else half and double."""
    found = []
    for name, value in config.items():
        if isinstance(value, (str, bool)):
            continue
        if name in CHOICES:
            choices = CHOICES[name]
            place = min(range(len(choices)), key=lambda i: abs(choices[i] - value))
            near = [choices[i] for i in (place - 1, place + 1) if 0 <= i < len(choices)]
        else:
            near = [value // 2, value * 2] if value > 1 else [2]
        found += [{**config, name: other} for other in near]
    return found


def _gpu(device: str) -> tuple[str, int]:
    if device != "cuda":
        return device, 90
    if not torch.cuda.is_available():
        raise InvalidRequest("tuning needs a CUDA device, and PyTorch finds none here")
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), 10 * major + minor


def _keys(operation: str, capability: int) -> list[Key]:
    keys = [key for key, _ in configs.configurations(operation, capability)]
    return [key for i, key in enumerate(keys) if key not in keys[:i]]


def _search(
    operation: str, key: Key, committed: Config, device: str, timer: Timer, size: Size, end: float, clock: Callable
) -> tuple[Config, float | None, int]:
    """Return the fastest configuration, its milliseconds and the number tried; the committed one if none could run."""
    module, function = LAUNCHERS.get(operation, (operation, operation))
    module = importlib.import_module(f"stylefast.kernels.gpu.{module}")
    launch = getattr(module, function)
    sets = [ARGUMENTS[operation](key, size, device, 0)]
    sets += [ARGUMENTS[operation](key, size, device, seed) for seed in range(1, _sets(sets[0], device))]

    def call(config: Config) -> Callable[[int], object]:
        return lambda i: launch(*sets[i][0], *sets[i][1], config=config)

    right = _results(call(committed), sets[0][1])
    times: dict[str, float] = {}
    known: dict[str, Config] = {}

    def time_some(candidates: Sequence[Config]) -> None:
        """Time a few at a time, checking the time limit in between."""
        new = {json.dumps(c, sort_keys=True): c for c in candidates}
        new = [(name, c) for name, c in new.items() if name not in known]
        for first in range(0, len(new), TOGETHER):
            if first and clock() >= end:
                break
            group = dict(new[first : first + TOGETHER])
            known.update(group)
            good = {name: call(c) for name, c in group.items() if _agrees(call(c), sets[0][1], right)}
            measured = timer(good, len(sets))
            times.update({name: statistics.median(samples) for name, samples in measured.samples.items()})

    offered = getattr(module, "candidates", None)
    start = offered(key) if offered else [c for t in configs.tunings() for k, c in _entries(t, operation) if k == key]
    time_some([committed, *start])
    while times and not offered and clock() < end:
        best = min(times, key=times.get)
        before = times[best]
        time_some(neighbours(known[best]))
        if min(times.values()) > FASTER * before:
            break
    if not times:
        return committed, None, len(known)
    # time the best again in turns, because their first times are from different moments
    finalists = sorted(times, key=times.get)[:FINALISTS]
    final = timer({name: call(known[name]) for name in finalists}, len(sets)).samples
    best = min(final, key=lambda name: statistics.median(final[name]))
    return known[best], float(f"{statistics.median(final[best]):.4g}"), len(known)


def _entries(tuning: configs.Tuning, operation: str) -> Sequence[tuple[Key, Config]]:
    return tuning.operations.get(operation, ())


def _results(run: Callable[[int], object], outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    for out in outputs:
        out.fill_(float("nan"))
    run(0)
    return [out.float() for out in outputs]


def _agrees(run: Callable[[int], object], outputs: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    try:
        found = _results(run, outputs)
    except Exception:  # e.g. too much shared memory or an unsupported shape: unusable on this GPU
        return False
    return all(torch.allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(found, right))


def _sets(arguments: tuple[Sequence, Sequence], device: str) -> int:
    """Return the number of input sets that fill at least twice the L2 together, at most 8."""
    used = sum(x.numel() * x.element_size() for x in tensors_in(arguments))
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    return min(8, max(1, -(-2 * cache // max(used, 1))))


class _Maker:
    """Generator of random tensors from one seed."""

    def __init__(self, key: Key, device: str, seed: int):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        # Triton's interpreter can't multiply bf16 matrices on CPUs
        half = torch.bfloat16 if device == "cuda" else torch.float16
        self.dtype = torch.float32 if key.get("bits") == 32 else half

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def full(self, shape: tuple[int, ...], value: float) -> torch.Tensor:
        return torch.full(shape, value, device=self.device)


def _shared_attention(key, size, device, seed):
    make, d = _Maker(key, device, seed), key["d"]
    shape, pages = (size.rows, size.tokens, size.heads, d), 2
    q = make(*shape)
    # own and page tokens in one buffer, as in the runtime
    k, v = (make(size.rows + pages, *shape[1:]) for _ in range(2))
    pool_k, pool_v, scales = k[size.rows :], v[size.rows :], (None, None)
    if key.get("page") == "fp8":
        pool_k, pool_v = pool_k.to(torch.float8_e4m3fn), pool_v.to(torch.float8_e4m3fn)
        scales = (make.full((pages, size.heads, d), 1.0), make.full((pages, size.heads, d), 1.0))
    page = (torch.arange(size.rows, device=device) * pages // size.rows + size.rows)[:, None]
    ones = make.full((size.rows, 1), 1.0)
    gain, offset = (make(3, size.rows, size.heads, d, dtype=torch.float32) * 0.1 + shift for shift in (1, 0))
    affine, pool = Affine(gain, offset), Pool(pool_k, pool_v, *scales)
    if key.get("page") == "none":
        page, ones, affine, pool = page[:, :0], ones[:, :0], None, None
    mode = torch.ones(size.rows, dtype=torch.int64, device=device)
    references = References(page, mode, ones, torch.zeros_like(ones))
    return (q, k[: size.rows], v[: size.rows], references, affine, pool), (torch.empty_like(q),)


def _gated_cross_attention(key, size, device, seed):
    make, d = _Maker(key, device, seed), key["d"]
    q = make(size.rows, size.tokens, size.heads, d)
    text_k, text_v = (make(size.rows, 77, size.heads, d) for _ in range(2))
    image_k, image_v = (make(2, 4, size.heads, d) for _ in range(2))
    row = torch.arange(size.rows, device=device)
    lengths, group = torch.full((2,), 4, device=device), torch.zeros(size.rows, 1, dtype=torch.int64, device=device)
    strength = make.full((size.rows, 1), 0.6)
    image_page = (row % 2)[:, None]
    images = ImageSegments(image_k, image_v, lengths, image_page, strength, group)
    return (q, text_k, text_v, row, None, images), (torch.empty_like(q),)


def _token_stats(key, size, device, seed):
    make = _Maker(key, device, seed)
    tensors = [make(size.rows, size.tokens, size.heads, key.get("d", 64)) for _ in range(3)]
    statistics_ = tuple(make(3, size.rows, size.heads, key.get("d", 64), dtype=torch.float32) for _ in range(2))
    return (tensors,), statistics_


def _adain_affine(key, size, device, seed):
    make = _Maker(key, device, seed)
    shape = (3, size.rows, size.heads, 64)
    mean, pool_mean, gain, offset = (make(*shape, dtype=torch.float32) for _ in range(4))
    variance, pool_variance = (make(*shape, dtype=torch.float32).abs() + 0.1 for _ in range(2))
    page = torch.arange(size.rows, device=device) + size.rows
    return (mean, variance, page, make.full((size.rows, 3), 1.0), pool_mean, pool_variance), (gain, offset)


def _group_norm_silu(key, size, device, seed):
    make, channels = _Maker(key, device, seed), 320
    x = make(size.rows, channels, size.side, size.side)
    if key.get("layout") == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    inputs = (x, Norm(32, make(channels), make(channels), 1e-5, True), NormPages())
    return inputs, (torch.empty_like(x),)


def _geglu(key, size, device, seed):
    make, inner = _Maker(key, device, seed), key.get("columns", 2560)
    return (make(size.rows, size.tokens, 2 * inner),), (make(size.rows, size.tokens, inner),)


def _layer_norm(key, size, device, seed):
    make, columns = _Maker(key, device, seed), key.get("columns", 640)
    x, residual, total, out = (make(size.rows, size.tokens, columns) for _ in range(4))
    return (x, residual, make(columns), make(columns), 1e-5), (total, out)


def _guided_step(key, size, device, seed):
    make, images = _Maker(key, device, seed), 8 * size.rows
    picture = (4, size.side, size.side)
    latents, anchor, noise, next_latents, next_anchor = (make(images, *picture, dtype=torch.float32) for _ in range(5))
    history, next_history = (make(images, 2, *picture, dtype=torch.float32) for _ in range(2))
    index = torch.arange(images, device=device)
    unused = torch.full_like(index, -1)
    inputs = (
        latents,
        anchor,
        history,
        make(2 * images, *picture),
        Branches(
            torch.stack([index, unused, unused, index + images], 1),
            torch.tensor([-4.0, 0.0, 0.0, 5.0], device=device).repeat(images, 1),
            make.full((images,), 0.7),
        ),
        SamplerStep(torch.tensor([1.0, -0.8], device=device).repeat(images, 1), make.full((images, 2, 6), 0.2), noise),
    )
    return inputs, (next_latents, next_anchor, next_history)


def _row_lora(key, size, device, seed):
    make, channels, units = _Maker(key, device, seed), 64 * size.heads, 8
    parts = 3 if key["ranks"] % 3 == 0 else 1
    count = key["ranks"] // 16 // parts
    unit = torch.randint(0, units, (parts, size.rows, count), generator=make.generator, device=device)
    factors = (make(units, 1, channels, 16) * channels**-0.5, make(units, 16, channels) * 0.1)
    ys = tuple(make(size.rows, size.tokens, channels) for _ in range(parts))
    return (make(size.rows, size.tokens, channels), *factors, unit, make.full((size.rows, count), 1.0)), ys


def add_row_lora(*arguments: torch.Tensor, config: Config) -> None:
    """Run row_lora on zeros: x, down, up, unit, scale, then its outputs."""
    from stylefast.kernels.gpu.row_lora import row_lora

    x, down, up, unit, scale, *ys = arguments
    for y in ys:
        y.zero_()
    row_lora(x, down, up, unit, scale, 1, 0, ys, config)


# operation -> (key, size, device, seed) -> arguments of its launcher, and its output tensors
ARGUMENTS: dict[str, Callable[[Key, Size, str, int], tuple[Sequence, Sequence]]] = {
    "shared_attention": _shared_attention,
    "gated_cross_attention": _gated_cross_attention,
    "token_stats": _token_stats,
    "adain_affine": _adain_affine,
    "group_norm_silu": _group_norm_silu,
    "geglu": _geglu,
    "layer_norm": _layer_norm,
    "guided_step": _guided_step,
    "row_lora": _row_lora,
}
