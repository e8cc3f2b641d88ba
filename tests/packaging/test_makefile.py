"""`make demo` installs what running takes, alone, and says in a few lines what it does."""

import os
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
NOISE = "for i in $(seq 60); do echo warning $i; echo warning $i >&2; done\n"


@pytest.fixture
def make(checkout, tmp_path):
    """Runs make with an environment and a log of its own; what it prints on both streams."""
    variables = [f"VENV={tmp_path / 'venv'}", f"LOG={tmp_path / 'logs' / 'setup.log'}", "PIP_FLAGS="]
    # a make around the tests would hand its own options down
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def run(*words):
        return subprocess.run(
            ["make", "--no-print-directory", *words, *variables],
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


@pytest.fixture
def script(tmp_path):
    """Writes a shell script that stands in for a program of the environment."""

    def write(name, body):
        path = tmp_path / "venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}")
        path.chmod(0o755)
        return path

    return write


def test_the_demo_needs_the_run_time_package_alone(make):
    done = make("-n", "demo")
    assert done.returncode == 0, done.stdout
    assert "-c constraints.txt" in done.stdout and "-e ." in done.stdout
    assert "[dev]" not in done.stdout and "pytriton" not in done.stdout


def test_the_tests_add_what_they_need_to_the_same_environment(make):
    done = make("-n", "check")
    assert done.returncode == 0 and done.stdout.index("-e .") < done.stdout.index("-e '.[dev]'"), done.stdout


def test_smoke_runs_the_tests_of_its_folder(make, checkout):
    done = make("-n", "smoke")
    assert done.returncode == 0 and "-m pytest -q tests/smoke\n" in done.stdout, done.stdout
    assert list((checkout / "tests" / "smoke").glob("test_*.py"))


def test_the_demo_prints_a_few_lines_and_the_address_at_the_end(make, script, tmp_path):
    script("python", NOISE)
    script("stylefast", "echo page; echo open file:///page >&2\n")
    done = make("demo")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) <= 5 and lines[-1] == "open file:///page" and not any("warning" in line for line in lines)
    assert "warning 60" in (tmp_path / "logs" / "setup.log").read_text()
    script("python", "exit 1\n")
    assert make("demo").stdout.splitlines() == lines[-2:], "what is installed is not installed again"


def test_a_step_that_fails_shows_the_end_of_its_log_and_names_it(make, script, tmp_path):
    script("python", f"{NOISE}echo there is no room >&2\nexit 1\n")
    done = make("demo")
    assert done.returncode != 0 and done.stdout.count("\n") < 22
    assert "there is no room" in done.stdout and f"all of it is in {tmp_path / 'logs' / 'setup.log'}" in done.stdout
