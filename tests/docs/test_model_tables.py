"""The tables in docs/models.md of what a model can say of itself are those that models are held against.

`python -m tests.docs.test_model_tables` writes them anew.
"""

import re
from pathlib import Path

from stylefast.models import statements
from stylefast.models.statements import Rules

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
START, END = "<!-- tables of stylefast/models/statements.py -->", "<!-- end of the tables -->"
CONFIGS = {
    "Scheduler": {**statements.SCHEDULER, **statements.EDM},
    "UNet": statements.UNET,
    "VAE": statements.VAE,
    "Tiny VAE": statements.TINY_VAE,
    "Text encoders": statements.TEXT_ENCODER,
    "Tokenizers": statements.TOKENIZER,
    "Image encoder": statements.IMAGE_ENCODER,
    "Image processor": statements.FEATURE_EXTRACTOR,
    "`model_index.json`": statements.MODEL_INDEX,
}
OTHERS = {"Single file": statements.SINGLE_FILE, "Pipeline in memory": statements.IN_MEMORY}


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    cells = [("what", "becomes", "because, or as"), ("---", "---", "---"), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]


def rows_of(rules: Rules) -> list[tuple[str, str, str]]:
    """One row for the keys that share a rule, in the order of the table."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for key, rule in rules.items():
        grouped.setdefault((rule.verdict, rule.why), []).append(f"`{key}`")
    return [(", ".join(keys), verdict, why) for (verdict, why), keys in grouped.items()]


def markdown() -> str:
    lines = [START]
    for title, rules in CONFIGS.items():
        lines += ["", f"**{title}**", "", *table(rows_of(rules))]
    for title, rows in OTHERS.items():
        lines += ["", f"**{title}**", "", *table([(what, *found) for what, found in rows.items()])]
    return "\n".join([*lines, "", END])


def test_the_page_shows_the_tables_that_models_are_held_against():
    assert markdown() in PAGE.read_text(encoding="utf-8"), "run python -m tests.docs.test_model_tables"


def test_the_page_names_every_scheduler_class_that_is_taken():
    page = PAGE.read_text(encoding="utf-8")
    assert not [name for name in (*statements.VP_SCHEDULERS, *statements.EDM_SCHEDULERS) if name not in page]


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"{START}.*{END}", lambda _: markdown(), page, flags=re.DOTALL), encoding="utf-8")
