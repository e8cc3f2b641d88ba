"""Names of modules and their tensors in LoRA files.

Trainers spell modules differently: with diffusers' names or those of the original SDXL code, with dots or underscores,
with one of many prefixes. All spellings of the model's modules are tabulated once, so that names are looked up, never
guessed.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import count

import torch

PARTS: tuple[str, ...] = ("unet", "text_encoder", "text_encoder_2")
PEFT_PREFIX = "base_model.model."

# prefix -> its part; a prefix comes before shorter ones that it starts with
_DOTTED = {
    "model.diffusion_model.": "unet",
    "diffusion_model.": "unet",
    "unet.": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_l.transformer.": "text_encoder",
    "clip_g.transformer.": "text_encoder_2",
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
}
_FLAT = {
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
}

# ending of a key -> the tensor's role. Until late 2023 diffusers attached LoRAs to attention processors
# (`to_q_lora.down.weight`) and named those of text encoders `lora_linear_layer`
_ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_up.bias": "up_bias",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora.up.bias": "up_bias",
    ".lora.alpha": "alpha",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    "_lora.alpha": "alpha",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_linear_layer.alpha": "alpha",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
}
_ROLES |= {f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
_ROLES |= {f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
# peft's own save function drops the adapter's name from keys, other tools keep it
_ADAPTER_NAME = re.compile(r"\.default(_\d+)?(?=\.weight$|\.bias$|$)")

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into (module as spelled in the file, role of the tensor); return None for an unknown ending."""
    bare = _ADAPTER_NAME.sub("", key)
    ending = next((bare[i:] for i in range(len(bare)) if bare[i:] in _ROLES), None)
    return None if ending is None else (bare.removesuffix(ending), _ROLES[ending])


class ModuleNames:
    """Lookup of a model's modules by their spellings in LoRA files.

    `weights`: per part, the model's tensors by name, with diffusers' names for UNets, transformers' for text encoders.
    """

    def __init__(self, weights: Mapping[str, Mapping[str, torch.Tensor]]):
        self._dotted: dict[str, dict[str, str]] = {}
        self._flat: dict[str, dict[str, str]] = {}
        self._weights = weights
        for part, state in weights.items():
            modules = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
            spellings = _unet_spellings(modules) if part == "unet" else _text_spellings(modules)
            self._dotted[part] = spellings
            self._flat[part] = {spelled.replace(".", "_"): module for spelled, module in spellings.items()}

    def find(self, spelled: str, default: str | None = None) -> list[tuple[str, str]]:
        """Return the modules (part, name) that match a spelling, possibly none.

        Names without a prefix may match both text encoders; `default` restricts them to one part.
        """
        for prefix, part in _FLAT.items():
            if spelled.startswith(prefix):
                module = self._flat[part].get(_without_text_model(spelled.removeprefix(prefix), "_"))
                return [] if module is None else [(part, module)]
        # as in models that were compiled or trained on several GPUs
        plain = spelled.replace("_orig_mod.", "").removeprefix("module.").removeprefix(PEFT_PREFIX)
        named = next(((prefix, part) for prefix, part in _DOTTED.items() if plain.startswith(prefix)), None)
        parts = PARTS if default is None else (default,)
        if named is not None:
            plain, parts = plain.removeprefix(named[0]).removeprefix(PEFT_PREFIX), (named[1],)
        plain = _without_text_model(plain.replace(".processor.", "."), ".")
        return [(part, self._dotted[part][plain]) for part in parts if plain in self._dotted[part]]

    def shape(self, part: str, module: str) -> tuple[int, ...]:
        """Return the shape of a module's weight."""
        return tuple(self._weights[part][f"{module}.weight"].shape)


def original_names(modules: Iterable[str]) -> dict[str, str]:
    """Map a UNet's modules from diffusers' names to those of the original SDXL code, if it has them.

    The original numbers blocks consecutively across levels; the blocks per level are counted from the modules.
    """
    modules = list(modules)
    counted = {block: len(numbers) for block, numbers in _resnets(modules).items()}
    places: dict[str, str] = {}
    here = 1
    for i in count():
        block = f"down_blocks.{i}"
        if block not in counted:
            break
        for j in range(counted[block]):
            places[f"{block}.resnets.{j}"] = f"input_blocks.{here + j}.0"
            places[f"{block}.attentions.{j}"] = f"input_blocks.{here + j}.1"
        here += counted[block]
        if f"{block}.downsamplers.0.conv" in modules:
            places[f"{block}.downsamplers.0.conv"] = f"input_blocks.{here}.0.op"
            here += 1
    attends = any(module.startswith("mid_block.attentions.") for module in modules)
    places |= {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": f"middle_block.{1 + attends}",
    }
    here = 0
    for i in count():
        block = f"up_blocks.{i}"
        if block not in counted:
            break
        for j in range(counted[block]):
            places[f"{block}.resnets.{j}"] = f"output_blocks.{here + j}.0"
            places[f"{block}.attentions.{j}"] = f"output_blocks.{here + j}.1"
        here += counted[block]
        slot = 1 + any(module.startswith(f"{block}.attentions.") for module in modules)
        places[f"{block}.upsamplers.0.conv"] = f"output_blocks.{here - 1}.{slot}.conv"
    return {module: name for module in modules if (name := _original_name(module, places)) is not None}


def _original_name(module: str, places: Mapping[str, str]) -> str | None:
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    if module in places:
        return places[module]
    pieces = module.split(".")
    length = 3 if pieces[0] == "mid_block" else 4
    place, rest = places.get(".".join(pieces[:length])), pieces[length:]
    if place is None or not rest:
        return None
    if pieces[length - 2] == "resnets":
        rest = [_RESNET.get(rest[0], rest[0]), *rest[1:]]
    return ".".join([place, *rest])


def _resnets(modules: Iterable[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module in modules:
        match = re.match(r"((?:down|up)_blocks\.\d+)\.resnets\.(\d+)\.", module)
        if match:
            found.setdefault(match[1], set()).add(match[2])
    return found


def _unet_spellings(modules: list[str]) -> dict[str, str]:
    spellings = {module: module for module in modules}
    spellings |= {original: module for module, original in original_names(modules).items()}
    # diffusers' processors and some trainers omit the index of an attention's output layer
    return spellings | {s.removesuffix(".0"): m for s, m in spellings.items() if s.endswith(".to_out.0")}


def _text_spellings(modules: list[str]) -> dict[str, str]:
    spellings = {_without_text_model(module, "."): module for module in modules}
    for ending, written in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
        spellings |= {s.removesuffix(ending) + written: m for s, m in spellings.items() if s.endswith(f".{ending}")}
    return spellings


def _without_text_model(name: str, separator: str) -> str:
    # only some versions and classes of transformers have this level
    return name.removeprefix(f"text_model{separator}")
