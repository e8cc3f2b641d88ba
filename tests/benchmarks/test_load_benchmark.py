"""The benchmark of an engine under load: what it takes for a gap, and that it asks for every kind of request."""

import math

from benchmarks import load


def test_the_gap_is_the_longest_time_that_a_job_stands_still():
    watched = load.Watched.__new__(load.Watched)
    watched.steps = [(0.0, 1.0), (1.25, 2.0), (4.0, 9.0), (9.5, 10.0)]
    assert watched.gap == 2.0 and watched.apart == 7.0
    watched.steps = watched.steps[:1]
    assert math.isnan(watched.gap) and math.isnan(watched.apart)


def test_every_kind_of_request_has_a_case_with_a_goal():
    cases = {case.name: case.expected[0] for case in load.cases()}
    asked = {"prompt", "picture", "reference", "bank", "inversion", "generate", "bake", "adapter", "row lora"}
    asked |= {"weights", "size", "decode", "export"}
    assert {f"gap: {name}" for name in asked} <= cases.keys() and "busy" in cases
    assert all(figure.at_most and figure.goal <= load.MOST_COST for figure in cases.values())


def test_a_case_that_does_not_exist_is_named(capsys):
    assert load.main(["--only", "nothing like that"]) == 2
    assert "gap: bake" in capsys.readouterr().err


def test_a_table_shows_what_its_file_has():
    seen = {"gap_ms": 4.2, "apart_ms": 19.8, "slowest_step_ms": 17.0, "slowest_step_alone_ms": 15.0}
    result = {"case": "gap: bank", "what": "a running job beside a bank", "figures": [{"value": 0.247}]}
    waits = {f"{when} {how}": [2.0] for when in ("alone_s", "busy_s") for how in load.WAITING}

    def table(details):
        return load.markdown({"results": [{**result, "details": details}, {"case": "busy", "details": waits}]})

    assert "| a bank | 4 ms | 20 ms | 17 ms (15 ms) | 0.25 |" in table(seen)
    assert "| a bank | 4 ms | 17 ms (15 ms) | 0.25 |" in table({k: v for k, v in seen.items() if k != "apart_ms"})
