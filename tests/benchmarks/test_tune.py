"""Tuning times what is committed and what lies around it, and writes files that the launchers read."""

import json
from types import SimpleNamespace

import pytest
import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels import configs
from stylefast.kernels.gpu import tune
from stylefast.kernels.gpu.timing import Times

SMALL = tune.Size(rows=2, tokens=16, heads=2, side=4)


@pytest.fixture(autouse=True)
def fresh():
    configs.tunings.cache_clear()
    yield
    configs.tunings.cache_clear()


@pytest.fixture
def committed(monkeypatch, tmp_path):
    """Only one committed file, of these operations."""

    def commit(**operations):
        content = {"gpu": None, "capability": 80, "measured": None, "operations": operations}
        folder = tmp_path / "committed"
        folder.mkdir()
        (folder / "sm_80.json").write_text(json.dumps(content))
        monkeypatch.setattr(configs, "FOLDER", folder)
        monkeypatch.delenv("STYLEFAST_TUNING", raising=False)
        configs.tunings.cache_clear()

    return commit


@pytest.fixture
def launched(monkeypatch):
    """Replaces the launchers by ones that note their configuration; a block of 512 can't run, 3 rows are wrong."""
    seen = []

    def launch(x, out, config=None):
        seen.append(config)
        if config["block"] == 512:
            raise RuntimeError("out of resource: shared memory")
        out.copy_(x[..., : out.shape[-1]] + (config["num_warps"] == 8))

    monkeypatch.setattr(tune.importlib, "import_module", lambda name: SimpleNamespace(geglu=launch))
    return seen


def timer_of(milliseconds):
    """A timer that runs each call once and asks `milliseconds(config)` for its time."""

    def timer(calls, sets):
        for call in calls.values():
            call(sets - 1)
        return Times({name: [milliseconds(json.loads(name))] * 3 for name in calls}, {})

    return timer


GEGLU = [{"key": {"columns": 32, "bits": 16}, "config": {"block": 64, "num_warps": 4}}]


def run_tune(timer, **settings):
    return tune.tune(["geglu"], device="cpu", timer=timer, size=SMALL, say=lambda line: None, **settings)


def test_the_search_walks_to_the_fastest_configuration_that_runs(committed, launched):
    committed(geglu=GEGLU)
    # 512 would be fastest but can't run, and 8 warps give another result
    content = run_tune(timer_of(lambda c: 1000 / c["block"] + abs(c["num_warps"] - 8)))
    assert content["operations"]["geglu"] == [{"key": GEGLU[0]["key"], "config": {"block": 256, "num_warps": 4}}]
    assert content["measured"]["milliseconds"] == {"geglu": [pytest.approx(1000 / 256 + 4, rel=1e-3)]}
    assert {"date", "torch", "triton"} <= content["measured"].keys()
    assert {"block": 512, "num_warps": 4} in launched


def test_a_module_that_names_candidates_is_searched_no_further(committed, monkeypatch):
    committed(geglu=GEGLU)
    offered = [{"block": 16, "num_warps": 4}, {"block": 32, "num_warps": 4}]
    module = SimpleNamespace(geglu=lambda x, out, config=None: out.zero_(), candidates=lambda key: offered)
    monkeypatch.setattr(tune.importlib, "import_module", lambda name: module)
    content = run_tune(timer_of(lambda c: c["block"]))
    assert content["operations"]["geglu"][0]["config"] == offered[0]


def test_many_candidates_are_timed_in_groups_and_the_best_of_all_groups_once_more(committed, monkeypatch):
    committed(geglu=GEGLU)
    offered = [{"block": block, "num_warps": 4} for block in range(100, 80, -1)]
    module = SimpleNamespace(geglu=lambda x, out, config=None: out.zero_(), candidates=lambda key: offered)
    monkeypatch.setattr(tune.importlib, "import_module", lambda name: module)
    groups = []

    def timer(calls, sets):
        groups.append([json.loads(name)["block"] for name in calls])
        return timer_of(lambda c: c["block"])(calls, sets)

    assert run_tune(timer)["operations"]["geglu"][0]["config"]["block"] == 64
    assert [len(group) for group in groups] == [8, 8, 5, 4] and groups[-1] == [64, 81, 82, 83]


def test_keys_after_the_time_is_over_keep_what_is_committed(committed, launched):
    committed(geglu=[*GEGLU, {"key": {"columns": 64, "bits": 16}, "config": {"block": 32, "num_warps": 2}}])
    now = iter(range(0, 10**6, 30))
    content = run_tune(timer_of(lambda c: c["block"]), minutes=1.0, clock=lambda: next(now))
    first, second = content["operations"]["geglu"]
    assert second["config"] == {"block": 32, "num_warps": 2}
    assert content["measured"]["milliseconds"]["geglu"][0] is not None
    assert content["measured"]["milliseconds"]["geglu"][1] is None


def test_the_file_is_read_for_the_gpu_that_it_was_measured_on(committed, launched, tmp_path, monkeypatch):
    committed(geglu=GEGLU)
    content = run_tune(timer_of(lambda c: c["block"])) | {"gpu": "NVIDIA H200 (SXM)"}
    path = tune.write(content, tmp_path / "tuned")
    assert path.name == "nvidia-h200-sxm.json" and json.loads(path.read_text()) == content
    monkeypatch.setenv("STYLEFAST_TUNING", str(path.parent))
    configs.tunings.cache_clear()
    best = content["operations"]["geglu"][0]["config"]
    assert best["block"] < 64
    assert configs.configuration("geglu", 90, "NVIDIA H200 (SXM)", columns=32, bits=16) == best
    assert configs.configuration("geglu", 90, "another", columns=32, bits=16) == GEGLU[0]["config"]


def test_tuning_needs_a_gpu_and_known_operations(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidRequest, match="needs a CUDA device"):
        tune.tune()
    with pytest.raises(InvalidRequest, match="nothing to tune for gelu; there is for shared_attention"):
        tune.tune(["gelu"], device="cpu")


def test_every_operation_with_committed_configurations_can_be_tuned():
    names = {name for tuning in configs.tunings() for name in tuning.operations}
    assert names and names <= tune.ARGUMENTS.keys()


@pytest.mark.parametrize("operation", sorted(tune.ARGUMENTS))
def test_the_arguments_fit_the_launcher_for_every_committed_key(operation):
    pytest.importorskip("triton")
    module, function = tune.LAUNCHERS.get(operation, (operation, operation))
    launch = getattr(tune.importlib.import_module(f"stylefast.kernels.gpu.{module}"), function)
    keys = tune._keys(operation, 90)
    assert keys
    for key in keys:
        # the warp-specialised form takes whole tiles
        size = SMALL._replace(tokens=128) if key.get("form") == "warp_specialised" else SMALL
        inputs, outputs = tune.ARGUMENTS[operation](key, size, "cpu", 0)
        for out in outputs:
            out.fill_(float("nan"))
        launch(*inputs, *outputs, config=configs.configuration(operation, 90, **key))
        assert all(torch.isfinite(out.float()).all() for out in outputs), key


def test_neighbours_change_one_setting_and_leave_words_alone():
    config = {"form": "pointers", "block_m": 128, "num_warps": 8, "num_stages": 3, "exp2": 0}
    found = tune.neighbours(config)
    changed = [[name for name in config if other[name] != config[name]] for other in found]
    assert all(len(names) == 1 and names != ["form"] for names in changed)
    assert {(n[0], c[n[0]]) for n, c in zip(changed, found)} == {
        ("block_m", 64),
        ("block_m", 256),
        ("num_warps", 4),
        ("num_warps", 16),
        ("num_stages", 2),
        ("num_stages", 4),
        ("exp2", 4),
        ("exp2", 8),
    }
