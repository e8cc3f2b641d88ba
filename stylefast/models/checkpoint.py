"""From any form of an SDXL checkpoint to its `Components`: diffusers folder, hub id, single file, pipeline, "tiny"."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stylefast.errors import InvalidRequest, ModelError, ModelFormatError, ModelNotFound
from stylefast.models import single_file
from stylefast.models.hub import hub_folder, is_hub_id, pick_weights, wanted_files
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.layout import STYLE_MODULE
from stylefast.models.packed import channels_last
from stylefast.models.quantised import check_storage
from stylefast.models.stored_tensors import load_weights
from stylefast.models.vae import check_state, fill, infer_vae_config, load_vae, vae_from_folder, vae_from_original
from stylefast.models.weight_files import (
    PICKLED,
    WeightHeader,
    offline,
    read_header,
    require_memory,
)

TINY = Path(__file__).parent / "tiny"
_PARTS = ("unet", "text_encoder", "text_encoder_2", "vae", "image_encoder")
_CONFIG_PARTS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
_TOKENIZER_SOURCES = ("stabilityai/stable-diffusion-xl-base-1.0", "openai/clip-vit-large-patch14")


@dataclass
class Components:
    """The parts of one SDXL model, loaded. `unet_state` has diffusers' names; modules are in eval mode."""

    unet_config: dict[str, Any]  # complete: diffusers' defaults are filled in
    unet_state: dict[str, torch.Tensor]
    vae: torch.nn.Module  # AutoencoderKL or AutoencoderTiny
    text_encoders: tuple  # (CLIPTextModel, CLIPTextModelWithProjection)
    tokenizers: tuple
    scheduler_config: dict[str, Any]
    force_zeros: bool  # without a negative prompt, the null branch gets zeros for its text
    image_encoder: torch.nn.Module | None = None  # CLIPVisionModelWithProjection, where the checkpoint brings one
    feature_extractor: dict[str, Any] | None = None  # its CLIPImageProcessor config
    name: str = ""
    fingerprint: str = ""
    adapter_path: Path | None = None  # an IP-Adapter shipped in the folder `ip_adapter`
    style_paths: Mapping[str, Path] = field(default_factory=dict)  # learned styles shipped in the folder `styles`
    reference_paths: Mapping[str, Path] = field(default_factory=dict)  # example pictures in the folder `references`
    style_modules: tuple[str, ...] = (STYLE_MODULE,)  # attention modules that carry style, of `stylefast.json`


def load_components(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    vae=None,
    variant: str | None = "auto",
    local_files_only: bool = False,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
) -> Components:
    """Load an SDXL model.

    source: "tiny" (the embedded model), a diffusers folder, a hub id, or a `.safetensors` file in the original layout.
    dtype: "auto" is float32 on the CPU and float16 on a GPU. vae: see `vae.load_vae`; replaces the checkpoint's own.
    variant: which edition of a folder's weights; "auto" prefers "fp16" for 16-bit types and takes what there is.
    config, tokenizer: for a single file only: a folder with the JSON configs of a diffusers folder (otherwise they are
    inferred), and one with `tokenizer/` and `tokenizer_2/`, or a CLIP tokenizer (otherwise the cache, then the hub).

    Raises ModelNotFound, ModelFormatError, OutOfMemory (before anything is loaded), InvalidRequest.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    path = Path(source).expanduser()
    if str(source) == "tiny":
        if not (TINY / "model_index.json").is_file():
            raise ModelNotFound(f"the embedded model is not in this installation ({TINY}); install the package again")
        path = TINY
    if path.is_file():
        components = _from_file(path, dtype, device, vae, local_files_only, config, tokenizer)
    else:
        if not path.is_dir():
            path = _find_on_hub(source, path, dtype, variant, local_files_only)
        components = _from_folder(path, dtype, device, vae, variant, local_files_only)
    components.name = str(source) if str(source) == "tiny" or is_hub_id(str(source)) else path.name
    components.fingerprint = fingerprint(components)
    return components


def from_pipeline(pipeline) -> Components:
    """Components of an existing diffusers SDXL pipeline: storage is shared, the pipeline is left as it is, but for the
    memory format of its UNet's convolutions on a GPU, which becomes channels last.

    An IP-Adapter loaded into the pipeline is left out. Raises ModelFormatError for a pipeline of another model, and
    ModelError if its weights are not at hand (offloaded layer by layer, or LoRA layers that are not fused).
    """
    parts = {part: getattr(pipeline, part, None)
             for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")}
    absent = [part for part, value in parts.items() if value is None]
    if absent:
        raise ModelFormatError(f"{type(pipeline).__name__} has no {', '.join(absent)}; an SDXL base pipeline is needed")
    unet = getattr(parts["unet"], "_orig_mod", parts["unet"])
    # the pipeline's own parameters, so that storage stays shared
    channels_last(dict(unet.named_parameters()))
    # an IP-Adapter's layers sit in the processors and in the projection of image embeddings
    state = {name: value for name, value in unet.state_dict().items()
             if ".processor." not in name and not name.startswith("encoder_hid_proj.")}
    if any(".lora_A." in name or ".base_layer." in name for name in state):
        raise ModelError("the pipeline holds LoRA layers; call fuse_lora() and unload_lora_weights() on it first")
    if any(value.is_meta for value in state.values()):
        raise ModelError("the pipeline's UNet is offloaded; give a pipeline without enable_sequential_cpu_offload()")
    config = dict(unet.config) | {"encoder_hid_dim_type": None}
    extractor = getattr(pipeline, "feature_extractor", None)
    components = Components(
        unet_config=_complete_unet_config(config, state, "the pipeline's UNet"),
        unet_state=state,
        vae=getattr(parts["vae"], "_orig_mod", parts["vae"]),
        text_encoders=tuple(getattr(parts[p], "_orig_mod", parts[p]) for p in ("text_encoder", "text_encoder_2")),
        tokenizers=(parts["tokenizer"], parts["tokenizer_2"]),
        scheduler_config=dict(parts["scheduler"].config),
        force_zeros=bool(pipeline.config.get("force_zeros_for_empty_prompt", True)),
        image_encoder=getattr(pipeline, "image_encoder", None),
        feature_extractor=extractor.to_dict() if extractor is not None else None,
        name=str(pipeline.config.get("_name_or_path") or "pipeline"),
    )
    components.fingerprint = fingerprint(components)
    return components


def load_image_encoder(source: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> ImageEncoder:
    """Load the CLIP image encoder of an IP-Adapter from a folder with config.json and .safetensors weights.

    Raises ModelNotFound where no such folder is, ModelFormatError where it holds another model.
    """
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelNotFound(
            f"no image encoder at {folder}; give the folder with its config.json, e.g. models/image_encoder (ViT-H) or "
            "sdxl_models/image_encoder (ViT-bigG) of a download of h94/IP-Adapter"
        )
    config = _read_json(folder / "config.json", folder)
    if "image_size" not in config:
        raise ModelFormatError(f"{folder} holds a {config.get('model_type', 'model')}, no CLIP image encoder")
    files = _weights(folder, dtype != torch.float32, "auto")
    if not files:
        raise ModelNotFound(f"{folder} holds no .safetensors weights")
    state = {}
    for file in files:
        read_header(folder / file)
        state |= load_weights(folder / file, dtype=dtype, device=device)
    processor = folder / "preprocessor_config.json"
    model = _clip("CLIPVisionModelWithProjection", config, state, str(folder))
    return ImageEncoder(model, json.loads(processor.read_text()) if processor.is_file() else None)


def resolve_device(device: torch.device | str) -> torch.device:
    """"auto" is the first CUDA GPU where there is one, else the CPU. Raises InvalidRequest for one that is absent."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise InvalidRequest(f"device={device!r} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(f"no device {device}: torch sees {torch.cuda.device_count()} CUDA GPUs; use 'cpu'")
    return device


def resolve_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """"auto" is float32 on the CPU and float16 on a GPU; otherwise float32, float16 or bfloat16, also as "fp16" etc."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    names = {"float32": torch.float32, "fp32": torch.float32, "float16": torch.float16, "fp16": torch.float16,
             "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    chosen = names.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise InvalidRequest(f"dtype={dtype!r} is not one of 'auto', 'float32', 'float16', 'bfloat16'")
    return chosen


def fingerprint(components: Components) -> str:
    """64 hex digits that tell one set of weights from another: all names, shapes and types, and 256 values each of
    some 48 tensors spread over UNet, text encoders and VAE. Takes milliseconds.
    """
    first, second = components.text_encoders
    tensors = {f"unet.{name}": value for name, value in components.unet_state.items()}
    for part, module in (("text_encoder", first), ("text_encoder_2", second), ("vae", components.vae)):
        tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    digest = hashlib.sha256()
    names = sorted(tensors)
    for name in names:
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}\n".encode())
    for name in names[:: max(len(names) // 48, 1)]:
        values = tensors[name].detach().reshape(-1)
        picked = values[:: max(values.numel() // 256, 1)][:256]
        digest.update(picked.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _find_on_hub(source, path: Path, dtype, variant, local_files_only: bool) -> Path:
    if path.suffix in (".safetensors", *PICKLED) or not is_hub_id(str(source)):
        raise ModelNotFound(
            f"nothing at {path}; give 'tiny', a diffusers folder, a .safetensors file, or a hub id such as "
            "'stabilityai/stable-diffusion-xl-base-1.0'"
        )
    half = dtype != torch.float32

    def complete(folder: Path) -> bool:
        return all(_weights(folder / part, half, variant) for part in _PARTS[:4])

    def select(names: list[str]) -> list[str]:
        return wanted_files(names, half, variant, (*_PARTS, *_CONFIG_PARTS))

    return hub_folder(str(source), complete, select, local_files_only)


def _from_folder(folder: Path, dtype, device, vae, variant, local_files_only: bool) -> Components:
    index = _read_json(folder / "model_index.json", folder)
    own_vae = vae is None
    parts = [part for part in _PARTS if own_vae or part != "vae"]
    configs = {part: _read_json(folder / part / "config.json", folder) for part in parts
               if part != "image_encoder" or (folder / part / "config.json").is_file()}
    _check_is_sdxl(configs["unet"], f"{folder.name} ({index.get('_class_name', 'no pipeline class')})")
    half = dtype != torch.float32
    headers: dict[str, list[WeightHeader]] = {}
    for part in configs:
        files = _weights(folder / part, half, variant)
        if not files:
            there = sorted(f.name for f in (folder / part).iterdir() if f.suffix in (".safetensors", *PICKLED))
            raise ModelNotFound(f"{folder / part} has no .safetensors weights of variant {variant!r}; it holds "
                                f"{', '.join(there) or 'no weights at all'}")
        headers[part] = [read_header(folder / part / file) for file in files]
    require_memory(sum(h.elements() for many in headers.values() for h in many) * dtype.itemsize, device, folder.name)

    def state(part: str) -> dict[str, torch.Tensor]:
        tensors = {}
        for header in headers[part]:
            tensors |= load_weights(header.path, dtype=dtype, device=device)
        return tensors

    unet_state = state("unet")
    extractor = folder / "feature_extractor" / "preprocessor_config.json"
    adapters = sorted((folder / "ip_adapter").glob("*.safetensors"))
    own = folder / "stylefast.json"
    return Components(
        unet_config=_complete_unet_config(configs["unet"], unet_state, f"{folder.name}/unet"),
        unet_state=unet_state,
        vae=vae_from_folder(folder / "vae", dtype=dtype, device=device, variant=variant) if own_vae
        else load_vae(vae, dtype=dtype, device=device, local_files_only=local_files_only),
        text_encoders=(
            _clip("CLIPTextModel", configs["text_encoder"], state("text_encoder"), f"{folder.name}/text_encoder"),
            _clip("CLIPTextModelWithProjection", configs["text_encoder_2"], state("text_encoder_2"),
                  f"{folder.name}/text_encoder_2"),
        ),
        tokenizers=(_tokenizer(folder / "tokenizer"), _tokenizer(folder / "tokenizer_2")),
        scheduler_config=_read_json(folder / "scheduler" / "scheduler_config.json", folder),
        force_zeros=bool(index.get("force_zeros_for_empty_prompt", True)),
        image_encoder=_clip("CLIPVisionModelWithProjection", configs["image_encoder"], state("image_encoder"),
                            f"{folder.name}/image_encoder") if "image_encoder" in configs else None,
        feature_extractor=json.loads(extractor.read_text()) if extractor.is_file() else None,
        adapter_path=adapters[0] if adapters else None,
        style_paths={file.stem: file for file in sorted((folder / "styles").glob("*.safetensors"))},
        reference_paths={file.stem: file for file in sorted((folder / "references").glob("*.png"))},
        style_modules=tuple(_read_json(own, folder)["style_modules"]) if own.is_file() else (STYLE_MODULE,),
    )


def _from_file(path: Path, dtype, device, vae, local_files_only: bool, config, tokenizer) -> Components:
    header = read_header(path)
    single_file.check_single_file(header, needs_vae=vae is None)
    check_storage(header.tensors, path.name)
    require_memory(header.elements() * dtype.itemsize, device, path.name)
    unet_config = single_file.config_from_folder(config, "unet") or single_file.infer_unet_config(header)
    text_configs = tuple(single_file.config_from_folder(config, part) for part in ("text_encoder", "text_encoder_2"))
    if None in text_configs:
        text_configs = single_file.infer_text_configs(header)
    tokenizers = _find_tokenizers(path, tokenizer or config, local_files_only)

    unet_state = single_file.convert_unet(
        load_weights(path, dtype=dtype, device=device, prefix=single_file.UNET), unet_config
    )
    if vae is None:
        vae_config = single_file.config_from_folder(config, "vae") or infer_vae_config(header, single_file.VAE)
        held = torch.float32 if dtype == torch.float16 and vae_config.get("force_upcast", True) else dtype
        loaded = load_weights(path, dtype=held, device=device, prefix=single_file.VAE)
        vae = vae_from_original(vae_config, loaded, path.name)
    else:
        vae = load_vae(vae, dtype=dtype, device=device, local_files_only=local_files_only)

    second = _empty_clip("CLIPTextModelWithProjection", text_configs[1])
    texts = single_file.convert_text_encoders(
        load_weights(path, dtype=dtype, device=device, prefix="conditioner.embedders."), second
    )
    return Components(
        unet_config=_complete_unet_config(unet_config, unet_state, path.name),
        unet_state=unet_state,
        vae=vae,
        text_encoders=(
            _clip("CLIPTextModel", text_configs[0], texts[0], path.name),
            _clip("CLIPTextModelWithProjection", text_configs[1], texts[1], path.name),
        ),
        tokenizers=tokenizers,
        scheduler_config=single_file.config_from_folder(config, "scheduler") or single_file.scheduler_config(header),
        force_zeros=True,
    )


def _check_is_sdxl(config: Mapping, what: str) -> None:
    width = config.get("cross_attention_dim")
    if config.get("addition_embed_type") != "text_time":
        family = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}.get(width, "another family")
        raise ModelFormatError(
            f"{what} is no SDXL model: its UNet is of {family} (cross-attention {width} wide, no size conditioning)"
        )
    if config.get("projection_class_embeddings_input_dim") == 2560:
        raise ModelFormatError(f"{what} is the SDXL refiner; load the base model")
    if config.get("in_channels", 4) != 4:
        raise ModelFormatError(
            f"{what} has {config['in_channels']} input channels (inpainting or editing); a text-to-image model has 4"
        )


def _complete_unet_config(config: Mapping, state: dict[str, torch.Tensor], what: str) -> dict[str, Any]:
    """Fill diffusers' defaults into a UNet config, and check that the weights are those of such a UNet."""
    from diffusers import UNet2DConditionModel

    _check_is_sdxl(config, what)
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(plain)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelFormatError(f"the config of {what} describes no UNet ({error})") from error
    check_state({name: tuple(value.shape) for name, value in unet.state_dict().items()}, state, what)
    return {name: value for name, value in dict(unet.config).items() if not name.startswith("_")}


def _empty_clip(kind: str, config: Mapping):
    """A CLIP model without weights."""
    import transformers

    model_class = getattr(transformers, kind)
    with torch.device("meta"):
        return model_class(model_class.config_class.from_dict(dict(config)))


def _clip(kind: str, config: Mapping, state: dict[str, torch.Tensor], what: str):
    """A CLIP text or vision model around the tensors of `state`."""
    model = _empty_clip(kind, config)
    expected = model.state_dict()
    tower = "vision_model." if "Vision" in kind else "text_model."
    state = {name: value for name, value in state.items() if not name.endswith("embeddings.position_ids")}
    state = single_file.with_linear_projection(state)
    # files always hold the tower's prefix; some versions of transformers dropped it from the module
    if not any(name.startswith(tower) for name in expected):
        state = {name.removeprefix(tower): value for name, value in state.items()}
    elif state and not any(name.startswith(tower) for name in state):
        state = {f"{tower}{name}": value for name, value in state.items()}
    fill(model, {name: value for name, value in state.items() if name in expected or name != "text_projection.weight"},
         what)
    device = next(iter(state.values())).device
    for module in model.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, torch.Tensor) and ids.is_meta:
            module.position_ids = torch.arange(ids.shape[-1], device=device).expand(1, -1)
    return model


def _tokenizer(folder: Path, **arguments):
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ModelNotFound(f"{folder} holds no CLIP tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **arguments)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFormatError(f"the tokenizer in {folder} can't be read ({error})") from error


def _find_tokenizers(path: Path, given, local_files_only: bool) -> tuple:
    """Tokenizers for a single file, which holds none: from where the caller says, beside it, the cache, the hub."""
    if given is not None and not Path(given).is_dir():
        raise ModelNotFound(f"no folder at {given}; tokenizer= and config= take a folder on this machine")
    for folder in filter(None, (given and Path(given), path.parent)):
        if (folder / "tokenizer").is_dir() and (folder / "tokenizer_2").is_dir():
            return _tokenizer(folder / "tokenizer"), _tokenizer(folder / "tokenizer_2")
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            # one vocabulary serves both encoders; the second pads with "!", id 0
            return _tokenizer(folder), _tokenizer(folder, pad_token="!")

    def has_vocabulary(folder: Path) -> bool:
        places = (folder, folder / "tokenizer")
        return any((place / file).is_file() for place in places for file in ("tokenizer.json", "vocab.json"))

    for repo_id in _TOKENIZER_SOURCES:
        try:
            # the last one is small enough to fetch; the first is only looked up in the cache
            cached_only = local_files_only or repo_id != _TOKENIZER_SOURCES[-1]
            folder = hub_folder(
                repo_id, has_vocabulary, lambda names: wanted_files(names, False, "none", ("",)), cached_only
            )
        except ModelNotFound:
            continue
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        return _tokenizer(folder), _tokenizer(folder, pad_token="!")
    reason = "downloads are switched off" if local_files_only or offline() else "the hub can't be reached"
    raise ModelNotFound(
        f"{path.name} holds no tokenizer, no CLIP tokenizer is cached, and {reason}. Get the small files vocab.json "
        f"and merges.txt (on a machine with network: `hf download {_TOKENIZER_SOURCES[-1]} vocab.json merges.txt "
        "tokenizer_config.json --local-dir clip-tokenizer`) and pass tokenizer='clip-tokenizer', or put them beside "
        "the file"
    )


def _weights(folder: Path, half: bool, variant: str | None) -> list[str]:
    return pick_weights([file.name for file in folder.iterdir()], half, variant) if folder.is_dir() else []


def _read_json(file: Path, folder: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelNotFound(f"{file.relative_to(folder)} is missing in {folder}; a diffusers SDXL folder has it")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ModelFormatError(f"{file.relative_to(folder)} in {folder} is no JSON ({error})") from error
