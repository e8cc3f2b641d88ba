"""The table in README.md names a test for each promise, and these tests exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_promise_names_tests_that_exist():
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", (HERE / "README.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 28))
    for number, _, tests in rows:
        named, file = re.findall(r"`([\w./]*)(?:::(\w+))?`", tests), ""
        assert named, number
        for path, name in named:
            file = path or file  # `::name` is in the file before
            text = (HERE / file).read_text()
            assert f"def {name}(" in text if name else "def test_" in text, (number, file, name)
