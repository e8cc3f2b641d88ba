"""What pictures that begin with pictures, and pictures under control, cost beside pictures from noise, in one batch.

    python -m benchmarks pictures [--rounds 5] [--threads 2] [--quick]

Writes benchmarks/results/pictures-cpu.json. Measured in turns: the steps of six pictures from noise, and of two from
noise, two from a picture and two repainted within a mask; without guidance, on SDXL's layout at half its widths and
512 x 512, and on the embedded model. Then the steps of four pictures of which a ControlNet steers one, and of one
picture alone, each with the network and without: what the network adds to the four is held to what it adds to the one.
--quick: the embedded model alone.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.environment import environment
from benchmarks.kernels.report import write
from benchmarks.runtime.models import Model, half_width_model, tiny_model
from stylefast import Control, Engine, Request

RESULTS = Path(__file__).parent / "results" / "pictures-cpu.json"
STEPS, GOAL, CONTROL_GOAL = 4, 1.05, 1.10


def requests_of(engine: Engine) -> dict[str, list[Request]]:
    """Return the requests of both batches; all of them run as many steps."""
    width, height = engine.native_size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 4, height // 4, width - width // 4, height - height // 4))
    shared: dict[str, Any] = {"guidance": 1.0, "size": (width, height)}
    plain = [Request("a fish", steps=STEPS, seed=seed, **shared) for seed in range(6)]
    begun = {"steps": 2 * STEPS, "image": noise, "strength": 0.5, **shared}
    masked = {**begun, "mask": mask}
    kinds = [Request("a cat", seed=seed, **given) for seed, given in enumerate((begun, begun, masked, masked))]
    return {"from noise": plain, "mixed": plain[:2] + kinds}


def seconds(engine: Engine, requests: Sequence[Request]) -> float:
    """Return the seconds from the end of the first step of all requests to the end of the last."""
    ends: list[float] = []
    engine.generate(requests, callback=lambda *_: ends.append(time.perf_counter()), output="latents")
    assert len(ends) == STEPS, "the pictures did not share their steps"
    return ends[-1] - ends[0]


def measure(model: Model, rounds: int) -> dict[str, Any]:
    """Return the median seconds of both batches, and the median of their ratio within a round."""
    batches = requests_of(model.engine)
    times: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(rounds):
        for name in sorted(batches, reverse=bool(turn % 2)):
            times[name].append(seconds(model.engine, batches[name]))
    ratios = [mixed / plain for mixed, plain in zip(times["mixed"], times["from noise"], strict=True)]
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    ratio = statistics.median(ratios)
    return {"model": model.name, "rounds": rounds, "seconds": medians, "ratio": round(ratio, 3), "goal": GOAL}


def control_net(model: Model) -> torch.nn.Module:
    """Return a ControlNet of diffusers for a model, with random weights."""
    from diffusers import ControlNetModel

    config, sizes = model.engine.unet.config, (16, 32, 96, 256)
    names = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")
    names += ("transformer_layers_per_block", "attention_head_dim", "num_attention_heads", "use_linear_projection")
    names += ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    names += ("norm_num_groups", "only_cross_attention")
    given = {name: config[name] for name in names if name in config}
    torch.manual_seed(0)
    widths = sizes[: model.engine.downscale.bit_length()]
    return ControlNetModel(**given, conditioning_embedding_out_channels=widths).requires_grad_(False).eval()


def measure_control(model: Model, rounds: int) -> dict[str, Any]:
    """Return the median seconds of the four batches, and the median ratio of what the network adds to them."""
    engine = model.engine
    engine.controls.add(control_net(model), "lines")
    width, height = engine.native_size
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    shared: dict[str, Any] = {"guidance": 1.0, "size": (width, height), "steps": STEPS}
    plain = [Request("a fish", seed=seed, **shared) for seed in range(4)]
    steered = Request("a fish", seed=0, control=Control(picture, "lines"), **shared)
    batches = {"four": plain, "four, one steered": [steered, *plain[1:]], "one": plain[:1], "one, steered": [steered]}
    times: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(rounds):
        for name in sorted(batches, reverse=bool(turn % 2)):
            times[name].append(seconds(engine, batches[name]))
    alone = statistics.median(b - a for a, b in zip(times["one"], times["one, steered"], strict=True))
    added = statistics.median(b - a for a, b in zip(times["four"], times["four, one steered"], strict=True))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    found = {"alone": alone, "among four": added, "ratio": round(added / alone, 3), "goal": CONTROL_GOAL}
    return {"model": model.name, "rounds": rounds, "seconds": medians, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="only the embedded model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    place, models, control = environment("cpu"), [], []
    for make in [tiny_model] if arguments.quick else [tiny_model, partial(half_width_model, 64)]:
        model = make()
        models.append(measure(model, arguments.rounds))
        control.append(measure_control(model, arguments.rounds))
    results = {"models": models, "control": control, "steps": STEPS}
    write(arguments.out, {"results": results, "environment": place})
    for kind, entries in (("begun with pictures", models), ("control", control)):
        for found in entries:
            print(f"{kind}, {found['model']}: {found['ratio']} (goal: at most {found['goal']})")


if __name__ == "__main__":
    main()
