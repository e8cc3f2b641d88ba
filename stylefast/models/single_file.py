"""SDXL in one `.safetensors` file, in the original layout: `model.diffusion_model.*`, `conditioner.embedders.*`,
`first_stage_model.*`.

The keys are renamed by diffusers' own converters. Configs are not in the file: they are inferred from the shapes, for
which two facts must be taken from SDXL itself: attention heads are 64 wide, and group norms have 32 groups. A model
that differs there needs a `config` folder (the JSON files of a diffusers folder).
"""

import json
from pathlib import Path

import torch

from stylefast.errors import ModelFormatError
from stylefast.models.weight_files import WeightHeader, recognise

UNET = "model.diffusion_model."
TEXT = "conditioner.embedders.0.transformer."
TEXT_2 = "conditioner.embedders.1.model."
VAE = "first_stage_model."
_HEAD_WIDTH = 64

SDXL_SCHEDULER_CONFIG = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def check_single_file(header: WeightHeader, needs_vae: bool) -> None:
    """Raise ModelFormatError unless the file is a whole SDXL checkpoint; the message names what it is instead."""
    name, kind = header.path.name, recognise(header)
    if kind == "LoRA":
        raise ModelFormatError(f"{name} is a LoRA, not a checkpoint; load a base model and add it with apply_lora")
    if kind == "IP-Adapter":
        raise ModelFormatError(f"{name} is an IP-Adapter, not a checkpoint; load a base model and give it as adapter=")
    if kind in ("VAE", "tiny VAE"):
        raise ModelFormatError(f"{name} is a {kind}, not a checkpoint; load a base model and give it as vae=")
    if kind != "SDXL checkpoint":
        raise ModelFormatError(f"{name} is a {kind}; an SDXL base checkpoint is needed")
    channels = header.shape(f"{UNET}input_blocks.0.0.weight")[1]
    if channels != 4:
        raise ModelFormatError(f"{name} is an SDXL model with {channels} input channels (inpainting or editing); "
                               "a text-to-image model has 4")
    for prefix, part in ((TEXT, "first text encoder"), (TEXT_2, "second text encoder"), (VAE, "VAE")):
        if not header.has(prefix) and (part != "VAE" or needs_vae):
            way_out = "give vae=" if part == "VAE" else "use the whole checkpoint, or a diffusers folder"
            raise ModelFormatError(f"{name} holds no {part} ({prefix}*); {way_out}")


def infer_unet_config(header: WeightHeader) -> dict:
    """diffusers' UNet config from the shapes of the original layout."""
    channels, depths, resnets = [], [], []
    level = -1
    fresh = True
    for i in range(1, _count(header, f"{UNET}input_blocks.")):
        block = f"{UNET}input_blocks.{i}"
        if f"{block}.0.op.weight" in header.tensors:
            fresh = True
            continue
        if fresh:
            level, fresh = level + 1, False
            channels.append(header.shape(f"{block}.0.out_layers.3.weight")[0])
            depths.append(_count(header, f"{block}.1.transformer_blocks."))
            resnets.append(0)
        resnets[level] += 1
    attending = [depth > 0 for depth in depths]
    first_attention = next((n for n in header.tensors if n.startswith(UNET) and n.endswith("attn2.to_k.weight")), None)
    if first_attention is None:
        raise ModelFormatError(f"{header.path.name} has a UNet without cross-attention; it is no SDXL model")
    if any(width % _HEAD_WIDTH for width, attends in zip(channels, attending) if attends):
        raise ModelFormatError(
            f"{header.path.name} has attention {channels} channels wide, which 64-wide heads do not divide; give "
            "config=, a folder with this model's unet/config.json and text encoder configs"
        )
    projection_input = header.shape(f"{UNET}label_emb.0.0.weight")[1]
    pooled = header.shape(f"{TEXT_2}text_projection")[1]
    proj_in = next(shape for n, (_, shape) in header.tensors.items() if n.endswith("1.proj_in.weight"))
    return {
        "sample_size": 128,
        "in_channels": header.shape(f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": header.shape(f"{UNET}out.2.weight")[0],
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attending],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attending)],
        "block_out_channels": channels,
        "layers_per_block": resnets[0],
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "attention_head_dim": [max(width // _HEAD_WIDTH, 1) for width in channels],
        "cross_attention_dim": header.shape(first_attention)[1],
        "use_linear_projection": len(proj_in) == 2,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (projection_input - pooled) // 6,
        "projection_class_embeddings_input_dim": projection_input,
        "norm_num_groups": 32,
    }


def infer_text_configs(header: WeightHeader) -> tuple[dict, dict]:
    """CLIPTextConfig arguments of both encoders: CLIP-L with quick GELU, OpenCLIP bigG with GELU."""
    first, second = f"{TEXT}text_model.", TEXT_2
    sizes = (
        (
            header.shape(f"{first}embeddings.token_embedding.weight"),
            header.shape(f"{first}embeddings.position_embedding.weight")[0],
            header.shape(f"{first}encoder.layers.0.mlp.fc1.weight")[0],
            _count(header, f"{first}encoder.layers."),
            header.shape(f"{first}embeddings.token_embedding.weight")[1],
            "quick_gelu",
        ),
        (
            header.shape(f"{second}token_embedding.weight"),
            header.shape(f"{second}positional_embedding")[0],
            header.shape(f"{second}transformer.resblocks.0.mlp.c_fc.weight")[0],
            _count(header, f"{second}transformer.resblocks."),
            header.shape(f"{second}text_projection")[1],
            "gelu",
        ),
    )
    configs = []
    for (vocab, width), positions, inner, layers, projection, activation in sizes:
        if width % _HEAD_WIDTH:
            raise ModelFormatError(
                f"{header.path.name} has a text encoder {width} channels wide, which 64-wide heads do not divide; give "
                "config=, a folder with text_encoder/config.json and text_encoder_2/config.json"
            )
        configs.append({
            "vocab_size": vocab, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": width // _HEAD_WIDTH, "max_position_embeddings": positions,
            "projection_dim": projection, "hidden_act": activation,
            # transformers reads 2 as "the highest id ends the prompt", which holds for every CLIP vocabulary
            "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
        })
    return configs[0], configs[1]


def scheduler_config(header: WeightHeader) -> dict:
    """SDXL's scheduler config; v-prediction and zero terminal SNR where the file says so (keys `v_pred`, `ztsnr`)."""
    config = dict(SDXL_SCHEDULER_CONFIG)
    if "v_pred" in header.tensors or header.metadata.get("modelspec.prediction_type") == "v":
        config["prediction_type"] = "v_prediction"
    if "ztsnr" in header.tensors:
        config["rescale_betas_zero_snr"] = True
    return config


def convert_unet(state: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """UNet tensors (names with their prefix) under diffusers' names; storage is shared."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint(state, {**config, "layers_per_block": _single(config["layers_per_block"])})


def convert_text_encoders(state: dict[str, torch.Tensor], second_encoder) -> tuple[dict, dict]:
    """Tensors of both text encoders under transformers' names, each beginning with `text_model.` or a projection."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    first = convert_ldm_clip_checkpoint({name: value for name, value in state.items() if name.startswith(TEXT)})
    second = convert_open_clip_checkpoint(second_encoder, state, prefix=TEXT_2)
    return first, second


def config_from_folder(config: str | Path | None, part: str) -> dict | None:
    """The JSON config of one part ("unet", "text_encoder", ..., "scheduler") in a config folder, if it is there."""
    if config is None:
        return None
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    file = Path(config) / part / name
    return json.loads(file.read_text()) if file.is_file() else None


def _count(header: WeightHeader, prefix: str) -> int:
    """How many different numbers follow `prefix` in the tensors' names."""
    return len({name[len(prefix):].split(".")[0] for name in header.tensors if name.startswith(prefix)})


def _single(layers_per_block) -> int:
    if isinstance(layers_per_block, int):
        return layers_per_block
    if len(set(layers_per_block)) != 1:
        raise ModelFormatError(f"layers_per_block {layers_per_block} differ; the original layout has one number")
    return layers_per_block[0]
