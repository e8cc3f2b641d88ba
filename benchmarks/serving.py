"""Measure the HTTP service: the time that it adds to a request, and latency under load with and without shared steps.

    python -m benchmarks serving [--only overhead,load] [--seconds 40] [--out FILE]

overhead: one client, requests of four steps on the embedded model, in turns with `Engine.generate` in this process;
what the service adds is the difference, less the encoding of the picture. load: Poisson arrivals of mixed styles, sizes
and steps at 0.5, 0.8 and 1.1 of the service's own capacity, which is measured first with 16 clients that always wait,
for the service and for the same service with one picture at a time (`--max-running 1`). Writes
benchmarks/results/serving-cpu.json.
"""

import argparse
import base64
import http.client
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.environment import environment
from benchmarks.kernels.report import write

RESULTS = Path(__file__).parent / "results" / "serving-cpu.json"
ROUNDS, STEPS = 200, 4
ADDED_GOAL = 5.0  # milliseconds
CLIENTS, LOADS = 16, (0.5, 0.8, 1.1)
MOST_RUNNING = {"steps shared": 8, "one at a time": 1}
# what a request of the mix may be
STYLES = (None, "neon", "chalk", "woodcut")
SIZES = ("64x64", "64x64", "96x64")
COUNTS = (8, 12, 20, 30)


@contextmanager
def served(*options: str) -> Iterator[str]:
    """Run `stylefast serve`, and yield its address once it is ready."""
    command = [sys.executable, "-m", "stylefast.cli", "serve", "--port", "0", "--max-waiting", "1000", *options]
    environment = {**os.environ, "STYLEFAST_SERVE_LOG_FORMAT": "text"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    address = next(found[1] for line in process.stderr if (found := re.search(r"http://(\S+)", line)))
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        while True:
            connection = http.client.HTTPConnection(address)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                break
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def ask(connection: http.client.HTTPConnection, body: dict[str, Any]) -> dict[str, Any]:
    """Return the reply to a request. Raises RuntimeError for an error."""
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"content-type": "application/json"})
    reply = connection.getresponse()
    content = json.loads(reply.read())
    if reply.status != 200:
        raise RuntimeError(f"{reply.status}: {content['error']['message']}")
    return content


def overhead() -> dict[str, Any]:
    """Return the medians of the service, of the engine and of encoding, and what the service adds, in milliseconds."""
    import stylefast as sf
    from stylefast.serving.media import encoded

    body = {"prompt": "a fish", "stylefast": {"steps": STEPS, "seed": 1}}
    times: dict[str, list[float]] = {"service": [], "engine": [], "encoding": []}
    with served() as address, sf.Engine.from_pretrained("tiny", device="cpu") as engine:
        connection = http.client.HTTPConnection(address)
        for turn in range(-5, ROUNDS):
            start = time.perf_counter()
            found = ask(connection, body)
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
        "rounds": ROUNDS,
        "same_pixels": drawn.tobytes() == made.images[0].tobytes(),
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "added_ms": round(added, 2),
        "goal_ms": ADDED_GOAL,
    }


def mix(seed: int) -> dict[str, Any]:
    """Return one request of the mix."""
    draw = random.Random(seed)
    own = {"steps": draw.choice(COUNTS), "seed": seed, "guidance": draw.choice((1.0, 4.0, 7.5))}
    style = draw.choice(STYLES)
    if style is not None:
        own["style"] = style
    return {"prompt": draw.choice(("a fish", "a cat", "a house")), "size": draw.choice(SIZES), "stylefast": own}


def capacity(address: str, seconds: float) -> float:
    """Return the requests a second that clients get who always wait for the reply."""
    until, done = time.monotonic() + seconds, [0] * CLIENTS

    def work(number: int) -> None:
        connection, seed = http.client.HTTPConnection(address), 10_000 * number
        while time.monotonic() < until:
            ask(connection, mix(seed))
            done[number] += 1
            seed += 1

    start = time.monotonic()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.monotonic() - start)


def latencies(address: str, rate: float, seconds: float) -> dict[str, Any]:
    """Send requests at random times, `rate` a second on average; return the percentiles of their latency in seconds."""
    draw, threads = random.Random(7), []
    found: list[float] = []
    refused: list[str] = []

    def one(seed: int) -> None:
        start = time.monotonic()
        try:
            ask(http.client.HTTPConnection(address), mix(seed))
            found.append(time.monotonic() - start)
        except RuntimeError as error:
            refused.append(str(error))

    start, due = time.monotonic(), 0.0
    for seed in range(10**6):
        due += draw.expovariate(rate)
        if due > seconds:
            break
        time.sleep(max(0.0, start + due - time.monotonic()))
        threads.append(threading.Thread(target=one, args=(seed,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return {"requests": len(threads), "refused": len(refused), **percentiles(found)}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return the percentiles that so many values can show."""
    ordered = sorted(values)
    shown = {
        "p50": 0.5,
        **({"p95": 0.95} if len(ordered) >= 60 else {}),
        **({"p99": 0.99} if len(ordered) >= 300 else {}),
    }
    return {name: round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 3) for name, share in shown.items()}


def load(seconds: float) -> dict[str, Any]:
    """Return latencies of both kinds of service at each load."""
    result: dict[str, Any] = {"seconds": seconds, "clients": CLIENTS, "loads": LOADS, "kinds": {}}
    for kind, running in MOST_RUNNING.items():
        with served("--max-running", str(running)) as address:
            capacity(address, 5.0)  # the first use of every size and style
            most = capacity(address, seconds / 2)
            result.setdefault("capacity", round(most, 3))
            entry = {"capacity": round(most, 3), "by_load": {}}
            for share in LOADS:
                entry["by_load"][str(share)] = latencies(address, share * result["capacity"], seconds)
            result["kinds"][kind] = entry
    return result


def markdown(content: dict[str, Any]) -> str:
    """Return the table of docs/serving-http.md."""
    lines = [
        "| load | requests a second | steps shared: p50 | p95 | one at a time: p50 | p95 |",
        "|---|---|---|---|---|---|",
    ]
    found = content["results"]["load"]
    for share in map(str, found["loads"]):
        cells = []
        for kind in MOST_RUNNING:
            entry = found["kinds"][kind]["by_load"][share]
            cells += [f"{entry[name]:.2f} s" if name in entry else "" for name in ("p50", "p95")]
        lines.append(f"| {share} | {float(share) * found['capacity']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="overhead,load")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each load")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    place, results = environment("cpu"), {}
    if "overhead" in arguments.only:
        results["overhead"] = overhead()
        print(json.dumps(results["overhead"], indent=1))
    if "load" in arguments.only:
        results["load"] = load(arguments.seconds)
        print(json.dumps(results["load"], indent=1))
    content = {"results": results, "environment": place}
    write(arguments.out, content)
    if "load" in results:
        print(markdown(content))


if __name__ == "__main__":
    main()
