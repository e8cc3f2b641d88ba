"""Supported settings of a model's configs: one table of rules for each kind of config.

Keys missing from their table are new or foreign and might affect pictures, so `config_check` rejects them.
docs/models.md shows these tables; tests compare both with the signatures of diffusers' and transformers' classes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

VP_SCHEDULERS = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# scheduler class of a distilled model -> the sampler it needs
DISTILLED = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}


@dataclass(frozen=True)
class Rule:
    """Rule for one key.

    why: its use, or the reason why it has no effect. allowed: the accepted values; None accepts all. irrelevant:
    whether it has no effect on pictures. kind: the name in `KINDS` of the check that values must pass.
    """

    why: str
    allowed: tuple | None = None
    irrelevant: bool = False
    kind: str | None = None

    @property
    def verdict(self) -> str:
        """Return "done", "irrelevant", or the values that are done while others are refused."""
        if self.irrelevant:
            return "irrelevant"
        if self.allowed is None:
            return "done"
        shown = dict.fromkeys(f"`{_json(value)}`" for value in self.allowed)
        return f"{', '.join(shown)} done, others refused"

    def takes(self, value: Any) -> bool:
        """Return whether a value (as in JSON) is accepted."""
        if self.kind is not None:
            return KINDS[self.kind](value)
        return self.allowed is None or any(_same(value, one) for one in self.allowed)


Rules = Mapping[str, Rule]


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pair(value) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) and len(value) == 2 else (value,)


KINDS: Mapping[str, Callable[..., bool]] = {
    "a number": _number,
    "a number above 0": lambda value: _number(value) and value > 0,
    "a number above 0, or null": lambda value: value is None or (_number(value) and value > 0),
    "a number above 0 and below 1": lambda value: _number(value) and 0 < value < 1,
    "a whole number from 1 to 100000": lambda value: type(value) is int and 1 <= value <= 100_000,
    "a whole number": lambda value: type(value) is int and abs(value) <= 100_000,
    "a whole number above 0, or null": lambda value: value is None or (type(value) is int and value > 0),
    "a whole number, two of them, or null": lambda value: (
        value is None or all(type(side) is int and 1 <= side <= 100_000 for side in _pair(value))
    ),
    "true or false, and not null": lambda value: isinstance(value, bool),
    "true or false": lambda value: value is None or isinstance(value, bool),
    "a list of numbers, or null": lambda value: (
        value is None or (isinstance(value, (list, tuple)) and all(map(_number, value)))
    ),
}


def _each(keys: str, why: str, kind: str | None = None, *, irrelevant: bool = False) -> dict[str, Rule]:
    return dict.fromkeys(keys.split(), Rule(why, irrelevant=irrelevant, kind=kind))


def _only(keys: str, allowed: tuple, why: str) -> dict[str, Rule]:
    return dict.fromkeys(keys.split(), Rule(why, allowed))


def _no_matter(keys: str, why: str) -> dict[str, Rule]:
    return _each(keys, why, irrelevant=True)


_OFF = (False, None)
_LIBRARY = "transformers' own module is built from it"
_QUANTISED = _only("quantization_config", (None,), "quantised layers are not loaded; use weights in 16 or 32 bits")

SCHEDULER: Rules = {
    **_each("num_train_timesteps", "how many noise levels the model was trained at", "a whole number from 1 to 100000"),
    **_each("beta_start beta_end", "those noise levels, which rise", "a number above 0 and below 1"),
    **_each("trained_betas", "those noise levels, one by one, each above 0 and below 1", "a list of numbers, or null"),
    **_only("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"), "how those levels are spread"),
    **_each("rescale_betas_zero_snr", "the last level is pure noise", "true or false"),
    **_only("prediction_type", ("epsilon", "v_prediction", "sample"), "what the model's output means"),
    **_only(
        "timestep_spacing", ("leading", "linspace", "trailing"), "where the steps are, unless a request specifies it"
    ),
    **_each("steps_offset", "where the steps lie", "a whole number"),
    **_each("set_alpha_to_one", "the end of ddim's path", "true or false"),
    **_only("final_sigmas_type", ("zero", "sigma_min"), "the end of the path"),
    **_each("use_karras_sigmas use_exponential_sigmas", "for the samplers that have these forms", "true or false"),
    **_each(
        "sigma_min sigma_max", "the ends of Karras' and exponential levels, and of EDM's", "a number above 0, or null"
    ),
    **_only("use_beta_sigmas use_lu_lambdas", _OFF, "these spreads of noise levels are not supported"),
    **_only(
        "use_flow_sigmas use_dynamic_shifting invert_sigmas stochastic_sampling", _OFF, "flow matching is not supported"
    ),
    **_only("interpolation_type", ("linear",), "levels between timesteps are interpolated linearly"),
    **_only(
        "timestep_type", ("discrete",), "the model receives timesteps; models with continuous noise levels use EDM"
    ),
    **_each("lower_order_final euler_at_final", "the last steps of dpmpp and unipc", "true or false"),
    **_each("disable_corrector", "the steps that unipc does not correct", "a list of numbers, or null"),
    **_each(
        "original_inference_steps", "the steps that lcm and tcd were distilled on", "a whole number from 1 to 100000"
    ),
    **_each("timestep_scaling", "how lcm's boundary condition weights the latents and x0", "a number"),
    **_only("lambda_min_clipped", (-math.inf, "-Infinity", "-inf", None), "dpmpp's levels are not clipped"),
    **_only(
        "variance_type",
        (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        "a model that predicts variances too has twice the output channels",
    ),
    **_only(
        "thresholding clip_sample",
        _OFF,
        "x0 is never clipped; refused where the model's own sampler would do it, and for requests whose sampler would",
    ),
    **_no_matter("sample_max_value dynamic_thresholding_ratio clip_sample_range", "only used if x0 is clipped"),
    **_no_matter("flow_shift time_shift_type shift_terminal", "only used by flow matching"),
    **_no_matter(
        "algorithm_type solver_order solver_type predict_x0 solver_p predictor_order corrector_order tau_func "
        "skip_prk_steps noise_sampler_seed",
        "settings of a sampler; the request names the sampler (`dpmpp_2m_sde`), and a seed its noise",
    ),
}
# keys of EDM classes only
EDM: Rules = {
    **_each("sigma_data rho", "EDM's preconditioning and noise levels", "a number above 0"),
    **_only("sigma_schedule", ("karras", "exponential"), "how EDM's noise levels are spread"),
}

UNET: Rules = {
    **_each("sample_size", "the size of a picture if a request gives none", "a whole number, two of them, or null"),
    **_only(
        "in_channels",
        (4, 9),
        "9: an inpainting model, which also sees the mask and what it keeps; editing models have 8, and models with "
        "other latents have other numbers",
    ),
    **_only("out_channels", (4,), "models with other latents have more"),
    **_only("center_input_sample", _OFF, "inputs are not rescaled"),
    **_each("flip_sin_to_cos", "the embedding of timesteps and sizes", "true or false"),
    **_each("freq_shift", "the embedding of timesteps and sizes", "a number"),
    **_each(
        "down_block_types up_block_types",
        "where attention is; `DownBlock2D`, `CrossAttnDownBlock2D` and the corresponding up blocks; others are refused",
    ),
    **_each(
        "mid_block_type block_out_channels layers_per_block transformer_layers_per_block "
        "reverse_transformer_layers_per_block attention_head_dim num_attention_heads use_linear_projection",
        "the shape of the network",
    ),
    **_each("cross_attention_dim norm_num_groups", "the shape of the network", "a whole number from 1 to 100000"),
    **_each("norm_eps", "what norms add to variances", "a number"),
    **_only(
        "only_cross_attention dual_cross_attention", _OFF, "every block has one self-attention and one cross-attention"
    ),
    **_only("mid_block_only_cross_attention", _OFF, "every block has one self-attention and one cross-attention"),
    **_only("downsample_padding", (1,), "as SDXL's"),
    **_only("mid_block_scale_factor resnet_out_scale_factor", (1,), "outputs of blocks are not rescaled"),
    **_no_matter("dropout", "none at inference"),
    **_no_matter(
        "upcast_attention",
        "the engine's kernels compute scores and softmax in float32; TensorRT chooses the type itself",
    ),
    **_only("act_fn", ("silu",), "as SDXL's"),
    **_only("encoder_hid_dim", (None,), "text states are not projected"),
    **_only(
        "encoder_hid_dim_type",
        (None,),
        "`ip_image_proj`, which a loaded IP-Adapter writes there, is left out of a pipeline in memory, with a warning",
    ),
    **_only("class_embed_type num_class_embeds", (None,), "there are no classes"),
    **_only("class_embeddings_concat", _OFF, "there are no classes"),
    **_only("addition_embed_type", ("text_time",), "pooled text and sizes, as SDXL's"),
    **_each(
        "addition_time_embed_dim projection_class_embeddings_input_dim",
        "the embedding of sizes; 2560 is the refiner's and refused",
        "a whole number from 1 to 100000",
    ),
    **_no_matter("addition_embed_type_num_heads", "read for other kinds of addition_embed_type"),
    **_only("resnet_time_scale_shift", ("default",), "the time embedding is added"),
    **_only("resnet_skip_time_act", _OFF, "the time embedding is activated in every block"),
    **_only("time_embedding_type", ("positional",), "as SDXL's"),
    **_only("time_embedding_dim time_embedding_act_fn timestep_post_act", (None,), "as SDXL's"),
    **_only(
        "time_cond_proj_dim",
        (None,),
        "a model that is told the guidance scale (LCM's full models); use a base model with the LCM LoRA",
    ),
    **_only("conv_in_kernel conv_out_kernel", (3,), "as SDXL's"),
    **_only("attention_type", ("default",), "GLIGEN's gated attention is not supported"),
    **_only("cross_attention_norm", (None,), "text states are not normalised"),
    **_QUANTISED,
}

VAE: Rules = {
    **_only("in_channels out_channels", (3,), "pictures are RGB"),
    **_each("latent_channels", "as many as the UNet has, or refused"),
    **_each(
        "down_block_types up_block_types block_out_channels layers_per_block act_fn norm_num_groups use_quant_conv "
        "use_post_quant_conv mid_block_add_attention",
        "diffusers' own module is built from it",
    ),
    **_each("scaling_factor", "latents are multiplied by it"),
    **_each("latents_mean latents_std", "latents are normalised by them (Playground v2.5); a single one is refused"),
    **_only("shift_factor", (None, 0), "no SDXL pipeline uses a single shift"),
    **_each("force_upcast", "a VAE that overflows in float16 is decoded in another type", "true or false"),
    **_no_matter("sample_size", "the tile size depends on memory"),
    **_QUANTISED,
}
TINY_VAE: Rules = {
    **_only("in_channels out_channels", (3,), "pictures are RGB"),
    **_each("latent_channels", "as many as the UNet has, or refused"),
    **_each(
        "encoder_block_out_channels decoder_block_out_channels act_fn upsample_fn num_encoder_blocks "
        "num_decoder_blocks block_out_channels",
        "diffusers' own module is built from it",
    ),
    **_only("upsampling_scaling_factor", (2,), "a level doubles the side"),
    **_each("scaling_factor", "latents are multiplied by it"),
    **_only("shift_factor", (None, 0), "no SDXL pipeline uses a single shift"),
    **_no_matter("latent_magnitude latent_shift", "for latents that are stored in 8 bits"),
    **_no_matter("force_upcast", "it runs in every type"),
    **_QUANTISED,
}

_TRANSFORMERS = _no_matter(
    "architectures transformers_version torch_dtype dtype initializer_factor initializer_range attention_dropout "
    "dropout chunk_size_feed_forward id2label label2id is_encoder_decoder output_attentions output_hidden_states "
    "problem_type use_cache gradient_checkpointing torchscript pruned_heads tie_word_embeddings "
    "attn_implementation",
    "about training, other tasks, or the type that the files were saved in",
) | _only("return_dict", (True, None), "transformers' CLIP looks its own results up by name")
TEXT_ENCODER: Rules = {
    **_only("model_type", ("clip_text_model", "clip"), "both text encoders are CLIP's"),
    **_each(
        "vocab_size hidden_size intermediate_size projection_dim num_hidden_layers max_position_embeddings hidden_act "
        "layer_norm_eps",
        _LIBRARY,
    ),
    **_each("num_attention_heads", _LIBRARY, "a whole number from 1 to 100000"),
    **_each("eos_token_id", "where the prompt is pooled; 2 means at the highest id", "a whole number"),
    **_no_matter("bos_token_id pad_token_id", "the tokenizer's are used"),
    **_TRANSFORMERS,
    **_QUANTISED,
}
IMAGE_ENCODER: Rules = {
    **_only("model_type", ("clip_vision_model", "clip"), "IP-Adapter's image encoders are CLIP's"),
    **_each(
        "hidden_size intermediate_size projection_dim num_hidden_layers num_channels image_size patch_size hidden_act "
        "layer_norm_eps",
        _LIBRARY,
    ),
    **_each("num_attention_heads", _LIBRARY, "a whole number from 1 to 100000"),
    **_TRANSFORMERS,
    **_QUANTISED,
}
TOKENIZER: Rules = {
    **_only("tokenizer_class", ("CLIPTokenizer", "CLIPTokenizerFast", None), "both text encoders read CLIP's tokens"),
    **_each(
        "model_max_length",
        "the maximum length of a prompt, if the encoder supports it",
        "a whole number above 0, or null",
    ),
    **_each(
        "bos_token eos_token pad_token unk_token errors add_prefix_space added_tokens_decoder "
        "additional_special_tokens extra_special_tokens special_tokens_map",
        "transformers' own tokenizer is built from it",
    ),
    **_only("do_lower_case", (True, None), "texts are converted to lower case"),
    **_only("padding_side truncation_side", ("right", None), "prompts are padded and cut at their end"),
    **_only("split_special_tokens", _OFF, "an end token in the text ends the text"),
    **_only("add_bos_token add_eos_token", (True, None), "a prompt has both"),
    **_no_matter(
        "backend tokenizer_file special_tokens_map_file name_or_path processor_class is_local "
        "local_files_only clean_up_tokenization_spaces use_fast chat_template max_length stride "
        "truncation_strategy tokenizer_type",
        "about files, other tasks, or decoding",
    ),
}
FEATURE_EXTRACTOR: Rules = {
    **_only(
        "image_processor_type feature_extractor_type",
        ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor", None),
        "pictures are prepared as CLIP's processor does",
    ),
    **_each("size crop_size image_mean image_std", "how a picture is scaled, cut and normalised"),
    **_only("do_resize do_center_crop do_rescale do_normalize", (True, None), "as CLIP's processor"),
    **_only("rescale_factor", (1 / 255, None), "pixels run from 0 to 1"),
    **_only("resample", (3, None), "bicubic"),
    **_no_matter("do_convert_rgb", "every picture becomes RGB"),
    **_no_matter(
        "processor_class data_format input_data_format default_to_square device disable_grouping "
        "return_tensors use_square_size",
        "about files and tensors",
    ),
    **_only("do_pad", _OFF, "pictures are not padded"),
    **_only("pad_size", (None,), "pictures are not padded"),
}

PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
PARTS = (
    "unet",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
    "image_encoder",
    "feature_extractor",
)
_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
# classes that model_index.json may name for a part; scheduler classes are listed above
PART_CLASSES: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": _CLIP_TOKENIZERS,
    "tokenizer_2": _CLIP_TOKENIZERS,
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "feature_extractor": (
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPImageProcessorPil",
        "CLIPFeatureExtractor",
    ),
}
OPTIONAL_PARTS = ("image_encoder", "feature_extractor")
MODEL_INDEX: Rules = {
    **_each(
        " ".join(PARTS),
        "loaded; a part of another class is refused, and so is one that is null, except for the last two. The "
        "scheduler's class named here takes precedence over that in its own config, with a warning. A part of "
        "another name (`controlnet`, `adapter`) is refused unless it is null",
    ),
    **_each("force_zeros_for_empty_prompt", "what an empty negative prompt means", "true or false, and not null"),
    **_only("requires_aesthetics_score", _OFF, "the refiner's conditioning is not supported"),
    **_only("is_cosxl_edit", _OFF, "editing models are not supported"),
    **_no_matter("add_watermarker", "pictures have no invisible watermark"),
}


def _same(value, allowed) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return False
    if isinstance(allowed, float) and isinstance(value, (int, float)):
        return math.isclose(value, allowed, rel_tol=1e-6)
    return value == allowed


def _json(value) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value).replace("-inf", "-Infinity")


# settings in a single file: key or metadata -> (verdict, why)
SINGLE_FILE: Mapping[str, tuple[str, str]] = {
    "v_pred": ("done", "v-prediction"),
    "ztsnr": ("done", "zero terminal SNR"),
    "edm_mean, edm_std": ("done", "EDM as Playground v2.5 has it, and latents normalised by these"),
    "edm_vpred.sigma_max, edm_vpred.sigma_min": ("done", "EDM with v-prediction between these levels (CosXL)"),
    "modelspec.prediction_type, modelspec.predict_key": (
        "done",
        "`epsilon` or `v`; others are refused. A key above takes precedence, with a warning",
    ),
    "modelspec.architecture": ("refused for a refiner, an editing model, an adapter", "others are SDXL's"),
    "modelspec.resolution": ("done", "the size of a picture if a request gives none"),
    "modelspec.encoder_layer": (
        "a warning, except for 2",
        "SDXL uses the second-to-last layer; a request may skip more",
    ),
    "modelspec.timestep_range": ("a warning, except for all", "the model is run at every timestep"),
    "other modelspec.*, ss_*": ("irrelevant", "titles, authors, hashes, how it was trained"),
    "denoiser.sigmas, alphas_cumprod, betas, ...": ("irrelevant", "merges copy these from their base model"),
    "model_ema.*": ("irrelevant", "averaged weights, kept for training"),
    "other tensors": ("a warning", "left out by name"),
}

# properties of a pipeline in memory -> (verdict, why)
IN_MEMORY: Mapping[str, tuple[str, str]] = {
    "its class": (
        "SDXL's three done, others refused",
        "ControlNet, PAG and editing pipelines do more; `StableDiffusionXLPipeline.from_pipe(pipe)` drops that "
        "explicitly",
    ),
    "a class or a pipeline with methods of its own (`encode_prompt`, `prepare_latents`)": (
        "refused",
        "the same `from_pipe` uses only its model; a class that replaces none of SDXL's methods is accepted",
    ),
    "other parts (`controlnet`, `adapter`)": ("refused", "they would be left out"),
    "a scheduler whose levels were changed by hand": ("refused", "its config no longer says what it does"),
    "methods put on the scheduler or the image processor, or overridden in a class of one's own": (
        "refused",
        "only their configs are used",
    ),
    "a tokenizer of another class, with methods of its own, or with other tokens, begin, end or padding "
    "(`add_bos_token`, `padding_side`)": (
        "refused",
        "it is asked for the tokens of words alone; its settings are those of the table above",
    ),
    "FreeU": ("refused", "`disable_freeu()`"),
    "fused projections": ("done", "the projections they were fused from are used; refused if those have changed"),
    "PyTorch's, xformers' and sliced attention": ("irrelevant", "the engine has its own"),
    "other attention processors": ("refused", "`unet.set_default_attn_processor()`"),
    "a loaded IP-Adapter": ("left out with a warning", "`engine.load_adapter` loads it"),
    "LoRA layers in any part": ("refused", "`fuse_lora()` and `unload_lora_weights()`, or `engine.load_lora`"),
    "fused LoRAs": ("done", "they are in the weights"),
    "textual inversions": ("done", "`<name>` means all vectors that were loaded under it"),
    "model offload": ("done", "weights are used where they are"),
    "sequential and group offload": ("refused", "the weights are not available"),
    "layerwise casting, caches, layer skips (diffusers' hooks)": ("refused", "by the hook's name"),
    "hooks and methods put on the UNet (DeepCache, ToMe, PAG)": ("refused", "the UNet's own forward is not called"),
    "layers and attributes of the UNet that its config does not make (seamless tiling by `padding_mode`, other "
    "activations, eps or scales), and dropout in training mode": (
        "refused",
        "the engine builds its UNet from config and weights",
    ),
    "methods put on a text encoder, on the image encoder or on the VAE itself (`vae.decode`)": (
        "refused",
        "by the method's name",
    ),
    "hooks on layers of text encoders, the image encoder and the VAE": ("done", "their layers run as they are"),
    "layers of the VAE changed by hand": (
        "done",
        "its encoder and decoder run as they are; layers of other libraries are refused",
    ),
    "quantised layers in any part (bitsandbytes, torchao, quanto, GGUF)": ("refused", "use weights in 16 or 32 bits"),
    "weights of several types in the UNet": ("refused", "`pipe.to(dtype)`"),
    "compiled modules": ("done", "the module inside is used"),
    "VAE slicing and tiling, forward chunking": ("irrelevant", "the engine cuts its own batches and tiles"),
    "a watermarker": ("left out with a warning", "pictures have no invisible watermark"),
}
