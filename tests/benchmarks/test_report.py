"""Goals are judged by the figures that are printed, and what is missing says why."""

import json
import math

import pytest
import torch

from benchmarks.kernels import report
from benchmarks.kernels.cases import Case, Share, Versus

CEILINGS = {"matmul": {"fp32": 200.0, "bf16": 800.0}, "copy": 40.0}


def case(*comparisons, dtype=torch.float32):
    return Case("geglu", "[2, 4]", dtype, comparisons, build=None, flop=1e9, bytes=1e7)


def measured(errors=None, failures=None, **milliseconds):
    times = {n: {"median_ms": ms, "min_ms": ms, "max_ms": ms, "samples": 5} for n, ms in milliseconds.items()}
    return {"times": times, "failures": failures or {}, "errors": errors or {}}


def judged(comparison, found, why="", dtype=torch.float32):
    return report.result_of(case(comparison, dtype=dtype), found, CEILINGS, why)["comparisons"][0]


@pytest.mark.parametrize(
    "peer_ms, goal, verdict",
    [(2.2, 1.1, report.MET), (2.19, 1.1, report.MISSED), (1.9, 0.95, report.MET), (9.0, None, report.NO_GOAL)],
    ids=["exactly the goal is met", "just below is missed", "a goal below one", "no goal"],
)
def test_a_ratio_is_the_peers_time_over_ours_and_is_held_against_its_goal(peer_ms, goal, verdict):
    found = judged(Versus("a", "b", goal), measured(a=2.0, b=peer_ms))
    assert found["ratio"] == pytest.approx(peer_ms / 2, rel=1e-3) and found["verdict"] == verdict


def test_a_goal_that_does_not_apply_says_why_and_is_not_missed():
    result = report.result_of(case(Versus("a", "b", 2.5, "no AVX512-BF16")), measured(a=2.0, b=2.0), CEILINGS)
    assert result["comparisons"][0]["verdict"] == report.WAIVED and report.missed([result]) == []
    assert "no AVX512-BF16" in report.block(result) and "waived" in report.block(result)


def test_a_contestant_that_failed_leaves_its_reason_and_the_others_stand():
    found = measured(a=2.0, c=4.0, failures={"b": "RuntimeError: refused"})
    result = report.result_of(case(Versus("a", "b", 1.0), Versus("a", "c", 1.0)), found, CEILINGS)
    assert [c["verdict"] for c in result["comparisons"]] == [report.NOT_MEASURED, report.MET]
    assert "RuntimeError: refused" in report.not_measured([result])[0] and report.missed([result]) == []


@pytest.mark.parametrize(
    "ceiling, dtype, ratio",
    [("matmul", torch.float32, 0.5), ("matmul", torch.bfloat16, 0.125), ("copy", torch.float32, 0.025)],
)
def test_a_share_is_the_rate_over_the_ceiling_of_its_type(ceiling, dtype, ratio):
    # 1 GFLOP and 10 MB in 10 ms: 100 GFLOP/s and 1 GB/s
    found = judged(Share("a", ceiling, 0.7), measured(a=10.0), dtype=dtype)
    assert found["ratio"] == pytest.approx(ratio) and found["verdict"] == report.MISSED


@pytest.mark.parametrize(
    "ours, peer, ratio, verdict",
    [
        ({"max": 2.0, "rms": 1.0}, {"max": 1.0, "rms": 1.0}, 2.0, report.MET),
        ({"max": 1.0, "rms": 2.1}, {"max": 1.0, "rms": 1.0}, 2.1, report.MISSED),
        ({"max": 0.0, "rms": 0.0}, {"max": 0.0, "rms": 0.0}, 1.0, report.MET),
        ({"max": 1e-9, "rms": 1e-9}, {"max": 0.0, "rms": 0.0}, math.inf, report.MISSED),
        ({"max": math.nan, "rms": math.nan}, {"max": 1.0, "rms": 1.0}, math.nan, report.MISSED),
    ],
    ids=["twice the peer's is met", "the worse of max and rms counts", "both exact", "peer exact", "NaN is missed"],
)
def test_errors_are_held_against_twice_the_peers(ours, peer, ratio, verdict):
    found = measured(a=1.0, b=1.0, errors={"a": ours, "b": peer})
    result = report.result_of(case(Versus("a", "b")), found, CEILINGS)
    comparison = result["comparisons"][0]
    assert comparison["error_verdict"] == verdict
    assert comparison["error_ratio"] == pytest.approx(ratio, nan_ok=True)
    assert bool(report.missed([result])) == (verdict == report.MISSED)


@pytest.mark.parametrize("error, missed", [(7.0, False), (math.nan, True)], ids=["any finite error", "NaN"])
def test_without_an_error_goal_only_a_nan_is_missed(error, missed):
    found = measured(a=1.0, b=1.0, errors={"a": {"max": error, "rms": error}, "b": {"max": 1.0, "rms": 1.0}})
    result = report.result_of(case(Versus("a", "b", error_goal=None)), found, CEILINGS)
    assert bool(report.missed([result])) == missed


def test_the_table_shows_times_ratio_goal_rate_and_a_clear_miss():
    found = measured(a=2.0, b=3.0, errors={"a": {"max": 1.0, "rms": 1.0}, "b": {"max": 2.0, "rms": 2.0}})
    text = report.table([report.result_of(case(Versus("a", "b", 1.9)), found, CEILINGS)])
    head, names, line = text.splitlines()
    assert head == "geglu [2, 4] fp32"
    assert names.split() == ["ours", "ms", "against", "ms", "ratio", "goal", "rate", "error"]
    assert line.split() == ["a", "2", "b", "3", "1.50", ">=", "1.9", "MISSED", "500", "GFLOP/s", "0.50", "x"]


def test_a_case_left_out_shows_no_figure(tmp_path):
    result = report.result_of(case(Versus("a", "b", 1.0), Share("a", "copy")), None, CEILINGS, "the budget was spent")
    assert report.block(result).count("not measured") == 2 and "the budget was spent" in report.block(result)
    report.write(tmp_path / "deep" / "x.json", {"results": [result], "error": math.nan})
    assert json.loads((tmp_path / "deep" / "x.json").read_text())["error"] is None
    assert json.loads((tmp_path / "deep" / "x.json").read_text())["results"][0]["comparisons"][0]["ratio"] is None
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.json"]
