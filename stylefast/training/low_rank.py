"""Trained low-rank changes of a model's linear layers and convolutions, and the tensors that are saved of them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stylefast.errors import NumericsError
from stylefast.models.lora_names import original_names

# choice of layers -> endings of the names of the UNet's layers that it trains, inside its blocks
_ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
_TRANSFORMER = (*_ATTENTION, ".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")
LAYERS: Mapping[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+ff": _TRANSFORMER,
    "all": (*_TRANSFORMER, ".conv1", ".conv2", ".conv_shortcut", ".time_emb_proj", ".conv"),
}
_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
_TEXT = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")
_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


class LowRank(nn.Module):
    """The change of one layer, scale * up(down(x)) with scale = alpha / rank (arXiv 2106.09685, section 4.1).

    It starts at zero: `down` [rank, in, ..] is drawn, `up` [out, rank, ..] is zeros. Both are float32, whatever the
    type of the layer.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        out, *inner = layer.weight.shape
        bound = 1 / math.sqrt(math.prod(inner))
        down = (2 * torch.rand(rank, *inner, generator=generator) - 1) * bound
        up = torch.zeros(out, rank, *(1 for _ in inner[1:]))
        self.down = nn.Parameter(down.to(layer.weight.device))
        self.up = nn.Parameter(up.to(layer.weight.device))
        self.alpha, self.scale = alpha, alpha / rank

    def added(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return a layer's output with the change; a forward hook."""
        x = inputs[0]
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            change = F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up)
        else:
            change = F.linear(F.linear(x, down), up)
        return output + self.scale * change


# part of the model -> name of a layer -> its change
Changes = dict[str, dict[str, LowRank]]


def unet_layers(unet: nn.Module, layers: str, blocks: Sequence[str] = ()) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers of a UNet, by diffusers' names, that a choice of `LAYERS` trains.

    blocks: parts of names, one of which must occur in a layer's name; none: all.
    """
    return {
        name: layer
        for name, layer in _layers(unet, LAYERS[layers]).items()
        if name.startswith(_BLOCKS) and (not blocks or any(block in name for block in blocks))
    }


def text_layers(encoder: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers of a text encoder that are trained: those of attention and feed-forward."""
    return _layers(encoder, _TEXT)


def _layers(module: nn.Module, endings: tuple[str, ...]) -> dict[str, nn.Linear | nn.Conv2d]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name.endswith(endings)
    }


@contextmanager
def attached(pairs: Iterable[tuple[nn.Module, LowRank]]) -> Iterator[None]:
    """Let layers add their changes to what they return."""
    with ExitStack() as stack:
        for layer, change in pairs:
            stack.callback(layer.register_forward_hook(change.added).remove)
        yield


def kohya_tensors(changes: Changes, unet_modules: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file in kohya's layout, in fp16, with alphas in fp32.

    unet_modules: all modules of the UNet by diffusers' names; kohya names layers as the original SDXL code does.
    Raises NumericsError for values that are not finite in fp16.
    """
    original, tensors = original_names(unet_modules), {}
    for part, found in changes.items():
        for name, change in found.items():
            spelled = original.get(name, name) if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            key = _PREFIXES[part] + spelled.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = change.down.detach().half().cpu().contiguous()
            tensors[f"{key}.lora_up.weight"] = change.up.detach().half().cpu().contiguous()
            tensors[f"{key}.alpha"] = torch.tensor(change.alpha, dtype=torch.float32)
    broken = next((key for key, value in tensors.items() if not value.isfinite().all()), None)
    if broken is not None:
        raise NumericsError(f"{broken} has values beyond fp16; train with a lower learning rate")
    return tensors
