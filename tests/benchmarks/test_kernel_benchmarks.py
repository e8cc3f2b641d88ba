"""The benchmarks run end to end at tiny sizes on a CPU, the GPU's list too, with a timer that only calls."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import attention, command, cross_attention, lora, plain, report, streaming
from benchmarks.kernels.cases import Case, Entrants, Share, Versus, input_sets
from benchmarks.kernels.measure import Budget, ceilings, cpu_timer, measure_case
from stylefast.kernels.gpu.timing import Times

CEILINGS = {"matmul": {"fp32": 100.0, "bf16": 100.0}, "copy": 10.0}


def each_once(calls, sets):
    """A timer that calls every contestant on every input set and says 1 ms."""
    samples, failures = {}, {}
    for name, call in calls.items():
        try:
            for i in range(sets):
                call(i)
            samples[name] = [1.0, 1.0, 1.0]
        except Exception as error:
            failures[name] = str(error)
    return Times(samples, failures)


def test_a_quick_run_on_the_cpu_measures_every_row_and_writes_its_file(tmp_path, capsys):
    path = tmp_path / "kernels.json"
    assert command.main(["--device", "cpu", "--quick", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["not_measured"] == [] and found["quick"]
    assert {r["operation"] for r in found["results"]} == {
        "shared_attention",
        "gated_cross_attention",
        "token_stats",
        "group_norm_silu",
        "row_lora",
        "geglu",
        "add_layer_norm",
        "guided_step",
    }
    assert found["ceilings"]["matmul"].keys() == {"fp32", "bf16"} and found["ceilings"]["copy"] > 0
    assert {"cpu", "cpu_features", "cores", "threads", "torch", "python", "date", "stylefast", "commit"} <= (
        found["environment"].keys()
    )
    for result in found["results"]:
        assert all(c["goal"] is None and c["ratio"] > 0 for c in result["comparisons"])
        assert all(t["min_ms"] <= t["median_ms"] <= t["max_ms"] for t in result["times"].values())
    out = capsys.readouterr().out
    assert "shared_attention 2x128x(128+128)x2x64 bf16" in out and f"wrote {path}" in out


def test_the_full_cpu_list_carries_the_goals_and_bf16_is_waived_without_its_instructions():
    def goals(features):
        cases = [*attention.cpu_cases(False, features), *cross_attention.cpu_cases(False, features)]
        return [(c.dtype, v.goal, bool(v.waived)) for c in cases for v in c.comparisons if v.goal is not None]

    fp32, bf16 = torch.float32, torch.bfloat16
    expected = [(fp32, 1.1, 0), (fp32, 0.95, 0), (bf16, 2.5, 0), (fp32, 1.2, 0), (bf16, 1.5, 0)]
    assert set(goals(["avx512_bf16"])) == set(expected)
    assert all(waived == (dtype == bf16) for dtype, _, waived in goals(["avx2"]))
    shapes = {case.shape for case in attention.cpu_cases(False, [])}
    assert shapes == {"2x4096x(4096+4096)x10x64", "2x1024x(1024+1024)x20x64"}


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """Peers that need a GPU or a compiler become their plain forms."""
    monkeypatch.setattr(attention, "with_backend", lambda backend: plain.attention)
    monkeypatch.setattr(cross_attention, "with_backend", lambda backend: plain.attention)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@torch.no_grad()
def test_every_row_of_the_gpu_list_has_its_contestants_and_agrees_with_the_oracle(no_gpu_needed):
    cases = [m.cuda_cases(True, "cpu") for m in (attention, cross_attention, streaming, lora)]
    for case in [case for part in cases for case in part]:
        result = report.result_of(case, measure_case(case, each_once), CEILINGS)
        missing = [c["peer"] for c in result["comparisons"] if c["verdict"] == report.NOT_MEASURED]
        assert set(missing) <= {attention.FA3, attention.FA4}, result["failures"]
        assert all(max(e.values()) < 0.2 for e in result["errors"].values()), result["errors"]


def test_the_full_gpu_list_carries_the_goals_of_the_kernels(monkeypatch):
    found = {
        (c.ours, getattr(c, "peer", None) or c.ceiling): c.goal
        for case in attention.cuda_cases(False)
        for c in case.comparisons
        if c.goal is not None
    }
    assert found == {
        (attention.WITH_STATISTICS, attention.CUDNN_PATH): 1.9,
        (attention.ATTENTION, attention.CUDNN): 1.3,
        (attention.ATTENTION, attention.FA3): 1.15,
        (attention.ATTENTION, attention.FA4): 1.15,
        (attention.ATTENTION, "matmul"): 0.7,
        (attention.ATTENTION, attention.NO_ADAIN): 0.98,
        (attention.FP8, attention.ATTENTION): 1.0,
    }
    one_target = attention.cuda_cases(False)[0]
    assert one_target.shape.startswith("n=1 2x") and Share(attention.ATTENTION, "matmul") in one_target.comparisons
    shares = [c.goal for case in streaming.cuda_cases(False) for c in case.comparisons if isinstance(c, Share)]
    assert shares.count(0.85) == 5


def test_the_rows_of_forms_compare_committed_configurations_with_every_way_to_compute_exp2(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no such GPU")
    for case in attention.form_cases(False):
        names = {name for c in case.comparisons for name in (c.ours, c.peer)}
        assert names == {
            f"{form}, {way}"
            for form in ("warp_specialised", "pointers")
            for way in ("exp2 on the MUFU", "1/4 of exp2 on FMA", "1/8 of exp2 on FMA")
        }
        # one against another form, the rest within a form
        assert len(case.comparisons) == 5


def test_forms_run_with_the_configuration_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no such GPU")
    seen = []
    module = SimpleNamespace(shared_attention=lambda *arguments, config: seen.append(config))
    monkeypatch.setattr(attention, "import_module", lambda name: module)
    result = measure_case(attention.form_cases(True, "cpu")[0], each_once)
    assert len(result["times"]) == 6 and [c["exp2"] for c in seen].count(0) == 2


def test_a_style_changes_the_result_so_that_errors_mean_something():
    scene = attention._Scene(32, 2, rows=2, pages=1, dtype=torch.float32, device="cpu")
    s = scene.inputs(0)
    with_style, without = attention.attend(s, attention.affine_of(s)), attention.attend(s)
    assert (with_style - without).abs().max() > 0.05
    assert torch.allclose(with_style.double(), attention.exact(s, [0, 1], slice(None)), atol=1e-5)


def test_fp8_pages_stand_for_the_values_they_came_from():
    k, v = torch.randn(2, 7, 3, 8), 50 * torch.randn(2, 7, 3, 8)
    pool = attention.fp8_pool(k, v)
    for name, x in (("k", k), ("v", v)):
        back = pool[f"pool_{name}"].float() * pool[f"pool_{name}_scale"][:, None]
        assert (back - x).abs().max() <= x.abs().max() / 16


def test_contestants_take_turns_and_one_that_fails_is_named():
    order = []

    def refuses(i):
        raise RuntimeError("no kernel for that")

    timer = cpu_timer(seconds=0, least=3, most=3, shortest=0)
    times = timer({"a": lambda i: order.append("a"), "b": refuses, "c": lambda i: order.append("c")}, 1)
    assert times.failures == {"b": "RuntimeError: no kernel for that"}
    assert order[-6:] == ["a", "c"] * 3 and {n: len(s) for n, s in times.samples.items()} == {"a": 3, "c": 3}


def test_short_calls_are_repeated_over_the_input_sets():
    seen = []
    cpu_timer(seconds=0, least=2, most=2, shortest=0.001)({"a": seen.append}, 3)
    assert len(seen) > 20 and set(seen[2:]) == {0, 1, 2}


@pytest.mark.parametrize("size, cache, sets", [(10, 60, 12), (200, 60, 1), (1, 60, 16), (10, 0, 1)])
def test_input_sets_outgrow_the_cache_twice_over(size, cache, sets):
    assert input_sets(size, cache) == sets


def fake_case(name, goal=1.0, build=None):
    calls = {"a": lambda i: None, "b": lambda i: None}
    build = build or (lambda: Entrants(calls))
    return Case(name, "[1]", torch.float32, [Versus("a", "b", goal, errors=False)], build, flop=1e6)


def test_cases_after_the_budget_are_listed_as_not_measured():
    now = [0.0]

    def build():
        now[0] += 61.0
        return Entrants({"a": lambda i: None, "b": lambda i: None})

    cases = [fake_case(name, build=build) for name in ("first", "second", "third")]
    found = command.run(cases, each_once, "cpu", True, Budget(2.0, lambda: now[0]), None)
    assert [r["comparisons"][0]["verdict"] for r in found["results"]] == ["met", "met", "not measured"]
    assert "the time budget of 2 minutes was spent" in found["not_measured"][0]


def test_a_case_that_cannot_be_built_does_not_cost_the_others(tmp_path):
    def build():
        raise MemoryError("too large")

    path = tmp_path / "x.json"
    cases = [fake_case("first", build=build), fake_case("second")]
    command.run(cases, each_once, "cpu", True, Budget(9.0), path)
    found = json.loads(path.read_text())
    assert "MemoryError: too large" in found["not_measured"][0]
    assert found["results"][1]["comparisons"][0]["verdict"] == "met"


@pytest.mark.parametrize("goal, words, code", [(math.inf, ["--check"], 1), (math.inf, [], 0), (0.0, ["--check"], 0)])
def test_a_missed_goal_is_an_exit_code_only_with_check(goal, words, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "cases_for", lambda device, quick: [fake_case("geglu", goal)])
    monkeypatch.setattr(command, "cpu_timer", lambda **settings: each_once)
    monkeypatch.setattr(command, "ceilings", lambda *arguments: CEILINGS | {"matmul_size": 1})
    assert command.main(["--out", str(tmp_path / "x.json"), *words]) == code
    assert ("MISSED  geglu" in capsys.readouterr().out) == (goal > 0)


@pytest.mark.parametrize(
    "words, part",
    [
        (["--device", "cuda"], "needs a CUDA device"),
        (["--only", "gelu"], "gelu; there are shared_attention"),
        (["--threads", "0"], "--threads is 0"),
    ],
)
def test_what_cannot_be_measured_is_an_error_of_one_line(words, part, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(words) == 2
    err = capsys.readouterr().err
    assert part in err and err.startswith("error: ") and err.count("\n") == 1


def test_ceilings_are_rates_of_a_matrix_product_and_of_a_copy():
    def timer(calls, sets):
        return Times({name: [2.0] for name in calls}, {})

    found = ceilings("cpu", True, timer)
    assert found["matmul"]["fp32"] == pytest.approx(2 * 256**3 / 2e-3 / 1e9, abs=0.1)
    assert found["copy"] == pytest.approx(2 * 2**22 / 2e-3 / 1e9, abs=0.1)
