"""The C++ extension: kernels for CPUs, the batch planner, the page pool and copies of blocks (csrc/bindings.cpp).

Kernels check nothing: `stylefast.kernels` does, and says what their tensors are.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

interface: int

class BatchPlanner:
    def __init__(self) -> None: ...
    def plan(
        self,
        pictures: NDArray[np.int64],
        branches: NDArray[np.int64],
        offsets: NDArray[np.int64],
        reference_pictures: NDArray[np.int64],
        reference_pages: NDArray[np.int64],
        page: NDArray[np.int64],
        order: NDArray[np.int64],
        mutual: bool,
    ) -> bool: ...

class PagePool:
    def __init__(self, slots: int) -> None: ...
    def acquire(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_], int]: ...
    def prefetch(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]: ...
    def filled(self, slots: NDArray[np.int64]) -> int: ...
    def failed(self, slots: NDArray[np.int64]) -> int: ...
    def unpinned(self, slots: NDArray[np.int64]) -> int: ...
    def wait(self, slots: NDArray[np.int64]) -> bool: ...
    def release(self, keys: NDArray[np.int64]) -> int: ...
    def drop(self, style: int) -> int: ...
    def clear(self) -> int: ...
    def stats(self) -> tuple[int, int, int, int, int, int, int]: ...
    def pages(self) -> NDArray[np.int64]: ...

def copy_blocks(
    sources: NDArray[np.int64], destinations: NDArray[np.int64], bytes: NDArray[np.int64], files: NDArray[np.int32]
) -> tuple[int, int]: ...
def cpu_features() -> list[str]: ...
def instruction_set() -> str: ...
def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page: Tensor,
    mode: Tensor,
    scale: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    pool_k: Tensor | None,
    pool_v: Tensor | None,
    pool_k_scale: Tensor | None,
    pool_v_scale: Tensor | None,
    out: Tensor,
) -> None: ...
def gated_cross_attention(
    q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    text_page: Tensor,
    text_lengths: Tensor | None,
    image_k: Tensor | None,
    image_v: Tensor | None,
    image_lengths: Tensor | None,
    image_page: Tensor | None,
    strength: Tensor | None,
    group: Tensor | None,
    masks: Tensor | None,
    mask_index: Tensor | None,
    out: Tensor,
) -> None: ...
def token_stats(xs: Sequence[Tensor], mean: Tensor, variance: Tensor) -> None: ...
def adain_affine(
    mean: Tensor,
    variance: Tensor,
    page: Tensor,
    strength: Tensor,
    pool_mean: Tensor | None,
    pool_variance: Tensor | None,
    gain: Tensor,
    offset: Tensor,
) -> None: ...
def dequantise(scale: Tensor, values: Tensor, out: Tensor) -> None: ...
def geglu(x: Tensor, out: Tensor) -> None: ...
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None: ...
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    total: Tensor,
    out: Tensor,
) -> None: ...
def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    page: Tensor | None,
    pool_mean: Tensor | None,
    pool_variance: Tensor | None,
    pool_elements: int,
    out: Tensor,
) -> None: ...
def guided_step(
    latents: Tensor,
    anchor: Tensor,
    history: Tensor,
    predictions: Tensor,
    branch_rows: Tensor,
    branch_weights: Tensor,
    rescale: Tensor,
    denoised: Tensor,
    update: Tensor,
    noise: Tensor,
    next_latents: Tensor,
    next_anchor: Tensor,
    next_history: Tensor,
) -> None: ...
def row_lora(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    unit: Tensor,
    scale: Tensor,
    stride: int,
    padding: int,
    ys: Sequence[Tensor],
) -> None: ...
