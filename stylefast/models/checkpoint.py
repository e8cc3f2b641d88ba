"""Loading of SDXL `Components` from a diffusers folder, hub id, single file, pipeline, or "tiny"."""

import copy
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stylefast import values
from stylefast.errors import InvalidRequest, ModelFormatError, ModelNotFound
from stylefast.models import single_file
from stylefast.models.changed_modules import Made, check_as_made, made_modules
from stylefast.models.config_check import (
    check_image_encoder,
    check_model_index,
    check_text_encoder,
    check_unet,
    checked_scheduler,
    indexed_scheduler,
)
from stylefast.models.config_files import build, config_of, read_config, style_modules
from stylefast.models.digests import sampled_bytes
from stylefast.models.hub import HubOptions, cached_ids, hub_folder, is_hub_id, is_whole, present, wanted_files
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.known_words import known_words
from stylefast.models.layout import STYLE_MODULE, AttentionLayout, UNetShape
from stylefast.models.pipeline_check import check_pipeline, check_same_latents, check_vae_module, inner, unet_weights
from stylefast.models.prepacked import channels_last
from stylefast.models.quantised import check_storage
from stylefast.models.single_file_marks import check_marks, marked_scheduler, marked_size, marked_vae
from stylefast.models.stored_tensors import load_weights
from stylefast.models.tokenizers import find_tokenizers, given_folder, has_vocabulary, tokenizers_in
from stylefast.models.vae import check_state, fill, infer_vae_config, load_vae, vae_from_folder, vae_from_original
from stylefast.models.weight_files import (
    PICKLED,
    WeightHeader,
    read_header,
    require_memory,
)
from stylefast.options import PREDICTION_TYPES

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

TINY = Path(__file__).parent / "tiny"
_PARTS = ("unet", "text_encoder", "text_encoder_2", "vae", "image_encoder")
# (config, tensors) -> (shapes, complete config, modules), cached because building diffusers' UNet is slow
_UNETS: dict[tuple[str, int], tuple[dict[str, tuple], dict[str, Any], Made]] = {}
_MOST_UNETS = 8
_CONFIG_PARTS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")


@dataclass
class Components:
    """Loaded parts of one SDXL model. `unet_state` uses diffusers' names; modules are in eval mode."""

    unet_config: dict[str, Any]  # complete, with diffusers' defaults
    unet_state: dict[str, torch.Tensor]
    vae: torch.nn.Module  # AutoencoderKL or AutoencoderTiny
    text_encoders: "tuple[CLIPTextModel, CLIPTextModelWithProjection]"
    tokenizers: tuple
    scheduler_config: dict[str, Any]
    force_zeros: bool  # without a negative prompt, the null branch's text states are zeros
    image_encoder: "CLIPVisionModelWithProjection | None" = None
    feature_extractor: dict[str, Any] | None = None  # its CLIPImageProcessor config
    name: str = ""
    fingerprint: str = ""
    adapter_path: Path | None = None  # an IP-Adapter shipped in the folder `ip_adapter`
    style_paths: Mapping[str, Path] = field(default_factory=dict)  # learned styles shipped in the folder `styles`
    reference_paths: Mapping[str, Path] = field(default_factory=dict)  # example pictures in the folder `references`
    lora_paths: Mapping[str, Path] = field(default_factory=dict)  # LoRAs shipped in the folder `loras`
    control_paths: Mapping[str, Path] = field(default_factory=dict)  # control networks in the folder `control`
    style_modules: tuple[str, ...] = (STYLE_MODULE,)  # attention modules that carry style, from `stylefast.json`
    known_words: tuple[str, ...] | None = None  # the only words the text encoders were trained on; None: any text


def load_components(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    vae: str | Path | torch.nn.Module | None = None,
    variant: str | None = "auto",
    local_files_only: bool = False,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    prediction_type: str | None = None,
) -> Components:
    """Load an SDXL model.

    source: "tiny" (the embedded model), a diffusers folder, a hub id, or a `.safetensors` file in the original layout.
    dtype: "auto" is float32 on the CPU and float16 on a GPU. vae: see `vae.load_vae`; replaces the checkpoint's own.
    variant: edition of a folder's weights; "auto" prefers "fp16" for 16-bit types, but uses any edition there is.
    config: for a single file only: a folder with the JSON configs of a diffusers folder; None: inferred.
    tokenizer: a folder with `tokenizer/` and `tokenizer_2/`, or a CLIP tokenizer; None: the folder's own, or for a
    single file the first found in `config`, next to the file, in the cache, on the hub.
    revision, cache_dir, token, force_download, local_files_only: for hub ids; see `hub.HubOptions`.
    prediction_type: "epsilon" or "v_prediction", overrides the model's files; None: as they say.

    Raises ModelNotFound, ModelFormatError, OutOfMemory (before anything is loaded), InvalidRequest.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    hub = HubOptions(revision, cache_dir, token, force_download, local_files_only)
    if variant is not None:
        values.text("variant", variant, longest=50, empty=False)
    if prediction_type is not None:
        values.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    path = values.path("the model", source)
    if str(source) == "tiny":
        if not (TINY / "model_index.json").is_file():
            raise ModelNotFound(f"the embedded model is not in this installation ({TINY}); install the package again")
        path = TINY
    if os.path.exists(path) and (revision is not None or hub.force_download):
        raise InvalidRequest(
            f"revision= and force_download= apply to ids on the hub, but {values.shown_path(path)} is local; leave "
            "them out"
        )
    if os.path.isfile(path):
        if variant not in (None, "auto"):
            raise InvalidRequest(
                f"variant={values.quoted(variant)} selects among the files of a folder, but {path.name} is a single "
                "file"
            )
        components = _from_file(path, dtype, device, vae, hub, config, tokenizer)
    else:
        if config is not None:
            raise InvalidRequest(f"config= applies to single files, but {source} is a folder with its own configs")
        if not os.path.isdir(path):
            path = _find_on_hub(source, path, dtype, variant, vae, tokenizer, hub)
        components = _from_folder(path, dtype, device, vae, variant, tokenizer, hub)
    components = predicting(components, prediction_type)
    components.name = str(source) if str(source) == "tiny" or is_hub_id(str(source)) else path.name
    _check_parts_fit(components)
    components.fingerprint = fingerprint(components)
    return components


def from_pipeline(pipeline: "StableDiffusionXLPipeline") -> Components:
    """Build Components that share storage with a diffusers SDXL pipeline.

    The pipeline stays unchanged, except that its UNet's convolutions on a GPU become channels last. Settings other than
    weights are taken over, rejected, or reported as ignored, see `statements.IN_MEMORY`. Raises ModelFormatError for
    a pipeline of another model, ModelError if its output doesn't follow from its weights, or if its weights are
    unavailable.
    """
    check_pipeline(pipeline)
    unet = inner(pipeline.unet)
    # convert the pipeline's own parameters, so that storage stays shared
    channels_last(dict(unet.named_parameters()))
    state = unet_weights(unet)
    config = dict(unet.config)
    if config.get("encoder_hid_dim_type") == "ip_image_proj":
        config["encoder_hid_dim_type"] = None
    encoder, extractor = (getattr(pipeline, part, None) for part in ("image_encoder", "feature_extractor"))
    complete, made = _made_unet(config, state, "the pipeline's UNet")
    check_as_made("the pipeline's UNet", unet, made)
    components = Components(
        unet_config=complete,
        unet_state=state,
        vae=inner(pipeline.vae),
        text_encoders=(inner(pipeline.text_encoder), inner(pipeline.text_encoder_2)),
        tokenizers=(pipeline.tokenizer, pipeline.tokenizer_2),
        scheduler_config=checked_scheduler(
            {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__},
            "the pipeline",
            file="from_config(pipe.scheduler.config, ...), which takes other values",
        ),
        force_zeros=pipeline.config.get("force_zeros_for_empty_prompt", True),
        image_encoder=None if encoder is None else inner(encoder),
        feature_extractor=extractor.to_dict() if extractor is not None else None,
        name=str(pipeline.config.get("_name_or_path") or "pipeline"),
    )
    _check_parts_fit(components)
    components.fingerprint = fingerprint(components)
    return components


def predicting(components: Components, prediction_type: str | None) -> Components:
    """Return the model with its prediction set to noise ("epsilon") or velocity ("v_prediction"); None: unchanged.

    Raises InvalidRequest for other types.
    """
    if prediction_type is None:
        return components
    kind = values.one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    return replace(components, scheduler_config={**components.scheduler_config, "prediction_type": kind})


def load_image_encoder(source: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> ImageEncoder:
    """Load the CLIP image encoder of an IP-Adapter from a folder with config.json and .safetensors weights.

    Raises ModelNotFound if there is no such folder, ModelFormatError if it holds another model.
    """
    folder = values.path("image_encoder", source)
    if not os.path.isfile(folder / "config.json"):
        raise ModelNotFound(
            f"no image encoder at {values.shown_path(folder)}; give the folder with its config.json, e.g. "
            "models/image_encoder (ViT-H) or sdxl_models/image_encoder (ViT-bigG) of a download of h94/IP-Adapter"
        )
    config = read_config(folder / "config.json", folder)
    if "image_size" not in config:
        raise ModelFormatError(f"{folder} holds a {config.get('model_type', 'model')}, not a CLIP image encoder")
    state = {}
    for file in present(folder, dtype != torch.float32):
        read_header(folder / file)
        state |= load_weights(folder / file, dtype=dtype, device=device)
    processor = folder / "preprocessor_config.json"
    model = _clip("CLIPVisionModelWithProjection", config, state, str(folder))
    return ImageEncoder(model, read_config(processor, folder) if processor.is_file() else None)


def resolve_device(device: torch.device | str) -> torch.device:
    """Return the torch.device; "auto" is the current CUDA GPU if there is one, else the CPU.

    Raises InvalidRequest for an unknown, unsupported or absent device.
    """
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = device if isinstance(device, torch.device) else torch.device(values.text("device", device))
    except RuntimeError as error:
        raise InvalidRequest(
            f"device {values.quoted(device)} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:1'"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device is '{device}'; pictures are made on 'cpu' or 'cuda'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(
            f"device is '{device}', but PyTorch finds {torch.cuda.device_count() or 'no'} CUDA devices; use 'cpu', or "
            "install a CUDA build"
        )
    return device


def resolve_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """Return the torch.dtype: float32, float16 or bfloat16, also given as "fp16" etc.

    "auto" is float32 on the CPU and float16 on a GPU. Raises InvalidRequest for other types.
    """
    names = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "float16": torch.float16,
        "fp16": torch.float16,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
    }
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else dtype
    chosen = values.one_of("dtype", name, ("auto", *names))
    if chosen == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    return names[chosen]


def fingerprint(components: Components) -> str:
    """Return 64 hex digits that identify the weights, within milliseconds.

    Hashes all names, shapes and types, and 256 values each of about 48 tensors across UNet, text encoders and VAE.
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
        digest.update(sampled_bytes(tensors[name]))
    return digest.hexdigest()


def _find_on_hub(source, path: Path, dtype, variant, vae, tokenizer, hub: HubOptions) -> Path:
    if path.suffix in (".safetensors", *PICKLED) or not is_hub_id(str(source)):
        raise ModelNotFound(
            f"nothing at {values.shown_path(path)}; give 'tiny', a diffusers folder, a .safetensors file, or a hub id "
            f"such as 'stabilityai/stable-diffusion-xl-base-1.0'{_meant(str(source), path)}"
        )
    half = dtype != torch.float32
    # parts given by the caller are neither required nor downloaded
    parts = [part for part in _PARTS if vae is None or part != "vae"]
    configs = [part for part in _CONFIG_PARTS if tokenizer is None or not part.startswith("tokenizer")]

    def complete(folder: Path) -> bool:
        small = ["model_index.json", "scheduler/scheduler_config.json"]
        return (
            all((folder / name).is_file() for name in small)
            and all(is_whole(folder / part, half, variant) for part in parts if part != "image_encoder")
            and (tokenizer is not None or all(has_vocabulary(folder / part) for part in ("tokenizer", "tokenizer_2")))
        )

    def select(names: list[str]) -> list[str]:
        return wanted_files(names, half, variant, (*parts, *configs))

    return hub_folder(str(source), complete, select, hub)


def _meant(source: str, path: Path) -> str:
    """Suggest the intended model for a path that doesn't exist: the embedded one, a cached one, or a nearby file."""
    meant = values.did_you_mean(source, ("tiny", *cached_ids()))
    return meant or values.did_you_mean_beside(path, (".safetensors",))


def _from_folder(folder: Path, dtype, device, vae, variant, tokenizer, hub: HubOptions) -> Components:
    index = read_config(folder / "model_index.json", folder)
    if not (folder / "unet" / "config.json").is_file():
        check_model_index(index, folder.name)  # names the class of model families without a UNet
    own_vae = vae is None
    parts = [part for part in _PARTS if own_vae or part != "vae"]
    configs = {
        part: read_config(folder / part / "config.json", folder)
        for part in parts
        if part != "image_encoder" or (folder / part / "config.json").is_file()
    }
    _check_is_sdxl(configs["unet"], f"{folder.name} ({index.get('_class_name', 'no pipeline class')})")
    given = (() if own_vae else ("vae",)) + (() if tokenizer is None else ("tokenizer", "tokenizer_2"))
    check_model_index(index, folder.name, given)
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json", folder)
    scheduler = checked_scheduler(indexed_scheduler(index, scheduler, folder.name), folder.name)
    half = dtype != torch.float32
    headers: dict[str, list[WeightHeader]] = {}
    for part in configs:
        headers[part] = [read_header(folder / part / file) for file in present(folder / part, half, variant)]
    require_memory(sum(h.elements() for many in headers.values() for h in many) * dtype.itemsize, device, folder.name)

    def state(part: str) -> dict[str, torch.Tensor]:
        tensors = {}
        for header in headers[part]:
            tensors |= load_weights(header.path, dtype=dtype, device=device)
        return tensors

    if own_vae:
        decoder = vae_from_folder(folder / "vae", dtype=dtype, device=device, variant=variant)
    else:
        decoder = load_vae(vae, dtype=dtype, device=device, hub=replace(hub, revision=None))
        if (folder / "vae" / "config.json").is_file():
            check_same_latents(read_config(folder / "vae" / "config.json", folder), decoder, folder.name)
    unet_state = state("unet")
    extractor = folder / "feature_extractor" / "preprocessor_config.json"
    adapters = sorted((folder / "ip_adapter").glob("*.safetensors"))
    unet_config = _complete_unet_config(configs["unet"], unet_state, f"{folder.name}/unet")
    return Components(
        unet_config=unet_config,
        unet_state=unet_state,
        vae=decoder,
        text_encoders=(
            _clip("CLIPTextModel", configs["text_encoder"], state("text_encoder"), f"{folder.name}/text_encoder"),
            _clip(
                "CLIPTextModelWithProjection",
                configs["text_encoder_2"],
                state("text_encoder_2"),
                f"{folder.name}/text_encoder_2",
            ),
        ),
        tokenizers=tokenizers_in(folder if tokenizer is None else given_folder(tokenizer)),
        scheduler_config=scheduler,
        force_zeros=index.get("force_zeros_for_empty_prompt", True),
        image_encoder=_clip(
            "CLIPVisionModelWithProjection",
            configs["image_encoder"],
            state("image_encoder"),
            f"{folder.name}/image_encoder",
        )
        if "image_encoder" in configs
        else None,
        feature_extractor=read_config(extractor, folder) if extractor.is_file() else None,
        adapter_path=adapters[0] if adapters else None,
        style_paths={file.stem: file for file in sorted((folder / "styles").glob("*.safetensors"))},
        reference_paths={file.stem: file for file in sorted((folder / "references").glob("*.png"))},
        control_paths={file.parent.name: file.parent for file in sorted((folder / "control").glob("*/config.json"))},
        lora_paths={file.stem: file for file in sorted((folder / "loras").glob("*.safetensors"))},
        known_words=known_words(folder),
        style_modules=style_modules(folder, AttentionLayout.from_config(unet_config).modules, (STYLE_MODULE,)),
    )


def _from_file(path: Path, dtype, device, vae, hub: HubOptions, config, tokenizer) -> Components:
    header = read_header(path)
    single_file.check_single_file(header, needs_vae=vae is None)
    check_storage(header.tensors, path.name)
    require_memory(header.elements() * dtype.itemsize, device, path.name)
    config = None if config is None else given_folder(config)
    check_marks(header)
    scheduler = marked_scheduler(header, single_file.config_from_folder(config, "scheduler"))
    unet_config = single_file.config_from_folder(config, "unet")
    if unet_config is None:
        unet_config = single_file.infer_unet_config(header)
        unet_config["sample_size"] = marked_size(header) or unet_config["sample_size"]
    first = single_file.config_from_folder(config, "text_encoder")
    second = single_file.config_from_folder(config, "text_encoder_2")
    if first is None or second is None:
        first, second = single_file.infer_text_configs(header)
    tokenizers = find_tokenizers(path, tokenizer, config, hub)

    unet_state = single_file.convert_unet(
        load_weights(path, dtype=dtype, device=device, prefix=single_file.UNET), unet_config
    )
    if vae is None:
        vae_config = single_file.config_from_folder(config, "vae") or infer_vae_config(header, single_file.VAE)
        vae_config |= marked_vae(header)
        held = torch.float32 if dtype == torch.float16 and vae_config.get("force_upcast", True) else dtype
        loaded = load_weights(path, dtype=held, device=device, prefix=single_file.VAE)
        vae = vae_from_original(vae_config, loaded, path.name)
    else:
        vae = load_vae(vae, dtype=dtype, device=device, hub=replace(hub, revision=None))
        check_same_latents(marked_vae(header), vae, path.name)

    texts = single_file.convert_text_encoders(
        load_weights(path, dtype=dtype, device=device, prefix="conditioner.embedders."), second
    )
    return Components(
        unet_config=_complete_unet_config(unet_config, unet_state, path.name),
        unet_state=unet_state,
        vae=vae,
        text_encoders=(
            _clip("CLIPTextModel", first, texts[0], path.name),
            _clip("CLIPTextModelWithProjection", second, texts[1], path.name),
        ),
        tokenizers=tokenizers,
        scheduler_config=scheduler,
        force_zeros=True,
    )


def _check_is_sdxl(config: Mapping, what: str) -> None:
    width = config.get("cross_attention_dim")
    if config.get("addition_embed_type") != "text_time":
        families: dict[int | None, str] = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}
        family = families.get(width, "another family")
        raise ModelFormatError(
            f"{what} is not an SDXL model: its UNet is of {family} (cross-attention {width} wide, no size conditioning)"
        )
    if config.get("projection_class_embeddings_input_dim") == 2560:
        raise ModelFormatError(f"{what} is the SDXL refiner; load the base model")
    if config.get("in_channels", 4) not in (4, 9):
        raise ModelFormatError(
            f"{what} has {values.quoted(config['in_channels'])} input channels, as models for editing have 8; a "
            "text-to-image model has 4, and one for inpainting 9"
        )


def _complete_unet_config(config: Mapping, state: dict[str, torch.Tensor], what: str) -> dict[str, Any]:
    """Fill diffusers' defaults into a UNet config, and check that the weights fit it. Raises ModelFormatError."""
    return _made_unet(config, state, what)[0]


def _made_unet(config: Mapping, state: dict[str, torch.Tensor], what: str) -> tuple[dict[str, Any], Made]:
    """Return a UNet's complete config and its modules, after checking that the weights fit. Raises ModelFormatError."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    _check_is_sdxl(config, what)
    check_unet(config, what)
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        layers = UNetShape.from_config(plain).layers
    except ModelFormatError as error:
        raise ModelFormatError(f"the config of {what} does not describe a UNet: {error}") from error
    if layers > len(state):
        raise ModelFormatError(
            f"the config of {what} has {layers} layers, but its weights have only {len(state)} tensors"
        )
    key = repr(sorted(plain.items())), len(state)
    made = _UNETS.get(key)
    if made is None:
        unet = build(lambda: UNet2DConditionModel.from_config(plain), plain, len(state), what)
        assert isinstance(unet, UNet2DConditionModel)  # the library declares a tuple too, which nothing asked for
        shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
        complete = {name: value for name, value in config_of(unet).items() if not name.startswith("_")}
        made = shapes, complete, made_modules(unet)
        if len(_UNETS) >= _MOST_UNETS:
            _UNETS.clear()
        _UNETS[key] = made
    shapes, complete, modules = made
    check_state(shapes, state, what)
    return copy.deepcopy(complete), modules


def _clip(kind: str, config: Mapping, state: dict[str, torch.Tensor], what: str):
    """Build a CLIP text or vision model around the tensors of `state`. Raises ModelFormatError if they don't fit."""
    import transformers

    (check_image_encoder if "Vision" in kind else check_text_encoder)(config, what)
    model_class = getattr(transformers, kind)
    model = build(lambda: model_class(model_class.config_class.from_dict(dict(config))), config, len(state), what)
    expected = model.state_dict()
    tower = "vision_model." if "Vision" in kind else "text_model."
    state = {name: value for name, value in state.items() if not name.endswith("embeddings.position_ids")}
    state = single_file.with_linear_projection(state)
    # files always contain the tower's prefix, some versions of transformers dropped it from the module
    if not any(name.startswith(tower) for name in expected):
        state = {name.removeprefix(tower): value for name, value in state.items()}
    elif state and not any(name.startswith(tower) for name in state):
        state = {f"{tower}{name}": value for name, value in state.items()}
    fill(
        model,
        {name: value for name, value in state.items() if name in expected or name != "text_projection.weight"},
        what,
    )
    device = next(iter(state.values())).device
    for module in model.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, torch.Tensor) and ids.is_meta:
            module.position_ids = torch.arange(ids.shape[-1], device=device).expand(1, -1)
    return model


def _check_parts_fit(components: Components) -> None:
    """Raise ModelFormatError if parts don't fit together, which would otherwise only fail late in a run."""
    config, encoders = components.unet_config, components.text_encoders
    widths = tuple(encoder.config.hidden_size for encoder in encoders)
    cross, added = config["cross_attention_dim"], config["projection_class_embeddings_input_dim"]
    if sum(widths) != cross:
        raise ModelFormatError(
            f"the text encoders are {widths[0]} and {widths[1]} wide, the UNet's cross-attention {cross}; they "
            "don't belong together"
        )
    ids = 6 * values.whole_number(
        "addition_time_embed_dim of the UNet's config", config.get("addition_time_embed_dim"), 1, error=ModelFormatError
    )
    pooled = encoders[1].config.projection_dim or 0
    if pooled + ids != added:
        raise ModelFormatError(
            f"the UNet takes {added} numbers in addition to the time step (projection_class_embeddings_input_dim), "
            f"but the second text encoder gives {pooled} and the picture's sizes {ids}; they don't belong together"
        )
    check_vae_module(components.vae, components.name, config["out_channels"])
