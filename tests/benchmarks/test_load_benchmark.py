"""The benchmark of an engine under load: what it takes for a gap, and that it asks for every kind of request."""

import math

from benchmarks import load


def test_the_gap_is_the_longest_time_that_a_job_stands_still():
    watched = load.Watched.__new__(load.Watched)
    watched.steps = [(0.0, 1.0), (1.25, 2.0), (4.0, 9.0), (9.5, 10.0)]
    assert watched.gap == 2.0
    watched.steps = watched.steps[:1]
    assert math.isnan(watched.gap)


def test_every_kind_of_request_has_a_case_with_a_goal():
    cases = {case.name: case.expected[0] for case in load.cases()}
    asked = {"prompt", "picture", "reference", "inversion", "bake", "adapter", "lora", "size", "decode", "export"}
    assert {f"gap: {name}" for name in asked} <= cases.keys() and "busy" in cases
    assert all(figure.at_most and figure.goal <= load.MOST_COST for figure in cases.values())


def test_a_case_that_does_not_exist_is_named(capsys):
    assert load.main(["--only", "nothing like that"]) == 2
    assert "gap: bake" in capsys.readouterr().err
