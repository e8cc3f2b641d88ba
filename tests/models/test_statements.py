"""Every key that diffusers and transformers know has a verdict, and configs that were published get the right one."""

import inspect
import logging
import math

import diffusers
import numpy as np
import pytest
from diffusers import schedulers
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig

from stylefast.errors import ModelFormatError
from stylefast.models import statements
from stylefast.models.config_check import (
    check_feature_extractor,
    check_image_encoder,
    check_model_index,
    check_text_encoder,
    check_tokenizer,
    check_unet,
    check_vae,
    checked_scheduler,
    indexed_scheduler,
)
from stylefast.sampling.edm import EDM_CLASSES
from tests.support.small_sdxl import small_unet_config, small_vae_config

SUPPORTED = (*statements.VP_SCHEDULERS, *statements.EDM_SCHEDULERS)


def defaults(kind) -> dict:
    """Keyword arguments of a class with their defaults."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def is_real(name: str) -> bool:
    # where an optional library is missing, diffusers has a stand-in without arguments
    return bool(defaults(getattr(schedulers, name)))


@pytest.mark.parametrize("name", [name for name in SUPPORTED if is_real(name)])
def test_every_setting_of_a_supported_scheduler_has_a_verdict(name):
    rules = {**statements.SCHEDULER, **(statements.EDM if name in statements.EDM_SCHEDULERS else {})}
    assert not defaults(getattr(schedulers, name)).keys() - rules.keys()


def test_every_scheduler_of_diffusers_is_supported_or_refused_by_its_name():
    for name in dir(schedulers):
        if name.endswith("Scheduler") and name not in SUPPORTED:
            with pytest.raises(ModelFormatError, match=f"scheduler of it is '{name}'"):
                checked_scheduler({"_class_name": name}, "it")


@pytest.mark.parametrize("name", [name for name in statements.VP_SCHEDULERS if is_real(name)])
def test_a_key_that_a_config_leaves_out_means_what_diffusers_means(name):
    theirs = defaults(getattr(schedulers, name))
    switched_off = {key: False for key in ("clip_sample", "thresholding") if key in theirs}
    filled = checked_scheduler({"_class_name": name, **switched_off}, "it")
    for key in (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "prediction_type",
        "steps_offset",
        "timestep_spacing",
        "set_alpha_to_one",
    ):
        if key in theirs and (name, key) != ("PNDMScheduler", "set_alpha_to_one"):  # false there and for SDXL
            assert filled[key] == theirs[key], key


def test_the_sampler_and_the_loader_mean_the_same_classes_by_edm():
    assert set(EDM_CLASSES) == set(statements.EDM_SCHEDULERS)


MODULES = {
    "UNet": (diffusers.UNet2DConditionModel, statements.UNET),
    "VAE": (diffusers.AutoencoderKL, statements.VAE),
    "tiny VAE": (diffusers.AutoencoderTiny, statements.TINY_VAE),
}


@pytest.mark.parametrize("part", MODULES)
def test_every_setting_of_diffusers_modules_has_a_verdict(part):
    kind, rules = MODULES[part]
    assert not defaults(kind).keys() - rules.keys()


@pytest.mark.parametrize(
    "config, rules",
    [
        (CLIPTextConfig(), statements.TEXT_ENCODER),
        (CLIPVisionConfig(), statements.IMAGE_ENCODER),
        (CLIPImageProcessor(), statements.FEATURE_EXTRACTOR),
    ],
    ids=["text encoder", "image encoder", "image processor"],
)
def test_every_setting_of_transformers_parts_has_a_verdict(config, rules):
    assert not {key for key in config.to_dict() if not key.startswith("_")} - rules.keys()


SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
DPM = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "lambda_min_clipped": -math.inf,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": True,
    "use_lu_lambdas": False,
    "variance_type": None,
}
PUBLISHED = {
    "SDXL base, refiner": SDXL,
    "Turbo": {**SDXL, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "Lightning": {**SDXL, "timestep_spacing": "trailing"},
    "LCM": {
        **SDXL,
        "_class_name": "LCMScheduler",
        "original_inference_steps": 50,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "rescale_betas_zero_snr": False,
        "clip_sample_range": 1.0,
    },
    "Playground v2": {**SDXL, "_class_name": "EulerAncestralDiscreteScheduler"},
    "Playground v2.5": {
        "_class_name": "EDMDPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "rho": 7.0,
        "sample_max_value": 1.0,
        "sigma_data": 0.5,
        "sigma_max": 80.0,
        "sigma_min": 0.002,
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
    },
    "CosXL": {
        "_class_name": "EDMEulerScheduler",
        "prediction_type": "v_prediction",
        "sigma_max": 120.0,
        "sigma_min": 0.002,
        "sigma_data": 1.0,
        "sigma_schedule": "exponential",
    },
    "NoobAI v-prediction": {
        **SDXL,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "final_sigmas_type": "zero",
        "sigma_max": None,
        "sigma_min": None,
        "timestep_type": "discrete",
    },
    "Animagine": {**SDXL, "_class_name": "EulerAncestralDiscreteScheduler", "rescale_betas_zero_snr": False},
    "SSD-1B, Vega": {**SDXL, "final_sigmas_type": "zero"},
    "Koala": {**SDXL, "use_exponential_sigmas": False, "use_beta_sigmas": False},
    "a merge with DPM++": DPM,
    "DDIM": {**SDXL, "_class_name": "DDIMScheduler", "thresholding": False, "rescale_betas_zero_snr": False},
    "PNDM": {**SDXL, "_class_name": "PNDMScheduler"},
    "UniPC": {
        **DPM,
        "_class_name": "UniPCMultistepScheduler",
        "predict_x0": True,
        "solver_type": "bh2",
        "solver_p": None,
        "disable_corrector": [],
    },
    "a minus infinity in quotes": {**DPM, "lambda_min_clipped": "-Infinity"},
    "left over from a sampler that clips": {**SDXL, "clip_sample": True, "thresholding": True},
    "EDM with what another scheduler left": {
        **SDXL,
        "_class_name": "EDMEulerScheduler",
        "beta_schedule": "odd",
        "timestep_type": "continuous",
    },
    "an unknown switch that is off": {**SDXL, "rephase": False, "more": None, "_private": 3},
    "zero terminal SNR in its betas": {**SDXL, "rescale_betas_zero_snr": True, "trained_betas": [*[0.01] * 999, 1.0]},
    "betas that are not read": {**SDXL, "beta_schedule": "squaredcos_cap_v2", "beta_start": 0.1, "beta_end": 0.02},
    "a largest level alone": {**SDXL, "sigma_min": None, "sigma_max": 10.0},
    "arrays": {**SDXL, "trained_betas": np.linspace(0.001, 0.01, 1000)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_schedulers_are_taken_as_they_are(name):
    config = PUBLISHED[name]
    filled = checked_scheduler(config, "it")
    assert all(np.array_equal(filled[key], value) for key, value in config.items())


REFUSED = {
    "flow matching": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow matching"),
    "a scheduler of one's own": ({"_class_name": "MyScheduler"}, "'MyScheduler'"),
    "no class": ({"_class_name": None}, "of it is None"),
    "flow levels": ({"use_flow_sigmas": True}, "use_flow_sigmas=True.*flow"),
    "flow prediction": ({"prediction_type": "flow_prediction"}, "flow_prediction.*'v_prediction'"),
    "beta levels": ({"use_beta_sigmas": True}, "use_beta_sigmas"),
    "continuous timesteps": ({"timestep_type": "continuous"}, "EDM"),
    "logarithmic interpolation": ({"interpolation_type": "log_linear"}, "log_linear"),
    "learned variance": ({**DPM, "variance_type": "learned_range"}, "learned_range"),
    "clipped levels": ({**DPM, "lambda_min_clipped": -5.1}, "-5.1"),
    "clipping of its own sampler": ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample=True"),
    "clipping that diffusers means": ({"_class_name": "DDIMScheduler", "clip_sample": ...}, "clip_sample=True"),
    "thresholding of its own sampler": ({**DPM, "thresholding": True}, "thresholding=True"),
    "EDM's under another class": ({"sigma_data": 1.0}, "sigma_data=1.0.*unknown"),
    "EDM of x0": ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "EDM's preconditioning"),
    "EDM's levels": ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "cosine"}, "cosine"),
    "what nobody knows": ({"warp": 0.3}, "warp=0.3.*unknown.*scheduler_config.json"),
    "a shift": ({"shift": 3.0}, "shift=3.0"),
    "a number in quotes": ({"beta_start": "0.00085"}, "beta_start='0.00085'.*a number"),
    "no levels": ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
    "levels that fill the memory": ({"num_train_timesteps": 10**9}, "from 1 to 100000"),
    "a switch in quotes": ({"rescale_betas_zero_snr": "no"}, "true or false"),
    "betas that are not as many": ({"trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000"),
    "betas that are no numbers": ({"trained_betas": ["a"]}, "a list of numbers"),
    "betas of nothing": ({"trained_betas": [0.0, *[0.1] * 999]}, "0.0 as number 0 of its trained_betas"),
    "betas above 1": ({"trained_betas": [*[0.1] * 999, 2.0]}, "2.0 as number 999"),
    "a last beta of 1": ({"trained_betas": [*[0.1] * 999, 1.0]}, "1.0 as number 999"),
    "betas that leave nothing of the picture": ({"trained_betas": [0.1] * 1000}, "nothing of the picture"),
    "an end that leaves nothing": ({"beta_end": 0.9}, "nothing of the picture"),
    "betas that fall": ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start=0.5 and beta_end=0.1"),
    "betas that stay": ({"beta_start": 0.1, "beta_end": 0.1}, "beta_start=0.1 and beta_end=0.1"),
    "an end above 1": ({"beta_end": 2.0}, "beta_end=2.0, but it must be a number above 0 and below 1"),
    "a start of 0": ({"beta_start": 0}, "beta_start=0,"),
    "levels below 0": ({"sigma_min": -1}, "sigma_min=-1, but it must be a number above 0, or null"),
    "levels of 0": ({"sigma_max": 0.0}, "sigma_max=0.0"),
    "levels that fall": ({"sigma_min": 5, "sigma_max": 1}, "sigma_min=5 and sigma_max=1"),
    "EDM's levels that fall": ({"_class_name": "EDMEulerScheduler", "sigma_min": 90.0}, "=90.0 and sigma_max=80"),
    "EDM of nothing": ({"_class_name": "EDMEulerScheduler", "sigma_data": 0}, "sigma_data=0,.*above 0"),
    "unknown betas": ({"beta_schedule": "sigmoid"}, "sigmoid"),
    "unknown spacing": ({"timestep_spacing": "even"}, "even"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_schedulers_that_say_what_is_not_done_are_refused_by_name(case):
    changes, words = REFUSED[case]
    config = {key: value for key, value in {**SDXL, **changes}.items() if value is not ...}
    with pytest.raises(ModelFormatError, match=words):
        checked_scheduler(config, "it")


def test_a_distilled_model_says_which_sampler_it_is_for(caplog):
    with caplog.at_level(logging.WARNING):
        checked_scheduler({**SDXL, "_class_name": "TCDScheduler"}, "it")
    assert "scheduler='tcd'" in caplog.text


# settings of other architectures, one value each; what is not here takes any value
OTHER_UNETS = {
    "center_input_sample": True,
    "only_cross_attention": [True, False, False],
    "dual_cross_attention": True,
    "downsample_padding": 0,
    "mid_block_scale_factor": 1.4,
    "resnet_out_scale_factor": 0.7,
    "act_fn": "gelu",
    "encoder_hid_dim": 1024,
    "encoder_hid_dim_type": "text_proj",
    "class_embed_type": "projection",
    "num_class_embeds": 10,
    "class_embeddings_concat": True,
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 512,
    "time_embedding_act_fn": "silu",
    "timestep_post_act": "silu",
    "time_cond_proj_dim": 256,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "attention_type": "gated",
    "cross_attention_norm": "layer_norm",
    "in_channels": 8,
    "out_channels": 8,
    "addition_embed_type": "text",
    "mid_block_only_cross_attention": True,
    "quantization_config": {"bits": 4},
    "block_warp": 2,
    "cross_attention_dim": [64, 64, 64],
    "norm_num_groups": None,
    "sample_size": "128",
    "freq_shift": None,
    "norm_eps": "small",
    "addition_time_embed_dim": 8.5,
}


@pytest.mark.parametrize("key", OTHER_UNETS)
def test_unets_that_say_what_is_not_computed_are_refused_by_name(key):
    with pytest.raises(ModelFormatError, match=f"UNet of it .*{key}"):
        check_unet(small_unet_config() | {key: OTHER_UNETS[key]}, "it")


def test_a_unet_of_another_class_is_refused_and_sdxls_own_defaults_are_taken():
    check_unet(defaults(diffusers.UNet2DConditionModel) | small_unet_config(), "it")
    with pytest.raises(ModelFormatError, match="UNetMotionModel.*UNet2DConditionModel is supported"):
        check_unet({**small_unet_config(), "_class_name": "UNetMotionModel"}, "it")


OTHER_VAES = {
    "a shift": ({"shift_factor": 0.1}, "shift_factor=0.1"),
    "means alone": ({"latents_mean": [0.0] * 4}, "only one of"),
    "too few means": ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "latents_mean=.*4 numbers"),
    "no deviation": ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]}, "above 0"),
    "words": ({"latents_mean": ["a"] * 4, "latents_std": [1.0] * 4}, "4 numbers"),
    "another depth of latents": ({"latent_channels": 16}, "16 latent channels, the UNet 4"),
    "pictures with alpha": ({"in_channels": 4}, "in_channels=4"),
    "a switch in quotes": ({"force_upcast": "no"}, "force_upcast='no', but it must be true or false"),
    "a scale of zero": ({"scaling_factor": 0.0}, "scaling_factor=0.0"),
    "what nobody knows": ({"patch": 2}, "patch=2"),
}


@pytest.mark.parametrize("case", OTHER_VAES)
def test_vaes_that_say_what_is_not_done_are_refused_by_name(case):
    changes, words = OTHER_VAES[case]
    with pytest.raises(ModelFormatError, match=words):
        check_vae(small_vae_config() | changes, "it", 4)


def test_the_vaes_of_sdxls_family_are_taken():
    check_vae(defaults(diffusers.AutoencoderKL) | small_vae_config(), "it", 4)
    playground = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}
    check_vae(small_vae_config(scaling_factor=0.5, **playground), "it", 4)
    check_vae({**defaults(diffusers.AutoencoderTiny), "_class_name": "AutoencoderTiny"}, "it", 4)
    with pytest.raises(ModelFormatError, match="upsampling_scaling_factor=4"):
        check_vae({"_class_name": "AutoencoderTiny", "upsampling_scaling_factor": 4}, "it")


PARTS_REFUSED = {
    "T5": (check_text_encoder, {"model_type": "t5"}, "model_type='t5'"),
    "a quantised text encoder": (check_text_encoder, {"quantization_config": {"bits": 4}}, "quantised"),
    "SigLIP": (check_image_encoder, {"model_type": "siglip_vision_model"}, "siglip"),
    "another tokenizer": (check_tokenizer, {"tokenizer_class": "T5Tokenizer"}, "T5Tokenizer"),
    "a length in quotes": (check_tokenizer, {"model_max_length": "77"}, "model_max_length='77'.*whole number"),
    "a length with a point": (check_tokenizer, {"model_max_length": 77.0}, "model_max_length=77.0.*whole number"),
    "several ends": (check_text_encoder, {"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\].*whole number"),
    "no end": (check_text_encoder, {"eos_token_id": None}, "eos_token_id=None"),
    "results without names": (check_text_encoder, {"return_dict": False}, "return_dict=False"),
    "heads below zero": (check_text_encoder, {"num_attention_heads": -1}, "num_attention_heads=-1"),
    "heads of pictures below zero": (check_image_encoder, {"num_attention_heads": -1}, "num_attention_heads=-1"),
    "padding at the left": (check_tokenizer, {"padding_side": "left"}, "left"),
    "upper case": (check_tokenizer, {"do_lower_case": False}, "do_lower_case"),
    "no normalisation": (check_feature_extractor, {"do_normalize": False}, "do_normalize"),
    "another filter": (check_feature_extractor, {"resample": 2}, "bicubic"),
    "another processor": (check_feature_extractor, {"image_processor_type": "SiglipImageProcessor"}, "Siglip"),
    "pixels from -1 to 1": (check_feature_extractor, {"rescale_factor": 2 / 255}, "rescale_factor"),
    "no object": (check_text_encoder, ["clip"], "must be an object"),
}


@pytest.mark.parametrize("case", PARTS_REFUSED)
def test_other_parts_that_say_what_is_not_done_are_refused_by_name(case):
    check, config, words = PARTS_REFUSED[case]
    with pytest.raises(ModelFormatError, match=words):
        check(config, "it")


def test_what_a_library_gets_and_the_tables_do_not_know_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        check_text_encoder({"model_type": "clip_text_model", "rope_theta": 10, "torchscript": True}, "it")
    assert "rope_theta=10" in caplog.text and "torchscript" not in caplog.text


INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0",
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
    "feature_extractor": [None, None],
    "controlnet": [None, None],
}


@pytest.mark.parametrize("kind", [*statements.PIPELINES, None])
def test_pipelines_of_sdxls_parts_are_taken(kind):
    check_model_index({**INDEX, "_class_name": kind}, "it")


def test_parts_that_are_given_by_hand_need_no_place_in_the_index():
    check_model_index({**INDEX, "vae": [None, None], "image_encoder": None}, "it", ("vae",))


def test_the_scheduler_is_of_the_class_that_the_index_names(caplog):
    index = {**INDEX, "scheduler": ["diffusers", "DDIMScheduler"]}
    check_model_index(index, "it")
    for own in ({"_class_name": "DDIMScheduler"}, {}):
        assert indexed_scheduler(index, own, "it") == {"_class_name": "DDIMScheduler"}
    assert indexed_scheduler(INDEX, SDXL, "it") == SDXL and not caplog.records
    with caplog.at_level(logging.WARNING):
        found = checked_scheduler(indexed_scheduler(index, SDXL, "it"), "it")
    assert found == {**SDXL, "_class_name": "DDIMScheduler"}
    assert "names the scheduler DDIMScheduler" in caplog.text and "'EulerDiscreteScheduler'" in caplog.text
    with pytest.raises(ModelFormatError, match="clip_sample=True"):
        checked_scheduler(indexed_scheduler(index, {**SDXL, "clip_sample": True}, "it"), "it")
    index = {**INDEX, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    with pytest.raises(ModelFormatError, match="flow matching.*but scheduler/.*'EulerDiscreteScheduler'"):
        indexed_scheduler(index, SDXL, "it")


INDEX_REFUSED = {
    "another family": ({"_class_name": "FluxPipeline"}, "FluxPipeline"),
    "editing": ({"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}, "InstructPix2Pix"),
    "a class of one's own": ({"_class_name": ["pipeline", "MyPipeline"]}, "MyPipeline"),
    "ControlNet": ({"controlnet": ["diffusers", "ControlNetModel"]}, "part 'controlnet'.*ControlNetModel"),
    "a T2I adapter": ({"adapter": ["diffusers", "T2IAdapter"]}, "part 'adapter'"),
    "the refiner's conditioning": ({"requires_aesthetics_score": True}, "requires_aesthetics_score"),
    "a switch in quotes": ({"force_zeros_for_empty_prompt": "false"}, "='false', but it must be true or false"),
    "a switch that is null": ({"force_zeros_for_empty_prompt": None}, "=None, but it must be true or false"),
    "no text encoder": (
        {"text_encoder": [None, None]},
        "text_encoder=.None, None., but an SDXL model needs this part.*'CLIPTextModel'",
    ),
    "no scheduler": (
        {"scheduler": None},
        "scheduler=None, but an SDXL model needs this part.*'EulerDiscreteScheduler'",
    ),
    "another UNet": ({"unet": ["diffusers", "UNetMotionModel"]}, "UNetMotionModel.*'UNet2DConditionModel'"),
    "a UNet of one's own code": ({"unet": ["my_unet", "UNet2DConditionModel"]}, "'my_unet'"),
    "a part in other words": ({"unet": "x"}, "unet='x', but only parts such as .'diffusers', 'UNet2DConditionModel'."),
    "a part without its class": ({"vae": ["diffusers"]}, "vae=.'diffusers'., but only parts such as"),
    "a class that is no name": ({"vae": ["diffusers", ["AutoencoderKL"]]}, "vae="),
    "the encoders in each other's place": ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "WithProjection"),
    "CosXL edit": ({"is_cosxl_edit": True}, "is_cosxl_edit"),
    "what nobody knows": ({"guidance_embedding": 3}, "guidance_embedding=3"),
}


@pytest.mark.parametrize("case", INDEX_REFUSED)
def test_pipelines_that_do_more_are_refused_by_name(case):
    changes, words = INDEX_REFUSED[case]
    with pytest.raises(ModelFormatError, match=words):
        check_model_index({**INDEX, **changes}, "it")
