"""The C++ that plans, keeps the books and copies: free of races, of bad memory accesses, and of allocations."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = [PROGRAMS.parents[1] / "csrc" / name for name in ("planner.cpp", "page_pool.cpp", "copies.cpp")]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:halt_on_error=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "OMP_NUM_THREADS": "1",  # what OpenMP orders a sanitizer can't see
}


def run(command, seconds=300):
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, **ENVIRONMENT},
    )


def build(folder, sources, *flags, seconds=300):
    """The built program and the compiler's answer."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++ here")
    program = folder / "program"
    options = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    # libraries behind the sources that want them
    return program, run([compiler, *options, *sources, *flags, "-o", program], seconds)


def launcher(folder, flag):
    """Words before a sanitized program; skips where even an empty one does not build or run."""
    empty = folder / "empty.cpp"
    empty.write_text("int main() {}\n")
    program, built = build(folder, [empty], flag)
    if built.returncode != 0:
        pytest.skip(f"g++ can't build with {flag}: {built.stderr.strip()[-200:]}")
    # GCC's older thread sanitizers don't start under the address randomisation of newer kernels
    for words in ([], ["setarch", "-R"]):
        if words and not shutil.which(words[0]):
            continue
        started = run([*words, program])
        if started.returncode == 0:
            return words
    pytest.skip(f"a program built with {flag} does not start here: {started.stderr.strip()[-200:]}")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_random_mixes_of_threads_are_clean_under_the_sanitizer(tmp_path, sanitizer):
    flag = f"-fsanitize={sanitizer}"
    words = launcher(tmp_path, flag)
    program, built = build(tmp_path, [PROGRAMS / "random_mixes.cpp", *SOURCES], flag, "-fno-sanitize-recover=all")
    assert built.returncode == 0, built.stderr[-3000:]
    done = run([*words, program])
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]


FAULTS = {
    "address,undefined": "int main(int n, char**) { int* p = new int[2]; return p[n + 1]; }\n",
    "thread": "#include <thread>\nint x;\nint main() { std::thread a([] { ++x; }); ++x; a.join(); }\n",
}


@pytest.mark.parametrize("sanitizer", FAULTS)
def test_the_sanitizer_finds_a_planted_fault(tmp_path, sanitizer):
    flag = f"-fsanitize={sanitizer}"
    words = launcher(tmp_path, flag)
    (tmp_path / "fault.cpp").write_text(FAULTS[sanitizer])
    program, built = build(tmp_path, [tmp_path / "fault.cpp"], flag, "-fno-sanitize-recover=all")
    assert built.returncode == 0, built.stderr
    done = run([*words, program])
    assert done.returncode != 0 and ("Sanitizer" in done.stderr or "runtime error" in done.stderr)


def test_planner_pool_and_copies_allocate_nothing_once_they_are_warm(tmp_path):
    if os.confstr_names.get("CS_GNU_LIBC_VERSION") is None:
        pytest.skip("counting allocations needs glibc")
    program, built = build(tmp_path, [PROGRAMS / "steady_state.cpp", *SOURCES])
    assert built.returncode == 0, built.stderr[-3000:]
    done = run([program])
    assert (done.returncode, done.stdout) == (0, "0 allocations in 10000 rounds\n"), done.stderr
    # one that allocates in every round is noticed
    done = run([program, "allocate"])
    assert (done.returncode, done.stdout) == (1, "100 allocations in 100 rounds\n")


@pytest.mark.slow
def test_the_cpu_kernels_share_nothing_between_threads_but_what_they_may(tmp_path):
    """The operations as they are cut into pieces, on threads that the sanitizer sees; OpenMP's it does not."""
    from torch.utils.cpp_extension import include_paths, library_paths

    words = launcher(tmp_path, "-fsanitize=thread")
    csrc = PROGRAMS.parents[1] / "csrc"
    names = [
        "arguments",
        "cpu_features",
        "attention_operations",
        "streaming_operations",
        "attention_avx2",
        "attention_avx512",
        "attention_avx512_bf16",
        "streaming_avx2",
        "streaming_avx512",
    ]
    torch_flags = [f"-isystem{path}" for path in include_paths()]
    torch_flags += [f"-L{path}" for path in library_paths()] + [f"-Wl,-rpath,{path}" for path in library_paths()]
    # the last -std counts
    program, built = build(
        tmp_path,
        [PROGRAMS / "operation_threads.cpp", *(csrc / f"{name}.cpp" for name in names)],
        "-std=c++20",
        "-fsanitize=thread",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
        "-Wno-error=tsan",
        f"-I{PROGRAMS / 'threads'}",
        *torch_flags,
        "-Wl,--no-as-needed",
        "-ltorch_cpu",
        "-lc10",
        "-ltorch",
        seconds=1500,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    done = run([*words, program])
    assert done.returncode == 0 and "operations on" in done.stdout, done.stdout + done.stderr[-5000:]
    planted = run([*words, program, "race"])
    assert planted.returncode != 0 and "data race" in planted.stderr
