"""The tables of docs/serving-http.md are those of the code."""

from dataclasses import MISSING, fields
from types import SimpleNamespace

from stylefast.serving.metrics import Metrics
from stylefast.serving.settings import ServeSettings


def test_every_setting_has_its_row(checkout):
    page = (checkout / "docs" / "serving-http.md").read_text()
    rows = []
    for f in fields(ServeSettings):
        default = "none" if f.default is MISSING or f.default is None else repr(f.default)
        rows.append(f"| `{f.name}` | {default} | {f.metadata['text']} |")
    assert "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]) in page, "\n".join(rows)


def test_every_metric_has_its_row(checkout):
    page = (checkout / "docs" / "serving-http.md").read_text()
    metrics = Metrics(SimpleNamespace(waiting=0, running=0, pictures=0, restarts=0))
    rows = [
        f"| `{family.name}{'_total' if family.type == 'counter' else ''}` | {family.type} | {family.documentation} |"
        for family in metrics.families()
    ]
    assert "\n".join(["| metric | kind | |", "|---|---|---|", *rows]) in page, "\n".join(rows)
