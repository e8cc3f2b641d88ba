"""Which modules have the marker `numerics`: those whose results depend on a CPU's sums or on its instructions.

A module has it that compares floating-point results, unless it stands on one of the lists below.
"""

import re
from functools import cache
from pathlib import Path

# words of a module that compares floating-point results
_COMPARES = re.compile(r"\b(fp64|near_fp64|allclose|assert_close|near|psnr|isclose|bit_equal|torch\.equal)\b")
# folders of programs that choose their instructions without regard to PyTorch's; samplers take each number by itself,
# and their kernel is compared in tests/kernels
FOLDERS = ("benchmarks", "cli", "docs", "export", "packaging", "sampling", "tiny_model")
# beginnings of modules' names
MODULES = (
    # compiled and exported code, and Triton's kernels
    "test_compile",
    "test_exported",
    "test_onnxruntime_backend",
    "test_shared_attention_launch",
    "test_gpu_",
    "test_custom_ops",
    # bits that are written, read and moved, with no sum over them; what a loaded model draws is that of test_plain.py
    "test_bank.py",
    "test_bank_file",
    "test_checkpoint",
    "test_copies",
    "test_embeddings",
    "test_image_embeds",
    "test_key_values",
    "test_load_options",
    "test_lora_",
    "test_masks",
    "test_packed_pages",
    "test_pipeline_check",
    "test_record",
    "test_row_table",
    "test_single_file",
    "test_step_buffers",
    # what happens when; the numbers beside it are those of test_requests.py and test_mixed_batches.py
    "test_batching",
    "test_driver_faults",
    "test_eager_graphs",
    "test_endings",
    "test_errors",
    "test_faults",
    "test_jobs",
    "test_memory",
    "test_one_driver",
    "test_strange_arguments",
    "test_style_interface",
    # one UNet in two drivers
    "test_naive",
)


@cache
def is_numeric(path: Path) -> bool:
    """Whether the tests of a module run on two kinds of CPU."""
    if path.parent.name in FOLDERS or path.name.startswith(MODULES):
        return False
    return _COMPARES.search(path.read_text()) is not None
