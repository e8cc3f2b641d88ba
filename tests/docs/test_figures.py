"""The figures of the kernels in the documentation are those of the recorded run."""

import json

import pytest

from benchmarks.kernels.report import markdown


@pytest.mark.parametrize("device", ["cpu"])
def test_the_table_of_a_device_is_that_of_its_results_file(checkout, device):
    results = json.loads((checkout / "benchmarks" / "results" / f"kernels-{device}.json").read_text())["results"]
    # otherwise: paste what `benchmarks.kernels.report.markdown` makes of the file into docs/kernels.md
    assert markdown(results) in (checkout / "docs" / "kernels.md").read_text()
