"""Checks of a diffusers pipeline in memory: everything but its weights is taken over, rejected by name, or reported.

Hooks, processors and methods attached to a module change the pipeline's pictures, but are not in a state dict.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from stylefast.errors import ModelError, ModelFormatError
from stylefast.models.changed_modules import overriding, replaced_method
from stylefast.models.config_check import (
    check_config,
    check_image_encoder,
    check_text_encoder,
    check_tokenizer,
    check_vae,
)
from stylefast.models.config_files import config_of
from stylefast.models.statements import EDM_SCHEDULERS, MODEL_INDEX, PARTS, PIPELINES, TOKENIZER
from stylefast.values import listed, quoted

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

Module = TypeVar("Module", bound=nn.Module)

logger = logging.getLogger(__name__)

_PLAIN_ATTENTION = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "AttnProcessorNPU",
    "XFormersAttnProcessor",
    "SlicedAttnProcessor",
    "FusedAttnProcessor2_0",
    "XLAFlashAttnProcessor2_0",
)
_IMAGE_ATTENTION = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")
_LIBRARIES = ("torch", "diffusers", "transformers")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FUSED = (".to_qkv.", ".to_kv.")
# diffusers modules whose methods load, save and place pipelines, without effect on pictures
_BOOKKEEPING = (
    "diffusers.pipelines.pipeline_utils",
    "diffusers.configuration_utils",
    "diffusers.utils",
    "diffusers.loaders.lora",
    "diffusers.loaders.single_file",
    "diffusers.loaders.ip_adapter",
)
# the same of schedulers, tokenizers and image processors
_SAVING = (
    "diffusers.configuration_utils",
    "diffusers.schedulers.scheduling_utils",
    "diffusers.utils",
    "transformers.utils",
)
_FREEU = ("s1", "s2", "b1", "b2")
# tokens of a prompt, begin and end included, to which tokenizers are made to pad and cut as a trial
_TRIAL = 8


def check_pipeline(pipeline: "StableDiffusionXLPipeline") -> None:
    """Raise ModelFormatError or ModelError for settings that change the pipeline's pictures but not the engine's."""
    name = type(pipeline).__name__
    absent = [part for part in PARTS[:7] if getattr(pipeline, part, None) is None]
    if absent:
        raise ModelFormatError(f"{name} has no {', '.join(absent)}; an SDXL base pipeline is needed")
    base, own = overriding(pipeline, "diffusers", _BOOKKEEPING)
    if base is None or base.__name__ not in PIPELINES:
        raise ModelFormatError(
            f"{name} works differently from {PIPELINES[0]}, which is the supported one; to use only its model, give "
            f"{PIPELINES[0]}.from_pipe(pipe)"
        )
    if own:
        raise ModelFormatError(
            f"the pipeline ({name}) has {listed(own)} of its own instead of {base.__name__}'s, which the engine would "
            f"not call; to use only its model, give {PIPELINES[0]}.from_pipe(pipe), or "
            f"{PIPELINES[0]}(**pipe.components)"
        )
    # in the config, parts are stored as (library, class name)
    parts = [key for key, value in pipeline.config.items() if isinstance(value, (list, tuple))]
    further = [part for part in parts if part not in PARTS and getattr(pipeline, part, None) is not None]
    if further:
        raise ModelFormatError(
            f"the pipeline has parts that would be left out ({listed(further)}); to use its model without them, "
            f"give {PIPELINES[0]}.from_pipe(pipe)"
        )
    settings = {key: value for key, value in pipeline.config.items() if key not in parts}
    check_config(MODEL_INDEX, settings, f"the pipeline ({name})", "its config")
    if getattr(pipeline, "watermark", None) is not None:
        logger.warning("the pipeline adds an invisible watermark to its pictures, but the engine does not")
    _check_scheduler(pipeline.scheduler)
    _check_unet(inner(pipeline.unet))
    for part in ("text_encoder", "text_encoder_2"):
        encoder = inner(getattr(pipeline, part))
        _check_modules(f"the pipeline's {part}", encoder)
        check_text_encoder(encoder.config.to_dict(), f"the pipeline's {part}")
    for part in ("tokenizer", "tokenizer_2"):
        _check_tokenizer(getattr(pipeline, part), f"the pipeline's {part}")
    if (encoder := getattr(pipeline, "image_encoder", None)) is not None:
        encoder = inner(encoder)
        _check_modules("the pipeline's image_encoder", encoder)
        check_image_encoder(encoder.config.to_dict(), "the pipeline's image_encoder")
    if (extractor := getattr(pipeline, "feature_extractor", None)) is not None:
        # its config is checked once an adapter needs it
        _check_own("the pipeline's feature_extractor", extractor, "transformers")
    check_vae_module(pipeline.vae, "the pipeline")


def check_vae_module(vae: nn.Module, what: str, latent_channels: int | None = None) -> None:
    """Raise ModelFormatError for a module that is not an SDXL VAE or has another number of latent channels.

    Raises ModelError for one with a replaced method, or layers that are quantised, hooked by diffusers or offloaded.
    """
    vae = inner(vae)
    kinds = {kind.__name__ for kind in type(vae).__mro__} & {"AutoencoderKL", "AutoencoderTiny"}
    if not kinds:
        raise ModelFormatError(
            f"the VAE of {what} is a {type(vae).__name__}; AutoencoderKL and AutoencoderTiny are supported"
        )
    # only its encoder and decoder are called, as they are
    if method := replaced_method(vae):
        raise ModelError(
            f"the method {method} of the VAE of {what} was replaced, and the engine would not call it; restore the "
            "method, or load the VAE again"
        )
    _check_modules(f"the VAE of {what}", vae, called=True)
    check_vae({**config_of(vae), "_class_name": kinds.pop()}, what, latent_channels)


def check_same_latents(own: Mapping, vae: nn.Module, what: str) -> None:
    """Raise ModelFormatError if a VAE normalises latents differently from the model's own, of config `own`."""
    theirs = config_of(inner(vae))
    for key in ("latents_mean", "latents_std"):
        expected, found = own.get(key), theirs.get(key)
        if (None if expected is None else [*expected]) != (None if found is None else [*found]):
            raise ModelFormatError(
                f"{what} works on latents of {key}={quoted(expected)}, but the VAE given instead of its own works "
                f"on {quoted(found)}; use a VAE of this model's family"
            )


def inner(module: Module) -> Module:
    """Return the module wrapped by `torch.compile`, or the module itself."""
    return getattr(module, "_orig_mod", module)


def unet_weights(unet: "UNet2DConditionModel") -> dict[str, torch.Tensor]:
    """Return the UNet's own weights by diffusers' names, without an IP-Adapter's and fused projections.

    Raises ModelError for weights that are quantised, of several types, offloaded, or different from fused ones.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in unet.state_dict().items()}
    # an IP-Adapter's layers are in the processors and in the projection of image embeddings
    own = {
        name: value
        for name, value in state.items()
        if ".processor." not in name and not name.startswith("encoder_hid_proj.")
    }
    if len(own) < len(state):
        logger.warning("the pipeline's IP-Adapter is left out; engine.load_adapter(file) loads it")
    if any(value.is_meta for value in own.values()):
        raise ModelError("the pipeline's UNet is offloaded; give a pipeline without enable_sequential_cpu_offload()")
    foreign = {type(value).__name__ for value in own.values()} - {"Tensor", "Parameter"}
    if foreign:
        raise ModelError(f"the pipeline's UNet is quantised ({', '.join(foreign)}); load it in 16 or 32 bits")
    types = {value.dtype for value in own.values()}
    if len(types) > 1 or not types <= {*_FLOATS}:
        shown = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
        raise ModelError(
            f"the pipeline's UNet has weights in {shown}; they must all be float32, float16 or bfloat16, for "
            "example after pipe.to(torch.float16)"
        )
    plain = {name: value for name, value in own.items() if not any(mark in name for mark in _FUSED)}
    if any(type(one).__name__.startswith("Fused") for one in unet.attn_processors.values()):
        _check_fused(own, plain)
    return plain


def _check_fused(state: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    for name in state.keys() - plain.keys():
        place, fused, kind = name.rsplit(".", 2)
        if kind == "weight":
            parts = [plain[f"{place}.to_{letter}.weight"] for letter in fused.removeprefix("to_")]
            if not torch.equal(torch.cat(parts), state[name]):
                raise ModelError(
                    f"{place} has fused projections that differ from those they were made from; call "
                    "unfuse_qkv_projections() on the pipeline before its weights change"
                )


def _check_scheduler(scheduler) -> None:
    """Raise ModelError for a scheduler with methods of its own, or whose noise levels are not those of its config."""
    _check_own("the pipeline's scheduler", scheduler, "diffusers")
    name = "alphas_cumprod"
    if type(scheduler).__name__ in EDM_SCHEDULERS:
        if scheduler.num_inference_steps is not None:
            return  # levels of its last call; every call computes its own from the config
        name = "sigmas"
    levels = getattr(scheduler, name, None)
    if levels is None:
        return
    fresh = getattr(type(scheduler).from_config(scheduler.config), name)
    if levels.shape != fresh.shape or not torch.allclose(levels.cpu(), fresh, rtol=1e-5, atol=0):
        raise ModelError(
            f"the noise levels of the pipeline's {type(scheduler).__name__} are not those of its config; specify in "
            "the config how they are computed (rescale_betas_zero_snr, trained_betas)"
        )


def _check_own(what: str, thing: Any, library: str) -> None:
    """Raise ModelFormatError for an object of another library, ModelError for one with methods of its own."""
    base, own = overriding(thing, library, _SAVING)
    if base is None:
        raise ModelFormatError(f"{what} is a {type(thing).__name__}, which is not of {library}; give {library}'s own")
    if own:
        raise ModelError(
            f"{what} ({type(thing).__name__}) has {listed(own)} of its own instead of {base.__name__}'s, which the "
            "engine would not call; load it again"
        )


def _check_tokenizer(tokenizer: Any, what: str) -> None:
    """Raise ModelFormatError or ModelError for a tokenizer that is not CLIP's or makes other tokens than the engine.

    The engine asks it for the tokens of words, and writes begin, end and padding itself.
    """
    config = {key: value for key, value in getattr(tokenizer, "init_kwargs", {}).items() if key in TOKENIZER}
    live = {key: getattr(tokenizer, key) for key in ("padding_side", "truncation_side") if hasattr(tokenizer, key)}
    kinds = [kind.__name__ for kind in type(tokenizer).__mro__ if kind.__module__.split(".")[0] == "transformers"]
    name = next(iter(kinds), type(tokenizer).__name__)
    check_tokenizer({**config, **live, "tokenizer_class": name}, what)
    _check_own(what, tokenizer, "transformers")
    try:
        words, begin, end, pad = tokenizer("A a", add_special_tokens=False).input_ids, *_special(tokenizer)
        cut = [begin, *(words * _TRIAL)[: _TRIAL - 2], end]
        expected = [[begin, *words, end], [begin, *words, end] + [pad] * (_TRIAL - len(words) - 2), cut, [end]]
        framed = {"padding": "max_length", "max_length": _TRIAL, "truncation": True}
        found = [
            tokenizer("a A").input_ids,
            tokenizer("a A", **framed).input_ids,
            tokenizer("a A " * _TRIAL, **framed).input_ids,
            tokenizer(tokenizer.eos_token, add_special_tokens=False).input_ids,
        ]
    except Exception as error:  # of many types, from two libraries
        raise ModelFormatError(f"{what} can't tokenise a text ({quoted(str(error))}); load it again") from error
    for wanted, tokens in zip(expected, found, strict=True):
        if list(tokens) != wanted:
            raise ModelError(
                f"{what} was changed: it makes the tokens {quoted(list(tokens))} of a text that has {quoted(wanted)} "
                "here (add_bos_token, add_eos_token, split_special_tokens, or its normaliser); load it again"
            )


def _special(tokenizer: Any) -> Sequence[int]:
    """Return the ids of the begin, end and padding tokens."""
    return [int(getattr(tokenizer, f"{name}_token_id")) for name in ("bos", "eos", "pad")]


def _check_unet(unet: "UNet2DConditionModel") -> None:
    if "UNet2DConditionModel" not in {kind.__name__ for kind in type(unet).__mro__}:
        raise ModelFormatError(f"the pipeline's UNet is a {type(unet).__name__}; UNet2DConditionModel is supported")
    _check_modules("the pipeline's unet", unet)
    hooked = [name for name, one in unet.named_modules() if one._forward_hooks or one._forward_pre_hooks]
    if hooked:
        raise ModelError(
            f"the pipeline's UNet has forward hooks ({hooked[0] or 'on itself'}), which the engine would not call; "
            "remove them"
        )
    drops = [name for name, one in unet.named_modules() if one.training and isinstance(one, nn.Dropout) and one.p > 0]
    if drops:
        raise ModelError(
            f"the pipeline's UNet is in training mode and has dropout ({drops[0]}), which the engine does not "
            "support; call eval() on it"
        )
    if any(getattr(block, key, None) is not None for block in unet.up_blocks for key in _FREEU):
        raise ModelError("FreeU is on in the pipeline and not supported; call disable_freeu() on it")
    for place, processor in unet.attn_processors.items():
        kind = type(processor)
        own = kind.__module__.split(".")[0] == "diffusers"
        if not own or kind.__name__ not in (*_PLAIN_ATTENTION, *_IMAGE_ATTENTION):
            raise ModelError(
                f"the pipeline's UNet has an attention processor {kind.__name__} ({place}), which the engine would "
                "not call; remove it with unet.set_default_attn_processor()"
            )


def _check_modules(what: str, module: nn.Module, called: bool = False) -> None:
    """Raise ModelError for modules that don't behave like their class: wrapped, patched, hooked or quantised.

    called: the module's layers are called as they are, so replaced methods take effect and are accepted.
    """
    for name, one in module.named_modules():
        place, kind = name or "itself", type(one)
        library = kind.__module__.split(".")[0]
        if library == "peft":
            raise ModelError(
                f"{what} holds LoRA layers ({place}); call fuse_lora() and unload_lora_weights() on the pipeline first"
            )
        if library not in _LIBRARIES:
            raise ModelError(
                f"{what} has a {kind.__name__} of {library} ({place}), quantised or patched; load the model in 16 or "
                "32 bits without it"
            )
        hooks = getattr(getattr(one, "_diffusers_hook", None), "hooks", {})
        if hooks:
            raise ModelError(
                f"{what} has diffusers' hook {', '.join(hooks)} ({place}), which is not supported; load the pipeline "
                "without it"
            )
        if not called and (method := replaced_method(one)):
            raise ModelError(
                f"the method {method} of {what} was replaced ({place}), for example by DeepCache or seamless "
                "tiling; remove that from the pipeline"
            )
        for parameter in one.parameters(recurse=False):
            if parameter.is_meta:
                raise ModelError(f"{what} is offloaded; give a pipeline without enable_sequential_cpu_offload()")
            if type(parameter) not in (nn.Parameter, torch.Tensor):
                raise ModelError(f"{what} is quantised ({type(parameter).__name__}, {place}); load it in 16 or 32 bits")
