"""A micro SDXL pipeline and its UNet as ONNX graphs: every kind of layer, few of each, exported in seconds."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

import stylefast
from stylefast.export.manifest import MANIFEST, Manifest, file_entry
from stylefast.export.onnx_file import export_unet
from stylefast.export.unet_graph import OUTPUT, GraphShape, UNetGraph, graph_inputs
from tests.support.fp64 import Measured, measured
from tests.support.oracle.instant_style import random_adapter
from tests.support.scene import EMBED_DIM
from tests.support.small_adapter import small_vision_model
from tests.support.small_sdxl import small_pipeline, small_unet_config
from tests.support.small_unet import sharpen

SHAPES = (GraphShape("plain", segments=2), GraphShape("live", 1, 2), GraphShape("banked", 2, 3))


def micro_config() -> dict:
    """SDXL's architecture with two levels, both attending, and one resnet to a block: 7 attention layers."""
    return small_unet_config(
        widths=(32, 64),
        head_width=16,
        depth=(1, 1),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )


def small_config() -> dict:
    """The micro model, attending where its features are large and in its middle: two levels, 4 attention layers."""
    return micro_config() | {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }


def micro_pipeline(seed: int = 3):
    """A random pipeline around a micro UNet, with an image encoder."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPImageProcessor

    pipe = small_pipeline(seed)
    torch.manual_seed(seed)
    pipe.unet = UNet2DConditionModel(**micro_config()).eval()
    sharpen(pipe.unet.requires_grad_(False), seed)
    pipe.register_modules(
        image_encoder=small_vision_model(seed, projection_dim=EMBED_DIM),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    return pipe


def small_graph_pipeline(seed: int = 3):
    """The micro pipeline around a UNet of `small_config`."""
    return _around(small_config(), seed)


def nano_pipeline(seed: int = 3):
    """The micro pipeline around a UNet of one level, all of which attends, in 4 layers."""
    return _around(
        small_unet_config(
            widths=(32,),
            depth=(1,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        ),
        seed,
    )


def one_layer_config() -> dict:
    """One level that attends in one layer."""
    return small_unet_config(
        widths=(32,),
        depth=(1,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
    )


def one_layer_pipeline(seed: int = 3):
    """The micro pipeline around a UNet that attends in one layer, of which graphs have every input all the same."""
    return _around(one_layer_config(), seed)


def _around(config: dict, seed: int):
    from diffusers import UNet2DConditionModel

    pipe = micro_pipeline(seed)
    torch.manual_seed(seed)
    pipe.unet = UNet2DConditionModel(**config).eval()
    sharpen(pipe.unet.requires_grad_(False), seed)
    return pipe


def write_adapter(unet, folder: Path) -> Path:
    """The file of a random IP-Adapter for a UNet and the image encoder of `micro_pipeline`."""
    file = folder / "a.bin"
    torch.save(random_adapter(unet, EMBED_DIM, 5), file)
    return file


def export_folder(unet, folder: Path, shapes=SHAPES, fixed=None, fingerprint: str = "", **changes) -> Manifest:
    """Write an export folder with the UNet's graphs; `changes` go to its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs, weights = [], None
    for shape in shapes:
        entry, weights = export_unet(unet, shape, folder, weights=weights, fixed=fixed)
        graphs.append(entry)
    names = dict.fromkeys(name for entry in graphs for name in entry.files)
    fields = {
        "kind": "onnx",
        "stylefast": stylefast.__version__,
        "model": "micro",
        "fingerprint": fingerprint,
        "dtype": str(unet.dtype).removeprefix("torch."),
        "target": "any",
        "toolchain": {},
        "graphs": tuple(graphs),
        "files": tuple(file_entry(folder, name) for name in names),
    }
    manifest = Manifest(**fields | changes)
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest into an export folder."""
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()))


@pytest.fixture(scope="module", autouse=True)
def translations():
    """PyTorch's table of how its operations are written in ONNX, made once in place of once for every export."""
    try:
        from torch.onnx._internal.exporter import _registration
    except ImportError:  # it lies elsewhere in this release: the exports take longer
        yield
        return
    made = cache(_registration.ONNXRegistry.from_torchlib)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(made))
        yield


def eager(unet, shape: GraphShape, inputs: dict) -> torch.Tensor:
    """What PyTorch makes of a graph's inputs, in the type of the UNet; what a graph wants in fp32 stays so in fp64."""
    given = (inputs[tensor.name].to(tensor.dtype) for tensor in graph_inputs(unet, shape))
    with torch.inference_mode():
        return UNetGraph(unet, shape)(*given)


def in_pytorch(unet, shape: GraphShape, inputs: dict) -> Measured:
    """The same, to compare a graph's output with."""
    return measured(eager, unet, shape, inputs)


class TorchSession:
    """A graph that PyTorch runs as it is written, in place of an exported one; keeps what it was given."""

    nbytes = 1000

    def __init__(self, unet, shape: GraphShape):
        self.graph = UNetGraph(unet, shape).eval()
        self.calls: list[dict[str, torch.Tensor]] = []
        self.closed = False

    def run(self, inputs, outputs):
        assert list(inputs) == self.graph.names and all(x.is_contiguous() for x in inputs.values())
        self.calls.append(dict(inputs))
        outputs[OUTPUT].copy_(self.graph(*inputs.values()))
        return outputs

    def close(self):
        self.closed = True
