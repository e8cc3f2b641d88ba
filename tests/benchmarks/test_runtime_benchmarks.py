"""The runtime benchmark measures what it says: its peer is the published method, its verdicts are right, it runs."""

import copy
import gc
import json
import random
import warnings
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import report as kernel_report
from benchmarks.kernels.measure import Budget
from benchmarks.runtime import command, cpu, cuda, host, mixes, report, soak
from benchmarks.runtime.cases import Case, Figure, Outcome, Ratio, deviation, race
from benchmarks.runtime.models import (
    HEAD_WIDTH,
    half_width_config,
    random_pipeline,
    sdxl_config,
    tiny_model,
    unet_config,
    vae_config,
)
from benchmarks.runtime.published import Published, adain, align, of_reference
from benchmarks.runtime.scene import Scene
from stylefast.errors import InvalidRequest
from stylefast.runtime.plan.sample import plan_samples
from stylefast.sampling.schedule import make_schedule
from tests.support.fp64 import close, measured
from tests.support.oracle.style_aligned import Sharing, guidance_layout, shared

MET, MISSED, NO_GOAL, NOT_MEASURED = (
    kernel_report.MET,
    kernel_report.MISSED,
    kernel_report.NO_GOAL,
    kernel_report.NOT_MEASURED,
)
SMALL = {"cross_dim": 128, "pooled_dim": 64, "time_dim": 16, "side": 8, "depth": (1, 1, 2)}


@pytest.fixture
def pipeline():
    config = unet_config((32, 64, 128), **SMALL)
    return random_pipeline(config, (64, 64), vae_config((32, 32), 1), "cpu", torch.float32)


def unet_call(pipeline, rows, seed=0):
    """Arguments of one UNet call of `rows` rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    conditions = {"text_embeds": draw(rows, 64), "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(rows, 1)}
    return {
        "sample": draw(rows, 4, 8, 8),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": draw(rows, 77, 128),
        "added_cond_kwargs": conditions,
    }


@torch.no_grad()
def called(unet, call, sharing=None):
    with shared(unet, sharing):
        return unet(**call).sample


def test_the_published_attention_equals_the_oracle_written_from_the_equations(pipeline):
    call, aligned = unet_call(pipeline, 6), copy.deepcopy(pipeline.unet)
    align(aligned)
    close(called(aligned, call), measured(called, pipeline.unet, call, Sharing(guidance_layout(3, 2))))


def test_in_the_published_form_reference_rows_stay_plain_and_targets_do_not(pipeline):
    call, unet = unet_call(pipeline, 4), copy.deepcopy(pipeline.unet)
    align(unet)
    aligned, plain = called(unet, call), measured(called, pipeline.unet, call)
    close(aligned[[0, 2]], plain[[0, 2]])
    assert (aligned[[1, 3]] - plain.value[[1, 3]]).abs().amax((1, 2, 3)).min() > 1e-3


def test_adain_gives_every_row_the_statistics_of_the_first_of_its_half():
    states = torch.randn(6, 2, 33, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    found = adain(states)
    torch.testing.assert_close(found[[0, 3]], states[[0, 3]])
    torch.testing.assert_close(found.mean(-2), of_reference(states).mean(-2))
    torch.testing.assert_close(found.std(-2), of_reference(states).std(-2), rtol=1e-4, atol=0)


def test_the_published_form_compiles_into_one_graph_without_a_break():
    # every kind of block, as few of each as there can be: tracing them is what takes long
    config = unet_config((32, 64, 64), **SMALL | {"depth": (1, 1)}) | {
        "block_out_channels": (32, 64),
        "attention_head_dim": (1, 1),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    pipeline = random_pipeline(config, (64, 64), vae_config((32, 32), 1), "cpu", torch.float32)
    align(pipeline.unet)
    call = unet_call(pipeline, 4)
    with torch.no_grad():
        compiled = torch.compile(pipeline.unet, backend="eager", fullgraph=True)(**call).sample
    close(compiled, measured(called, pipeline.unet, call))
    torch._dynamo.reset()


def test_plain_leaves_the_attention_and_pictures_come_decoded(pipeline):
    form = Published(pipeline, plain=True)
    assert not any(type(p).__name__ == "SharedAttention" for p in pipeline.unet.attn_processors.values())
    images = form.images(["a cat", "a dog"], [1, 2], steps=2, guidance=3.0, size=(16, 32))
    assert [image.shape for image in images] == [(32, 16, 3)] * 2
    assert all(image.min() >= 0 and image.max() <= 1 for image in images)


@pytest.mark.parametrize("seed", [0, 1], ids=["one seed", "another"])
def test_random_weights_keep_predictions_of_order_one_and_repeat_with_their_seed(seed):
    config = unet_config((32, 64, 128), **SMALL)
    first, second = (
        random_pipeline(config, (64, 64), vae_config((32, 32), 1), "cpu", torch.float32).unet for _ in range(2)
    )
    call = unet_call(None, 3, seed)
    with torch.no_grad():
        prediction = first(**call).sample
    assert 0.1 < prediction.std() < 10
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_half_width_model_has_half_of_sdxls_widths_at_its_full_depth():
    from diffusers import UNet2DConditionModel

    half, full = half_width_config(48), sdxl_config()
    assert [2 * width for width in half["block_out_channels"]] == list(full["block_out_channels"])
    assert half["transformer_layers_per_block"] == full["transformer_layers_per_block"] == (1, 2, 10)
    for config in (half, full):
        attended = list(zip(config["block_out_channels"], config["attention_head_dim"]))[1:]
        assert all(width == heads * HEAD_WIDTH for width, heads in attended)
    with torch.device("meta"):
        counts = [sum(p.numel() for p in UNet2DConditionModel(**config).parameters()) for config in (half, full)]
    assert counts[1] == 2_567_463_684 and 0.64e9 < counts[0] < 0.66e9


@pytest.mark.parametrize(
    "figure, verdict",
    [
        (Figure("a", 1.7, 1.7), MET),
        (Figure("a", 1.699, 1.7), MISSED),
        (Figure("a", 1.69999, 1.7), MET),
        (Figure("a", 1.1, 1.1, at_most=True), MET),
        (Figure("a", 1.101, 1.1, at_most=True), MISSED),
        (Figure("a", 0, 0, at_most=True), MET),
        (Figure("a", 3.0), NO_GOAL),
        (Figure("a", None, 2.0), NOT_MEASURED),
        (Figure("a", float("nan"), 1e-3, at_most=True), MISSED),
        (Figure("a", float("nan"), 1.0), MISSED),
    ],
    ids=[
        "at the bound",
        "below",
        "as it is printed",
        "at most",
        "above",
        "nothing",
        "no goal",
        "no value",
        "NaN is no small error",
        "NaN is no speed",
    ],
)
def test_a_verdict_goes_by_the_figure_as_it_is_recorded(figure, verdict):
    assert figure.verdict == verdict


def test_a_ratio_is_of_medians_and_names_who_did_not_run():
    ratio = Ratio("slow", "fast", 2.0)
    assert ratio.figure({"slow": [4.0, 9.0, 2.0], "fast": [2.0, 1.0, 7.0]}, {}).value == 2.0
    missing = ratio.figure({"slow": [1.0]}, {"fast": "RuntimeError: broke"})
    assert missing.verdict == NOT_MEASURED and missing.note == "fast: RuntimeError: broke"


@pytest.fixture
def little_garbage():
    """Garbage is collected before every sample; what other tests left, and all that was imported, is passed over."""
    gc.collect()
    gc.freeze()  # until the tests end: see conftest.py


@pytest.mark.usefixtures("little_garbage")
def test_contestants_take_turns_and_one_that_breaks_does_not_stop_the_others():
    order = []

    def run(name, breaks=False):
        def call():
            order.append(name)
            if breaks:
                raise RuntimeError("no")
            return [torch.ones(2)]

        return call

    found = race({"a": run("a"), "b": run("b", breaks=True), "c": run("c")}, 2, Budget(1), warm_ups=1)
    assert order == ["a", "b", "c", "a", "c", "a", "c"]
    assert {name: len(samples) for name, samples in found.times.items()} == {"a": 2, "c": 2}
    assert found.failures == {"b": "RuntimeError: no"} and torch.equal(found.results["a"][0], torch.ones(2))


def test_no_round_is_begun_that_the_budget_has_no_time_for():
    spent = Budget(0.0)
    assert len(race({"a": lambda: None}, 5, spent, warm_ups=0).times["a"]) == 1


def test_a_deviation_with_nan_is_nan_and_unequal_lists_are_refused():
    ones = [torch.ones(3)]
    assert deviation(ones, [torch.full((3,), 1.5)]) == 0.5
    assert deviation([torch.tensor([1.0, float("nan"), 1.0])], ones) != deviation(ones, ones)
    with pytest.raises(ValueError):
        deviation(ones, ones * 2)


def outcome_of(value):
    return lambda budget: Outcome({"a": [1.0, 3.0, 2.0]}, [Figure("x", value, 1e-3, at_most=True)])


def failing(budget):
    raise RuntimeError("broke")


@pytest.fixture
def run_cases(monkeypatch, tmp_path):
    """Runs the command on given cases: (exit code, the file)."""

    def run(cases, *words):
        monkeypatch.setattr(cpu, "cases", lambda quick: cases)
        path = tmp_path / "runtime.json"
        code = command.main(["--out", str(path), *words])
        return code, json.loads(path.read_text()) if path.exists() else None

    return run


EXPECTED = (Figure("x", None, 1e-3, at_most=True),)


def test_every_sample_and_verdict_is_written_and_met_goals_exit_with_zero(run_cases, capsys):
    code, found = run_cases([Case("one", "what it is", outcome_of(1e-4), EXPECTED)])
    assert code == 0 and found["unproved"] == []
    result = found["results"][0]
    assert result["times"]["a"] == {
        "median_s": 2.0,
        "min_s": 1.0,
        "max_s": 3.0,
        "spread": 1.0,
        "samples_s": [1.0, 3.0, 2.0],
    }
    assert result["figures"][0]["verdict"] == MET and {"cpu", "threads", "torch"} <= found["environment"].keys()
    out = capsys.readouterr().out
    assert "one: what it is" in out and "1 goals met, 0 missed or not measured" in out


def test_a_missed_goal_exits_with_one_and_is_named(run_cases, capsys):
    code, found = run_cases([Case("one", "w", outcome_of(0.5), EXPECTED)])
    assert code == 1 and found["unproved"] == ["MISSED  one: x 0.5, goal <= 0.001"]
    assert "MISSED  one: x 0.5" in capsys.readouterr().out


def test_a_case_that_breaks_costs_only_itself_and_is_no_success(run_cases):
    code, found = run_cases([Case("one", "w", failing, EXPECTED), Case("two", "w", outcome_of(0.0), EXPECTED)])
    assert code == 1 and [r["figures"][0]["verdict"] for r in found["results"]] == [NOT_MEASURED, MET]
    assert found["unproved"] == ["not measured  one: x: RuntimeError: broke"]


@pytest.mark.parametrize("measure", [outcome_of(0.5), failing], ids=["other pictures", "no pictures"])
def test_when_the_peer_draws_other_pictures_nothing_is_compared_with_it(run_cases, measure):
    called = []
    cases = [Case(cpu.CHECK, "w", measure, EXPECTED), Case("two", "w", called.append, EXPECTED)]
    code, found = run_cases(cases)
    assert code == 1 and not called and "void" in found["results"][1]["figures"][0]["note"]


def test_a_case_that_would_overrun_is_skipped_and_says_so(run_cases):
    code, found = run_cases([Case("long", "w", failing, EXPECTED, seconds=100)], "--minutes", "1")
    note = found["results"][0]["figures"][0]["note"]
    assert code == 1 and "skipped" in note and "needs 100 s" in note and "RuntimeError" not in note


@pytest.mark.parametrize(
    "words, part",
    [
        (("--only", "nothing"), "--only names nothing; there are one"),
        (("--threads", "0"), "--threads is 0"),
        (("--minutes", "0"), "--minutes is 0"),
        (("--device", "cuda"), "needs a CUDA device"),
    ],
    ids=["an unknown case", "no threads", "no time", "no GPU"],
)
def test_bad_arguments_exit_with_two_and_one_line(run_cases, monkeypatch, capsys, words, part):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, found = run_cases([Case("one", "w", failing, EXPECTED)], *words)
    assert code == 2 and found is None and part in capsys.readouterr().err


def test_only_takes_beginnings_of_names(run_cases):
    cases = [Case(name, "w", outcome_of(0.0), EXPECTED) for name in ("tiny n=1", "tiny n=4", "soak")]
    _, found = run_cases(cases, "--only", "tiny")
    assert [r["case"] for r in found["results"]] == ["tiny n=1", "tiny n=4"]


def test_gaps_count_from_ten_microseconds_on_and_only_in_the_middle_of_a_run():
    # a run of 1000 us: its middle is 300 to 950
    busy = [(0.0, 10.0), (200.0, 400.0), (405.0, 600.0), (550.0, 700.0), (730.0, 1000.0)]
    idle, details = host.shares(busy)
    assert idle == pytest.approx(30 / 650) and details == {"all_gaps_share": round(35 / 650, 4), "longest_gap_us": 30.0}
    assert host.shares([(0.0, 1000.0), (500.0, 600.0)])[0] == 0


def test_growth_is_the_highest_reading_above_the_first():
    assert soak.growth([100.0, 103.5, 101.0]) == 3.5 and soak.growth([100.0, 90.0]) == 0


class FakeEngine:
    """Ends every request as it is told."""

    def __init__(self, ends):
        self.ends = ends

    def submit(self, request, deadline=None):
        end = "late" if deadline is not None else request
        return SimpleNamespace(cancel=lambda: None, result=lambda timeout: self._end(end))

    def _end(self, end):
        if end in self.ends:
            raise self.ends[end]


@pytest.mark.parametrize(
    "ends, wrong",
    [
        ({}, 0),
        ({"late": InvalidRequest("too late")}, 0),
        ({"bad": InvalidRequest("broke")}, 1),
        ({"bad": KeyError("a bug"), "late": KeyError("a bug")}, 1),
    ],
    ids=["all is well", "a deadline passes", "a request fails", "a bug shows"],
)
def test_the_soak_tells_wanted_ends_from_failures(ends, wrong):
    mix = SimpleNamespace(request=lambda choose: choose.choice(["good", "bad"]))
    ended = [soak.one_request(FakeEngine(ends), mix, random.Random(seed)) for seed in range(60)]
    assert (sum(bool(error) for _, error in ended) > 0) == bool(wrong)
    assert any(end == "finished" for end, _ in ended)


@pytest.fixture(scope="module")
def tiny_scene():
    scene = Scene(tiny_model, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        # its engine computes with PyTorch's own products, as its peer does
        patch.setattr("stylefast.engine.pack", lambda unet, room: False)
        assert scene.model
    return scene


def test_what_is_counted_between_two_steps_is_not_what_the_benchmark_itself_does(tiny_scene, monkeypatch):
    runner, modes = tiny_scene.model.engine.runner, []

    def fetching(*_):
        raise AssertionError("latents were fetched for a callback")

    def waiting(groups):
        # as PyTorch says it in the mode "warn"
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(runner, "shown_of", fetching)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    assert host.synchronisations(tiny_scene) == 0 and modes == ["warn", 0]
    assert host.cpu_microseconds_per_step(tiny_scene) > 0
    monkeypatch.setattr(runner, "prefetch", waiting)
    assert host.synchronisations(tiny_scene) == 1  # between two steps
    assert "step" not in vars(runner), "the engine kept the benchmark's wrapper"


def test_batches_that_are_compared_have_equally_many_rows(tiny_scene):
    def rows(requests):
        schedule = make_schedule("euler", tiny_scene.steps)
        samples = plan_samples(requests, lambda request, begin: schedule, tiny_scene.model.size)
        return sum(len(t.branches) for t in samples)

    assert rows(mixes.one_live_style(tiny_scene)) == rows(mixes.mixed_styles(tiny_scene)) == 18
    assert rows(mixes.one_bank(tiny_scene)) == rows(mixes.eight_banks(tiny_scene)) == 16
    kinds = [tuple(type(style).__name__ for style in r.style) for r in mixes.mixed_styles(tiny_scene)]
    assert {(), ("StyleAligned",), ("InstantStyle",), ("DreamStyler",), ("StyleAligned", "InstantStyle")} == set(kinds)


def test_every_form_of_a_scene_draws_the_same_pictures(tiny_scene):
    def by_diffusers(pipeline):
        return torch.stack(tiny_scene.published(2, Published(pipeline))())

    published, uncached = measured(by_diffusers, tiny_scene.model.published.pipeline), tiny_scene.uncached(2)()
    close(uncached, published[1:])
    close(tiny_scene.cached(2)(), published[1:])
    close(tiny_scene.uncached_set(2)(), published)
    assert deviation(tiny_scene.plain(2)(), uncached) > 1e-2


@pytest.mark.usefixtures("tiny_scene", "little_garbage")
def test_a_quick_run_on_the_cpu_measures_every_figure_and_writes_its_file(tmp_path):
    path = tmp_path / "quick.json"
    assert command.main(["--quick", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    cases = [r["case"] for r in found["results"]]
    assert cases == ["check", "tiny n=1", "tiny n=4", "mixed batch of 8", "eight threads", "soak"]
    assert found["unproved"] == [] and sum(found["results"][-1]["details"]["ends"].values()) == 9
    assert all(f["goal"] is None for r in found["results"][1:] for f in r["figures"])


def test_the_full_list_of_the_cpu_carries_the_goals():
    goals = {(c.name, e.over, e.under): e.goal for c in cpu.cases() for e in c.expected if isinstance(e, Ratio)}
    for model in ("tiny", "half-width"):
        assert goals[f"{model} n=1", "uncached", "cached"] == 1.7
        assert goals[f"{model} n=1", "published", "cached"] == 2.0
        assert goals[f"{model} n=4", "uncached", "cached"] == 1.15
    assert goals["mixed batch of 8", "eight styles", "one style"] == 1.1
    assert goals["eight threads", "threads", "submit"] == 1.3


@pytest.mark.usefixtures("tiny_scene", "little_garbage")
def test_the_list_of_the_gpu_runs_on_a_small_model(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(host, "SWITCHES", 1)  # one call with another style, and one with the same
    found = command.run(cuda.cases(quick=True, device="cpu"), "cpu", True, Budget(10), None)
    missing = {f["what"] for r in found["results"] for f in r["figures"] if f["verdict"] == NOT_MEASURED}
    # one step more of a small model may be lost in the noise
    noisy = {"share of peak, n=1", "share of peak, n=4", "step, n=1", "step, n=4", "compiled / ours"}
    assert missing - noisy == {"idle share of the device", "synchronisations in the loop"}, report.unproved(
        found["results"]
    )


def test_the_list_of_the_gpu_carries_the_goals_and_compiles_last():
    cases = cuda.cases()
    goals = {(c.name, e.label): None for c in cases for e in c.expected if e.goal is not None}
    assert {label for _, label in goals} == {"B1", "B2", "B3", "B4", "C", "G", "L"}
    names = [c.name for c in cases]
    assert names[0] == "published n=1" and all("compiled" in name for name in names[-3:])
    assert all(c.seconds >= cuda.COMPILE_SECONDS for c in cases[-3:])
