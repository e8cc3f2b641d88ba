"""What a pipeline in memory carries beside its weights is taken over, refused by name, or said to be left out."""

import copy
import logging

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from tokenizers import Tokenizer, normalizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from stylefast.errors import ModelError, ModelFormatError
from stylefast.models.checkpoint import from_pipeline, load_components
from stylefast.models.layout import AttentionLayout
from stylefast.models.pipeline_check import unet_weights
from tests.support.small_adapter import global_adapter
from tests.support.small_checkpoints import write_folder
from tests.support.small_sdxl import small_pipeline, small_tiny_vae, small_unet_config, small_vae_config


@pytest.fixture(scope="module")
def original():
    shallow = small_unet_config(depth=(1, 1, 1), layers_per_block=1)
    return small_pipeline(seed=3, unet_config=shallow)


@pytest.fixture
def pipe(original):
    """A pipeline of its own, for a test to change."""
    parts = copy.deepcopy(original.components)
    made = type(original)(**parts, force_zeros_for_empty_prompt=True, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


def refused(pipe, words, error=ModelError):
    with pytest.raises(error, match=words):
        from_pipeline(pipe)


def test_a_plain_pipeline_is_taken_without_a_word(pipe, caplog):
    from_pipeline(pipe)
    assert not caplog.records


def test_freeu_is_refused_until_it_is_off(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    refused(pipe, "FreeU.*disable_freeu")
    pipe.disable_freeu()
    from_pipeline(pipe)


def test_fused_projections_give_the_weights_they_were_made_of(pipe, original):
    pipe.fuse_qkv_projections()
    state = from_pipeline(pipe).unet_state
    expected = original.unet.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    with torch.no_grad():
        next(one for name, one in pipe.unet.named_parameters() if "attn1.to_k." in name).add_(1.0)
    refused(pipe, "fused projections that differ.*unfuse_qkv_projections")


class OwnProcessor:
    def __call__(self, attention, hidden_states, *arguments, **options):
        return hidden_states


def test_attention_of_ones_own_is_refused_and_that_of_libraries_is_not(pipe):
    pipe.enable_attention_slicing()
    from_pipeline(pipe)
    pipe.unet.set_attn_processor(AttnProcessor())
    from_pipeline(pipe)
    pipe.unet.set_attn_processor(
        {
            **dict.fromkeys(pipe.unet.attn_processors, AttnProcessor2_0()),
            next(iter(pipe.unet.attn_processors)): OwnProcessor(),
        }
    )
    refused(pipe, "OwnProcessor.*set_default_attn_processor")


class OwnBlock(nn.Linear):
    pass


def change(model, kind, **attributes):
    for one in model.modules():
        if isinstance(one, kind):
            vars(one).update(attributes)


def hooked(model, **attributes):
    vars(model).update(attributes)
    add_hook_to_module(model, ModelHook())


class OwnConv(nn.Conv2d):
    pass


class OwnTokenizer(CLIPTokenizer):
    def convert_ids_to_tokens(self, ids, skip_special_tokens=False):
        return super().convert_ids_to_tokens(ids, skip_special_tokens)[::-1]


class Packed(torch.Tensor):
    pass


def packed(layer):
    return nn.Parameter(layer.weight.detach().as_subclass(Packed), False)


def image_encoder():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 16, "image_size": 8, "patch_size": 4}
    config = CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    return CLIPVisionModelWithProjection(config).eval()


def patched(thing, method="forward"):
    setattr(thing, method, lambda *_, **__: None)
    return thing


def without_begin(tokenizer):
    frame = processors.TemplateProcessing(
        "$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = frame


def louder(scheduler):
    scheduler.sigmas = scheduler.sigmas * 2
    return scheduler


CARRIED = {
    "a forward put on a block": (
        lambda pipe: setattr(pipe.unet.mid_block, "forward", lambda *_, **__: None),
        "forward.*replaced.*mid_block",
    ),
    "a forward hook": (lambda pipe: pipe.unet.conv_in.register_forward_hook(lambda *_: None), "forward hooks.*conv_in"),
    "a hook before forward": (lambda pipe: pipe.unet.register_forward_pre_hook(lambda *_: None), "on itself"),
    "a class put on a layer": (
        lambda pipe: setattr(pipe.unet.time_embedding.linear_1, "__class__", OwnBlock),
        "OwnBlock.*or patched",
    ),
    "seamless tiling": (
        lambda pipe: change(pipe.unet, nn.Conv2d, padding_mode="circular"),
        "padding_mode='circular' at conv_in where its config has 'zeros'",
    ),
    "a layer's own method": (
        lambda pipe: setattr(pipe.unet.conv_in, "_conv_forward", lambda x, *_: x),
        "method _conv_forward.*conv_in",
    ),
    "a method of a text encoder's layer": (
        lambda pipe: change(pipe.text_encoder_2, nn.Linear, forward=lambda x: x),
        "method forward of the pipeline's text_encoder_2",
    ),
    "a patch under a hook": (lambda pipe: hooked(pipe.unet, forward=lambda *_, **__: None), "method forward.*itself"),
    "the VAE's decoding": (lambda pipe: setattr(pipe.vae, "decode", lambda *_, **__: None), "method decode of the VAE"),
    "another eps": (lambda pipe: change(pipe.unet, nn.GroupNorm, eps=0.3), "eps=0.3 at .*1e-05"),
    "another activation": (
        lambda pipe: setattr(pipe.unet.mid_block.resnets[0], "nonlinearity", nn.ReLU()),
        "a ReLU at mid_block.resnets.0.nonlinearity where its config creates a SiLU",
    ),
    "a layer more": (
        lambda pipe: setattr(pipe.unet.mid_block.resnets[0], "upsample", nn.AvgPool2d(1)),
        "AvgPool2d.*creates nothing",
    ),
    "another scale": (
        lambda pipe: setattr(pipe.unet.mid_block.resnets[0], "output_scale_factor", torch.tensor(2.0)),
        "output_scale_factor=tensor",
    ),
    "rescaled attention": (
        lambda pipe: change(
            pipe.unet, type(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1), rescale_output_factor=2.0
        ),
        "rescale_output_factor=2.0",
    ),
    "another embedding of time": (
        lambda pipe: setattr(pipe.unet.time_proj, "flip_sin_to_cos", False),
        "flip_sin_to_cos=False at time_proj",
    ),
    "dropout": (lambda pipe: change(pipe.unet.train(), nn.Dropout, p=0.5), "training mode and has dropout.*eval"),
    "layerwise casting": (
        lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        "layerwise_casting",
    ),
    "group offload": (
        lambda pipe: pipe.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level"),
        "group_offloading",
    ),
    "weights of two types": (lambda pipe: pipe.unet.conv_in.half(), "float16, float32.*pipe.to"),
    "double precision": (lambda pipe: pipe.unet.double(), "float64"),
    "weights that are not there": (lambda pipe: pipe.unet.conv_in.to("meta"), "offloaded"),
    "a text encoder that is not there": (lambda pipe: pipe.text_encoder.to("meta"), "text_encoder is offloaded"),
    "a quantised layer of the VAE": (
        lambda pipe: setattr(pipe.vae.decoder.conv_in, "__class__", OwnConv),
        "VAE of the pipeline has a OwnConv of tests",
    ),
    "packed weights of the VAE": (
        lambda pipe: pipe.vae.decoder.conv_in._parameters.update(weight=packed(pipe.vae.decoder.conv_in)),
        "VAE of the pipeline is quantised .Packed, decoder.conv_in",
    ),
    "packed weights of a text encoder": (
        lambda pipe: pipe.text_encoder_2.text_projection._parameters.update(
            weight=packed(pipe.text_encoder_2.text_projection)
        ),
        "text_encoder_2 is quantised .Packed, text_projection",
    ),
    "layerwise casting of the VAE": (
        lambda pipe: pipe.vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        "VAE of the pipeline has diffusers' hook layerwise_casting",
    ),
    "a VAE that is not there": (lambda pipe: pipe.vae.to("meta"), "VAE of the pipeline is offloaded"),
    "a method of the image encoder": (
        lambda pipe: pipe.register_modules(image_encoder=patched(image_encoder())),
        "method forward of the pipeline's image_encoder",
    ),
    "an image encoder that is not there": (
        lambda pipe: pipe.register_modules(image_encoder=image_encoder().to("meta")),
        "image_encoder is offloaded",
    ),
    "a method of the image processor": (
        lambda pipe: pipe.register_modules(feature_extractor=patched(CLIPImageProcessor(), "preprocess")),
        "feature_extractor .*has preprocess of its own",
    ),
    "padding on the left": (lambda pipe: setattr(pipe.tokenizer, "padding_side", "left"), "padding_side='left'"),
    "cutting on the left": (lambda pipe: setattr(pipe.tokenizer_2, "truncation_side", "left"), "tokenizer_2 has trunc"),
    "no begin": (
        lambda pipe: without_begin(pipe.tokenizer_2),
        "tokenizer_2 was changed: it makes the tokens .*add_bos_token",
    ),
    "letters of both cases": (
        lambda pipe: setattr(pipe.tokenizer.backend_tokenizer, "normalizer", normalizers.NFC()),
        "tokenizer was changed: it makes the tokens",
    ),
    "end tokens read as text": (
        lambda pipe: setattr(pipe.tokenizer, "split_special_tokens", True),
        "tokenizer was changed",
    ),
    "a tokenizer of another class": (
        lambda pipe: setattr(pipe, "tokenizer_2", PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()))),
        "tokenizer_2 has tokenizer_class=.*CLIPTokenizer",
    ),
    "a tokenizer's own method": (
        lambda pipe: setattr(pipe.tokenizer, "__class__", OwnTokenizer),
        "tokenizer .OwnTokenizer. has convert_ids_to_tokens of its own",
    ),
    "something that is no tokenizer": (lambda pipe: setattr(pipe, "tokenizer", str), "tokenizer has tokenizer_class"),
    "a scheduler's own method": (
        lambda pipe: setattr(pipe.scheduler, "set_timesteps", lambda *_: None),
        "scheduler .EulerDiscreteScheduler. has set_timesteps of its own",
    ),
    "an EDM scheduler's own method": (
        lambda pipe: pipe.register_modules(scheduler=patched(EDMEulerScheduler(), "precondition_outputs")),
        "scheduler .EDMEulerScheduler. has precondition_outputs of its own",
    ),
    "EDM's levels changed by hand": (
        lambda pipe: pipe.register_modules(scheduler=louder(EDMEulerScheduler())),
        "noise levels of the pipeline's EDMEulerScheduler",
    ),
    "levels changed by hand": (
        lambda pipe: setattr(pipe.scheduler, "alphas_cumprod", pipe.scheduler.alphas_cumprod**2),
        "noise levels",
    ),
    "flow matching": (lambda pipe: pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler()), "flow matching"),
    "clipping": (lambda pipe: pipe.register_modules(scheduler=DDIMScheduler(clip_sample=True)), "clip_sample=True"),
    "another UNet": (lambda pipe: setattr(pipe, "unet", nn.Linear(1, 1)), "UNet is a Linear"),
    "another VAE": (lambda pipe: setattr(pipe, "vae", nn.Linear(1, 1)), "VAE of the pipeline is a Linear"),
    "latents of other channels": (
        lambda pipe: setattr(pipe, "vae", type(pipe.vae)(**small_vae_config(latent_channels=16))),
        "16 latent",
    ),
    "a refiner's settings": (
        lambda pipe: pipe.register_to_config(requires_aesthetics_score=True),
        "requires_aesthetics_score",
    ),
    "a further part": (
        lambda pipe: pipe.register_modules(second_scheduler=DDIMScheduler()),
        "left out .second_scheduler.*from_pipe",
    ),
    "a missing part": (lambda pipe: setattr(pipe, "text_encoder", None), "has no text_encoder"),
}


@pytest.mark.parametrize("what", CARRIED)
def test_refuses_by_name(pipe, what):
    put, words = CARRIED[what]
    put(pipe)
    refused(pipe, words)


@pytest.mark.parametrize("put", [{"add_bos_token": False}, {"do_lower_case": False}], ids=str)
def test_what_a_tokenizer_was_made_with_is_refused_by_name(pipe, put):
    pipe.tokenizer.init_kwargs.update(put)
    ((key, value),) = put.items()
    refused(pipe, f"tokenizer has {key}={value}, but it must be", ModelFormatError)


def test_parts_in_ordinary_use_are_taken(pipe):
    pipe.tokenizer.add_tokens(["<sks>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    pipe.tokenizer("a cat", padding="max_length", truncation=True, max_length=5)
    pipe.vae.decoder.conv_in.register_forward_hook(lambda *_: None)
    pipe.text_encoder.register_forward_hook(lambda *_: None)
    encoder = image_encoder()
    pipe.register_modules(image_encoder=torch.compile(encoder), feature_extractor=CLIPImageProcessor())
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(3)
    pipe.register_modules(scheduler=scheduler)
    assert from_pipeline(pipe).image_encoder is encoder


def test_what_libraries_set_in_ordinary_use_is_taken(pipe):
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.vae.enable_tiling()
    pipe.unet.to = lambda *_: pipe.unet  # as accelerate does with a model that is spread over devices
    pipe.unet.requires_grad_(False).enable_gradient_checkpointing()
    pipe.unet.train()
    pipe.unet.set_attention_slice("max")
    pipe.unet.register_to_config(sample_size=32)
    change(pipe.unet, nn.Dropout, p=0.1)
    change(pipe.vae, nn.Conv2d, padding_mode="circular")
    hooked(pipe.unet.conv_in)
    pipe.unet.eval()
    from_pipeline(pipe)


def test_a_vae_given_by_hand_with_another_decode_is_refused(original):
    vae = copy.deepcopy(original.vae)
    vae.decode = lambda *_, **__: None
    with pytest.raises(ModelError, match="decode of the VAE"):
        load_components("tiny", vae=vae)


def test_lora_layers_are_refused_on_text_encoders_too(pipe):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), pipe.text_encoder_2)
    refused(pipe, "text_encoder_2 holds LoRA layers.*unload_lora_weights")


def test_a_quantised_tensor_is_refused(original):
    unet = copy.deepcopy(original.unet)
    weight = unet.conv_in.weight.detach()
    unet.state_dict = lambda: {"conv_in.weight": weight.as_subclass(Packed)}
    with pytest.raises(ModelError, match="quantised .Packed."):
        unet_weights(unet)


def test_a_pipeline_with_a_controlnet_is_refused_with_the_way_to_leave_it_out(original):
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, StableDiffusionXLImg2ImgPipeline

    controlnet = ControlNetModel.from_unet(original.unet)
    refused(
        StableDiffusionXLControlNetPipeline(**original.components, controlnet=controlnet, add_watermarker=False),
        "ControlNetPipeline works differently.*from_pipe",
        ModelFormatError,
    )
    from_pipeline(StableDiffusionXLImg2ImgPipeline(**original.components, add_watermarker=False))


class Plain(StableDiffusionXLPipeline):
    _optional_components = StableDiffusionXLPipeline._optional_components

    def __init__(
        self,
        vae,
        text_encoder,
        text_encoder_2,
        tokenizer,
        tokenizer_2,
        unet,
        scheduler,
        image_encoder=None,
        feature_extractor=None,
        force_zeros_for_empty_prompt=True,
    ):
        super().__init__(
            vae,
            text_encoder,
            text_encoder_2,
            tokenizer,
            tokenizer_2,
            unet,
            scheduler,
            image_encoder,
            feature_extractor,
            force_zeros_for_empty_prompt,
            add_watermarker=False,
        )

    def save_pretrained(self, folder):
        raise NotImplementedError

    def draw(self):
        return self("a cat")


class Own(Plain):
    def encode_prompt(self, *arguments, **options):
        return super().encode_prompt(*arguments, **options)

    @property
    def guidance_scale(self):
        return 1.0


class Further(Own):
    pass


def test_a_class_of_ones_own_is_taken_if_it_draws_as_diffusers_does(original):
    from_pipeline(Plain(**original.components))
    for kind in (Own, Further):
        own = kind(**original.components)
        refused(
            own, f"pipeline .{kind.__name__}. has encode_prompt, guidance_scale of its own.*from_pipe", ModelFormatError
        )
    from_pipeline(StableDiffusionXLPipeline.from_pipe(own))
    from_pipeline(StableDiffusionXLPipeline(**own.components, add_watermarker=False))


def test_a_method_put_on_the_pipeline_is_refused(pipe):
    pipe.unload_lora_weights = pipe.to = lambda *_: None
    from_pipeline(pipe)
    pipe._get_add_time_ids = lambda *_: None
    refused(pipe, "has _get_add_time_ids of its own", ModelFormatError)


def test_a_loaded_ip_adapter_and_a_watermarker_are_left_out_and_said(pipe, original, caplog):
    pipe.unet._load_ip_adapter_weights([global_adapter(AttentionLayout.from_config(dict(pipe.unet.config)))])
    pipe.watermark = object()
    with caplog.at_level(logging.WARNING):
        components = from_pipeline(pipe)
    assert components.unet_state.keys() == original.unet.state_dict().keys()
    assert "IP-Adapter is left out" in caplog.text and "watermark" in caplog.text


def test_compiled_modules_and_a_tiny_vae_are_taken(pipe, original):
    pipe.unet = torch.compile(pipe.unet)
    pipe.unet._orig_mod.mid_block = torch.compile(pipe.unet._orig_mod.mid_block)
    pipe.vae = torch.compile(small_tiny_vae())
    components = from_pipeline(pipe)
    assert components.unet_state.keys() == original.unet.state_dict().keys()
    assert type(components.vae).__name__ == "AutoencoderTiny"


def test_the_scheduler_is_known_by_its_class(pipe):
    pipe.scheduler = EDMEulerScheduler()
    assert from_pipeline(pipe).scheduler_config["_class_name"] == "EDMEulerScheduler"


def test_a_vae_in_place_of_one_that_normalises_latents_is_refused(tmp_path):
    normalised = small_vae_config(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    folder = write_folder(small_pipeline(vae_config=normalised), tmp_path / "model")
    plain = small_pipeline(seed=1).vae
    with pytest.raises(ModelFormatError, match="latents_mean=.*instead of its own works on None"):
        load_components(folder, vae=plain)
    assert load_components(folder, vae=load_components(folder).vae).vae.config["latents_std"] == [2.0] * 4
