"""The `compile` backend: the UNet's blocks as compiled regions, and on a GPU whole steps as CUDA graphs.

A region is the forward of a transformer block or a resnet. Blocks of equal shape share its code, because their weights
are ordinary arguments. Rows, pages and slots are dynamic dimensions, so another batch size or larger buffers compile
nothing; the feature map's size is static, since memory formats and index arithmetic depend on it. PyTorch's compiler
treats a dimension of 1 separately, so a single row has its own regions.

Strengths, scales, pages, lengths of texts, seeds and the sampler's coefficients are tensor contents, which the compiler
ignores.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Literal

import torch
import torch._dynamo
import torch.fx.experimental._config as symbolic_shapes
from torch.utils._config_module import ConfigModule

from stylefast.code_caches import inductor_cache
from stylefast.errors import InvalidRequest, MissingDependency
from stylefast.kernels.gated_cross_attention import ImageSegments
from stylefast.kernels.shared_attention import References
from stylefast.models.row_loras import BlockLoras, LoraInputs, ResnetLoras, RowLoras
from stylefast.models.row_table import ImageKV, StylePages
from stylefast.models.unet import Resnet, TransformerBlock, UNet
from stylefast.runtime.backends.base import Backend, LatentSlots, ModelInputs, graphs_for, read_in_place, run_step
from stylefast.runtime.backends.compile_cache import CompileCache, default_folder
from stylefast.runtime.backends.cuda_graphs import StepGraphs
from stylefast.runtime.banks.bank_pages import idle_pages
from stylefast.runtime.steps.conditions import KeyValuePages
from stylefast.runtime.steps.step_buffers import BatchShape, StepBuffers, StepColumns
from stylefast.values import quoted

logger = logging.getLogger(__name__)

COMPILERS = ("inductor", "aot_eager", "eager")
# idle rows cost as much as real ones, so they are at most a fifth; another row count compiles nothing, but on a GPU
# needs its own graph
BUCKETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
# variants of one region (latent sizes times block shapes) before PyTorch refuses to compile more
_MOST_CASES = 4096
_KNOWN_KEYS = 1024
# idle masks for a batch without any; more than one, so that their number is a dynamic dimension
_IDLE_MASKS = 4


class CompileBackend(Backend):
    """Backend that runs a step with compiled blocks; replaces `TorchBackend`.

    cache: folder for compiled code, so that a second process starts warm; "auto": `STYLEFAST_CACHE` or
    ~/.cache/stylefast; None: not kept. Its contents are executed: make sure that no other user can write to it.
    compiler: "inductor", or "aot_eager" and "eager", which trace and guard but generate no code.
    graphs: captures and replays steps; "auto": CUDA graphs on a GPU, none on a CPU.

    The UNet itself is unchanged: regions belong to a twin with the same parameters. Raises MissingDependency if
    Inductor lacks a compiler: Triton on a GPU, C++ on a CPU.
    """

    name = "compile"
    takes_loras = takes_long_texts = takes_controls = True
    buckets: tuple[int, ...] = BUCKETS

    def __init__(
        self,
        unet: UNet,
        cache: str | Path | None = "auto",
        compiler: str = "inductor",
        graphs: StepGraphs | None | Literal["auto"] = "auto",
    ):
        if compiler not in COMPILERS:
            raise InvalidRequest(f"compiler is {quoted(compiler)}; choose one of {', '.join(COMPILERS)}")
        if compiler == "inductor":
            _check_toolchain(unet.device)
        self._unet, self._count = unet, _CountingCompiler(compiler)
        self._twin = UNet.from_state(unet.config, unet.state_dict())
        self._twin.layout = unet.layout
        compiled: dict[type, Callable] = {kind: self._compile(kind.forward) for kind in (TransformerBlock, Resnet)}
        for module in self._twin.modules():
            if type(module) in compiled:
                module.forward = self._region(module, compiled[type(module)])
        self._graphs = graphs_for(unet.device) if graphs == "auto" else graphs
        self._cache = None
        if cache is not None and compiler == "inductor":
            folder = default_folder() if cache == "auto" else Path(cache)
            self._cache = CompileCache(folder, unet.config, unet.dtype, unet.device)
            self._cache.load()
        self._compiling = nullcontext if compiler != "inductor" else inductor_cache
        if self._cache is not None:
            self._compiling = self._cache.compiling
        self._known: set[tuple] = set()
        self._marking = self._warm = self._told = False
        self._masks: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}
        self._pages: dict[tuple[int, int], StylePages] = {}

    @property
    def compilations(self) -> int:
        """Count the regions compiled so far, including those found in the cache, which are traced too."""
        return self._count.graphs

    @property
    def captures(self) -> int:
        """Count the CUDA graphs that are ready for replay."""
        return len(self._graphs) if self._graphs is not None else 0

    @property
    def nbytes(self) -> int:
        """Return the bytes on the device: memory of captured graphs, idle masks and idle pages."""
        masks = sum(x.numel() * x.element_size() for levels in self._masks.values() for x in levels)
        # a size's idle pages share one storage
        pages = sum(idle.layers[0][0].untyped_storage().nbytes() for idle in self._pages.values())
        return masks + pages + (self._graphs.nbytes if self._graphs is not None else 0)

    @torch.inference_mode()
    def run(self, key: tuple, state: LatentSlots, columns: StepColumns, buffers: ModelInputs) -> None:
        """Run one step. Equal keys mean equal shapes; buffers replaced under the same key are detected."""
        # before a capture: memory allocated within one belongs to its graph
        buffers = self._with_idle(buffers, state.shape[1:])

        def step():
            self._step(key, state, columns, buffers)

        if self._graphs is None or buffers.controls:  # which rows are steered changes the shapes
            step()
        else:
            self._graphs.run(key, read_in_place(state, columns, buffers), step)

    def reset(self) -> None:
        """Free the memory of captured graphs; compiled code stays."""
        if self._graphs is not None:
            self._graphs.reset()
        self._masks.clear()
        self._pages.clear()

    def warm_up(
        self,
        latent_shape: tuple[int, int, int],
        rows: Sequence[int],
        images: bool = False,
        references: int = 1,
    ) -> int:
        """Compile ahead of use for latents [channels, h, w] and these row counts; return the number of regions.

        images: whether requests will use pictures as prompts; references: the most that a row attends to.
        Afterwards the first shape that still compiles is logged. CUDA graphs are captured when steps are run.
        """
        if not rows or any(not isinstance(count, int) or count < 1 for count in rows):
            raise InvalidRequest(f"rows is {quoted(rows)}; give row counts of 1 or more, such as (2, 8)")
        before = self.compilations
        for count in rows:
            self._warm_step(latent_shape, count, images, references)
        self._warm = True
        return self.compilations - before

    @torch.inference_mode()
    def _warm_step(self, latent_shape: tuple[int, int, int], rows: int, images: bool, references: int) -> None:
        """Run one step on zeros, in buffers with the layout of real ones."""
        unet = self._unet
        layout, place = unet.layout, (unet.device, unet.dtype)
        pooled = unet.config["projection_class_embeddings_input_dim"] - 6 * unet.config["addition_time_embed_dim"]
        text, pictures = KeyValuePages(layout, 77, pooled, *place), None
        if images:
            pictures = KeyValuePages(layout, 4, 0, *place)
        shape = BatchShape(
            rows, rows, references, int(images), 0, True, len(layout.layers), len(layout.modules), latent_shape
        )
        more = unet.config["in_channels"] - latent_shape[0]
        state, table = LatentSlots(latent_shape, unet.device, more), StepBuffers(shape, unet.device)
        image_kv = None if pictures is None else ImageKV(pictures.layers, pictures.lengths)
        buffers = self._with_idle(ModelInputs(text.layers, text.extra, image_kv, None, ()), latent_shape[1:])
        self._step(("warm-up", shape), state, table.columns, buffers)

    def _step(self, key: tuple, state: LatentSlots, columns: StepColumns, buffers: ModelInputs) -> None:
        fresh, before = key not in self._known, self.compilations
        buffers = buffers._replace(
            text_kv=_as_inference(buffers.text_kv),
            image_kv=_as_inference(buffers.image_kv),
            pages=_as_inference(buffers.pages),
            masks=_as_inference(buffers.masks),
            loras=_as_inference(buffers.loras),
            text_lengths=_as_inference(buffers.text_lengths),
        )
        # marks are read only while compiling, which happens only for new shapes
        self._marking = fresh
        # entered at every step, because any step may still compile
        with _symbols_of_their_own(), self._compiling():
            run_step(self._twin, state, columns, buffers)
        self._marking = False
        if fresh:
            if len(self._known) >= _KNOWN_KEYS:
                self._known.clear()
            self._known.add(key)
        new = self.compilations - before
        if new:
            self._after_compiling(new, columns, state.shape, expected=fresh and key[0] == "warm-up" or not self._warm)

    def _after_compiling(self, new: int, columns: StepColumns, latent_shape: tuple, expected: bool) -> None:
        rows, pictures = len(columns.row_picture), columns.table.image_page.shape[1]
        logger.info("compiled %d regions for %d rows at latents %s", new, rows, latent_shape)
        if not expected and not self._told:
            self._told = True
            logger.warning(
                "%d regions were compiled after warm_up, for %d rows at latents %s with %d columns of references "
                "and %d of pictures; add this case to warm_up, or expect one such pause per case",
                new,
                rows,
                "x".join(map(str, latent_shape)),
                columns.table.self_page.shape[1],
                pictures,
            )
        if self._cache is not None:
            self._cache.save()

    def _with_idle(self, buffers: ModelInputs, latent_size: tuple[int, int]) -> ModelInputs:
        """Add unused bank pages and masks if the buffers have none, so that the first real ones compile nothing."""
        if buffers.pages is not None:
            self._pages.pop(latent_size, None)
        else:
            if latent_size not in self._pages:
                self._pages[latent_size] = idle_pages(self._unet, latent_size)
            buffers = buffers._replace(pages=self._pages[latent_size])
        if buffers.image_kv is None:
            # not read without pictures
            return buffers._replace(masks=())
        if buffers.masks:
            return buffers
        if latent_size not in self._masks:
            sizes, device = self._unet.attention_sizes(*latent_size), self._unet.device
            self._masks[latent_size] = tuple(torch.zeros(_IDLE_MASKS, h * w, device=device) for h, w in sizes)
        return buffers._replace(masks=self._masks[latent_size])

    def _compile(self, forward: Callable) -> Callable:
        # PyTorch stores compiled code with the function's code object: a copy is freed with this backend, and backends
        # in one process don't search each other's code
        code = forward.__code__.replace()
        own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
        return torch.compile(own, backend=self._count, fullgraph=True, dynamic=False)

    def _region(self, module: torch.nn.Module, compiled: Callable) -> Callable:
        def region(*inputs):
            if self._marking:
                _mark_dynamic(inputs)
            return compiled(module, *inputs)

        return region


class _CountingCompiler:
    """Compiler, chosen by name, that counts the graphs it compiles."""

    def __init__(self, name: str):
        self._compile, self.graphs = torch._dynamo.lookup_backend(name), 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        self.graphs += 1
        return self._compile(graph, inputs)


@contextmanager
def _symbols_of_their_own() -> Iterator[None]:
    """Keep dimensions apart that happen to be equal, such as 8 rows and 8 pages, and raise the recompile limit."""
    with ExitStack() as stack:
        limits = {"recompile_limit": _MOST_CASES, "accumulated_recompile_limit": _MOST_CASES}
        stack.enter_context(torch._dynamo.config.patch(limits))
        assert isinstance(symbolic_shapes, ConfigModule)
        stack.enter_context(symbolic_shapes.patch("use_duck_shape", False))
        yield


def _mark_dynamic(inputs: Sequence) -> None:
    """Mark the dynamic dimensions of a region's inputs: rows, pages, slots, columns of references and pictures."""
    for value in inputs:
        if isinstance(value, torch.Tensor):
            _mark(value, 0)  # a feature map or the time embedding: rows
            continue
        if value is None:
            continue
        for name, field in value._asdict().items():
            if isinstance(value, (BlockLoras, ResnetLoras)):
                for lora in _lora_inputs(field):
                    _mark_lora(lora)
                continue
            if name in ("references", "images") and field is not None:
                _mark_tables(field)
                continue
            for tensor in _tensors(field):
                _mark(tensor, 1 if name == "pool_stats" else 0)  # [3, pages, heads, d]


def _mark_tables(group: References | ImageSegments) -> None:
    # columns of references and pictures vary, and the tokens of pictures; a mask's are those of the feature map
    for name, tensor in group._asdict().items():
        if tensor is not None:
            _mark(tensor, 0, *((1,) if tensor.ndim > 1 and name != "masks" else ()))


def _lora_inputs(value) -> Iterator[LoraInputs]:
    if isinstance(value, LoraInputs):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _lora_inputs(part)


def _mark_lora(lora: LoraInputs) -> None:
    _mark(lora.pool.down, 0)
    _mark(lora.pool.up, 0)
    _mark(lora.rows.unit, 1, 2)
    _mark(lora.rows.scale, 0, 1)


def _mark(tensor: torch.Tensor, *dimensions: int) -> None:
    for dimension in dimensions:
        if tensor.shape[dimension] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def _tensors(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _as_inference(value):
    """Return the tensors as inference-mode tensors: compiled code distinguishes the two kinds.

    Buffers are made in one mode and grow in the other. Tensors that are already right are returned unchanged.
    """
    if isinstance(value, torch.Tensor):
        if value.is_inference():
            return value
        alias = torch.empty(0, dtype=value.dtype, device=value.device)
        return alias.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
    if isinstance(value, tuple):
        parts = [_as_inference(part) for part in value]
        if all(new is old for new, old in zip(parts, value)):
            return value
        return type(value)(*parts) if isinstance(value, (ImageKV, StylePages, RowLoras)) else tuple(parts)
    return value


def _check_toolchain(device: torch.device) -> None:
    if device.type == "cuda":
        if find_spec("triton") is None:
            raise MissingDependency(
                "backend 'compile' generates Triton kernels, but triton is not installed; run `pip install "
                "'stylefast[triton]'`, or use backend='torch'"
            )
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl") if name):
        raise MissingDependency(
            "backend 'compile' generates C++ on a CPU, but no compiler was found (CXX, g++, clang++, cl); install "
            "one, or use backend='torch'"
        )
