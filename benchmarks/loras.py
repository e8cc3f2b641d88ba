"""LoRAs per row: eight pictures with eight LoRAs in one batch, against the same batch without any, and one by one.

    python -m benchmarks loras [--rounds 5] [--threads 2] [--quick]

Writes benchmarks/results/loras-cpu.json. LoRAs have rank 16 and change all attention and feed-forward layers. Measured
in turns: the steps of eight pictures without guidance, that is one UNet call of eight rows a step, on SDXL's layout at
half its widths and 512 x 512, and on the embedded model; with the LoRAs merged into the model's weights and removed
again, one picture after another; and the registration of a LoRA of rank 32 for SDXL from a file in the system's page
cache. --quick: the embedded model alone.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.environment import environment
from benchmarks.kernels.measure import Budget
from benchmarks.kernels.report import write
from benchmarks.runtime.cases import Race, Run, race
from benchmarks.runtime.models import half_width_model, sdxl_config, tiny_model
from stylefast import Engine, Request
from stylefast.models.prepacked import Linear
from stylefast.models.unet import UNet
from stylefast.runtime.loras import Loras

RESULTS = Path(__file__).parent / "results" / "loras-cpu.json"
COUNT, RANK, STEPS = 8, 16, 2
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
COUNTED = {8: "eight", 32: "32"}
# figure -> its goal: at most, or at least where it is a gain
GOALS = {"eight LoRAs / none": 1.20, "one LoRA on one row / none": 1.04, "one by one / eight LoRAs": 3.0}
REGISTRATION_GOAL = 1.0  # seconds


def write_lora(unet: UNet, path: Path, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random LoRA in kohya's layout."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for name, layer in unet.named_modules():
        if isinstance(layer, Linear) and name.endswith(LAYERS):
            key = "lora_unet_" + name.replace(".", "_")
            down = torch.randn(rank, layer.in_features, generator=draw) / layer.in_features**0.5
            up = torch.randn(layer.out_features, rank, generator=draw) * 0.1
            found |= {f"{key}.lora_down.weight": down.to(dtype), f"{key}.lora_up.weight": up.to(dtype)}
            found[f"{key}.alpha"] = torch.tensor(float(rank), dtype=dtype)
    save_file(found, path)
    return path


def registered(engine: Engine, folder: Path, count: int, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    """Register `count` random LoRAs of rank 16; return their files by name."""
    files = {f"lora{i}": write_lora(engine.unet, folder / f"lora{i}.safetensors", RANK, i, dtype) for i in range(count)}
    for name, file in files.items():
        engine.loras.add(file, name)
    return files


def contestants(engine: Engine, files: Mapping[str, Path], steps: int) -> dict[str, Run]:
    """Return runs of as many pictures as files: without LoRAs, with one for the first, with one each, and merged."""
    own = [{name: 1.0} for name in files]
    none: list[dict[str, float]] = [{} for _ in own]

    def request(i: int, loras: Mapping[str, float]) -> Request:
        return Request("a fish", seed=i, steps=steps, guidance=1.0, loras=loras)

    def draw(loras: Sequence[Mapping[str, float]]) -> list[torch.Tensor]:
        return engine.generate([request(i, each) for i, each in enumerate(loras)], output="latents").latents

    def merged() -> list[torch.Tensor]:
        found = []
        for i, file in enumerate(files.values()):
            merged = engine.load_lora(file, 1.0)
            found += engine.generate(request(i, {}), output="latents").latents
            engine.merged_loras.remove(merged)
        return found

    return {
        "none": lambda: draw(none),
        "one LoRA on one row": lambda: draw([own[0], *none[1:]]),
        f"{COUNTED.get(len(files), len(files))} LoRAs": lambda: draw(own),
        "one by one": merged,
    }


def measure(name: str, engine: Engine, folder: Path, rounds: int, minutes: float) -> dict:
    """Return the median seconds of each contestant, and the figures: medians of the ratios within a round.

    Merging takes most of a round's time, and what follows it packs weights and encodes prompts again, so it runs in
    fewer rounds of its own.
    """
    (folder / name).mkdir()
    runs = contestants(engine, registered(engine, folder / name, COUNT), STEPS)
    # the last takes upon itself what follows the merges
    merging = {"eight LoRAs": runs["eight LoRAs"], "one by one": runs.pop("one by one"), "after": runs["none"]}
    races = [
        race(runs, rounds, Budget(0.7 * minutes)),
        race(merging, -(-rounds // 3), Budget(0.3 * minutes), warm_ups=0),
    ]
    together, alone = (races[1].results[run] for run in ("eight LoRAs", "one by one"))
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(together, alone, strict=True))
    times = races[1].times | races[0].times
    return {
        "model": name,
        "rounds": {run: len(taken) for run, taken in times.items()},
        "seconds": {run: statistics.median(taken) for run, taken in times.items()},
        "figures": {figure: round(_ratio(figure, races), 3) for figure in GOALS},
        "apart": apart,
    }


def _ratio(figure: str, races: Sequence[Race]) -> float:
    names = figure.split(" / ")
    times = next(found.times for found in races if {*names} <= {*found.times})
    return statistics.median(over / under for over, under in zip(*(times[name] for name in names), strict=True))


def registration(folder: Path, rounds: int) -> dict:
    """Return the seconds that registering a LoRA of rank 32 for SDXL takes, and the bytes of its file."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):  # without weights
        unet = UNet(dict(UNet2DConditionModel(**sdxl_config()).config)).to(torch.float16)
    file = write_lora(unet, folder / "sdxl.safetensors", 32, 0, torch.float16)
    times = []
    for _ in range(rounds + 1):
        registry = Loras(unet, {"unet": unet.state_dict(), "text_encoder": {}, "text_encoder_2": {}})
        start = time.perf_counter()
        registry.add(file, "big")
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times[1:]), "bytes": file.stat().st_size}


def markdown(content: dict) -> str:
    """Return the table of docs/loras.md."""
    lines = ["| figure | goal | half-width SDXL, 512 x 512 | embedded model |", "|---|---|---|---|"]
    by_model = {row["model"]: row["figures"] for row in content["results"]["models"]}
    for figure, goal in GOALS.items():
        word = "at least" if figure.startswith("one by one") else "at most"
        cells = [f"{by_model[model][figure]:.2f}" if model in by_model else "" for model in ("half-width", "embedded")]
        lines.append(f"| {figure} | {word} {goal:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="only the embedded model")
    parser.add_argument("--minutes", type=float, default=12.0, help="for each model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    place, models = environment("cpu"), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models.append(measure("embedded", tiny_model().engine, folder, arguments.rounds, arguments.minutes))
        if not arguments.quick:
            big = half_width_model(64).engine
            models.append(measure("half-width", big, folder, arguments.rounds, arguments.minutes))
        registered = registration(folder, arguments.rounds)
    content = {"results": {"models": models, "registration": registered, "steps": STEPS}, "environment": place}
    write(arguments.out, content)
    print(markdown(content))
    print(f"registering {registered['bytes'] / 2**20:.0f} MiB: {registered['seconds']:.2f} s")
    for row in models:
        print(row["model"], {name: round(value, 3) for name, value in row["seconds"].items()}, f"{row['apart']:.1e}")


if __name__ == "__main__":
    main()
