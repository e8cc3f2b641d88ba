"""The tables of docs/serving-http.md are those of the code."""

from dataclasses import MISSING, fields
from types import SimpleNamespace

from stylefast.serving import tickets
from stylefast.serving.metrics import Metrics
from stylefast.serving.settings import ServeSettings
from stylefast.serving.tickets import Ticket


def test_every_setting_has_its_row(checkout):
    page = (checkout / "docs" / "serving-http.md").read_text()
    rows = []
    for f in fields(ServeSettings):
        default = "none" if f.default is MISSING or f.default is None else repr(f.default)
        rows.append(f"| `{f.name}` | {default} | {f.metadata['text']} |")
    assert "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]) in page, "\n".join(rows)


def families():
    """Return the metrics of a server that has answered a request; those with labels have no values before."""
    metrics = Metrics(SimpleNamespace(waiting=0, running=0, pictures=0, max_running=0, restarts=0, levels={}))
    metrics.ended(Ticket("a", "alice", {"requests": []}, status=tickets.DONE))
    metrics.replied("/livez", 200, 0.1)
    return list(metrics.families())


def metric_names():
    """Return the names by which Prometheus has them."""
    names = set()
    for family in families():
        ends = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}.get(family.type, ("",))
        names |= {family.name + end for end in ends}
    return names


def test_every_metric_has_its_row(checkout):
    page = (checkout / "docs" / "serving-http.md").read_text()
    rows = [
        f"| `{family.name}{'_total' if family.type == 'counter' else ''}` | {family.type} | {family.documentation} |"
        for family in families()
    ]
    assert "\n".join(["| metric | kind | |", "|---|---|---|", *rows]) in page, "\n".join(rows)
