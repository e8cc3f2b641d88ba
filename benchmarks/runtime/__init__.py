"""The engine against itself without a bank and against the published method: `python -m benchmarks runtime`.

`published.py` is that method in plain PyTorch, `models.py` makes what it is measured on, `cases.py` says what a
measurement consists of and takes times, `cpu.py` and `cuda.py` list the cases, `soak.py` keeps an engine busy for long,
`report.py` judges and prints.
"""
