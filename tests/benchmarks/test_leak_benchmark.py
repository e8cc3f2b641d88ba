"""The benchmark of style kept and content leaked, on the embedded model."""

import json
import sys

from benchmarks import leak


def test_a_quick_run_writes_its_file(tmp_path, monkeypatch):
    out = tmp_path / "leak.json"
    plans = {name: make for name, make in leak.plans().items() if name in ("as it is", "clean 0.2")}
    monkeypatch.setattr(leak, "plans", lambda: plans)
    monkeypatch.setattr(leak, "cost", lambda bench: {"clean / plain": 1.0, "quartiles": [1.0, 1.0]})
    monkeypatch.setattr(sys, "argv", ["leak", "--sets", "1", "--steps", "4", "--out", str(out)])
    leak.main()
    found = json.loads(out.read_text())
    assert found["results"].keys() == plans.keys() and found["cost"]["clean / plain"] == 1.0
    for shares in found["results"].values():
        assert shares["pictures"] == 5 and all(0 <= shares[name] <= 1 for name in ("style", "content", "leak"))
