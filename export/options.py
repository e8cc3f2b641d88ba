"""Request, source and progress of an export (`Options`, `Source`, `Progress`), and estimates of what it will take."""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from stylefast import export, kernels, models, values
from stylefast.errors import InvalidRequest, MissingDependency, ModelError
from stylefast.export.manifest import COMPONENTS, KINDS, versions
from stylefast.export.onnx_writer import check_opset
from stylefast.export.tensorrt import check_buildable, load_package, package_of
from stylefast.export.tensorrt_profiles import Profile
from stylefast.export.unet_graph import FLAVOURS, GraphShape, native_latents
from stylefast.models import vae as vaes
from stylefast.models.adapter_loading import load_adapter
from stylefast.models.checkpoint import load_components
from stylefast.models.digests import sampled_digest
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.prepacked import unpack
from stylefast.models.text import TextEncoder
from stylefast.models.text_chunks import MAX_CHUNKS
from stylefast.models.unet import UNet

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ATTENTION = ("standard", "plugin")
RUNNERS = ("python", "onnxruntime")
DIGEST = "digest"  # key in `extra` of a UNet's graph: `sampled_digest` of its weights
NATIVE = "native"
ALL = "all"
DEFAULT_FLAVOURS = {
    "onnx": ("live", "banked", "plain"),
    "tensorrt": ("live", "banked"),
    "aoti": ("live", "banked", "plain"),
    "triton-repo": ("live", "banked", "plain"),
}
DEFAULT_COMPONENTS = {"onnx": (ALL,), "tensorrt": ("unet",), "aoti": ("unet",), "triton-repo": (ALL,)}
_MOST_NAMES = 64
_SLOTS = 2  # LoRAs of a picture, unless `lora_slots` says otherwise
_AOTI_TARGETS = ("cpu", "cuda")
_NEEDS_ADAPTER = ("image_encoder", "image_projector")
# packages besides torch that affect the graphs
_EXPORTERS = ("diffusers", "onnx", "onnxscript", "transformers", "triton")
# packages whose absence can be reported before a model is loaded
_PACKAGES = {"onnx": ("onnx", "onnxscript"), "tensorrt": ("onnx", "onnxscript"), "triton-repo": ("onnx", "onnxscript")}


@dataclass(frozen=True)
class Options:
    """Options of an export. Raises InvalidRequest.

    kind: "onnx", "tensorrt", "aoti" or "triton-repo". dtype: of weights and activations. flavours, references,
    segments, lora_rank, lora_slots: see `GraphShape`; lora_slots None: 2 with a lora_rank, else 0. max_text_chunks: its
    `text_chunks`. targets: chips such as "sm89" for TensorRT, "cpu" or "cuda" for AOTInductor, else none.
    profiles: TensorRT's ranges of sizes, as text for `Profile.parse`. opset: of ONNX; None: the oldest that supports
    the type. size: None for any size, NATIVE for the model's own, or (width, height) in pixels. components: names of
    COMPONENTS, or ("all",) for those that the model has. refit: TensorRT engines whose weights can be replaced.
    attention: "plugin" for our own kernel in TensorRT. onnx: an export of kind "onnx" to build from. runner: how a
    Triton repository runs its graphs.
    """

    kind: str
    dtype: str = "float32"
    flavours: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    references: int = 1
    segments: int = 2
    lora_rank: int = 0
    lora_slots: int | None = None
    max_text_chunks: int = 1
    size: str | tuple[int, int] | None = None
    opset: int | None = None
    components: tuple[str, ...] = ()
    refit: bool = False
    attention: str = "standard"
    runner: str = "python"
    onnx: Path | None = None
    overwrite: bool = False

    def __post_init__(self):
        values.one_of("kind", self.kind, KINDS)
        values.one_of("dtype", self.dtype, DTYPES)
        values.one_of("attention", self.attention, ATTENTION)
        values.one_of("runner", self.runner, RUNNERS)
        put = object.__setattr__
        for name in ("flavours", "components", "targets", "profiles"):
            given = values.several(name, getattr(self, name), most=_MOST_NAMES)
            put(self, name, tuple(values.text(f"{name}[{i}]", one) for i, one in enumerate(given)))
        put(self, "flavours", self.flavours or DEFAULT_FLAVOURS[self.kind])
        put(self, "components", self.components or DEFAULT_COMPONENTS[self.kind])
        put(self, "onnx", None if self.onnx is None else values.path("onnx", self.onnx))
        for name in ("refit", "overwrite"):
            put(self, name, values.flag(name, getattr(self, name)))
        if self.lora_slots is None:
            put(self, "lora_slots", _SLOTS if self.lora_rank else 0)
        for name in ("references", "segments", "lora_rank", "lora_slots", "max_text_chunks"):
            put(self, name, values.whole_number(name, getattr(self, name)))
        if self.opset is not None:
            put(self, "opset", values.whole_number("opset", self.opset))
        for name, known in (("flavours", FLAVOURS), ("components", (*COMPONENTS, ALL))):
            _distinct(name, getattr(self, name))
            for one in getattr(self, name):
                values.one_of(name, one, known)
        if ALL in self.components and len(self.components) > 1:
            raise InvalidRequest(f"components are {', '.join(self.components)}; give {ALL}, or names of single ones")
        if self.kind in ("tensorrt", "aoti") and self.components != ("unet",):
            raise InvalidRequest(
                f"components are {', '.join(self.components)}; exports of kind {self.kind} hold the unet alone, the "
                "engine runs the other parts itself"
            )
        values.whole_number("max_text_chunks", self.max_text_chunks, 1, MAX_CHUNKS)
        put(self, "lora_rank", self.shapes[0].lora_rank)  # raises for counts out of range
        self._check_targets()
        self._check_size()
        check_opset(self.opset, self.torch_dtype)
        self._check_belongs()

    @property
    def shapes(self) -> tuple[GraphShape, ...]:
        """Return one shape per flavour."""
        assert self.lora_slots is not None
        more = {"text_chunks": self.max_text_chunks, "lora_rank": self.lora_rank, "lora_slots": self.lora_slots}
        return tuple(GraphShape(flavour, self.references, self.segments, **more) for flavour in self.flavours)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        """Return all options that determine the files; with the source's `identity`, they identify an export."""
        found = asdict(self)
        del found["overwrite"]
        return found | {"onnx": None if self.onnx is None else str(self.onnx.resolve())}

    def _check_targets(self) -> None:
        if self.kind == "tensorrt":
            if not self.targets:
                raise InvalidRequest("TensorRT builds for a chip; say which, e.g. --target sm89 (RTX 40) or sm89,sm120")
            package_of(self.targets)
            for text in self.profiles:
                Profile.parse(text, scale=2)  # the real scale is known once the model is loaded
        elif self.kind == "aoti":
            if len(self.targets) != 1 or self.targets[0] not in _AOTI_TARGETS:
                shown = values.listed(self.targets, "missing")
                raise InvalidRequest(f"target is {shown}; AOTInductor compiles for one of {', '.join(_AOTI_TARGETS)}")
        elif self.targets:
            raise InvalidRequest(f"target is {values.listed(self.targets)}; exports of kind {self.kind} have no target")

    def _check_size(self) -> None:
        if self.size is None or (isinstance(self.size, str) and self.size == NATIVE):
            return
        if not isinstance(self.size, (list, tuple)) or len(self.size) != 2:
            shown = values.quoted(self.size)
            raise InvalidRequest(f"size is {shown}; it must be {values.quoted(NATIVE)} or (width, height) in pixels")
        sides = []
        for name, side in zip(("width", "height"), self.size):
            sides.append(values.whole_number(name, side, 8, 8192))
            if sides[-1] % 8:
                raise InvalidRequest(f"{name} is {side}; it must be divisible by 8 and from 8 to 8192 pixels")
        object.__setattr__(self, "size", tuple(sides))

    def _check_belongs(self) -> None:
        """Raise InvalidRequest for options that this kind of export does not use, and for conflicting ones."""
        owners = {
            "profiles": (self.profiles, ("tensorrt",)),
            "refit": (self.refit, ("tensorrt",)),
            "attention plugin": (self.attention == "plugin", ("tensorrt",)),
            "onnx": (self.onnx is not None, ("tensorrt", "triton-repo")),
            "runner onnxruntime": (self.runner != "python", ("triton-repo",)),
            # clients of a server can't name LoRAs
            "lora_rank": (self.lora_rank > 0 and self.onnx is None, ("onnx", "tensorrt", "aoti")),
        }
        for name, (given, kinds) in owners.items():
            if given and self.kind not in kinds:
                raise InvalidRequest(f"{name} belongs to exports of kind {' and '.join(kinds)}, not {self.kind}")
        if self.onnx is not None and (self.size is not None or self.opset is not None):
            raise InvalidRequest("size and opset are those of the graphs in onnx; drop them, or drop onnx")
        if self.kind == "tensorrt" and self.attention == "plugin" and self.onnx is not None:
            raise InvalidRequest("attention plugin needs graphs of its own; drop onnx, whose graphs have standard ones")


@dataclass(frozen=True)
class Source:
    """Loaded model to export, from `load_source` or from the parts of an engine.

    unet: with unpacked weights. adapters: name -> IP-Adapter and its image encoder. version: stylefast's. origin:
    argument of `Engine.from_pretrained` that loads the model; empty if unknown.
    """

    name: str
    fingerprint: str
    unet: UNet
    vae: torch.nn.Module
    text_encoder: TextEncoder
    adapters: Mapping[str, tuple[IPAdapter, ImageEncoder]] = field(default_factory=dict)
    version: str = ""
    origin: str = ""

    @property
    def native_size(self) -> tuple[int, int]:
        """Return (width, height) in pixels that the model was trained at."""
        height, width = native_latents(self.unet)
        scale = vaes.downscale(self.vae)
        return width * scale, height * scale

    @property
    def other_bytes(self) -> int:
        """Return the bytes of all weights except the UNet's."""
        modules = [self.vae, *self.text_encoder.encoders]
        for adapter, encoder in self.adapters.values():
            modules += [adapter, encoder.vision_model]
        return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

    def identity(self) -> dict[str, Any]:
        """Return what identifies this source and the code and packages that export it, for `folder.publishing`."""
        adapters = {
            name: [sampled_digest(adapter.state_dict()), sampled_digest(encoder.vision_model.state_dict())]
            for name, (adapter, encoder) in self.adapters.items()
        }
        # a fingerprint covers only some tensors; sampling all of them tells other weights apart
        parts = [sampled_digest(module.state_dict()) for module in (self.unet, self.vae, *self.text_encoder.encoders)]
        return {
            "model": self.name,
            "fingerprint": self.fingerprint,
            "parts": parts,
            "adapters": adapters,
            "stylefast": self.version,
            "code": code_digest(),
            **_versions(),
        }

    def fixed(self, options: Options) -> dict[str, int]:
        """Return the dimensions that the options fix: {}, or height and width in latents. Raises InvalidRequest."""
        if options.size is None:
            return {}
        width, height = self.native_size if isinstance(options.size, str) else options.size
        scale = vaes.downscale(self.vae)
        if width % scale or height % scale:
            raise InvalidRequest(f"size is {width}x{height}; this model's must be divisible by {scale}")
        return {"height": height // scale, "width": width // scale}

    def components(self, options: Options) -> tuple[str, ...]:
        """Return the components to export. Raises ModelError for one that the model does not have."""
        absent = () if self.adapters else _NEEDS_ADAPTER
        if options.components == (ALL,):
            return tuple(name for name in COMPONENTS if name not in absent)
        for name in options.components:
            if name in absent:
                raise ModelError(f"{self.name} has no {name}; give an IP-Adapter with --adapter, or leave it out")
        return options.components


class Progress:
    """Listener of an export; this one ignores all calls. Graphs have phases, some of which report steps."""

    def graph(self, name: str, number: int, total: int) -> None:
        """Begin graph `number` of `total`, counted from 0; number == total when all are finished."""

    def phase(self, done: int, total: int, name: str) -> None:
        """Report `done` of `total` steps of a phase of the current graph; total 0 means unknown."""

    def say(self, text: str) -> None:
        """Report an event in one line: a resumed export, a reused graph."""


def load_source(
    model: str | Path,
    dtype: str,
    *,
    device: str = "cpu",
    adapter: str | Path | None = None,
    image_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    version: str = "",
) -> Source:
    """Load a model as the engine does, for export. adapter: None takes the model's own, if any.

    Raises ModelNotFound, ModelFormatError, AdapterError, OutOfMemory, InvalidRequest.
    """
    values.one_of("dtype", dtype, DTYPES)
    components = load_components(model, dtype=DTYPES[dtype], device=device, vae=vae)
    unet = UNet.from_state(components.unet_config, components.unet_state)
    unet.layout = replace(unet.layout, style_modules=components.style_modules)
    unpack(unet)
    file = adapter if adapter is not None else components.adapter_path
    adapters = {} if file is None else {Path(file).stem: load_adapter(file, image_encoder, components, unet)}
    text = TextEncoder(components.tokenizers, components.text_encoders, components.force_zeros)
    origin = str(Path(model).expanduser().resolve()) if Path(model).expanduser().exists() else str(model)
    return Source(components.name, components.fingerprint, unet, components.vae, text, adapters, version, origin)


def require_toolchain(options: Options) -> None:
    """Raise errors that can be found before a model is loaded.

    These are MissingDependency, and EngineMismatch for a chip or a way of building that needs a GPU if none is present.
    """
    packages = _PACKAGES.get(options.kind, ())
    if options.kind == "tensorrt":
        package = package_of(options.targets)
        check_buildable(package, options.targets, options.refit)
        if importlib.util.find_spec(package) is None:
            load_package(package)  # raises, with instructions to install it
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"exports of kind {options.kind} need {' and '.join(missing)}; install with: "
            "pip install 'stylefast[export]'"
        )


@cache
def code_digest() -> str:
    """Return a digest of the code that determines the graphs: exporters, operations and models."""
    digest = hashlib.sha256()
    for package in (export, kernels, models):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{file.relative_to(root).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    """Return versions of the packages that trace and write graphs; "" if not installed."""
    return {"torch": torch.__version__, **dict.fromkeys(_EXPORTERS, ""), **versions(*_EXPORTERS)}


def _distinct(name: str, given: tuple) -> None:
    twice = [value for i, value in enumerate(given) if value in given[:i]]
    if twice:
        raise InvalidRequest(f"{name} has {values.quoted(twice[0])} twice; name each once")


# process overhead besides weights: Python, PyTorch, the traced graph
_BASE = 600_000_000
# memory of TensorRT's builder process per byte of the UNet's weights; see `estimate_export`
_BUILDER = 3.25
# files contain weights and little else
_DISK = 1.02
# per UNet graph or TensorRT engine besides its weights
_GRAPH = 40_000_000


@dataclass(frozen=True)
class Estimate:
    """Bytes: peak memory, disk for the folder and temporary files, and weights that are already loaded."""

    memory: int
    disk: int
    weights: int

    def warning(self, free: int | None) -> str | None:
        """Return a warning if the rest may not fit in `free` bytes (weights already loaded), else None."""
        wanted = self.memory - self.weights
        if free is None or wanted <= free:
            return None
        return (
            f"the export may need {wanted / 1e9:.3g} GB more memory than is in use now, and {free / 1e9:.3g} GB are "
            "free: it may be slow or be stopped by the system; close other programs, export in a 16-bit type, or one "
            "flavour at a time"
        )


def estimate_export(
    unet_config: Mapping[str, Any],
    dtype: torch.dtype,
    flavours: Sequence[str],
    kind: str,
    other_weights: int = 0,
    from_onnx: bool = False,
) -> Estimate:
    """Estimate the memory and disk of exporting a UNet in these flavours, one flavour after the other.

    The UNet's parameters are counted without loading them. Memory is a base per process plus a factor per byte of
    weights, based on measured peaks:

        onnx      SDXL in float16 (2.57e9 parameters, 5.13 GB): 5.7 GB; flavours share one file of weights
        tensorrt  graphs as above; then the weights are freed, and the builder takes 17.3 GB for the same UNet, banked
                  (TensorRT-RTX 1.7, one chip); its engine has 4.6 GB (benchmarks/results/export-sdxl.json)
        aoti      UNets of 4 MB and 1 GB of weights in float32 on a CPU: 0.53 and 1.53 GB, packages of 3.5 MB without
                  weights. The C++ compiler, a separate process, is not counted.

    other_weights: bytes of text encoders, VAE and adapters; they stay in memory and are written once if exported too
    (kinds onnx and triton-repo). from_onnx: whether the ONNX files to build from exist. Raises InvalidRequest for an
    unknown kind.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"kind is {values.quoted(kind)}; there are {', '.join(KINDS)}")
    unet = _parameters(_frozen(unet_config)) * dtype.itemsize
    memory = _BASE + unet + other_weights
    count = len(flavours)
    shared = (unet if count else 0) + other_weights  # in a folder of graphs
    if kind == "onnx":
        written = shared
    elif kind == "triton-repo":
        written = shared if from_onnx else 2 * shared  # the graphs are copied
    elif kind == "tensorrt":
        written = unet * count if from_onnx else unet * (count + 1)  # plus the graphs, which share one file of weights
        # weights are freed before the builder, a separate process, starts
        memory = max(memory, 2 * _BASE + other_weights + round(_BUILDER * unet))
    else:
        written = 0
    return Estimate(memory, round(_DISK * written) + _GRAPH * count, unet + other_weights)


def _frozen(value: Any) -> Any:
    """Return a config as a hashable value."""
    if isinstance(value, Mapping):
        return tuple((name, _frozen(value[name])) for name in sorted(value))
    return tuple(_frozen(one) for one in value) if isinstance(value, list | tuple) else value


@lru_cache(maxsize=8)
def _parameters(config: tuple) -> int:
    with torch.device("meta"):
        unet = UNet(dict(config))
    return sum(parameter.numel() for parameter in unet.parameters())
