"""Summaries of a graph in TensorRT: its inputs, its layers, and whether attention was fused.

Engines can't be opened without a GPU; instead, the parsed network is inspected, and the listing of layers that the
builder prints at its end (kept by `tensorrt_api.forwarder`). With a GPU the engine's own inspector prints the same
listing.
"""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from types import ModuleType

_LAYER = re.compile(r"^\s*Name: (?P<name>.*?), LayerType: (?P<kind>\w*), ", re.MULTILINE)
# kernels that contain queries, softmax and values of one attention
_FUSED = re.compile(r"mha|fmha|flash|attention_v", re.IGNORECASE)
# these only order streams
_WAITING = ("signal", "wait", "shape_call")


@dataclass(frozen=True)
class NetworkSummary:
    """Parsed network: inputs and outputs as (name, type's name, dims, -1 for varying ones), layers by type.

    attentions: their number. plugins: names of layers that are not standard operators.
    """

    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    layers: dict[str, int]
    attentions: int
    plugins: tuple[str, ...]


@dataclass(frozen=True)
class EngineLayers:
    """Layers of a built engine: their number by kind, and the number of kernels with fused attention.

    kinds are TensorRT's: "kgen" is a kernel generated for several operators, "gemm" and "correlation" are matrix
    products and convolutions, "runtime_fusion" either with what follows it.
    """

    kinds: dict[str, int]
    fused_attentions: int
    plugins: tuple[str, ...]

    @property
    def kernels(self) -> int:
        """Return the number of layers that compute something."""
        return sum(count for kind, count in self.kinds.items() if kind not in _WAITING)

    def to_dict(self) -> dict:
        return asdict(self) | {"kernels": self.kernels}


def summarise_network(trt: ModuleType, network) -> NetworkSummary:
    """Summarise an INetworkDefinition after parsing."""

    def tensor(found) -> tuple[str, str, tuple[int, ...]]:
        return found.name, found.dtype.name, tuple(found.shape)

    layers, plugins = Counter(), []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = layer.type.name
        layers[kind] += 1
        if "PLUGIN" in kind:
            plugins.append(layer.name)
    return NetworkSummary(
        inputs=tuple(tensor(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(tensor(network.get_output(i)) for i in range(network.num_outputs)),
        layers=dict(layers),
        attentions=layers["SOFTMAX"] + layers["ATTENTION_INPUT"],
        plugins=tuple(plugins),
    )


def read_layers(listing: str) -> EngineLayers | None:
    """Summarise a listing of layers as TensorRT prints it; None if it has none."""
    found = [(match["name"], match["kind"]) for match in _LAYER.finditer(listing)]
    if not found:
        return None
    return EngineLayers(
        kinds=dict(Counter(kind for _, kind in found)),
        fused_attentions=sum(1 for name, kind in found if kind not in _WAITING and _FUSED.search(name)),
        plugins=tuple(name for name, kind in found if "plugin" in kind.lower()),
    )


def inspect_engine(trt: ModuleType, engine) -> EngineLayers | None:
    """Summarise an opened engine, which needs a GPU; None if it was built without layer names."""
    return read_layers(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


__all__ = ["EngineLayers", "NetworkSummary", "inspect_engine", "read_layers", "summarise_network"]
