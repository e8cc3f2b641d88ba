"""Loading options under diffusers' names: mapped to the engine's own options, or rejected by name.

`Engine.from_pretrained` declares its own options; all further ones are handled here.
"""

from collections.abc import Mapping
from typing import Any

import torch

from stylefast import values
from stylefast.errors import InvalidRequest

# options of `load_components` that an engine passes on
PASSED_ON = ("variant", "local_files_only", "config", "tokenizer", "revision", "cache_dir", "token", "force_download")
_OTHER_NAMES = {"use_auth_token": "token", "original_config": "config", "original_config_file": "config"}

# option -> (values that match what is done anyway, why others are rejected and what to do instead)
_REFUSED: dict[str, tuple[tuple, str]] = {
    "use_safetensors": ((None, True), "pickled weights are not supported; get the .safetensors edition"),
    "low_cpu_mem_usage": ((None, True), "weights are never loaded twice; leave it out"),
    "safety_checker": ((None,), "SDXL has none, and stylefast runs none; check pictures after they are made"),
    "requires_safety_checker": ((None, False), "SDXL has none; leave it out"),
    "add_watermarker": ((None, False), "pictures get no watermark; add one to the result"),
    "subfolder": ((None, ""), "give the model's own folder, or a repository that contains only the model"),
    "custom_pipeline": ((None,), "pipeline code is not run; load only the model"),
    "custom_revision": ((None,), "pipeline code is not run; load only the model"),
    "trust_remote_code": ((None, False), "code from repositories is never run; leave it out"),
    "quantization_config": ((None,), "weights are held in 16 or 32 bits; give dtype='float16' or 'bfloat16'"),
    "proxies": ((None,), "set the environment variables HTTP_PROXY and HTTPS_PROXY"),
    "mirror": ((None,), "set the environment variable HF_ENDPOINT"),
    "resume_download": ((None, True), "downloads are always resumed; leave it out"),
    "output_loading_info": ((None, False), "weights that do not match are an error; leave it out"),
    "max_memory": ((None,), "the model is on one device; memory_limit= bounds its memory there"),
    "offload_folder": ((None,), "weights are not offloaded; give dtype='float16', or a smaller model"),
    "offload_state_dict": ((None, False), "weights are not offloaded; give dtype='float16', or a smaller model"),
    "provider": ((None,), "backend='onnxruntime' picks its own; leave it out"),
    "dduf_file": ((None,), "DDUF archives are not supported; unpack it and give the folder"),
    "use_onnx": ((None, False), "backend='onnxruntime' runs exported graphs"),
    "use_flashpack": ((None, False), "get the .safetensors edition"),
    "disable_mmap": ((None, False), "weights are read as safetensors does; leave it out"),
    "scheduler": ((None,), "a request names its sampler: Request(..., scheduler='dpmpp_2m')"),
    "unet": ((None,), "for your own parts, create a diffusers pipeline and use Engine.from_pipeline"),
    "text_encoder": ((None,), "for your own parts, create a diffusers pipeline and use Engine.from_pipeline"),
    "text_encoder_2": ((None,), "for your own parts, create a diffusers pipeline and use Engine.from_pipeline"),
    "tokenizer_2": ((None,), "tokenizer= takes a folder with tokenizer/ and tokenizer_2/"),
    "feature_extractor": ((None,), "image_encoder= takes a folder with an encoder and its preprocessor_config.json"),
    "controlnet": ((None,), "ControlNets are not run"),
    "force_zeros_for_empty_prompt": ((None,), "the model's own model_index.json says so; change it there"),
}


def sort_options(
    given: Mapping[str, Any], own: tuple[str, ...], dtype: Any, device: Any
) -> tuple[dict[str, Any], Any, Any]:
    """Sort options given in addition to an engine's own.

    own: names of the engine's options, for "did you mean". Returns (arguments for `load_components`, dtype, device);
    `torch_dtype` and `device_map` replace the latter two. Raises InvalidRequest for an option that is unknown,
    contradicts another, or is not supported.
    """
    options = {}
    for name, value in given.items():
        if name == "torch_dtype":
            dtype = _instead("torch_dtype", "dtype", "auto" if value is None else value, dtype)
        elif name == "device_map":
            if value is not None:
                device = _instead("device_map", "device", _device_of_map(value), device)
        elif name in PASSED_ON or name in _OTHER_NAMES:
            target = _OTHER_NAMES.get(name, name)
            if target != name and value is None:
                continue
            if target in options:
                raise InvalidRequest(f"{name} and {target} mean the same; give one of them")
            options[target] = value
        elif name in _REFUSED:
            harmless, reason = _REFUSED[name]
            if not any(value is one or (type(value) is type(one) and value == one) for one in harmless):
                raise InvalidRequest(f"{name}={values.quoted(value)} is not supported: {reason}")
        else:
            known = (*own, *PASSED_ON, "torch_dtype", "device_map", *_OTHER_NAMES, *_REFUSED)
            raise InvalidRequest(
                f"{values.quoted(name)} is not a loading option; choose one of "
                f"{', '.join((*own, *PASSED_ON))}{values.did_you_mean(name, known)}"
            )
    return options, dtype, device


def check_engine_options(given: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Raise InvalidRequest for options other than the engine's `own`, for an engine whose model is already loaded."""
    for name in given:
        if name in own:
            continue
        if name in ("dtype", "torch_dtype", "device", "device_map"):
            way_out = "move it first: pipeline.to('cuda', torch.float16)"
        elif name in ("vae", "adapter", "image_encoder", "tokenizer"):
            way_out = "put the part into the pipeline, or use Engine.from_pretrained, or engine.load_adapter"
        elif name in PASSED_ON or name in _OTHER_NAMES or name in _REFUSED:
            way_out = "it applies to Engine.from_pretrained, which loads a model"
        else:
            raise InvalidRequest(
                f"{values.quoted(name)} is not an engine option; choose one of "
                f"{', '.join(own)}{values.did_you_mean(name, own)}"
            )
        raise InvalidRequest(f"{name}= has no effect on a loaded pipeline; {way_out}")


def _instead(name: str, ours: str, value: Any, own: Any) -> Any:
    """Return the value of an alias of one of our options. Raises InvalidRequest if it contradicts that option."""

    def spelled(one: Any) -> Any:
        plain = isinstance(one, (str, torch.dtype, torch.device))
        return str(one).removeprefix("torch.") if plain else values.quoted(one)

    if not (isinstance(own, str) and own == "auto") and spelled(own) != spelled(value):
        raise InvalidRequest(f"{name} is {values.quoted(value)} and {ours} {values.quoted(own)}; give one of them")
    return value


def _device_of_map(value: Any) -> Any:
    if isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "auto")):
        return value
    raise InvalidRequest(
        f"device_map is {values.quoted(value)}; the whole model is on one device: give device='cuda' or 'cuda:1'"
    )
