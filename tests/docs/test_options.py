"""The table of options in docs/serving.md is `EngineOptions`."""

from dataclasses import fields
from pathlib import Path

from stylefast.options import EngineOptions


def test_every_option_has_its_row_in_the_order_of_the_code(checkout: Path):
    page = (checkout / "docs" / "serving.md").read_text()
    rows = []
    for option in fields(EngineOptions):
        text, flag = option.metadata["text"], option.metadata["flag"]
        shell = f"`--{option.name.replace('_', '-')}`" if flag else ""
        rows.append(f"| `{option.name}` | {option.default!r} | {shell} | {text} |".replace("'", '"'))
    wanted = "\n".join(["| option | default | command line | meaning |", "|---|---|---|---|", *rows])
    assert wanted.replace('"', "'") in page.replace('"', "'"), wanted
