"""The kernels against what PyTorch has: `python -m benchmarks kernels --device cpu|cuda`.

`cases.py` says what a measurement consists of, `attention.py`, `cross_attention.py` and `streaming.py` list them,
`plain.py` holds the peers in plain PyTorch, `measure.py` takes times and errors, `report.py` judges and prints.
"""
