import numpy as np
import pytest
import torch

from stylefast.errors import AdapterError, InvalidRequest, ModelFormatError, ModelNotFound
from stylefast.models.image_encoder import ImageEncoder, preprocess
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.layout import LAYOUT_MODULE, STYLE_MODULE, AttentionLayout
from tests.support.fp64 import close, measured
from tests.support.small_adapter import (
    CROSS_DIM,
    global_adapter,
    layer_weights,
    plus_adapter,
    save_adapter,
    small_layout,
    small_picture,
    small_vision_model,
)
from tests.support.small_sdxl import sdxl_unet_config

# of pixels, which are scaled one by one: there are no sums whose order could differ
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def layout():
    return small_layout()


@pytest.fixture(scope="module")
def encoder():
    return ImageEncoder(small_vision_model())


def load(state, layout, **options):
    return IPAdapter.load(state, layout, CROSS_DIM, **options)


def diffusers_projection(state):
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    return UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers(
        state["image_proj"], low_cpu_mem_usage=False
    )


@torch.no_grad()
def projected(projection, features):
    return projection(features)


def clip_processor(**options):
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    return Processor(**options)


# --- the index map (T1)


def test_sdxl_has_seventy_layers_with_odd_keys_and_mid_last():
    layout = AttentionLayout.from_config(sdxl_unet_config())
    keys = {}
    for i, layer in enumerate(layout.layers):
        keys.setdefault(layer.module, []).append(layout.ip_adapter_key(i))
    assert {module: (ks[0], ks[-1]) for module, ks in keys.items()} == {
        "down_blocks.1.attentions.0": (1, 3),
        "down_blocks.1.attentions.1": (5, 7),
        "down_blocks.2.attentions.0": (9, 27),
        LAYOUT_MODULE: (29, 47),
        "up_blocks.0.attentions.0": (49, 67),
        STYLE_MODULE: (69, 87),
        "up_blocks.0.attentions.2": (89, 107),
        "up_blocks.1.attentions.0": (109, 111),
        "up_blocks.1.attentions.1": (113, 115),
        "up_blocks.1.attentions.2": (117, 119),
        "mid_block.attentions.0": (121, 139),
    }
    assert [k for ks in keys.values() for k in ks] == list(range(1, 140, 2))


def test_sdxl_adapter_has_the_published_number_of_parameters():
    with torch.device("meta"):
        adapter = IPAdapter.load(
            _meta_sdxl_global(), AttentionLayout.from_config(sdxl_unet_config()), 2048, device="meta"
        )
    assert sum(p.numel() for p in adapter.parameters()) == 351_285_248
    assert sum(p.numel() for p in adapter.layer_projections.parameters()) == 340_787_200


def _meta_sdxl_global():
    layers = {
        f"ip_adapter.{2 * i + 1}.to_{w}_ip.weight": torch.empty(layer.channels, 2048, device="meta")
        for i, layer in enumerate(AttentionLayout.from_config(sdxl_unet_config()).layers)
        for w in "kv"
    }
    shapes = {"proj.weight": (8192, 1280), "proj.bias": (8192,), "norm.weight": (2048,), "norm.bias": (2048,)}
    return layers | {f"image_proj.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}


# --- loading


@pytest.mark.parametrize(
    "make, kind, embed_dim, tokens", [(global_adapter, "global", 48, 4), (plus_adapter, "plus", 40, 16)]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_files_load_and_their_kind_is_recognised_from_the_keys(tmp_path, layout, make, kind, embed_dim, tokens, suffix):
    state = make(layout)
    path = tmp_path / f"adapter{suffix}"
    save_adapter(state, path)
    adapter = load(path, layout)
    assert (adapter.kind, adapter.embed_dim, adapter.token_count, adapter.name) == (kind, embed_dim, tokens, path.name)
    for i in range(len(layout.layers)):
        key = layout.ip_adapter_key(i)
        stored = adapter.layer_projections[str(i)].weight
        expected = torch.cat([state["ip_adapter"][f"{key}.to_{w}_ip.weight"] for w in "kv"])
        assert torch.equal(stored, expected)


def test_key_values_are_the_file_matrices_per_layer_with_heads_split(layout):
    state = global_adapter(layout)
    tokens = torch.randn(3, 4, CROSS_DIM, generator=torch.Generator().manual_seed(5))
    pairs = load(state, layout).key_values(tokens)
    assert len(pairs) == len(layout.layers)
    for i, (layer, pair) in enumerate(zip(layout.layers, pairs)):
        for which, got in zip("kv", pair):
            weight = state["ip_adapter"][f"{layout.ip_adapter_key(i)}.to_{which}_ip.weight"]
            assert got.shape == (3, 4, layer.heads, layer.channels // layer.heads)
            close(got.flatten(2), measured(torch.nn.functional.linear, tokens, weight))


def test_only_the_named_modules_are_read(tmp_path, layout):
    path = tmp_path / "adapter.safetensors"
    save_adapter(global_adapter(layout), path)
    tokens = torch.randn(1, 4, CROSS_DIM, generator=torch.Generator().manual_seed(5))
    everything = load(path, layout).key_values(tokens)
    some = load(path, layout, modules=[STYLE_MODULE]).key_values(tokens)
    for layer, full, pair in zip(layout.layers, everything, some):
        if layer.module == STYLE_MODULE:
            assert torch.equal(pair[0], full[0]) and torch.equal(pair[1], full[1])
        else:
            assert pair is None


def test_half_precision_files_load_in_the_type_asked_for(layout):
    state = {part: {k: t.half() for k, t in inner.items()} for part, inner in plus_adapter(layout).items()}
    adapter = load(state, layout, dtype=torch.float32)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


# --- tokens: against diffusers, and of no picture (T5, T7)


@pytest.mark.parametrize("make, shape", [(global_adapter, (3, 48)), (plus_adapter, (3, 17, 40))])
def test_tokens_equal_those_of_diffusers(layout, make, shape):
    state = make(layout)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    close(load(state, layout).tokens(features), measured(projected, diffusers_projection(state), features))


def test_global_negative_tokens_are_the_normalised_bias_and_not_zero(layout):
    state = global_adapter(layout)
    projector = state["image_proj"]
    expected = measured(
        torch.nn.functional.layer_norm,
        projector["proj.bias"].reshape(4, CROSS_DIM),
        (CROSS_DIM,),
        projector["norm.weight"],
        projector["norm.bias"],
    )
    negative = load(state, layout).negative_tokens()
    close(negative, expected)
    assert negative.abs().mean() > 0.5


def test_plus_negative_tokens_come_from_zeros_after_normalisation(layout, encoder):
    state = plus_adapter(layout)

    def of_zeros(vision_model, projection, zeros):
        with torch.no_grad():
            return projection(vision_model(zeros, output_hidden_states=True).hidden_states[-2])[0]

    expected = measured(of_zeros, encoder.vision_model, diffusers_projection(state), torch.zeros(1, 3, 32, 32))
    adapter = load(state, layout)
    close(adapter.negative_tokens(encoder), expected)
    black = adapter.tokens(encoder.patches([np.zeros((32, 32, 3), dtype=np.uint8)]))[0]
    assert (black - expected.value).abs().max() > 1e-3


def test_plus_negative_tokens_follow_a_change_of_encoder(layout, encoder):
    adapter = load(plus_adapter(layout), layout)
    first = adapter.negative_tokens(encoder)
    assert adapter.negative_tokens(encoder) is first
    other = adapter.negative_tokens(ImageEncoder(small_vision_model(seed=1)))
    assert (other - first).abs().max() > 1e-3


@pytest.mark.parametrize("make", [global_adapter, plus_adapter])
def test_order_and_repetition_of_pictures_do_not_change_attention(layout, encoder, make):
    adapter = load(make(layout), layout)
    features = adapter.features(encoder, [small_picture(seed) for seed in range(3)])
    tokens = adapter.tokens(features)

    def image_term(adapter, tokens):
        k, v = adapter.key_values(tokens.flatten(0, 1)[None])[0]
        query = torch.randn(1, k.shape[2], 9, k.shape[3], generator=torch.Generator().manual_seed(7)).to(k.dtype)
        return torch.nn.functional.scaled_dot_product_attention(query, k.transpose(1, 2), v.transpose(1, 2))

    together = measured(image_term, adapter, tokens)
    alone = [measured(image_term, adapter, tokens[[i]]) for i in range(3)]
    close(image_term(adapter, tokens[[2, 0, 1]]), together)
    close(image_term(adapter, tokens[[0, 0]]), alone[0])
    assert (together.value - sum(one.value for one in alone)).abs().max() > 0.1


# --- what does not fit


def _with(state, part, **changes):
    return state | {part: state[part] | changes}


def _without(state, part, key):
    return state | {part: {k: t for k, t in state[part].items() if k != key}}


def _sd15(layout):
    return global_adapter(layout, cross_dim=48)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda s: _without(s, "ip_adapter", "5.to_v_ip.weight"), r"lacks ip_adapter\.5\.to_v_ip\.weight"),
        (lambda s: _with(s, "ip_adapter", **{"999.to_k_ip.weight": torch.zeros(64, 64)}), r"ip_adapter\.999"),
        (lambda s: _with(s, "ip_adapter", **{"1.to_k_ip.weight": torch.zeros(32, 64)}), r"\[32, 64\].*\[64, 64\]"),
        (lambda s: _with(s, "ip_adapter", **{"0.to_q_lora.up.weight": torch.zeros(2, 2)}), "FaceID"),
        (lambda s: s | {"image_proj": {"perceiver_resampler.proj_in.weight": torch.zeros(2, 2)}}, "FaceID-Plus"),
        (lambda s: s | {"image_proj": {"proj.0.weight": torch.zeros(2, 512)}}, r"FaceID adapter \(portrait\)"),
        (
            lambda s: s | {"image_proj": {"latents": torch.zeros(1, 2, 4), "proj_in.weight": torch.zeros(4, 512)}},
            "InstantID",
        ),
        (lambda s: s | {"image_proj": {"proj.0.weight": torch.zeros(2, 2)}}, "full-face"),
        (lambda s: s | {"image_proj": {"mapper.weight": torch.zeros(2, 2)}}, "unknown kind.*mapper.weight"),
        (lambda s: _without(s, "image_proj", "norm.bias"), r"lacks image_proj\.norm\.bias"),
        (lambda s: _with(s, "image_proj", foreign=torch.zeros(1)), r"image_proj\.foreign"),
        (lambda s: s | {"optimizer": {"step": torch.zeros(1)}}, r"optimizer\.step"),
        (lambda s: {"ip_adapter": s["ip_adapter"]}, "not an IP-Adapter"),
        (lambda s: {"unet": {"x.lora_A.weight": torch.zeros(1)}}, "not an IP-Adapter, .* but: LoRA"),
    ],
    ids=[
        "missing layer",
        "foreign layer",
        "wrong width",
        "faceid lora",
        "faceid resampler",
        "faceid portrait",
        "instantid",
        "full-face adapter",
        "unknown projection",
        "missing projection",
        "foreign projection",
        "foreign part",
        "no projection",
        "another model",
    ],
)
def test_an_adapter_that_does_not_fit_says_which_key_and_which_shape(layout, spoil, words):
    with pytest.raises(AdapterError, match=words):
        load(spoil(global_adapter(layout)), layout)


@pytest.mark.parametrize("make", [global_adapter, plus_adapter])
def test_an_adapter_of_another_base_model_is_named_with_both_widths(layout, make):
    with pytest.raises(AdapterError, match="48 wide.*64"):
        load(make(layout, cross_dim=48), layout)


def test_an_adapter_for_fewer_layers_says_how_many(layout):
    state = global_adapter(layout)
    few = dict(list(state["ip_adapter"].items())[:8])
    with pytest.raises(AdapterError, match=f"has 8 .*the model {2 * len(layout.layers)}"):
        load(state | {"ip_adapter": few}, layout)


def test_an_unknown_module_is_refused(layout):
    with pytest.raises(AdapterError, match="up_blocks.9"):
        load(global_adapter(layout), layout, modules=["up_blocks.9.attentions.0"])


def test_missing_files_and_folders_say_where_to_look(tmp_path, layout):
    with pytest.raises(ModelNotFound, match="absent.safetensors"):
        load(tmp_path / "absent.safetensors", layout)
    save_adapter(global_adapter(layout), tmp_path / "ip-adapter_sdxl.bin")
    with pytest.raises(ModelNotFound, match="ip-adapter_sdxl.bin"):
        load(tmp_path, layout)


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.bin", "broken.txt"])
def test_damaged_files_are_refused(tmp_path, layout, name):
    (tmp_path / name).write_bytes(b"\x80\x02 no tensors here")
    with pytest.raises(ModelFormatError, match="broken"):
        load(tmp_path / name, layout)


def test_files_cut_short_are_refused(tmp_path, layout):
    for name in ("cut.safetensors", "cut.bin"):
        path = tmp_path / name
        save_adapter(global_adapter(layout), path)
        whole = path.read_bytes()
        for length in (0, 5, 200, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(ModelFormatError, match="cut"):
                load(path, layout)


class _Code:
    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, layout, capsys):
    torch.save({"image_proj": _Code()}, tmp_path / "evil.bin")
    with pytest.raises(ModelFormatError, match="evil.bin"):
        load(tmp_path / "evil.bin", layout)
    assert capsys.readouterr().out == ""


def test_values_that_are_no_tensors_are_refused(layout):
    with pytest.raises(ModelFormatError, match="int under 'image_proj.proj.weight'"):
        load({"image_proj": {"proj.weight": 3}, "ip_adapter": layer_weights(layout)}, layout)


def test_features_and_tokens_of_the_wrong_width_are_refused(layout):
    adapter = load(global_adapter(layout), layout)
    with pytest.raises(AdapterError, match=r"\[n, 48\], not \[2, 47\]"):
        adapter.tokens(torch.zeros(2, 47))
    with pytest.raises(AdapterError, match="not"):
        adapter.tokens(torch.zeros(2, 17, 48))
    with pytest.raises(AdapterError, match=r"\[pages, t, 64\]"):
        adapter.key_values(torch.zeros(4, 64))


@pytest.mark.parametrize(
    "make, embed_dim, hidden_size, projection_dim, folder",
    [
        (global_adapter, 1280, 40, 1024, "sdxl_models/image_encoder"),
        (global_adapter, 1024, 40, 1280, "models/image_encoder"),
        (plus_adapter, 1280, 64, 1280, "models/image_encoder"),
    ],
    ids=["bigG adapter with ViT-H", "ViT-H adapter with bigG", "plus adapter with bigG"],
)
def test_the_wrong_image_encoder_is_named_with_the_right_folder(
    layout, make, embed_dim, hidden_size, projection_dim, folder
):
    adapter = load(make(layout, embed_dim=embed_dim), layout)
    wrong = ImageEncoder(small_vision_model(hidden_size=hidden_size, projection_dim=projection_dim))
    given = projection_dim if adapter.kind == "global" else hidden_size
    with pytest.raises(AdapterError, match=f"{embed_dim} wide.*returns {given}.*'{folder}'"):
        adapter.features(wrong, [small_picture()])


# --- the image encoder


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (97, 33), (32, 32), (20, 16), (333, 250)])
def test_preprocessing_equals_clip_image_processor(size):
    picture = small_picture(3, size)
    processor = clip_processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = torch.as_tensor(np.array(processor(picture, return_tensors="np")["pixel_values"]))[0]
    torch.testing.assert_close(preprocess(picture, 32), expected.float(), **CLOSE)


def test_preprocessing_equals_clip_image_processor_where_the_crop_is_smaller_than_the_short_side():
    picture = small_picture(3, (77, 61))
    config = {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.25],
    }
    expected = torch.as_tensor(np.array(clip_processor(**config)(picture, return_tensors="np")["pixel_values"]))
    pixels = ImageEncoder(small_vision_model(), config).pixels([picture])
    torch.testing.assert_close(pixels, expected.float(), **CLOSE)


def test_squash_keeps_the_edges_that_center_cuts_off():
    pixels = np.full((32, 96, 3), 255, dtype=np.uint8)
    pixels[:, :24] = pixels[:, -24:] = 0
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    assert preprocess(pixels, 32, "center", **plain).min() == 1
    squashed = preprocess(pixels, 32, "squash", **plain)
    assert squashed.shape == (3, 32, 32) and squashed.mean() == pytest.approx(0.5, abs=0.02)


def test_pad_keeps_the_aspect_and_fills_up_with_the_mean_colour():
    padded = preprocess(np.full((32, 64, 3), 255, dtype=np.uint8), 32, "pad")
    assert padded.shape == (3, 32, 32)
    assert (padded[:, :8] == 0).all() and (padded[:, 24:] == 0).all() and (padded[:, 8:24] > 1).all()


def test_embeddings_and_patches_are_those_of_transformers(encoder):
    pictures = [small_picture(0), small_picture(1, (32, 70))]
    pixels = encoder.pixels(pictures)

    @torch.no_grad()
    def embeds(model, pixels):
        return model(pixels).image_embeds

    @torch.no_grad()
    def patches(model, pixels):
        return model(pixels, output_hidden_states=True).hidden_states[-2]

    close(encoder.embed(pictures), measured(embeds, encoder.vision_model, pixels))
    close(encoder.patches(pictures), measured(patches, encoder.vision_model, pixels))
    assert encoder.embed(pictures).shape == (2, 48) and encoder.patches(pictures).shape == (2, 17, 40)


def test_unknown_crops_empty_lists_and_single_pictures_are_refused(encoder):
    with pytest.raises(InvalidRequest, match="'stretch'"):
        encoder.embed([small_picture()], crop="stretch")
    with pytest.raises(InvalidRequest, match="list"):
        encoder.embed([])
    with pytest.raises(InvalidRequest, match="list"):
        encoder.embed(small_picture())


def test_a_processor_of_another_encoder_is_refused():
    with pytest.raises(ModelFormatError, match="crops to 224 pixels.*takes 32"):
        ImageEncoder(small_vision_model(), {"crop_size": {"height": 224, "width": 224}})
    with pytest.raises(ModelFormatError, match="Linear"):
        ImageEncoder(torch.nn.Linear(2, 2))
