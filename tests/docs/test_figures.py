"""The figures of the kernels in the documentation are those of the recorded run."""

import json
import subprocess

import pytest

from benchmarks.kernels.report import markdown


@pytest.mark.parametrize("device", ["cpu"])
def test_the_table_of_a_device_is_that_of_its_results_file(checkout, device):
    name = f"benchmarks/results/kernels-{device}.json"
    recorded = [(checkout / name).read_text()]
    # `make bench` writes the file anew: then the documentation still shows the committed run
    committed = subprocess.run(["git", "-C", str(checkout), "show", f"HEAD:{name}"], capture_output=True, text=True)
    if committed.returncode == 0:
        recorded.append(committed.stdout)
    # otherwise: paste what `benchmarks.kernels.report.markdown` makes of the file into docs/kernels.md
    page = (checkout / "docs" / "kernels.md").read_text()
    assert any(markdown(json.loads(text)["results"]) in page for text in recorded)
