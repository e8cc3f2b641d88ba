"""The one declaration of the row table's columns."""

import pytest
import torch

from stylefast.models.row_table import COLUMNS, RowTable

SIZES = {"rows": 5, "norm_rows": 0, "references": 2, "segments": 3, "loras": 2, "layers": 7, "modules": 4}


@pytest.mark.parametrize("name", COLUMNS)
def test_an_idle_column_has_its_type_its_shape_and_values_that_do_nothing(name):
    column = COLUMNS[name]
    filled = column.filled(column.shape(SIZES))
    assert filled.dtype == column.dtype and filled.shape == tuple(SIZES.get(dim, dim) for dim in column.dims)
    if column.idle is not None:
        assert (filled == column.idle).all()


def test_no_two_segments_of_an_idle_row_share_a_softmax():
    groups = COLUMNS["image_group"].filled((2, 3))
    assert groups.tolist() == [[0, 1, 2]] * 2
    groups[0] = 9  # rows have memory of their own
    assert groups[1].tolist() == [0, 1, 2]


def test_a_size_of_zero_gives_an_empty_column():
    assert COLUMNS["self_page"].filled((4, 0)).shape == (4, 0) and COLUMNS["norm_page"].filled((0,)).numel() == 0


def test_dimensions_may_be_names_too():
    assert COLUMNS["adain_strength"].shape({"rows": "rows"}) == ("rows", 3)


def test_a_table_moves_whole():
    table = RowTable(**{name: column.filled(column.shape(SIZES)) for name, column in COLUMNS.items()})
    assert all(torch.equal(a, b) for a, b in zip(table, table.to("cpu")))
