"""The ahead-of-time gate: every committed kernel compiles for every chip, spills nothing and fits its shared memory."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.kernels.gpu.ahead import OPERATIONS, SHARED_LIMITS, Report

PLANTED = """
import triton
import triton.language as tl

from stylefast.kernels.gpu.launch import specialisation


@triton.jit
def spilling(x, y):
    i, j = tl.arange(0, 256)[:, None], tl.arange(0, 128)[None, :]
    tile = tl.load(x + i * 128 + j)
    tl.store(y + i * 128 + j, tile / tl.sum(tile * tile, 1)[:, None])


@triton.jit
def broken(x, y):
    tl.store(y + tl.arange(0, 32), tl.load(x + tl.arange(0, 64)))


@triton.jit
def sound(x, y):
    tl.store(y + tl.arange(0, 32), tl.load(x + tl.arange(0, 32)))


def specialisations(capability):
    types = {"x": "*fp32", "y": "*fp32"}
    return [specialisation(kernel.__name__, kernel, types, {}) for kernel in (spilling, broken, sound)]
"""


def _gate(arguments, folder, path=None):
    report = folder / "report.json"
    environment = dict(os.environ) | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-m", "stylefast.kernels.gpu.ahead", *arguments, "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert report.exists(), done.stderr[-2000:]
    return done, json.loads(report.read_text())


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    return _gate([], tmp_path_factory.mktemp("gate"))


@pytest.mark.parametrize("chip", SHARED_LIMITS)
def test_every_committed_kernel_passes_the_gate_on(gate, chip):
    reports = [report for report in gate[1] if report["capability"] == chip]
    assert [(report["name"], report["problem"]) for report in reports if report["problem"]] == []
    assert all(report["registers"] > 0 for report in reports)
    missing = [operation for operation in OPERATIONS if not any(operation in report["name"] for report in reports)]
    assert not missing


def test_the_gate_exits_0_and_prints_a_row_per_kernel(gate):
    done, reports = gate
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{len(reports)} of {len(reports)} pass" in done.stdout
    assert len(done.stdout.splitlines()) == len(reports) + 2


def test_hopper_has_the_warp_specialised_form(gate):
    assert any("warp-specialised" in report["name"] for report in gate[1] if report["capability"] == 90)


def test_planted_kernels_that_spill_or_do_not_compile_are_found(tmp_path, checkout):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "kernels.py").write_text(PLANTED)
    path = os.pathsep.join([str(tmp_path), str(checkout)])
    done, reports = _gate(["--operations", "planted.kernels", "--chips", "80,90", "--jobs", "1"], tmp_path, path)
    assert done.returncode == 1
    for chip in (80, 90):
        problems = {report["name"]: report["problem"] for report in reports if report["capability"] == chip}
        assert "bytes of stack" in problems["spilling"]
        assert "does not compile" in problems["broken"]
        assert problems["sound"] is None
    assert "spilling on sm_90 spills" in done.stderr


def test_shared_memory_beyond_the_chips_limit_is_a_problem():
    report = Report("kernel", 89, 100, 0, 0, 120 * 1024, 1.0, None)
    assert "a block may have 101376" in report.problem()
    assert report._replace(capability=90).problem() is None
    assert "local memory" in report._replace(capability=90, local_bytes=8).problem()


def test_a_chip_without_known_limits_is_refused_by_name():
    command = [sys.executable, "-m", "stylefast.kernels.gpu.ahead", "--chips", "75"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no limits known for [75]" in done.stderr
