"""SDXL in one `.safetensors` file, in the original layout: `model.diffusion_model.*`, `conditioner.embedders.*`,
`first_stage_model.*`.

diffusers' converters rename the keys. The file has no configs: they are inferred from the shapes, assuming SDXL's
64-wide attention heads and 32 groups per group norm. Models that differ there need a `config` folder (the JSON files
of a diffusers folder).
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch

from stylefast.errors import ModelFormatError
from stylefast.models.config_files import read_config
from stylefast.models.weight_files import WeightHeader, recognise

UNET = "model.diffusion_model."
TEXT = "conditioner.embedders.0."
TEXT_2 = "conditioner.embedders.1."
# longer prefixes first; the name within the encoder follows the prefix
_TEXT_PREFIXES = (
    (f"{TEXT}transformer.",),
    # transformers' layout with OpenCLIP's prefix, and with its own
    (f"{TEXT_2}model.transformer.text_model.", f"{TEXT_2}model.", f"{TEXT_2}transformer."),
)
VAE = "first_stage_model."
_HEAD_WIDTH = 64


def check_single_file(header: WeightHeader, needs_vae: bool) -> None:
    """Raise ModelFormatError, naming the file's actual kind, unless it is a complete SDXL checkpoint."""
    name, kind = header.path.name, recognise(header)
    if kind == "LoRA":
        raise ModelFormatError(
            f"{name} is a LoRA, not a checkpoint; load a base model and add it with engine.load_lora"
        )
    if kind == "IP-Adapter":
        raise ModelFormatError(f"{name} is an IP-Adapter, not a checkpoint; load a base model and give it as adapter=")
    if kind in ("VAE", "tiny VAE"):
        raise ModelFormatError(f"{name} is a {kind}, not a checkpoint; load a base model and give it as vae=")
    if kind != "SDXL checkpoint":
        raise ModelFormatError(f"{name} is a {kind}; an SDXL base checkpoint is needed")
    channels = header.shape(f"{UNET}input_blocks.0.0.weight")[1]
    if channels != 4:
        raise ModelFormatError(
            f"{name} is an SDXL model with {channels} input channels (inpainting or editing); "
            "a text-to-image model has 4"
        )
    for prefix, part in ((TEXT, "first text encoder"), (TEXT_2, "second text encoder"), (VAE, "VAE")):
        if not header.has(prefix) and (part != "VAE" or needs_vae):
            way_out = "give vae=" if part == "VAE" else "use the whole checkpoint, or a diffusers folder"
            raise ModelFormatError(f"{name} contains no {part} ({prefix}*); {way_out}")


def infer_unet_config(header: WeightHeader) -> dict:
    """Infer diffusers' UNet config from names and shapes in the original layout, for SDXL and smaller variants.

    Raises ModelFormatError for a UNet that diffusers' config can't describe, or that is incomplete.
    """
    # one list per block: the transformer depths after its resnets, None for no attention
    down, channels = [[]], []
    for i in range(1, _count(header, f"{UNET}input_blocks.")):
        block = f"{UNET}input_blocks.{i}"
        if f"{block}.0.op.weight" in header.tensors:
            down.append([])
            continue
        if not down[-1]:
            channels.append(header.shape(f"{block}.0.out_layers.3.weight")[0])
        down[-1].append(_depth(header, f"{block}.1."))
    resnets = [len(block) for block in down]
    places = iter(range(_count(header, f"{UNET}output_blocks.")))
    up = [
        [_depth(header, f"{UNET}output_blocks.{next(places, -1)}.1.") for _ in range(count + 1)]
        for count in reversed(resnets)
    ]
    middle = _depth(header, f"{UNET}middle_block.1.")
    mid_type = "UNetMidBlock2DCrossAttn" if middle is not None else None
    if middle is None and header.has(f"{UNET}middle_block.0."):
        mid_type = "UNetMidBlock2D"

    first_attention = next((n for n in header.tensors if n.startswith(UNET) and n.endswith("attn2.to_k.weight")), None)
    if first_attention is None:
        raise ModelFormatError(f"{header.path.name} has a UNet without cross-attention; it is not an SDXL model")
    attending = [_attends(header, block) for block in down]
    up_attending = [_attends(header, block) for block in up]
    wide = [width for width, attends in zip(channels, attending) if attends and width % _HEAD_WIDTH]
    if wide:
        raise ModelFormatError(
            f"{header.path.name} has attention {channels} channels wide, which is not divisible into 64-wide heads; "
            "give config=, a folder with this model's unet/config.json and text encoder configs"
        )
    projection_input = header.shape(f"{UNET}label_emb.0.0.weight")[1]
    pooled = _pooled_width(header)
    proj_in = next(shape for n, (_, shape) in header.tensors.items() if n.endswith("1.proj_in.weight"))
    return {
        "sample_size": 128,
        "in_channels": header.shape(f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": header.shape(f"{UNET}out.2.weight")[0],
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attending],
        "mid_block_type": mid_type,
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in up_attending],
        "block_out_channels": channels,
        "layers_per_block": resnets[0] if len(set(resnets)) == 1 else resnets,
        **_transformer_depths(header, down, middle, up),
        "attention_head_dim": [max(width // _HEAD_WIDTH, 1) for width in channels],
        "cross_attention_dim": header.shape(first_attention)[1],
        "use_linear_projection": len(proj_in) == 2,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (projection_input - pooled) // 6,
        "projection_class_embeddings_input_dim": projection_input,
        "norm_num_groups": 32,
    }


def _depth(header: WeightHeader, prefix: str) -> int | None:
    """Count the transformer blocks of the attention at `prefix`; None without attention, 0 for projections only."""
    if f"{prefix}proj_in.weight" not in header.tensors:
        return None
    return _count(header, f"{prefix}transformer_blocks.")


def _attends(header: WeightHeader, block: list[int | None]) -> bool:
    """Return whether a block attends. Raises ModelFormatError if only some of its layers do."""
    if None in block and any(depth is not None for depth in block):
        raise ModelFormatError(
            f"{header.path.name} has a UNet whose blocks have attention in some layers but not in others ({block}); "
            "in diffusers' format a block has it in all or none"
        )
    return bool(block) and None not in block


def _transformer_depths(header: WeightHeader, down: list, middle: int | None, up: list) -> dict:
    """Return the depths as config entries: a number per block, or lists where layers differ.

    Raises ModelFormatError for depths that the config can't express.
    """

    def short(block: list) -> int | list:
        plain = [1 if depth is None else depth for depth in block]
        return plain[0] if len(set(plain)) == 1 else plain

    depths, backwards = [short(block) for block in down], [short(block) for block in up]
    if middle is not None:
        # in the config, the middle has the depth of the last block, or of that block's first layer
        last = depths[-1] if isinstance(depths[-1], int) else depths[-1][0]
        if down[-1][0] is None:
            depths[-1] = middle
            backwards[0] = middle if up[0][0] is None else backwards[0]
        elif last != middle:
            raise ModelFormatError(
                f"{header.path.name} has {middle} transformer blocks in its middle and {last} before it; diffusers' "
                "config has one number for both"
            )
    if backwards == depths[::-1] and all(isinstance(depth, int) for depth in depths):
        return {"transformer_layers_per_block": depths}
    return {"transformer_layers_per_block": depths, "reverse_transformer_layers_per_block": backwards}


def infer_text_configs(header: WeightHeader) -> tuple[dict, dict]:
    """Infer CLIPTextConfig arguments of both encoders: CLIP-L with quick GELU, OpenCLIP bigG with GELU.

    Raises ModelFormatError for missing tensors, or widths that 64-wide heads don't divide.
    """
    first, second = text_names(header.tensors, 0), text_names(header.tensors, 1)

    def shape(names: dict[str, str], name: str) -> tuple[int, ...]:
        if name not in names:
            raise ModelFormatError(f"{header.path.name} lacks {name} of a text encoder; the file is incomplete")
        return header.tensors[names[name]][1]

    def layers(names: dict[str, str], prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})

    configs = []
    for names, projection, activation in ((first, None, "quick_gelu"), (second, _pooled_width(header), "gelu")):
        if "token_embedding.weight" in names:
            vocab, width = shape(names, "token_embedding.weight")
            positions = shape(names, "positional_embedding")[0]
            inner = shape(names, "transformer.resblocks.0.mlp.c_fc.weight")[0]
            depth = layers(names, "transformer.resblocks.")
        else:
            tower = "text_model."
            vocab, width = shape(names, f"{tower}embeddings.token_embedding.weight")
            positions = shape(names, f"{tower}embeddings.position_embedding.weight")[0]
            inner = shape(names, f"{tower}encoder.layers.0.mlp.fc1.weight")[0]
            depth = layers(names, f"{tower}encoder.layers.")
        if width % _HEAD_WIDTH:
            raise ModelFormatError(
                f"{header.path.name} has a text encoder {width} channels wide, which is not divisible into 64-wide "
                "heads; give config=, a folder with text_encoder/config.json and text_encoder_2/config.json"
            )
        configs.append(
            {
                "vocab_size": vocab,
                "hidden_size": width,
                "intermediate_size": inner,
                "num_hidden_layers": depth,
                "num_attention_heads": width // _HEAD_WIDTH,
                "max_position_embeddings": positions,
                "projection_dim": projection or width,
                "hidden_act": activation,
                # transformers interprets 2 as "the highest id ends the prompt", which holds for every CLIP vocabulary
                "bos_token_id": 0,
                "pad_token_id": 1,
                "eos_token_id": 2,
            }
        )
    return configs[0], configs[1]


def text_names(names: Iterable[str], index: int) -> dict[str, str]:
    """Return name within text encoder `index` (0 or 1) -> name in the file, for all tensors of that encoder.

    Files have the encoders in OpenCLIP's layout (`transformer.resblocks.`) or in transformers', with or without the
    prefix `text_model.`, which is added if missing. The projection is `text_projection` if it is a matrix that
    multiplies from the right, [in, out], and `text_projection.weight` if it is a linear layer's weight, [out, in].
    """
    found = {}
    for name in names:
        prefix = next(filter(name.startswith, _TEXT_PREFIXES[index]), None)
        if prefix is not None:
            found.setdefault(name[len(prefix) :], name)
    if any(name.startswith("text_model.") for name in found) or "token_embedding.weight" in found:
        return found
    bare = ("embeddings.", "encoder.", "final_layer_norm.")
    return {f"text_model.{name}" if name.startswith(bare) else name: whole for name, whole in found.items()}


def _pooled_width(header: WeightHeader) -> int:
    """Return the width of the second text encoder's projected state. Raises ModelFormatError if it is missing."""
    names = text_names(header.tensors, 1)
    for spelling, side in (("text_projection", 1), ("text_projection.weight", 0)):
        if spelling in names:
            return header.shape(names[spelling])[side]
    raise ModelFormatError(
        f"{header.path.name} lacks {TEXT_2}text_projection (or text_projection.weight); the file is incomplete"
    )


def convert_unet(state: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """Rename UNet tensors (with prefix) to diffusers' names; storage is shared."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint(state, {**config, "layers_per_block": _single(config["layers_per_block"])})


def convert_text_encoders(state: dict[str, torch.Tensor], second_config: Mapping) -> tuple[dict, dict]:
    """Rename tensors of both text encoders to transformers' names (`text_model.` prefix, or the projection).

    second_config: CLIPTextConfig arguments of the second encoder.
    """
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    # the converter reads the width of the states from a model
    second = SimpleNamespace(config=SimpleNamespace(hidden_size=second_config["hidden_size"]))
    converted = []
    for index in range(2):
        tensors = {name: state[whole] for name, whole in text_names(state, index).items()}
        if "token_embedding.weight" in tensors:
            linear = tensors.pop("text_projection.weight", None)
            tensors = convert_open_clip_checkpoint(second, tensors, prefix="")
            if linear is not None:
                tensors["text_projection.weight"] = linear
        tensors.pop("logit_scale", None)
        converted.append(with_linear_projection(tensors))
    return converted[0], converted[1]


def with_linear_projection(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert OpenCLIP's `text_projection`, which multiplies from the right, to a linear layer's weight."""
    if "text_projection" not in state:
        return state
    rest = {name: value for name, value in state.items() if name != "text_projection"}
    return rest | {"text_projection.weight": state["text_projection"].T.contiguous()}


def config_from_folder(config: Path | None, part: str) -> dict | None:
    """Read the JSON config of one part ("unet", "text_encoder", ..., "scheduler") in a config folder, if present."""
    if config is None:
        return None
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    file = config / part / name
    return read_config(file, config) if file.is_file() else None


def _count(header: WeightHeader, prefix: str) -> int:
    """Count the different numbers that follow `prefix` in the tensors' names."""
    return len({name[len(prefix) :].split(".")[0] for name in header.tensors if name.startswith(prefix)})


def _single(layers_per_block) -> int:
    if isinstance(layers_per_block, int):
        return layers_per_block
    if len(set(layers_per_block)) != 1:
        raise ModelFormatError(f"layers_per_block {layers_per_block} differ; the original layout has one number")
    return layers_per_block[0]
