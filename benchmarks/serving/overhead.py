"""The time that the service adds to a request of `Engine.generate`, with one client."""

import base64
import json
import statistics
import time
from io import BytesIO
from typing import Any

from PIL import Image

from benchmarks.serving.service import JSON, OURS, PATH, running

ROUNDS, STEPS = 200, 4
GOAL = 5.0  # milliseconds


def overhead(rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the medians of the service, of the engine and of encoding, and what the service adds, in milliseconds.

    Requests to the service and calls of an engine in this process take turns.
    """
    import stylefast as sf
    from stylefast.serving.media import encoded

    body = json.dumps({"prompt": "a fish", "stylefast": {"steps": STEPS, "seed": 1}})
    times: dict[str, list[float]] = {"service": [], "engine": [], "encoding": []}
    with running(OURS) as service, sf.Engine.from_pretrained("tiny", device="cpu") as engine:
        connection = service.connect()
        for turn in range(-5, rounds):
            start = time.perf_counter()
            connection.request("POST", PATH, body, JSON)
            found = json.loads(connection.getresponse().read())
            between = time.perf_counter()
            made = engine.generate("a fish", steps=STEPS, seed=1)
            done = time.perf_counter()
            encoded(made.images[0], "png", 100, json.dumps(made.metadata[0]), "x" * 200)
            last = time.perf_counter()
            if turn >= 0:
                for name, seconds in zip(times, (between - start, done - between, last - done), strict=True):
                    times[name].append(1e3 * seconds)
    drawn = Image.open(BytesIO(base64.b64decode(found["data"][0]["b64_json"])))
    medians = {name: statistics.median(values) for name, values in times.items()}
    added = medians["service"] - medians["engine"] - medians["encoding"]
    return {
        "rounds": rounds,
        "same_pixels": drawn.tobytes() == made.images[0].tobytes(),
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "added_ms": round(added, 2),
        "goal_ms": GOAL,
    }
