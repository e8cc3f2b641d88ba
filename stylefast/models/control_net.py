"""ControlNet: a copy of a UNet's first half that reads a control picture, such as edges, and steers the UNet by it.

Zhang, Rao, Agrawala, "Adding Conditional Control to Text-to-Image Diffusion Models", 2023 (arXiv 2302.05543): the
control picture is embedded at the size of the latents and added to the copy's input; what the copy's blocks give passes
through convolutions and is added to the feature maps that the UNet keeps for its up blocks, and to its middle one.

The embedding does not depend on the step, so it is made once for a picture (`ControlNet.embed_picture`).
"""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stylefast import values
from stylefast.errors import AdapterError, ModelFormatError, ModelNotFound
from stylefast.models.config_files import build, config_of, read_config
from stylefast.models.control_union import CLASSES as UNIONS
from stylefast.models.control_union import Union, refuse_mode, split
from stylefast.models.digests import sampled_digest
from stylefast.models.hub import present
from stylefast.models.layout import AttentionLayout, check_architecture
from stylefast.models.module_lists import list_of
from stylefast.models.prepacked import Conv2d, channels_last
from stylefast.models.residuals import Residuals
from stylefast.models.row_table import COLUMNS, KeyValue, LayerInputs, RowTable
from stylefast.models.stored_tensors import load_weights
from stylefast.models.unet import Encoder, UNet
from stylefast.models.weight_files import read_header, recognise

if TYPE_CHECKING:  # built on this file
    from stylefast.models.t2i_adapter import T2IAdapter

# what a file holds that is a control network of another kind: a part of a key's name -> what it is
_OTHERS = {
    "lora_controlnet": "a Control-LoRA",
    "adapter.body.": "a T2I-Adapter",
    "body.0.": "a T2I-Adapter",
    "controlnet_x_embedder": "a ControlNet of a transformer (FLUX or SD3)",
    "pos_embed_input": "a ControlNet of a transformer (FLUX or SD3)",
}
# of a config: the values that are implemented, and those that mean the same
_DEMANDS: dict[str, tuple] = {
    "conditioning_channels": (3, None),
    "controlnet_conditioning_channel_order": ("rgb", "bgr", None),
    "class_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "resnet_time_scale_shift": ("default", None),
    "only_cross_attention": (False, None),
    "act_fn": ("silu", None),
    "addition_embed_type": ("text_time", None),
    "upcast_attention": (False, None),
}
_PICTURE_WIDTHS = (16, 32, 96, 256)  # of the picture's embedding, in every published network


class ConditioningEmbedding(nn.Module):
    """Convolutions that bring a picture [n, 3, height, width] to the size of latents, [n, channels, h, w]."""

    def __init__(self, widths: tuple[int, ...], channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        blocks = []
        for narrow, wide in itertools.pairwise(widths):
            blocks += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.Conv2d(narrow, wide, 3, padding=1, stride=2)]
        self.blocks = list_of(blocks)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(Encoder):
    """A ControlNet for SDXL's family, created by `ControlNet.load`.

    `name`; `digest` identifies its weights; `downscale` is how many pixels of a control picture make one latent;
    `union` is set if it reads pictures of several types.
    """

    def __init__(self, config: dict, name: str = "", digest: str = ""):
        super().__init__(config, AttentionLayout.from_config(config, encoder=True))
        self.name, self.digest = name, digest
        self.path: Path | None = None  # of its file or folder
        widths = tuple(config.get("conditioning_embedding_out_channels") or _PICTURE_WIDTHS)
        self.downscale = 2 ** (len(widths) - 1)
        channels = config["block_out_channels"]
        self.controlnet_cond_embedding = ConditioningEmbedding(widths, channels[0])
        self.controlnet_down_blocks = list_of(Conv2d(width, width, 1) for width in self.skip_channels)
        self.controlnet_mid_block = Conv2d(channels[-1], channels[-1], 1)
        self.union = Union(config) if "num_control_type" in config else None
        self._number_norms()

    @classmethod
    def load(cls, source: "str | Path | nn.Module", unet: UNet, name: str = "") -> "ControlNet":
        """Load a network for `unet`: a diffusers folder, a `.safetensors` file, or diffusers' module.

        A file without a config is taken to be a copy of the UNet's first half.
        Raises ModelNotFound, ModelFormatError for what can't be read, and AdapterError for networks of another kind or
        another base model, and for settings that are not implemented.
        """
        if isinstance(source, nn.Module):
            config, state, what = dict(config_of(source)), source.state_dict(), type(source).__name__
            _check_class({"_class_name": what}, what)
            state = {key: x.detach().to(unet.device, unet.dtype) for key, x in state.items()}
        else:
            path = values.path("a ControlNet", source)
            what = path.name
            if path.is_dir():
                config, state = _from_folder(path, unet)
            elif path.is_file():
                config, state = _from_file(path, unet)
            else:
                raise ModelNotFound(
                    f"no ControlNet at {values.shown_path(path)}; give a folder with config.json and "
                    "diffusion_pytorch_model.safetensors, or a .safetensors file"
                )
        config, state = split(config, state, unet.config["block_out_channels"][0], what)
        config = _checked(config, unet, what)
        channels_last(state)
        with torch.device("meta"):
            net = build(lambda: cls(config, name, sampled_digest(state)), config, len(state), what)
        try:
            net.load_state_dict(state, assign=True)
        except RuntimeError as error:
            detail = " ".join(str(error).replace('"union.', '"').splitlines()[:3])[:600]
            raise ModelFormatError(f"the weights of {values.shown(what)} don't fit its config: {detail}") from error
        return net.requires_grad_(False).eval()

    inside = False  # what it adds goes to the maps kept for the up blocks, and to the middle

    @property
    def attends(self) -> bool:
        """Return whether it reads the prompt."""
        return bool(self.layout.layers)

    @property
    def maps(self) -> int:
        """Return the number of feature maps that it adds."""
        return len(self.skip_channels) + 1

    @torch.inference_mode()
    def embed_picture(
        self, picture: Tensor, mode: str | int | None = None, weight: float | None = None
    ) -> tuple[Tensor]:
        """Embed a control picture [3, height, width] in [0, 1] as one map [channels, h, w], for every step.

        mode: its type, for a union. weight: among several pictures of a union; None: it is alone.
        """
        if self.config.get("controlnet_conditioning_channel_order") == "bgr":
            picture = picture.flip(0)
        embedded = self.controlnet_cond_embedding(picture[None].to(self.device, self.dtype))[0]
        return (embedded if self.union is None else self.union.place(embedded, self.mode_number(mode), weight),)

    def mode_number(self, mode: str | int | None) -> int:
        """Return the number of a picture's type, -1 without types. Raises InvalidRequest for types that it lacks."""
        return refuse_mode(mode, self.name) if self.union is None else self.union.number(mode, self.name)

    @property
    def pools(self) -> bool:
        """Return whether what it adds is the same everywhere in the picture."""
        return bool(self.config.get("global_pool_conditions"))

    def forward(
        self,
        latents: Tensor,  # [rows, 4, h, w]
        time_embedding: Tensor,  # [rows, time channels], from `embed`
        pictures: Tensor,  # [rows, channels, h, w], from `embed_picture`
        text_kv: tuple[KeyValue, ...],  # from `project_text`
        text_page: Tensor,  # [rows] int64
        text_lengths: Tensor | None = None,  # [text pages] int64; None: all tokens
    ) -> list[Tensor]:
        """Evaluate the network once. Returns what is added to each map, the middle last, before any weight."""
        table = _plain_rows(text_page, len(self.layout.layers), len(self.layout.modules))
        time = F.silu(time_embedding)
        condition = LayerInputs.of(time, table, text_kv, None, None, (), text_lengths=text_lengths)
        x = self.conv_in(latents) + pictures
        skips = [x]
        for block in self.down_blocks:
            for resnet, transformer in block.layers():
                x = resnet(x, *resnet.inputs(condition))
                x = x if transformer is None else transformer(x, condition)
                skips.append(x)
            if block.resamples:
                x = block.resample(x, condition)
                skips.append(x)
        for resnet, transformer in [] if self.mid_block is None else self.mid_block.layers():
            x = resnet(x, *resnet.inputs(condition))
            x = x if transformer is None else transformer(x, condition)
        middle = self.controlnet_mid_block(x)
        added = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        added.append(middle)
        return [x.mean((2, 3), keepdim=True).expand_as(x) for x in added] if self.pools else added

    def added(
        self, control: "ControlRows", latents: Tensor, timesteps: Tensor, pooled: Tensor, time_ids: Tensor
    ) -> list[Tensor]:
        """Return what is added to the rows of `control`, of those in the batch, before any weight."""
        at, (pictures,) = control.rows, control.pictures
        embedding = self.embed(timesteps[at], pooled[at], time_ids[at])
        if control.types is not None:
            embedding = embedding + control.types
        return self(latents[at], embedding, pictures, control.text_kv, control.text_page, control.text_lengths)


class ControlRows(NamedTuple):
    """Rows of a batch that one network steers; a row with two control pictures is there twice."""

    network: "ControlNet | T2IAdapter"
    rows: Tensor  # [n] int64: places in the batch
    pictures: tuple[Tensor, ...]  # [n, channels, h, w], embedded
    weights: Tensor  # [n, maps]: of each map that is added
    text_kv: tuple[KeyValue, ...]
    text_page: Tensor  # [n] int64: pages of `text_kv`
    text_lengths: Tensor | None = None  # per page
    types: Tensor | None = None  # [n, time channels]: what a union adds to the time embedding


def map_weights(maps: int, weight: float, guess_mode: bool) -> list[float]:
    """Return the weight of each of `maps` feature maps, the middle one last; in guess mode the finer have less.

    They rise from a tenth to the whole, evenly in their logarithms, as in ControlNet's own code.
    """
    if not guess_mode:
        return [weight] * maps
    return [weight * 10 ** (i / (maps - 1) - 1) for i in range(maps)]


def residuals_of(
    controls: tuple[ControlRows, ...], latents: Tensor, timesteps: Tensor, pooled: Tensor, time_ids: Tensor
) -> list[Residuals]:
    """Run each network on its rows alone, and return what all of them add.

    latents: the model's input [rows, 4, h, w]; timesteps [rows]; pooled text [rows, d]; time_ids [rows, 6].
    """
    found = []
    for control in controls:
        parts = control.network.added(control, latents, timesteps, pooled, time_ids)
        weighted = [part * weight[:, None, None, None] for part, weight in zip(parts, control.weights.T, strict=True)]
        kind = "inside" if control.network.inside else "kept"
        found.append(Residuals(control.rows, **{kind: weighted}))
    return found


def _plain_rows(text_page: Tensor, layers: int, modules: int) -> RowTable:
    """Return a table of rows that read nothing but their text."""
    sizes = {"rows": len(text_page), "layers": layers, "modules": modules}
    sizes |= dict.fromkeys(("references", "segments", "loras", "norm_rows"), 0)
    columns = {name: column.filled(column.shape(sizes), text_page.device) for name, column in COLUMNS.items()}
    return RowTable(**columns | {"text_page": text_page})


def _from_folder(folder: Path, unet: UNet) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not os.path.isfile(folder / "config.json"):
        raise ModelNotFound(
            f"{values.shown_path(folder)} has no config.json; give the folder of a ControlNet as diffusers saves it"
        )
    config, state = dict(read_config(folder / "config.json", folder)), {}
    _check_class(config, folder.name)
    for file in present(folder, unet.dtype != torch.float32):
        read_header(folder / file)
        state |= load_weights(folder / file, dtype=unet.dtype, device=unet.device)
    _check_keys(state, folder.name)
    return config, state


def _from_file(path: Path, unet: UNet) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = read_header(path)
    keys = list(header.tensors)
    _check_keys(dict.fromkeys(keys), path.name)
    if "controlnet_mid_block.weight" not in keys:
        raise AdapterError(
            f"{values.shown(path.name)} is {recognise(header)}, not a ControlNet in diffusers' layout, whose keys "
            "begin with controlnet_; give one for SDXL"
        )
    widths = {shape[1] for key, (_, shape) in header.tensors.items() if key.endswith(".attn2.to_k.weight")}
    for width in widths:
        _check_same("cross_attention_dim", width, unet.config["cross_attention_dim"], path.name)
    state = load_weights(path, dtype=unet.dtype, device=unet.device)
    prefix = "controlnet_cond_embedding."
    convolutions = sorted(
        (int(key[len(prefix) :].split(".")[1]), len(state[key]))
        for key in keys
        if key.startswith(f"{prefix}blocks.") and key.endswith(".weight")
    )
    widths = [len(state[f"{prefix}conv_in.weight"]), *(width for i, width in convolutions if i % 2)]
    own = {**unet.config, "in_channels": unet.config["out_channels"]}
    return own | {"conditioning_embedding_out_channels": widths, "mid_block_type": "UNetMidBlock2DCrossAttn"}, state


def _check_class(config: Mapping[str, Any], what: str) -> None:
    """Raise AdapterError for a model of another class."""
    kind = config.get("_class_name", "ControlNetModel")
    if kind not in ("ControlNetModel", *UNIONS):
        known = {"T2IAdapter": _OTHERS["body.0."]}
        raise AdapterError(
            f"{values.shown(what)} is {known.get(str(kind), f'a {values.quoted(kind)}')}, which is not supported; give "
            "a ControlNet (ControlNetModel or ControlNetUnionModel) for SDXL"
        )


def _check_keys(state: Mapping[str, Any], what: str) -> None:
    for part, kind in _OTHERS.items():
        if any(part in key if part.startswith("lora") else key.startswith(part) for key in state):
            raise AdapterError(
                f"{values.shown(what)} is {kind}, which is not supported; give a ControlNet (ControlNetModel or "
                "ControlNetUnionModel) for SDXL"
            )


def _checked(config: dict[str, Any], unet: UNet, what: str) -> dict[str, Any]:
    """Return a network's config with what it leaves to the UNet. Raises AdapterError if the two don't fit."""
    shown = values.shown(what)
    for key in ("cross_attention_dim", "in_channels", "block_out_channels", "layers_per_block"):
        # an inpainting model's ControlNets see its latents alone
        wanted = unet.config["out_channels" if key == "in_channels" else key]
        _check_same(key, config.get(key, wanted), wanted, what)
    for key, allowed in _DEMANDS.items():
        if config.get(key) not in allowed:
            raise AdapterError(
                f"{shown} has {key}={values.quoted(config.get(key))}, which is not supported; it must be "
                f"{values.quoted(allowed[0])}"
            )
    kinds = config.get("down_block_types", unet.config["down_block_types"])
    if not isinstance(kinds, (list, tuple)) or not all(isinstance(kind, str) for kind in kinds):
        raise AdapterError(f"{shown} has down_block_types={values.quoted(kinds)}; it must be a list of names")
    defaults = {"norm_num_groups": 32, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5}
    found = defaults | {key: value for key, value in config.items() if not key.startswith("up_")}
    # the layout of a whole UNet, of which a network has the first half
    found |= {
        "down_block_types": list(kinds),
        "up_block_types": [kind.replace("Down", "Up") for kind in kinds][::-1],
        "block_out_channels": list(unet.config["block_out_channels"]),
        "reverse_transformer_layers_per_block": [1] * len(kinds),
        "in_channels": unet.config["out_channels"],
        "cross_attention_dim": unet.config["cross_attention_dim"],
    }
    if found.get("addition_embed_type") is not None:
        try:
            check_architecture(found | {"use_linear_projection": True})
        except ModelFormatError as error:
            raise AdapterError(f"{shown} is no ControlNet for SDXL: {error}") from error
    if found.get("use_linear_projection") is not True and any("CrossAttn" in kind for kind in kinds):
        raise AdapterError(
            f"{shown} has use_linear_projection={values.quoted(found.get('use_linear_projection'))}, as networks for "
            "SD 1.5 have; give one for SDXL"
        )
    widths = found.get("conditioning_embedding_out_channels")
    if widths is not None:
        whole = isinstance(widths, (list, tuple)) and all(isinstance(n, int) and 1 <= n <= 4096 for n in widths)
        if not whole or not 1 <= len(widths) <= 8:
            raise AdapterError(
                f"{shown} has conditioning_embedding_out_channels={values.quoted(widths)}; it must be 1 to 8 numbers"
            )
    return found


def _check_same(key: str, own: Any, wanted: Any, what: str) -> None:
    """Raise AdapterError for a setting that differs from the UNet's."""
    plain, other = (list(value) if isinstance(value, (list, tuple)) else value for value in (own, wanted))
    if plain != other:
        hint = " (768 is SD 1.5's)" if own == 768 else " (1024 is SD 2's)" if own == 1024 else ""
        raise AdapterError(
            f"{values.shown(what)} has {key}={values.quoted(own)}{hint}, but the loaded model has "
            f"{values.quoted(wanted)}; give a ControlNet that was trained for this model's family"
        )
