"""`make gpu`: every step runs whatever the others did, in its time, and the exit code tells them apart."""

import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu, gpu_wheels


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Runs `gpu.main` with steps of given exit codes; (exit code, names of the steps run, commands)."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu, "unusable", lambda: "")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu.gpu_wheels, "bring", lambda: [])

    def main(*parts, **codes):
        commands = {}

        def run(name, command, seconds, logs):
            commands[name] = command
            if name == "kernels":
                (tmp_path / "kernels-some-gpu.json").write_text("{}")
            return codes.get(name, 0)

        monkeypatch.setattr(gpu, "run", run)
        return gpu.main(parts), commands

    return main


@pytest.mark.parametrize(
    "codes, expected",
    [
        ({}, 0),
        ({"tests": 1}, 1),
        ({"tests": None}, 1),
        ({"kernels": 2}, 2),
        ({"tests": 1, "kernels": None}, 3),
        ({"runtime": 1}, 4),
        ({"tests": 1, "kernels": 1, "runtime": None}, 7),
        ({"extension": 1}, 0),
    ],
    ids=[
        "all pass",
        "a test fails",
        "tests take too long",
        "kernels crash",
        "both",
        "the engine misses a goal",
        "nothing works",
        "the build alone is optional",
    ],
)
def test_the_exit_code_tells_tests_and_benchmarks_apart(steps, codes, expected, capsys):
    code, commands = steps(**codes)
    assert code == expected and {"tests", "kernels", "runtime"} <= commands.keys()
    assert "kernels-some-gpu.json" in capsys.readouterr().out


def test_results_are_copied_to_the_folder_that_out_names(steps, tmp_path):
    (tmp_path / "kernels-cpu.json").write_text("{}")
    steps()
    assert (tmp_path / "out" / "kernels-some-gpu.json").is_file()


def test_without_pytest_the_benchmarks_still_run_and_the_message_is_clear(steps, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "find_spec", lambda name: name not in ("pytest", "hypothesis", "xdist") or None)
    code, commands = steps()
    assert code == gpu.TESTS_FAILED and "tests" not in commands and {"kernels", "runtime"} <= commands.keys()
    assert "NOT RUN, pytest and hypothesis missing" in capsys.readouterr().out


def test_a_machine_without_a_gpu_is_an_error_of_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main() == 7
    err = capsys.readouterr().err
    assert "no CUDA device" in err and err.count("\n") == 1


def test_a_step_that_takes_too_long_is_stopped_with_its_children(tmp_path, capsys):
    program = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', 'input()'])"
    slow = program.replace("input()", "import time; time.sleep(60)")
    assert gpu.run("slow", [sys.executable, "-c", slow], 5.0, tmp_path) is None
    assert (tmp_path / "slow.log").read_text() == "begun\n" and "stopped" in capsys.readouterr().out


def test_a_step_shows_and_keeps_its_output_and_code(tmp_path, capsys):
    assert gpu.run("step", [sys.executable, "-c", "print('hello'); raise SystemExit(5)"], 60, tmp_path) == 5
    assert (tmp_path / "step.log").read_text() == "hello\n" and "hello" in capsys.readouterr().out


@pytest.mark.parametrize("left, minutes", [(500, "5.0"), (270, "4.0"), (10, "0.5")])
def test_the_benchmarks_get_the_time_that_is_left(left, minutes):
    assert gpu.benchmark_command("kernels", left)[-2:] == ["--minutes", minutes]


def test_one_part_alone_gets_all_the_time(steps):
    code, commands = steps("runtime")
    assert code == 0 and commands.keys() & set(gpu.PARTS) == {"runtime"}
    assert float(commands["runtime"][-1]) > gpu.MINUTES - 1


def test_without_diffusers_the_engine_is_said_not_to_run(steps, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "find_spec", lambda name: name != "diffusers" or None)
    code, commands = steps()
    assert code == gpu.RUNTIME_FAILED and "runtime" not in commands
    out = capsys.readouterr().out
    assert "NOT RUN, diffusers missing" in out and "make gpu-wheels" in out


def test_an_unknown_part_is_an_error_of_one_line(capsys):
    assert gpu.main(["everything"]) == 7
    assert "tests, kernels, runtime, exports, not everything" in capsys.readouterr().err


def test_exported_engines_run_when_they_are_named_and_then_have_all_the_time(steps):
    assert "exports" not in steps()[1]
    code, commands = steps("exports", exports=1)
    assert code == gpu.EXPORTS_FAILED == 8 and commands.keys() & set(gpu.PARTS) == {"exports"}
    assert commands["exports"][2:6] == ["benchmarks", "exports", "--device", "cuda"]
    assert float(commands["exports"][-1]) > gpu.MINUTES - 1


def test_exported_engines_share_the_time_with_the_engine_if_both_are_named(steps):
    code, commands = steps("runtime", "exports", runtime=1)
    assert code == gpu.RUNTIME_FAILED and commands.keys() & set(gpu.PARTS) == {"runtime", "exports"}
    assert float(commands["runtime"][-1]) < gpu.MINUTES / 2 < float(commands["exports"][-1])


def _wheel(folder, name, files):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as content:
        for file, text in {f"{name}-1.0.dist-info/METADATA": f"Name: {name}\nVersion: 1.0\n", **files}.items():
            content.writestr(file, text)


def test_carried_wheels_are_used_where_their_package_is_missing_and_nowhere_else(tmp_path, monkeypatch):
    wheels, unpacked = tmp_path / "wheels", tmp_path / "unpacked"
    wheels.mkdir()
    _wheel(wheels, "carried_thing", {"carried_thing/__init__.py": "VALUE = 7\n"})
    _wheel(wheels, "pytest", {"pytest/__init__.py": "raise ImportError('the wrong one')\n"})
    (wheels / "compiled-1.0-cp311-cp311-linux_x86_64.whl").write_bytes(b"no zip")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert gpu_wheels.bring(wheels, unpacked) == ["carried_thing"]
    assert sys.path[-1] == str(unpacked) and not (unpacked / "pytest").exists()
    found = subprocess.run(
        [sys.executable, "-c", "import carried_thing; print(carried_thing.VALUE)"], capture_output=True, text=True
    )
    assert found.stdout == "7\n", found.stderr
    assert gpu_wheels.bring(tmp_path / "nothing", unpacked) == [] and not unpacked.exists()


def test_wheels_are_fetched_as_pinned_and_of_pure_python_alone(tmp_path, monkeypatch, capsys):
    asked = []

    def run(command):
        asked.append((command, Path(command[command.index("-c") + 1]).read_text()))
        return SimpleNamespace(returncode=len(asked) - 1)

    (tmp_path / "old.whl").write_bytes(b"")
    (tmp_path / "mine.txt").write_bytes(b"")
    monkeypatch.setattr(gpu_wheels.subprocess, "run", run)
    assert gpu_wheels.main([str(tmp_path)]) == 0 and "0 wheels" in capsys.readouterr().out
    command, constraints = asked[0]
    assert {"diffusers", "pytest", "--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[command.index("--platform") + 1] == "any"
    assert "diffusers==" in constraints and "hypothesis==" not in constraints
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert gpu_wheels.main([str(tmp_path)]) == 1 and "could not fetch" in capsys.readouterr().err
