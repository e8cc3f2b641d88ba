"""The table of mutants in docs/testing.md is that of tests/mutants.py."""

import re

from tests.mutants import MUTANTS


def test_the_page_of_testing_lists_the_mutants_and_the_tests_that_caught_them(checkout):
    # otherwise: paste what `make mutants` prints
    page = (checkout / "docs" / "testing.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| `([^|]+)` \| \d+ \|$", page, re.MULTILINE)
    assert [name for name, _ in rows] == [mutant.name for mutant in MUTANTS]
    assert all(test.startswith(mutant.tests.split("[")[0]) for (_, test), mutant in zip(rows, MUTANTS))


def test_every_mutant_finds_its_text_once(checkout):
    assert [m.name for m in MUTANTS if (checkout / m.file).read_text().count(m.old) != 1 or m.old == m.new] == []
