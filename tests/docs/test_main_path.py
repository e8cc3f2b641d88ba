"""The way from `Engine.generate` to a kernel is as short as docs/architecture.md says."""

import os
import subprocess
import sys

from tests.main_path import BEGIN, END, MOST_CALLS, PAGE


def test_the_calls_on_a_cpu_are_those_of_the_page_and_few(checkout):
    words = [sys.executable, str(checkout / "tests" / "main_path.py"), "--calls", "cpp"]
    # with the C++ kernels, whatever level the tests run at
    environment = {name: value for name, value in os.environ.items() if name != "STYLEFAST_CPU"}
    done = subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=True, env=environment)
    calls = done.stdout.strip().splitlines()
    assert calls[0].startswith("Engine.generate") and calls[-1] == "C++`" and len(calls) <= MOST_CALLS
    page = PAGE.read_text()
    shown = page[page.index(BEGIN) : page.index(END)]
    assert "\n".join(f"{i}. `{call}" for i, call in enumerate(calls, 1)) in shown, (
        "run python tests/main_path.py --write"
    )
