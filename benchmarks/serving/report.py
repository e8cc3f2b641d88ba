"""The table, the chart and the figures in the words of docs/serving-http.md.

python -m benchmarks.serving.report    writes docs/serving-load.svg from the results file, and prints the table
"""

import json
from collections.abc import Mapping
from html import escape
from math import ceil
from pathlib import Path
from typing import Any

from benchmarks.serving.load import ALONE, KINDS, PUBLISHED, SHARED

RESULTS = Path(__file__).parents[1] / "results" / "serving-cpu.json"
CHART = Path(__file__).parents[2] / "docs" / "serving-load.svg"
WHATS = {"to_preview": "first preview", "to_picture": "picture"}
# bars that differ without colours: black, hatched, white
FILLS = {SHARED: "#222222", ALONE: "url(#hatched)", PUBLISHED: "#ffffff"}
WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 860, 170, 90, 92, 15, 16


def markdown(content: Mapping[str, Any]) -> str:
    """Return the table of docs/serving-http.md."""
    found = content["results"]["load"]
    names = [name for name in ("p50", "p95", "p99") if all(name in entry["to_picture"] for *_, entry in entries(found))]
    heads = [f"{what}, {name}" for what in WHATS.values() for name in names]
    lines = [f"| load | requests a second | server | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for share, kind, entry in entries(found):
        first = kind == SHARED
        cells = [entry[what][name] for what in WHATS for name in names]
        between = [entry[what][f"{name}_between"] for what in WHATS for name in names]
        texts = [f"{cell:.1f} s ({low:.1f} to {high:.1f})" for cell, (low, high) in zip(cells, between, strict=True)]
        place = f"{share} | {entry['rate']:.2f}" if first else " | "
        lines.append(f"| {place} | {kind} | {' | '.join(texts)} |")
    return "\n".join(lines)


def sentences(content: Mapping[str, Any]) -> list[str]:
    """Return what docs/serving-http.md says of the other parts, of those that were measured."""
    found = content["results"]
    lines = []
    for size, entry in found["overhead"]["sizes"].items():
        low, high = entry["added_between_ms"]
        lines.append(f"{entry['added_ms']:.1f} ms ({low:.1f} to {high:.1f}) at {size}")
    if "soak" in found:
        soak, ends = found["soak"], found["soak"]["ends"]
        gone = sum(ends.get(name, 0) for name in ("cancelled", "cut off", "too late to cancel"))
        lines.append(
            f"{soak['clients']} clients for {soak['seconds']:.0f} seconds sent {soak['requests']} requests, of which "
            f"{gone} were cancelled and {ends.get('malformed', 0)} malformed: {soak['lost']} were lost, "
            f"{soak['server_errors']} ended in an error of the server's own, and memory grew by "
            f"{soak['growth_megabytes']:.1f} MB after the first {soak['warm_up_requests']}"
        )
    if "crash" in found:
        crash = found["crash"]
        back = " and ".join(f"{seconds:.1f}" for seconds in crash["ready_again_seconds"])
        lines.append(
            f"its engine killed {crash['kills']} times under load, {crash['requests']} requests ended in "
            f"{crash['ends']['picture']} pictures and {crash['ends']['clear error']} clear errors, none twice; the "
            f"server was ready again after {back} s"
        )
    if "starts" in found:
        lines.append(f"is ready {found['starts']['median']:.1f} s after its start")
    return lines


def entries(found: Mapping[str, Any]):
    """Yield the load, the kind and the entry of every cell of the measurement."""
    for share in found["loads"]:
        for kind in KINDS:
            yield str(share), kind, found["kinds"][kind]["by_load"][str(share)]


def description(found: Mapping[str, Any]) -> str:
    """Return the chart in words."""
    parts = [f"At load {share}, {kind}: {', '.join(words(entry))}." for share, kind, entry in entries(found)]
    return " ".join(parts)


def words(entry: Mapping[str, Any]) -> list[str]:
    """Return what an entry's bars show."""
    return [
        f"{name} after {entry[what]['p50']:.1f} s"
        + (f" (p95 {entry[what]['p95']:.1f} s)" if "p95" in entry[what] else "")
        for what, name in WHATS.items()
    ]


def chart(content: Mapping[str, Any]) -> str:
    """Draw the medians as bars and the 95th percentiles as lines, by load, as SVG."""
    found = content["results"]["load"]
    rows = list(entries(found))
    most = max(entry[what].get("p95", entry[what]["p50"]) for *_, entry in rows for what in WHATS)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200) if most / step <= 8)
    end = step * ceil(most / step)
    panel = len(found["loads"]) * (len(KINDS) * BAR + GAP) + 42
    height = TOP + len(WHATS) * panel + 16
    scale = (WIDTH - LEFT - RIGHT) / end
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-labelledby="title words" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        '<title id="title">Seconds to the first preview and to the picture, by load and server</title>',
        f'<desc id="words">{escape(description(found))}</desc>',
        '<defs><pattern id="hatched" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="5" height="5" fill="#ffffff"/>'
        '<line x1="0" y1="0" x2="0" y2="5" stroke="#222222" stroke-width="2.4"/></pattern></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        text(14, 24, "Seconds from the request, under Poisson arrivals", weight="bold", size=15),
        text(14, 44, "bar: median; line: to the 95th percentile"),
    ]
    for place, kind in enumerate(KINDS):
        x = 14 + 190 * place
        out += [bar(x, 56, 26, kind), text(x + 34, 56 + BAR - 3, kind)]
    y = TOP
    for what, name in WHATS.items():
        out.append(text(14, y + 14, f"To the {name}", weight="bold"))
        y += 22
        bottom = y + panel - 42
        for tick in range(0, end + 1, step):
            x = LEFT + scale * tick
            out.append(f'<line x1="{x:.1f}" y1="{y - 4}" x2="{x:.1f}" y2="{bottom}" stroke="#cccccc"/>')
            out.append(text(x, bottom + 14, f"{tick} s" if tick == end else str(tick), anchor="middle"))
        for number, (share, kind, entry) in enumerate(rows):
            if number % len(KINDS) == 0:
                label = f"load {share}: {entry['rate']:.2f} a second"
                out.append(text(14, y + BAR * len(KINDS) / 2 + 4, label))
            middle, cell = y + BAR / 2, entry[what]
            out.append(bar(LEFT, y, scale * cell["p50"], kind))
            until, mark = LEFT + scale * cell["p50"], f"{cell['p50']:.1f}"
            if "p95" in cell:
                late = LEFT + scale * cell["p95"]
                out.append(
                    f'<path d="M{until:.1f} {middle} H{late:.1f} M{late:.1f} {middle - 4} v8" stroke="#222222" '
                    'stroke-width="1.5" fill="none"/>'
                )
                until, mark = max(until, late), f"{mark}, {cell['p95']:.1f}"
            out.append(text(until + 6, y + BAR - 3, mark))
            y += BAR + (GAP if (number + 1) % len(KINDS) == 0 else 0)
        y = bottom + 20
    return "\n".join([*out, "</svg>", ""])


def bar(x: float, y: float, width: float, kind: str) -> str:
    """Return a bar in the fill of a kind."""
    return f'<rect x="{x}" y="{y + 1:g}" width="{width:.1f}" height="{BAR - 3}" fill="{FILLS[kind]}" stroke="#222222"/>'


def text(x: float, y: float, words: str, *, weight: str = "normal", size: int = 12, anchor: str = "start") -> str:
    """Return a line of text."""
    style = f'font-weight="{weight}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style} fill="#222222">{escape(words)}</text>'


def main() -> None:
    """Write the chart, and print the table."""
    content = json.loads(RESULTS.read_text())
    CHART.write_text(chart(content))
    print(markdown(content), *sentences(content), sep="\n")


if __name__ == "__main__":
    main()
