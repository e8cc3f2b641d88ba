"""The time that the service adds to a request of `Engine.generate`, with one client."""

import base64
import json
import time
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serving.service import JSON, OURS, PATH, running

ROUNDS, STEPS = 200, 4
# the model's own, and a small one: what the service adds hardly depends on the picture, whose own time scatters less
SIZES = (None, "32x32")
GOAL = 5.0  # milliseconds


def overhead(rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the medians of the service, of the engine and of encoding, and what the service adds, in milliseconds.

    Requests to the service and calls of an engine in this process take turns, and so does which of them is first. What
    is added is the median of the differences within a round.
    """
    import stylefast as sf

    with running(OURS) as service, sf.Engine.from_pretrained("tiny", device="cpu") as engine:
        sizes = dict(_one_size(service.connect(), engine, size, rounds) for size in SIZES)
    return {"rounds": rounds, "goal_ms": GOAL, "sizes": sizes}


def _one_size(connection: Any, engine: Any, size: str | None, rounds: int) -> tuple[str, dict[str, Any]]:
    from stylefast.serving.media import encoded

    shape = None if size is None else tuple(map(int, size.split("x")))
    body = json.dumps({"prompt": "a fish", "size": size or "auto", "stylefast": {"steps": STEPS, "seed": 1}})

    def ask() -> Any:
        connection.request("POST", PATH, body, JSON)
        return json.loads(connection.getresponse().read())

    def draw() -> Any:
        return engine.generate("a fish", size=shape, steps=STEPS, seed=1)

    def encode() -> bytes:
        return encoded(made.images[0], "png", 100, json.dumps(made.metadata[0]), "x" * 200)

    made, found, times = draw(), ask(), []
    for turn in range(-5, rounds):
        order = (ask, draw, encode) if turn % 2 else (encode, draw, ask)
        seconds = {part: _timed(part) for part in order}
        if turn >= 0:
            times.append([1e3 * seconds[part] for part in (ask, draw, encode)])
    drawn = Image.open(BytesIO(base64.b64decode(found["data"][0]["b64_json"])))
    columns = np.array(times)
    added = columns[:, 0] - columns[:, 1] - columns[:, 2]
    resampled = np.median(np.random.default_rng(0).choice(added, (2000, rounds)), axis=1)
    return "x".join(map(str, drawn.size)), {
        "same_pixels": drawn.tobytes() == made.images[0].tobytes(),
        "median_ms": dict(zip(("service", "engine", "encoding"), np.median(columns, axis=0).round(2), strict=True)),
        "added_ms": round(float(np.median(added)), 2),
        "added_between_ms": [round(float(end), 2) for end in np.quantile(resampled, (0.025, 0.975))],
    }


def _timed(part: Any) -> float:
    start = time.perf_counter()
    part()
    return time.perf_counter() - start
