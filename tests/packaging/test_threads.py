"""How many threads there are, and how they wait: what a busy machine asks of a program."""

import os
import subprocess
import sys

import pytest
import torch

from stylefast import threads


def environment_of(program: str, **given: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in threads._CHOSEN}
    program += "; import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    return subprocess.run(
        [sys.executable, "-c", program], env=inherited | given, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_threads_spin_shortly_while_they_wait_and_torch_is_not_loaded_for_it():
    assert environment_of("import stylefast, sys; assert 'torch' not in sys.modules") == "passive 4000"


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}], ids=str)
def test_what_the_environment_says_of_waiting_is_left_as_it_is(given):
    expected = f"{given.get('OMP_WAIT_POLICY')} {given.get('GOMP_SPINCOUNT')}"
    assert environment_of("import stylefast", **given) == expected


def test_long_work_beside_steps_gives_way_until_the_last_of_it_is_over():
    before = sys.getswitchinterval()
    with threads.giving_way():
        with pytest.raises(KeyError), threads.giving_way():
            raise KeyError
        assert sys.getswitchinterval() == pytest.approx(threads.SHORT_TURNS, rel=0.01)
    assert sys.getswitchinterval() == before


FILES = {
    "no group": ({}, "", None),
    "no limit": ({"cpu.max": "max 100000"}, "0::/", None),
    "of a container": ({"cpu.max": "250000 100000"}, "0::/", 2.5),
    "of a group above": ({"pod/cpu.max": "150000 100000", "pod/one/cpu.max": "max 100000"}, "0::/pod/one", 1.5),
    "the least of two": ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b", 0.5),
    "of version 1": ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", 3.0),
    "no limit in version 1": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", None),
    "another controller's": ({"x/cpu.max": "100000 100000"}, "4:memory:/x", None),
    "damaged": ({"cpu.max": "lots"}, "0::/", None),
}


@pytest.mark.parametrize("files, group, expected", FILES.values(), ids=FILES)
def test_the_quota_is_read_from_the_control_groups(tmp_path, files, group, expected):
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    own = tmp_path / "cgroup"
    own.write_text(group)
    assert threads.cpu_quota(tmp_path / "root", own) == expected


@pytest.mark.parametrize(
    "variables, asked, quota, expected",
    [
        ({}, 8, 2.5, 2),
        ({}, 8, 0.3, 1),
        ({}, 2, 4.0, 2),
        ({}, 8, None, 8),
        ({"OMP_NUM_THREADS": "8"}, 8, 2.0, 8),
    ],
)
def test_there_are_no_more_threads_than_a_quota_has_time_for(monkeypatch, variables, asked, quota, expected):
    counts = [asked]
    monkeypatch.setattr(threads, "_fitted", False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    for name in threads._COUNTS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    threads.fit_to_quota()
    assert counts[-1] == expected
    counts.append(6)  # what a caller sets afterwards stays
    threads.fit_to_quota()
    assert counts[-1] == 6


def test_torch_imported_too_early_is_warned_of_once_a_model_is_loaded():
    program = (
        "import torch; torch.set_num_threads(2); import stylefast, logging; logging.basicConfig(level='WARNING'); "
        "from stylefast.threads import fit_to_quota as fit; fit(); fit()"
    )
    environment = {name: value for name, value in os.environ.items() if name not in threads._CHOSEN}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("torch was imported before stylefast") == (0 if torch.cuda.is_available() else 1)
