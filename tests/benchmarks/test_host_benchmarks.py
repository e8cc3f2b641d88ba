"""The benchmarks of planning, pages and copies measure both forms, on work that succeeds."""

import pytest
import torch

from benchmarks import copies, planning
from tests.support.cpp_forms import needs_extension

pytestmark = needs_extension


@pytest.mark.parametrize("make", [planning.planning, planning.holding])
def test_both_forms_are_timed_and_the_table_shows_them(make):
    found = planning.measured(make(8), rounds=2)
    assert found["cpp_us"] > 0 and found["python_us"] > 0
    table = planning.markdown({"results": {"cases": [{"what": "x", "rows": 8} | found]}})
    assert table.splitlines()[-1].startswith("| 8 | x | ")


def test_the_batch_that_is_planned_has_sets_that_read_their_first_picture():
    segments = planning.planning(16)["cpp"]()
    assert segments.page.tolist()[:8] == [[-1], [-1], [0], [1], [0], [1], [0], [1]]


@pytest.mark.parametrize("kind", copies.BESIDE)
def test_pages_are_copied_by_both_forms_beside_other_threads(kind):
    sources, destinations = [torch.ones(9), torch.ones(5)], [torch.zeros(9), torch.zeros(5)]
    row = copies.measured(sources, destinations, kind, rounds=1)
    assert all(x.eq(1).all() for x in destinations)
    assert copies.markdown({"results": {"loads": [{"from": "memory", "beside": kind} | row]}}).count("\n") == 2
