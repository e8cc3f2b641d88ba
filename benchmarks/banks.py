"""Cost of style banks at SDXL's size, by kind of storage: bytes, time to fetch pages, added work, error.

    python -m benchmarks banks --device cpu [--rounds 3]

Writes benchmarks/results/banks-cpu.json. Bytes and work are counted. Times are measured with only SDXL's page layout
and projections at full width: for each kind, a bank of one step with random content is written, and its two pages are
fetched from the system's page cache into a pool of two fp32 pages. Errors are measured on the embedded model, against
the same pictures with a live reference.
"""

import argparse
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stylefast as sf
from benchmarks.environment import environment
from benchmarks.kernels.report import write
from benchmarks.runtime.models import sdxl_config, unet_config
from benchmarks.runtime.scene import PROMPTS, REFERENCE, REFERENCE_SEED
from stylefast.models.layout import STYLE_MODULE, AttentionLayout
from stylefast.models.prepacked import pack
from stylefast.models.unet import UNet
from stylefast.runtime.banks.baking import DTYPES
from stylefast.runtime.banks.bank_pages import BankPages, PageKey
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.bank import BankWriter, LayerFeatures, ReferenceFeatures
from stylefast.styles.bank_info import FORMAT, BankInfo
from stylefast.styles.bank_size import BankShapes, bank_bytes, page_bytes

RESULTS = Path(__file__).parent / "results"
SIZE, STEPS, HALVES = (1024, 1024), 30, ("null", "full")
MODES = [(store, kind) for store in ("kv", "hidden") for kind in DTYPES] + [("latents", "fp32")]
# sustained bytes per second from pinned memory to a GPU: PCIe 5 and 4, 16 lanes
BUSES = {"pcie5": 55e9, "pcie4": 25e9}
TARGETS = 4


def counted_modes(config: Mapping, row_flop: int, size=SIZE, steps: int = STEPS) -> list[dict[str, Any]]:
    """Count, for every kind of storage, the bytes of the bank and of one step, and the work added to a step."""
    shapes = BankShapes.from_config(config, size)
    # keys and values of every layer; a multiply-add counts as two operations
    projections = sum(2 * 2 * layer.tokens * layer.channels**2 for layer in shapes.layers)
    added = {"kv": 0, "hidden": projections, "latents": row_flop}
    found = []
    for store, kind in MODES:
        dtype = DTYPES[kind]
        # one picture's latents serve both halves
        step = (
            4 * math.prod(shapes.latents)
            if store == "latents"
            else len(HALVES) * page_bytes(config, size, store, dtype)
        )
        found.append(
            {
                "store": store,
                "type": kind,
                "bytes": bank_bytes(config, size, steps, len(HALVES), 1, store, dtype),
                "step_bytes": step,
                "added_flop": len(HALVES) * added[store],
            }
        )
    return found


def counted_layers(config: Mapping, size=SIZE, steps: int = STEPS) -> list[dict[str, Any]]:
    """Count the bytes of banks with fewer layers or one half, and a bus's milliseconds for one step's pages."""
    layers = AttentionLayout.from_config(config).layers
    up = [i for i, layer in enumerate(layers) if layer.name.startswith("up_blocks")]
    style = [i for i, layer in enumerate(layers) if layer.module == STYLE_MODULE]
    kinds = [
        ("all layers, both halves", range(len(layers)), 2, "kv"),
        ("all layers, both halves, hidden states", range(len(layers)), 2, "hidden"),
        ("all layers, without guidance", range(len(layers)), 1, "kv"),
        ("up_blocks, both halves", up, 2, "kv"),
        ("the style block, both halves", style, 2, "kv"),
    ]
    found = []
    for what, chosen, halves, store in kinds:
        for kind in ("fp16", "fp8"):
            step = halves * page_bytes(config, size, store, DTYPES[kind], chosen)
            found.append(
                {
                    "what": what,
                    "layers": len(chosen),
                    "type": kind,
                    "bytes": bank_bytes(config, size, steps, halves, 1, store, DTYPES[kind], chosen),
                    "step_bytes": step,
                    "bus_ms": {name: round(1e3 * step / rate, 1) for name, rate in BUSES.items()},
                }
            )
    return found


def row_flop(config: Mapping) -> int:
    """Count the floating point operations of one row of a UNet call, with PyTorch's counter on meta tensors."""
    from diffusers import UNet2DConditionModel

    side, pooled = config["sample_size"], _pooled_width(config)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        UNet2DConditionModel(**_arguments(config))(
            torch.zeros(1, config["in_channels"], side, side),
            torch.tensor(1.0),
            torch.zeros(1, 77, config["cross_attention_dim"]),
            added_cond_kwargs={"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)},
        )
    return counter.get_total_flops()


def whole_config(given: Mapping) -> dict:
    """Return a UNet config with diffusers' defaults filled in."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return dict(UNet2DConditionModel(**given).config)


def projecting_unet(config: Mapping, seed: int = 0) -> UNet:
    """Make a UNet on the meta device, except the projections to keys and values, which are random and packed."""
    with torch.device("meta"):
        unet = UNet(dict(config)).requires_grad_(False).eval()
    # the UNet takes its dtype and device from this layer
    unet.conv_in = nn.Conv2d(config["in_channels"], config["block_out_channels"][0], 3, padding=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in unet.layout.layers:
            attention = unet.get_submodule(layer.name).attn1
            for projection in (attention.to_k, attention.to_v):
                weight = torch.empty(layer.channels, layer.channels).normal_(
                    0.0, layer.channels**-0.5, generator=generator
                )
                projection.weight = nn.Parameter(weight, requires_grad=False)
                pack(projection)
            # enough tokens to trigger the packed form, which is built on the first call
            attention.key_values(torch.zeros(1, 64, layer.channels))
    return unet


def fetched(unet: UNet, size, rounds: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (store, type, measurement) of fetching the two pages of a step into the pool."""
    shapes = BankShapes.from_config(unet.config, size)
    pages = BankPages(unet, shapes.latents[1:], slots=len(HALVES))
    features = _features(shapes)
    for store, kind in MODES[:-1]:
        with tempfile.TemporaryDirectory(prefix="stylefast-banks-") as folder:
            bank = _written(Path(folder) / "one-step.bank", unet, shapes, features, store, kind)
            start = time.perf_counter()
            bank = sf.StyleBank.load(bank.path)
            checked = time.perf_counter() - start
            keys = [PageKey(bank, 0, BRANCHES.index(half), 0) for half in HALVES]
            samples = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                pages.hold(keys)
                samples.append(time.perf_counter() - start)
                pages.release(keys)
                pages.clear()
            del bank, keys
        # the first round reads the file into the page cache
        seconds = statistics.median(samples[1:])
        yield (
            store,
            kind,
            {
                "seconds": _shown(seconds),
                "first_seconds": _shown(samples[0]),
                "samples_s": [_shown(sample) for sample in samples[1:]],
                "check_seconds": _shown(checked),
            },
        )
    pages.close()


def _written(path: Path, unet: UNet, shapes: BankShapes, features: ReferenceFeatures, store: str, kind: str):
    layers = tuple(range(len(shapes.layers)))
    _, height, width = shapes.latents
    info = BankInfo(
        format=FORMAT,
        model="random",
        fingerprint="0" * 64,
        store=store,
        dtype=DTYPES[kind],
        scheduler="euler",
        schedule="0" * 64,
        steps=1,
        size=(8 * width, 8 * height),
        guidance=None,
        guidance_rescale=None,
        branches=HALVES,
        negative_prompt="",
        prompt="",
        seed=0,
        noise="forward",
        references=1,
        layers=layers,
        styles="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        stylefast=sf.__version__,
    )
    with BankWriter(info, shapes, path) as writer:
        for half in HALVES:
            writer.put(0, half, 0, features)
        writer.put_latents(1, 0, torch.zeros(shapes.latents))
        return writer.finish()


def _features(shapes: BankShapes) -> ReferenceFeatures:
    """Return random features; layers of the same shape share their values, which does not affect copying."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    of_shape = {}
    for shape in set(shapes.layers):
        heads = (shape.heads, shape.d)
        of_shape[shape] = LayerFeatures(
            draw(shape.tokens, shape.channels), draw(*shape), draw(*shape), draw(3, *heads), draw(3, *heads).square()
        )
    return ReferenceFeatures(
        {i: of_shape[shape] for i, shape in enumerate(shapes.layers)},
        tuple(draw(groups) for groups in shapes.groups),
        tuple(draw(groups).square() for groups in shapes.groups),
        shapes.norm_elements,
    )


def errors(steps: int, targets: int) -> dict[str, dict[str, float]]:
    """Return, by "store type" and for "no style", how far pictures are from those with a live reference.

    Two styles: one named by a prompt and one of a picture. "latents": the largest difference over the largest value;
    "max_255" and "mean_255": of the pictures' bytes.
    """
    engine = sf.Engine.from_pretrained("tiny", device="cpu", dtype="float32")
    settings = {"steps": steps, "seed": 11}
    styles = [
        sf.StyleAligned(prompt=REFERENCE, seed=REFERENCE_SEED),
        sf.StyleAligned(engine.references()["watercolor"]),
    ]
    live = [engine.generate(PROMPTS[:targets], style, **settings) for style in styles]
    plain = engine.generate(PROMPTS[:targets], **settings)
    found = {"no style": _apart([plain] * len(styles), live)}
    for store, kind in MODES:
        results = []
        for style in styles:
            bank = engine.bake(style, steps=steps, store=store, dtype=kind)
            results.append(engine.generate(PROMPTS[:targets], sf.StyleAligned(bank), **settings))
        found[f"{store} {kind}"] = _apart(results, live)
    return found


def _apart(results: list, expected: list) -> dict[str, float]:
    pairs = list(zip(results, expected, strict=True))
    bytes_off = np.stack(
        [
            np.abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16))
            for one, other in pairs
            for a, b in zip(one.images, other.images, strict=True)
        ]
    )
    latents = max(
        ((a - b).abs().max() / b.abs().max()).item()
        for one, other in pairs
        for a, b in zip(one.latents, other.latents, strict=True)
    )
    return {"latents": float(f"{latents:.2g}"), "max_255": int(bytes_off.max()), "mean_255": _shown(bytes_off.mean())}


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """Return the content of the results file."""
    start = time.perf_counter()
    found_environment = environment("cpu")
    given = sdxl_config()
    if quick:
        given = unet_config((32, 64, 128), cross_dim=128, pooled_dim=64, time_dim=16, side=8, depth=(1, 1, 2))
    config = whole_config(given)
    size, steps = (8 * config["sample_size"],) * 2, 2 if quick else STEPS
    flop = row_flop(config)
    modes = counted_modes(config, flop, size, steps)
    by_kind = {(mode["store"], mode["type"]): mode for mode in modes}
    for name, error in errors(steps, 1 if quick else TARGETS).items():
        if name == "no style":
            no_style = error
        else:
            by_kind[tuple(name.split())]["error"] = error
        print(f"{name:14} off by {error}", flush=True)
    for store, kind, fetch in fetched(projecting_unet(config), size, rounds):
        mode = by_kind[store, kind]
        mode["fetch"] = fetch | {"gb_per_second": _shown(mode["step_bytes"] / fetch["seconds"] / 1e9)}
        print(f"{store} {kind}: {mode['fetch']}", flush=True)
    return {
        "quick": quick,
        "environment": found_environment,
        "counted": "bytes by bank_bytes and page_bytes, row_flop by torch.utils.flop_counter, projections by shape",
        "measured": "fetch: two pages of a one-step bank at full width from the page cache into an fp32 pool, the "
        "median after a first round; hidden with all projections in fp32, packed. error: embedded model",
        "size": size,
        "steps": steps,
        "halves": HALVES,
        "row_flop": flop,
        "modes": modes,
        "layers": counted_layers(config, size, steps),
        "no_style": no_style,
        "peak_resident_gb": _shown(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9),
        "seconds": round(time.perf_counter() - start, 1),
    }


def modes_table(content: Mapping) -> str:
    """Format every kind of storage as a Markdown table, for docs/banks.md."""
    lines = [
        "| store, type | bank, bytes | one step, bytes | its pages, on this CPU | added work a step | latents off by "
        "| pictures off by: max, mean of 255 |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode in content["modes"]:
        fetch = mode.get("fetch")
        time_taken = f"{fetch['seconds']:.3g} s" if fetch else "none"
        added = f"{mode['added_flop'] / 1e12:.3g} TFLOP" if mode["added_flop"] else "none"
        lines.append(
            f"| {mode['store']} {mode['type']} | {mode['bytes']:,} | {mode['step_bytes']:,} | {time_taken} | {added} | "
            f"{_error_cells(mode['error'])} |"
        )
    lines.append(f"| no style at all | | | | | {_error_cells(content['no_style'])} |")
    return "\n".join(lines)


def layers_table(content: Mapping) -> str:
    """Format banks with fewer layers, and their bus times, as a Markdown table."""
    lines = [
        "| what is stored | layers | type | bank, bytes | one step, bytes | PCIe 5, 55 GB/s | PCIe 4, 25 GB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["layers"]:
        bus = " | ".join(f"{row['bus_ms'][name]:.1f} ms" for name in BUSES)
        lines.append(
            f"| {row['what']} | {row['layers']} | {row['type']} | {row['bytes']:,} | {row['step_bytes']:,} | {bus} |"
        )
    return "\n".join(lines)


def _error_cells(error: Mapping) -> str:
    latents = f"{error['latents']:.1e}" if error["latents"] else "0"
    return f"{latents} | {error['max_255']}, {error['mean_255']:.2g}"


def _arguments(config: Mapping) -> dict:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _pooled_width(config: Mapping) -> int:
    return config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]


def _shown(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="times that each pair of pages is brought")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: to see that all runs")
    parser.add_argument("--out", type=Path, help="file to write (with --quick: none unless given)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; at least 1 is needed")
    content = measure(arguments.quick, arguments.rounds)
    path = arguments.out or (None if arguments.quick else RESULTS / f"banks-{arguments.device}.json")
    print(modes_table(content), layers_table(content), sep="\n\n")
    if path is not None:
        write(path, content)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
