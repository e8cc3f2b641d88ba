"""docs/architecture.md lists the columns of the row table as the code declares them."""

from pathlib import Path

from stylefast.models.row_table import COLUMNS, RowTable


def test_every_column_has_its_row_in_the_order_of_the_code(checkout: Path):
    page = (checkout / "docs" / "architecture.md").read_text()
    rows = []
    for name, column in COLUMNS.items():
        idle = "numbered" if column.idle is None else str(column.idle)
        cells = (f"`{name}`", str(column.dtype).removeprefix("torch."), ", ".join(map(str, column.dims)), idle)
        rows.append(f"| {' | '.join((*cells, column.writer, column.meaning))} |")
    assert "\n".join(rows) in page
    assert tuple(COLUMNS) == RowTable._fields
