"""The engine with and without a bank, and against the published method: `python -m benchmarks runtime`.

`published.py` is that method in plain PyTorch, `models.py` makes the models, `cases.py` defines a measurement and takes
times, `cpu.py` and `cuda.py` list the cases, `soak.py` is a long-running load test, `report.py` judges and prints.
"""
