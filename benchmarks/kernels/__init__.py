"""The kernels against PyTorch: `python -m benchmarks kernels --device cpu|cuda`.

`cases.py` defines a measurement, `attention.py`, `cross_attention.py`, `streaming.py` and `lora.py` list them,
`plain.py` holds the peers in plain PyTorch, `measure.py` measures times and errors, `report.py` judges and prints.
"""
