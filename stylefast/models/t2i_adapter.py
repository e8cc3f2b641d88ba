"""T2I-Adapter: a small network that turns a control picture into feature maps, added inside the UNet's down blocks.

Mou et al., "T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image Diffusion Models",
2023 (arXiv 2302.08453), in the form for SDXL (diffusers' "full_adapter_xl"). Its feature maps depend on the picture
alone, not on the step, so they are made once and a step only adds them.
"""

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stylefast import values
from stylefast.errors import AdapterError, ModelFormatError, ModelNotFound
from stylefast.models.config_files import build, config_of, read_config
from stylefast.models.control_net import ControlRows
from stylefast.models.control_union import refuse_mode
from stylefast.models.digests import sampled_digest
from stylefast.models.hub import present
from stylefast.models.module_lists import list_of
from stylefast.models.stored_tensors import load_weights
from stylefast.models.unet import UNet
from stylefast.models.weight_files import read_header

KIND = "full_adapter_xl"
_GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue, as in Pillow


class _Resnet(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class _Stage(nn.Module):
    """Feature maps of one stage; `halved` from those before."""

    def __init__(self, channels_in: int, channels: int, resnets: int, halved: bool):
        super().__init__()
        self.halved = halved
        self.in_conv = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None
        self.resnets = list_of(_Resnet(channels) for _ in range(resnets))

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2, 2, ceil_mode=True) if self.halved else x
        x = x if self.in_conv is None else self.in_conv(x)
        for resnet in self.resnets:
            x = resnet(x)
        return x


class T2IAdapter(nn.Module):
    """A T2I-Adapter for SDXL's family, created by `T2IAdapter.load`.

    `name`; `digest` identifies its weights; `downscale` is what a picture's sides must be divisible by.
    """

    inside = True  # what it adds goes into the down blocks, and not to the maps kept for the up blocks
    attends = pools = False
    union = None  # it reads pictures of one type

    def __init__(self, config: dict[str, Any], name: str = "", digest: str = ""):
        super().__init__()
        self.config, self.name, self.digest = config, name, digest
        self.path: Path | None = None  # of its file or folder
        channels, resnets = config["channels"], config["num_res_blocks"]
        self.channels_in, self.downscale, self.maps = config["in_channels"], config["downscale_factor"], len(channels)
        self.conv_in = nn.Conv2d(self.channels_in * self.downscale**2, channels[0], 3, padding=1)
        before = [channels[0], *channels]
        self.body = list_of(
            _Stage(before[i] if i in (1, 2) else one, one, resnets, halved=i == 2) for i, one in enumerate(channels)
        )

    @classmethod
    def load(cls, source: "str | Path | nn.Module", unet: UNet, name: str = "") -> "T2IAdapter":
        """Load an adapter for `unet`: a folder or `.safetensors` file in diffusers' layout, or its `T2IAdapter`.

        Raises ModelNotFound, ModelFormatError for what can't be read, and AdapterError for adapters of another base
        model, and for kinds that are not implemented.
        """
        if isinstance(source, nn.Module):
            what = type(source).__name__
            _check_class(what, what)
            config, state = dict(config_of(source)), source.state_dict()
            state = {key: x.detach().to(unet.device, unet.dtype) for key, x in state.items()}
        else:
            path = values.path("a T2I-Adapter", source)
            config, state, what = *_read(path, unet), path.name
        state = {key.removeprefix("adapter."): x for key, x in state.items()}
        config = _checked(config, unet, what)
        adapter = build(lambda: cls(config, name, sampled_digest(state)), config, 2**20, what)
        try:
            adapter.load_state_dict(state, assign=True)
        except RuntimeError as error:
            detail = " ".join(str(error).splitlines()[:3])[:600]
            raise ModelFormatError(f"the weights of {values.shown(what)} don't fit its config: {detail}") from error
        return adapter.requires_grad_(False).eval()

    @torch.inference_mode()
    def embed_picture(self, picture: Tensor) -> tuple[Tensor, ...]:
        """Turn a control picture [3, height, width] in [0, 1] into feature maps [channels, h, w], one of each stage.

        Its sides must be divisible by `downscale`.
        """
        if self.channels_in == 1:
            picture = (picture * picture.new_tensor(_GREY)[:, None, None]).sum(0, keepdim=True)
        place = self.conv_in.weight
        x = self.conv_in(F.pixel_unshuffle(picture[None].to(place.device, place.dtype), self.downscale))
        found = []
        for stage in self.body:
            x = stage(x)
            found.append(x[0])
        return tuple(found)

    def mode_number(self, mode: str | int | None) -> int:
        """Return -1, since it knows no types. Raises InvalidRequest for a mode."""
        return refuse_mode(mode, self.name)

    def added(self, control: ControlRows, *step: Tensor) -> tuple[Tensor, ...]:
        """Return what is added to the rows of `control`, before any weight; it is the same in every step."""
        return control.pictures


def is_t2i_adapter(source: Any) -> bool:
    """Return whether a source of a control network says that it is a T2I-Adapter."""
    if isinstance(source, nn.Module):
        return type(source).__name__ in ("T2IAdapter", "MultiAdapter")
    path = values.path("a control network", source)
    if (path / "config.json").is_file():
        return read_config(path / "config.json", path).get("_class_name") == "T2IAdapter"
    if path.is_file():
        header = read_header(path)
        return header.has("adapter.") or header.has("body.0.")
    return False


def _read(path: Path, unet: UNet) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.is_dir():
        config, state = dict(read_config(path / "config.json", path)), {}
        for file in present(path, unet.dtype != torch.float32):
            read_header(path / file)
            state |= load_weights(path / file, dtype=unet.dtype, device=unet.device)
        return config, state
    if not os.path.isfile(path):
        raise ModelNotFound(f"no T2I-Adapter at {values.shown_path(path)}")
    header = read_header(path)
    if not header.has("adapter.conv_in."):
        raise AdapterError(
            f"{values.shown(path.name)} is a T2I-Adapter in its authors' layout, which is not supported; give the "
            "folder in diffusers' layout, such as TencentARC/t2i-adapter-canny-sdxl-1.0"
        )
    # a file without a config: its shapes say the rest
    stages = sorted({int(key.split(".")[2]) for key in header.tensors if key.startswith("adapter.body.")})
    inputs, first = header.shape("adapter.conv_in.weight")[1], "adapter.body.0.resnets."
    channels = [header.shape(f"adapter.body.{i}.resnets.0.block1.weight")[0] for i in stages]
    grey = math.isqrt(inputs) ** 2 == inputs
    config = {
        "adapter_type": KIND,
        "channels": channels,
        "in_channels": 1 if grey else 3,
        "downscale_factor": math.isqrt(inputs if grey else inputs // 3),
        "num_res_blocks": len({key.split(".")[4] for key in header.tensors if key.startswith(first)}),
    }
    return config, load_weights(path, dtype=unet.dtype, device=unet.device)


def _check_class(kind: Any, what: str) -> None:
    if kind != "T2IAdapter":
        raise AdapterError(
            f"{values.shown(what)} is a {values.quoted(kind)}, not a T2IAdapter; of several adapters in one, add each "
            "alone, and give a request a list of controls"
        )


def _checked(config: dict[str, Any], unet: UNet, what: str) -> dict[str, Any]:
    """Return an adapter's config with diffusers' defaults. Raises AdapterError if it does not fit the UNet."""
    shown = values.shown(what)
    _check_class(config.get("_class_name", "T2IAdapter"), what)
    found = {"in_channels": 3, "num_res_blocks": 2, "downscale_factor": 16, "adapter_type": "full_adapter"} | config
    if found["adapter_type"] != KIND:
        raise AdapterError(
            f"{shown} is a T2I-Adapter of type {values.quoted(found['adapter_type'])}, as those for SD 1.5 are; SDXL's "
            f"are of type {values.quoted(KIND)}"
        )
    wide = list(unet.config["block_out_channels"])
    channels = found.get("channels", [320, 640, 1280, 1280])
    if list(channels if isinstance(channels, (list, tuple)) else []) != [*wide, wide[-1]] or len(wide) != 3:
        raise AdapterError(
            f"{shown} has channels={values.quoted(channels)}, but this model takes {[*wide, wide[-1]]}; give an "
            "adapter that was trained for this model's family"
        )
    for name, least, most in (("in_channels", 1, 3), ("num_res_blocks", 0, 64), ("downscale_factor", 1, 64)):
        whole = isinstance(found[name], int) and not isinstance(found[name], bool)
        if not whole or not least <= found[name] <= most or (name == "in_channels" and found[name] == 2):
            raise AdapterError(f"{shown} has {name}={values.quoted(found[name])}, which is not supported")
    return found | {"channels": list(channels)}
