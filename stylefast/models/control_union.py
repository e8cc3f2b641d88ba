"""What a union ControlNet has besides a ControlNet, to follow pictures of several types, such as depth or edges.

It is diffusers' `ControlNetUnionModel`, from https://github.com/xinsir6/ControlNetPlus. The embedding of a picture's
type is added to the mean of the embedded picture; blocks of a small transformer read that, and what they give is added
to the embedded picture, everywhere the same. Several pictures of a row are added up, each times its weight, and run
through the network together. The time embedding is told which types they have.

The attention in those blocks runs along the batch, in diffusers as in the network's own code. All rows of a call for
one prompt have the same picture there, so every row reads its own value and nothing else. Here this holds in every
batch, and what a picture adds depends on no step and no other row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stylefast import values
from stylefast.errors import AdapterError, InvalidRequest
from stylefast.models.module_lists import list_of
from stylefast.models.unet import TimestepEmbedding, sinusoids

CLASSES = ("ControlNetUnionModel", "ControlNetModel_Union")
MODES = {"openpose": 0, "depth": 1, "hed": 2, "pidi": 2, "scribble": 2, "ted": 2, "canny": 3, "lineart": 3}
MODES |= {"anime_lineart": 3, "mlsd": 3, "normal": 4, "segment": 5, "tile": 6, "repaint": 7}
_PARTS = ("task_embedding", "transformer_layes.", "spatial_ch_projs.", "control_add_embedding.")


class _Values(nn.Module):
    """Attention of a token to itself alone, with the weights of `nn.MultiheadAttention`."""

    def __init__(self, channels: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * channels))
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.linear(x, self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]))


class _Block(nn.Module):
    """One block of the transformer."""

    def __init__(self, channels: int):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(channels), _Values(channels), nn.LayerNorm(channels)
        widths = {"c_fc": (channels, 4 * channels), "c_proj": (4 * channels, channels)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*width) for name, width in widths.items()})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        wide = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](wide * torch.sigmoid(1.702 * wide))


class Union(nn.Module):
    """The parts of a union ControlNet that know the types of pictures; `types` is how many there are."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        channels, self.types = config["block_out_channels"][0], config["num_control_type"]
        self._sinusoids = config["addition_time_embed_dim"], config["flip_sin_to_cos"], config["freq_shift"]
        self.task_embedding = nn.Parameter(torch.empty(self.types, channels))
        self.transformer_layes = list_of(_Block(channels) for _ in range(config["num_trans_layer"]))
        self.spatial_ch_projs = nn.Linear(channels, channels)
        self.control_add_embedding = TimestepEmbedding(self._sinusoids[0] * self.types, 4 * channels)

    def number(self, mode: str | int | None, network: str) -> int:
        """Return the number of a type. Raises InvalidRequest, listing the types, for none and for those it lacks."""
        number = MODES[mode] if isinstance(mode, str) else mode
        if number is None or number >= self.types:
            asked = "the control has no mode" if mode is None else f"the control has mode={values.quoted(mode)}"
            known = ", ".join(f"{name} ({one})" for name, one in MODES.items() if one < self.types)
            raise InvalidRequest(
                f"{asked}, but the union ControlNet {values.quoted(network)} must know which of its {self.types} types "
                f"the picture has; give its number, 0 to {self.types - 1}, or its name: {known}"
            )
        return number

    def place(self, picture: Tensor, number: int, weight: float | None) -> Tensor:
        """Add to an embedded picture [channels, h, w] what its type says. weight: among several; None: it is alone."""
        scale = 1.0 if weight is None else weight
        token = (picture.mean((1, 2)) + self.task_embedding[number]) * scale
        for block in self.transformer_layes:
            token = block(token)
        return (picture + self.spatial_ch_projs(token)[:, None, None]) * scale

    def embed_types(self, numbers: Sequence[Sequence[int]]) -> Tensor:
        """Embed the types of each row's pictures as [rows, time channels]."""
        weight = self.task_embedding
        present = torch.zeros(len(numbers), self.types)
        for row, of_row in enumerate(numbers):
            present[row, list(of_row)] = 1
        embedded = sinusoids(present.to(weight.device).flatten(), *self._sinusoids)
        return self.control_add_embedding(embedded.view(len(numbers), -1).to(weight.dtype))


def refuse_mode(mode: str | int | None, network: str) -> int:
    """Return -1, the number for a network without types. Raises InvalidRequest for a mode."""
    if mode is not None:
        raise InvalidRequest(
            f"the control has mode={values.quoted(mode)}, but the network {values.quoted(network)} reads pictures of "
            "one type; leave mode out, or name a union ControlNet"
        )
    return -1


def split(
    config: dict[str, Any], state: dict[str, Tensor], channels: int, what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and weights of a network, with those of `Union` under "union." if it is one.

    channels: of its embedded pictures. Raises AdapterError for settings that are not implemented.
    """
    tasks = state.get("task_embedding")
    if tasks is None:
        return config, state
    if tasks.ndim != 2 or tasks.shape[1] != channels:
        raise AdapterError(
            f"{values.shown(what)} has a task_embedding of shape {values.quoted(list(tasks.shape))}, which is not "
            f"supported; it must be [types, {channels}]"
        )
    order = config.get("controlnet_conditioning_channel_order", "rgb")
    if order != "rgb":
        raise AdapterError(
            f"{values.shown(what)} has controlnet_conditioning_channel_order={values.quoted(order)}; it must be 'rgb' "
            "for a union ControlNet"
        )
    blocks = {key.split(".")[1] for key in state if key.startswith("transformer_layes.")}
    config = config | {"num_control_type": len(tasks), "num_trans_layer": len(blocks)}
    return config, {f"union.{key}" if key.startswith(_PARTS) else key: x for key, x in state.items()}
