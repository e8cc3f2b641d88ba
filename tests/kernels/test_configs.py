"""Launch configurations: nearest GPU, nearest key, and what is said where nothing fits."""

import json

import pytest

from stylefast.errors import InvalidRequest
from stylefast.kernels import configs


def _file(gpu, capability, **operations):
    entries = {name: [{"key": key, "config": config} for key, config in pairs] for name, pairs in operations.items()}
    return {"gpu": gpu, "capability": capability, "measured": None, "operations": entries}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    monkeypatch.delenv("STYLEFAST_TUNING", raising=False)
    configs.tunings.cache_clear()

    def write(name, content, place=tmp_path):
        (place / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        configs.tunings.cache_clear()

    yield write
    configs.tunings.cache_clear()


def test_the_file_of_the_gpus_name_goes_before_that_of_its_capability(folder):
    folder("sm_90", _file(None, 90, geglu=[({}, {"num_warps": 4})]))
    folder("h200", _file("NVIDIA H200", 90, geglu=[({}, {"num_warps": 8})]))
    assert configs.configuration("geglu", 90, "NVIDIA H200") == {"num_warps": 8}
    assert configs.configuration("geglu", 90, "NVIDIA H100 80GB HBM3") == {"num_warps": 4}


def test_an_operation_that_the_named_file_lacks_comes_from_the_capability(folder):
    folder("sm_90", _file(None, 90, geglu=[({}, {"num_warps": 4})]))
    folder("h200", _file("NVIDIA H200", 90))
    assert configs.configuration("geglu", 90, "NVIDIA H200") == {"num_warps": 4}


def test_an_unknown_gpu_takes_the_highest_capability_below_its_own(folder):
    for capability in (80, 90, 120):
        folder(f"sm_{capability}", _file(None, capability, geglu=[({}, {"num_warps": capability // 10})]))
    assert configs.configuration("geglu", 103) == {"num_warps": 9}
    assert configs.configuration("geglu", 86) == {"num_warps": 8}


def test_words_must_match_and_numbers_are_nearest(folder):
    entries = [
        ({"columns": 640, "type": "fp8"}, {"n": 1}),
        ({"columns": 5120, "type": "fp8"}, {"n": 2}),
        ({"columns": 640, "type": "bf16"}, {"n": 3}),
    ]
    folder("sm_80", _file(None, 80, geglu=entries))
    assert configs.configuration("geglu", 80, columns=1280, type="fp8") == {"n": 1}
    assert configs.configuration("geglu", 80, columns=2560, type="fp8") == {"n": 2}
    assert configs.configuration("geglu", 80, columns=9999, type="bf16") == {"n": 3}


@pytest.mark.parametrize("capability, key", [(75, {}), (80, {"type": "fp64"})], ids=["an old GPU", "no entry matches"])
def test_where_nothing_fits_the_error_names_the_way_out(folder, capability, key):
    folder("sm_80", _file(None, 80, geglu=[({"type": "bf16"}, {})]))
    with pytest.raises(InvalidRequest, match="STYLEFAST_KERNELS=geglu=torch"):
        configs.configuration("geglu", capability, **key)


def test_a_folder_of_ones_own_goes_first(folder, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    folder("h200", _file("NVIDIA H200", 90, geglu=[({}, {"num_warps": 4})]))
    monkeypatch.setenv("STYLEFAST_TUNING", str(own))
    folder("h200", _file("NVIDIA H200", 90, geglu=[({}, {"num_warps": 16})]), own)
    assert configs.configuration("geglu", 90, "NVIDIA H200") == {"num_warps": 16}


@pytest.mark.parametrize("content", ["{", "[]", '{"gpu": null}', '{"gpu": 1, "capability": "x"}'])
def test_a_damaged_file_is_named(folder, content):
    folder("broken", content)
    with pytest.raises(InvalidRequest, match="broken.json is not a tuning file"):
        configs.configuration("geglu", 90)


def test_the_committed_files_cover_every_chip_of_the_gate():
    configs.tunings.cache_clear()
    general = {tuning.capability for tuning in configs.tunings() if tuning.gpu is None}
    assert general >= {80, 89, 90, 100, 120}
    operations = [set(tuning.operations) for tuning in configs.tunings() if tuning.gpu is None]
    assert all(names == operations[0] for names in operations)
