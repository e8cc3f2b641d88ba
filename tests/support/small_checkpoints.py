"""Writers of small checkpoints in the layouts in which SDXL models are published."""

import json

import torch
from safetensors.torch import load_file, save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def write_folder(pipeline, folder, variant=None):
    """A diffusers folder as on the hub: text encoders with the prefix `text_model.` and their position ids."""
    pipeline.save_pretrained(folder, variant=variant)
    for part in ("text_encoder", "text_encoder_2"):
        file = folder / part / (f"model.{variant}.safetensors" if variant else "model.safetensors")
        state = {_prefixed(name): value for name, value in load_file(file).items()}
        state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        save_file(state, file, metadata={"format": "pt"})
    return folder


def write_single_file(pipeline, path, dtype=torch.float32, extra=None):
    """One `.safetensors` in the original layout, with the noise schedule that many published files carry along."""
    state = {f"model.diffusion_model.{name}": value for name, value in original_unet(pipeline.unet).items()}
    first = pipeline.text_encoder.state_dict()
    state |= {f"conditioner.embedders.0.transformer.{_prefixed(name)}": value for name, value in first.items()}
    second = open_clip(pipeline.text_encoder_2)
    state |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    state |= {f"first_stage_model.{name}": value for name, value in original_vae(pipeline.vae).items()}
    state["denoiser.sigmas"] = torch.linspace(0.03, 14.6, 1000)
    state |= extra or {}
    save_file({name: value.to(dtype).contiguous().clone() for name, value in state.items()}, path)
    return path


def original_unet(unet):
    """State dict of a diffusers UNet under the original names (no prefix)."""
    renamed = {}
    for name, value in unet.state_dict().items():
        renamed[original_unet_name(name, unet.config)] = value
    return renamed


def original_unet_name(name, config):
    """`down_blocks.1.attentions.0...` -> `input_blocks.4.1...`"""
    outside = {
        "conv_in.": "input_blocks.0.0.",
        "time_embedding.linear_1.": "time_embed.0.",
        "time_embedding.linear_2.": "time_embed.2.",
        "add_embedding.linear_1.": "label_emb.0.0.",
        "add_embedding.linear_2.": "label_emb.0.2.",
        "conv_norm_out.": "out.0.",
        "conv_out.": "out.2.",
    }
    for start, original in outside.items():
        if name.startswith(start):
            return original + name[len(start) :]
    parts = name.split(".")
    per_block = config["layers_per_block"] + 1
    if parts[0] == "mid_block":
        kind, index, rest = parts[1], int(parts[2]), parts[3:]
        place = f"middle_block.{1 if kind == 'attentions' else 2 * index}"
    else:
        block, kind, index, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if parts[0] == "down_blocks":
            if kind == "downsamplers":
                return f"input_blocks.{(block + 1) * per_block}.0.op.{rest[-1]}"
            place = f"input_blocks.{1 + block * per_block + index}.{int(kind == 'attentions')}"
        else:
            if kind == "upsamplers":
                slot = 2 if config["up_block_types"][block].startswith("CrossAttn") else 1
                return f"output_blocks.{(block + 1) * per_block - 1}.{slot}.conv.{rest[-1]}"
            place = f"output_blocks.{block * per_block + index}.{int(kind == 'attentions')}"
    if kind == "resnets":
        rest = [_RESNET[rest[0]], *rest[1:]]
    return ".".join([place, *rest])


def original_vae(vae):
    """State dict of an AutoencoderKL under the original names; the middle attention as 1x1 convolutions."""
    last = len(vae.config["block_out_channels"]) - 1
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    renamed = {}
    for name, value in vae.state_dict().items():
        parts = name.split(".")
        side = parts[0]
        if len(parts) > 3 and parts[1] in ("down_blocks", "up_blocks"):
            level, kind, index, rest = int(parts[2]), parts[3], parts[4], parts[5:]
            place = f"{side}.down.{level}" if parts[1] == "down_blocks" else f"{side}.up.{last - level}"
            if kind == "resnets":
                name = ".".join([place, "block", index, *rest]).replace("conv_shortcut", "nin_shortcut")
            else:
                name = f"{place}.{kind[:-2]}.conv.{rest[-1]}"
        elif len(parts) > 2 and parts[1] == "mid_block":
            if parts[2] == "resnets":
                name = ".".join([side, "mid", f"block_{int(parts[3]) + 1}", *parts[4:]])
            else:
                name = f"{side}.mid.attn_1.{attention[parts[4]]}.{parts[-1]}"
                value = value[:, :, None, None] if value.ndim == 2 else value
        else:
            name = name.replace("conv_norm_out", "norm_out")
        renamed[name] = value
    return renamed


def open_clip(encoder):
    """State dict of a CLIPTextModelWithProjection under OpenCLIP's names."""
    state = {_prefixed(name): value for name, value in encoder.state_dict().items()}
    renamed = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": torch.tensor(4.6),
    }
    for i in range(encoder.config.num_hidden_layers):
        source, target = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            fused = [state[f"{source}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            renamed[f"{target}attn.in_proj_{kind}"] = torch.cat(fused)
            for before, after in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            ):
                renamed[f"{target}{after}.{kind}"] = state[f"{source}{before}.{kind}"]
    return renamed


def write_vae_folder(vae, folder, **config_changes):
    """A VAE's own folder, as fp16-fix and tiny VAEs are published."""
    vae.save_pretrained(folder)
    if config_changes:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | config_changes))
    return folder


def random_lora(pipeline, seed=0, rank=3, text=True, convolutions=False):
    """{(part, module): (down, up, alpha)}: every attention projection of the UNet, and of the text encoders."""
    generator = torch.Generator().manual_seed(seed)
    endings = {"unet": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in")}
    if text:
        endings |= dict.fromkeys(("text_encoder", "text_encoder_2"), ("q_proj", "out_proj", "fc1"))
    if convolutions:
        endings["unet"] += ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
    lora = {}
    for part, wanted in endings.items():
        for name, module in getattr(pipeline, part).named_modules():
            if not name.endswith(wanted):
                continue
            out, *rest = module.weight.shape
            down = torch.randn(rank, *rest, generator=generator) * 0.1
            up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator) * 0.1
            name = name if part == "unet" else _prefixed(name)
            lora[part, name] = (down, up, 2.0)
    return lora


def write_kohya_lora(lora, path, config):
    """kohya's layout: flattened original names, `lora_down`, `lora_up` and `alpha`."""
    starts = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    state = {}
    for (part, name), (down, up, alpha) in lora.items():
        if part == "unet":
            name = original_unet_name(f"{name}.weight", config).removesuffix(".weight")
        key = starts[part] + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
    save_file(state, path, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    return path


def write_peft_lora(lora, path):
    """diffusers' present layout: dotted names, `lora_A` and `lora_B`; alpha is the rank."""
    state = {}
    for (part, name), (down, up, _) in lora.items():
        state |= {f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}
    save_file(state, path, metadata={"format": "pt"})
    return path


def _prefixed(name):
    """A text encoder's name as files spell it, whatever this version of transformers calls it in memory."""
    outside = name.startswith(("text_model.", "text_projection."))
    return name if outside else f"text_model.{name}"
