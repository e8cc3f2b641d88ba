"""The benchmark of pictures that begin with pictures, on the embedded model."""

import json
import sys

from benchmarks import pictures


def test_a_quick_run_writes_its_file(tmp_path, monkeypatch):
    out = tmp_path / "pictures.json"
    monkeypatch.setattr(sys, "argv", ["pictures", "--quick", "--rounds", "1", "--out", str(out)])
    pictures.main()
    (found,) = json.loads(out.read_text())["results"]["models"]
    assert found["ratio"] > 0 and {*found["seconds"]} == {"from noise", "mixed"}
