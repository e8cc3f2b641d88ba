"""Loading SDXL in each published form gives the same model; what is no SDXL model is refused by its true name."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from stylefast.errors import InvalidRequest, ModelError, ModelFormatError, ModelNotFound, OutOfMemory
from stylefast.models import checkpoint, hub, weight_files
from stylefast.models.checkpoint import from_pipeline, load_components, resolve_dtype
from stylefast.models.layout import AttentionLayout
from tests.support.fp64 import close, measured
from tests.support.small_checkpoints import (
    random_lora,
    write_folder,
    write_kohya_lora,
    write_single_file,
    write_vae_folder,
)
from tests.support.small_sdxl import (
    sdxl_unet_config,
    small_pipeline,
    small_tiny_vae,
    small_tokenizer,
    small_unet_config,
)


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline(seed=3)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    return write_folder(pipeline, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def single_file(pipeline, tmp_path_factory):
    return write_single_file(pipeline, tmp_path_factory.mktemp("single") / "small.safetensors")


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A hub cache with nothing in it, and a hub that nobody may ask."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def assert_same_model(components, pipeline):
    """Equal UNet weights; equal outputs up to the summation order that a tensor's place in memory decides."""

    @torch.no_grad()
    def states(encoder):
        return encoder(ids, output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def output(encoder):
        return encoder(ids)[0]

    @torch.no_grad()
    def pictures(vae, latents):
        return vae.decode(latents).sample

    expected = pipeline.unet.state_dict()
    assert components.unet_state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(components.unet_state[name], value), name
    ids = pipeline.tokenizer(["a cat in neon style"], padding="max_length", return_tensors="pt")["input_ids"]
    for ours, theirs in zip(components.text_encoders, (pipeline.text_encoder, pipeline.text_encoder_2)):
        close(states(ours), measured(states, theirs))
        close(output(ours), measured(output, theirs))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    close(pictures(components.vae, latents), measured(pictures, pipeline.vae, latents))
    for ours, theirs in zip(components.tokenizers, (pipeline.tokenizer, pipeline.tokenizer_2)):
        text = {"padding": "max_length", "max_length": 12}
        assert ours("a dog, a fish", **text)["input_ids"] == theirs("a dog, a fish", **text)["input_ids"]
        assert ours.model_max_length == 77


def test_a_diffusers_folder_gives_the_pipelines_model(folder, pipeline):
    components = load_components(folder)
    assert_same_model(components, pipeline)
    assert components.force_zeros
    assert components.name == "small"
    assert components.scheduler_config["beta_schedule"] == "scaled_linear"
    assert AttentionLayout.from_config(components.unet_config).modules[8] == "up_blocks.1.attentions.0"


def test_a_pipeline_and_its_folder_have_one_fingerprint_and_another_model_another(folder, pipeline):
    prints = {load_components(folder).fingerprint, from_pipeline(pipeline).fingerprint}
    assert len(prints) == 1
    assert from_pipeline(small_pipeline(seed=4)).fingerprint not in prints
    assert load_components(folder, dtype="bfloat16").fingerprint not in prints


def test_16_bit_types_take_the_fp16_edition_and_others_the_plain_one(pipeline, folder, tmp_path):
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    half = small_pipeline(seed=8).to(dtype=torch.float16)
    write_folder(half, tmp_path / "half", variant="fp16")
    for file in (tmp_path / "half").rglob("*.fp16.safetensors"):
        shutil.copy(file, both / file.relative_to(tmp_path / "half"))
    assert_same_model(load_components(both), pipeline)
    name = "conv_in.weight"
    assert torch.equal(load_components(both, dtype="fp16").unet_state[name], half.unet.state_dict()[name])
    assert torch.equal(load_components(both, variant="fp16").unet_state[name], half.unet.state_dict()[name].float())
    only_half = load_components(tmp_path / "half")
    assert only_half.unet_state[name].dtype == torch.float32
    with pytest.raises(ModelNotFound, match="variant 'bf16'; it has diffusion_pytorch_model.fp16.safetensors"):
        load_components(tmp_path / "half", variant="bf16")


def test_a_folder_in_shards_gives_the_same_model(pipeline, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    whole = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    state = sorted(load_file(whole).items())
    whole.unlink()
    for i in range(2):
        save_file(dict(state[i::2]), whole.with_name(f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"))
    assert_same_model(load_components(tmp_path / "model"), pipeline)


def test_a_single_file_with_a_config_folder_gives_the_pipelines_model(single_file, folder, pipeline):
    assert_same_model(load_components(single_file, config=folder), pipeline)


def test_a_single_file_with_sdxls_head_width_needs_no_config(tmp_path):
    config = small_unet_config(widths=(64, 64, 128), head_width=64, cross_dim=128, pooled_dim=64)
    pipeline = small_pipeline(seed=5, unet_config=config, text_width=64, text_heads=1)
    path = write_single_file(pipeline, tmp_path / "model.safetensors")
    small_tokenizer().save_pretrained(tmp_path / "clip")
    components = load_components(path, tokenizer=tmp_path / "clip")
    assert_same_model(components, pipeline)
    for name, value in config.items():
        if name != "sample_size":
            found = components.unet_config[name]
            assert tuple(found) == tuple(value) if isinstance(value, tuple) else found == value, name
    assert components.scheduler_config["prediction_type"] == "epsilon"
    assert components.vae.config["scaling_factor"] == 0.13025
    assert components.vae.config["force_upcast"]


def test_a_single_files_keys_tell_v_prediction_and_zero_terminal_snr(pipeline, folder, tmp_path):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    path = write_single_file(pipeline, tmp_path / "v.safetensors", extra=marks)
    for part in ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"):
        shutil.copytree(folder / part, tmp_path / "config" / part)
    components = load_components(path, config=tmp_path / "config")
    assert components.scheduler_config["prediction_type"] == "v_prediction"
    assert components.scheduler_config["rescale_betas_zero_snr"]


def test_a_single_file_in_half_precision_loads_in_any_type_and_keeps_its_vae_in_float32(pipeline, folder, tmp_path):
    path = write_single_file(pipeline, tmp_path / "half.safetensors", dtype=torch.float16)
    full = load_components(path, config=folder)
    assert {value.dtype for value in full.unet_state.values()} == {torch.float32}
    half = load_components(path, config=folder, dtype="float16")
    assert {value.dtype for value in half.unet_state.values()} == {torch.float16}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert {p.dtype for encoder in half.text_encoders for p in encoder.parameters()} == {torch.float16}


def test_a_single_file_with_narrow_heads_asks_for_a_config(single_file, folder):
    with pytest.raises(ModelFormatError, match="64-wide heads.*config="):
        load_components(single_file, tokenizer=folder)


def test_a_single_file_without_tokenizer_offline_says_which_files_to_get(single_file, folder, empty_cache, tmp_path):
    shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ModelNotFound, match="vocab.json and merges.txt.*tokenizer='clip-tokenizer'"):
        load_components(single_file, config=tmp_path / "config", local_files_only=True)


def test_a_single_file_takes_a_cached_sdxl_models_tokenizer(single_file, folder, empty_cache, tmp_path, pipeline):
    shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("tokenizer*"))
    snapshot = _cached(empty_cache, "stabilityai/stable-diffusion-xl-base-1.0")
    shutil.copytree(folder / "tokenizer", snapshot / "tokenizer")
    components = load_components(single_file, config=tmp_path / "config", local_files_only=True)
    assert_same_model(components, pipeline)


def test_an_extra_vae_replaces_the_checkpoints_own(folder, single_file, tmp_path):
    vae = write_vae_folder(small_tiny_vae(), tmp_path / "taesd")
    assert type(load_components(folder, vae=vae).vae).__name__ == "AutoencoderTiny"
    assert type(load_components(single_file, config=folder, vae=str(vae)).vae).__name__ == "AutoencoderTiny"
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("vae"))
    assert type(load_components(tmp_path / "bare", vae=vae).vae).__name__ == "AutoencoderTiny"


def _cached(cache, repo_id):
    """An empty snapshot of a repository in a hub cache."""
    home = cache / f"models--{repo_id.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_hub_id_that_is_cached_loads_without_the_network(folder, empty_cache, pipeline, monkeypatch):
    shutil.copytree(folder, _cached(empty_cache, "someone/small"), dirs_exist_ok=True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: pytest.fail("asked the network"))
    monkeypatch.setattr(hub, "offline", lambda: False)
    components = load_components("someone/small")
    assert_same_model(components, pipeline)
    assert components.name == "someone/small"


@pytest.mark.parametrize("repo_id", ["stabilityai/stable-diffusion-xl-base-1.0", "someone/model.v2"])
def test_a_hub_id_offline_and_not_cached_says_what_to_download_and_where_to_put_it(repo_id, empty_cache):
    with pytest.raises(ModelNotFound) as error:
        load_components(repo_id, local_files_only=True)
    assert f"hf download {repo_id} --local-dir" in str(error.value)
    assert "give its path" in str(error.value)


@pytest.mark.parametrize("failure", [ConnectionError("no route"), TimeoutError(), RuntimeError("proxy\nlong trace")])
def test_a_network_error_is_no_stack_trace_but_says_what_to_download(failure, empty_cache, monkeypatch):
    def model_info(*arguments, **options):
        raise failure

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "offline", lambda: False)
    with pytest.raises(ModelNotFound, match=f"can't be reached \\({type(failure).__name__}.*hf download someone/model"):
        load_components("someone/model")


def test_a_download_takes_only_the_edition_that_will_be_loaded(folder):
    plain = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    half = [name.replace(".safetensors", ".fp16.safetensors") for name in plain if name.endswith(".safetensors")]
    others = [
        "sd_xl_base_1.0.safetensors",
        "unet/model.onnx",
        "unet/diffusion_pytorch_model.bin",
        "README.md",
        "vae_1_0/diffusion_pytorch_model.safetensors",
    ]
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler", "tokenizer", "tokenizer_2")
    chosen = hub.wanted_files(plain + half + others, False, "auto", parts)
    assert sorted(chosen) == sorted(plain)
    chosen = hub.wanted_files(plain + half + others, True, "auto", parts)
    assert {name for name in chosen if name.endswith(".safetensors")} == set(half)


@pytest.mark.parametrize("source", ["/nowhere/model.safetensors", "no-such-folder", "a/b/c", "./x/y", "a/b.ckpt"])
def test_a_path_with_nothing_at_it_is_not_taken_for_a_hub_id(source):
    with pytest.raises(ModelNotFound, match="nothing at .*'tiny'"):
        load_components(source)


@pytest.mark.parametrize("source", ["a/b..c", "a/b.git", "a/" + "b" * 200])
def test_what_only_looks_like_a_hub_id_is_not_found(source):
    with pytest.raises(ModelNotFound, match="can't be an id on the hub"):
        load_components(source)


def test_a_file_cut_short_is_refused_with_both_sizes(single_file, folder, tmp_path):
    whole = single_file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(ModelFormatError, match=f"{len(whole) - 1000} bytes, but its header declares {len(whole)}"):
        load_components(tmp_path / "cut.safetensors", config=folder)


def test_a_single_file_without_text_encoders_is_refused(single_file, folder, tmp_path):
    state = {name: value for name, value in load_file(single_file).items() if not name.startswith("conditioner.")}
    save_file(state, tmp_path / "unet_only.safetensors")
    with pytest.raises(ModelFormatError, match="first text encoder"):
        load_components(tmp_path / "unet_only.safetensors", config=folder)


@pytest.mark.parametrize(
    "part, file",
    [
        ("unet", "config.json"),
        ("scheduler", "scheduler_config.json"),
        (".", "model_index.json"),
    ],
)
def test_a_folder_that_lacks_a_config_is_refused(part, file, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / part / file).unlink()
    with pytest.raises(ModelNotFound, match=file):
        load_components(tmp_path / "model")


def test_a_folder_with_pickled_weights_alone_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelNotFound, match="diffusion_pytorch_model.bin"):
        load_components(tmp_path / "model")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"addition_embed_type": None, "cross_attention_dim": 768}, "Stable Diffusion 1"),
        ({"projection_class_embeddings_input_dim": 2560}, "refiner"),
        ({"in_channels": 8}, "8 input channels"),
        ({"cross_attention_dim": 48}, "of wrong shape"),
        ({"layers_per_block": 3}, "missing"),
        ({"block_out_channels": [32, 64]}, "does not describe a UNet"),
    ],
    ids=["sd 1.5", "refiner", "editing", "other width", "more layers", "nonsense"],
)
def test_a_folder_whose_config_is_not_that_of_its_weights_is_refused(change, said, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelFormatError, match=said):
        load_components(tmp_path / "model")


def test_too_little_memory_is_told_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(weight_files, "available_memory", lambda device: 2_000_000)
    monkeypatch.setattr(checkpoint, "load_weights", lambda *a, **k: pytest.fail("loaded weights"))
    with pytest.raises(OutOfMemory, match=r"small take 0.0[0-9]+ GB and cpu has 0.002 GB free"):
        load_components(folder)


def test_from_pipeline_shares_storage_and_leaves_the_pipeline_as_it_is():
    pipeline = small_pipeline()
    processors = {name: id(value) for name, value in pipeline.unet.attn_processors.items()}
    flags = [parameter.requires_grad for parameter in pipeline.unet.parameters()]
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    components = from_pipeline(pipeline)
    theirs = pipeline.unet.state_dict()
    assert all(value.data_ptr() == theirs[name].data_ptr() for name, value in components.unet_state.items())
    assert components.vae is pipeline.vae
    assert components.text_encoders == (pipeline.text_encoder, pipeline.text_encoder_2)
    assert {name: id(value) for name, value in pipeline.unet.attn_processors.items()} == processors
    assert [parameter.requires_grad for parameter in pipeline.unet.parameters()] == flags
    assert all(torch.equal(theirs[name], value) for name, value in before.items())
    assert not pipeline.unet._forward_hooks and not pipeline.unet._forward_pre_hooks


def test_from_pipeline_refuses_unfused_lora_and_accepts_it_fused(tmp_path):
    pipeline = small_pipeline()
    lora = random_lora(pipeline, text=False)
    pipeline.load_lora_weights(str(write_kohya_lora(lora, tmp_path / "lora.safetensors", pipeline.unet.config)))
    with pytest.raises(ModelError, match="fuse_lora"):
        from_pipeline(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert from_pipeline(pipeline).fingerprint != from_pipeline(small_pipeline()).fingerprint


def test_from_pipeline_refuses_a_pipeline_of_another_family():
    pipeline = small_pipeline()
    pipeline.text_encoder_2 = None
    with pytest.raises(ModelFormatError, match="text_encoder_2"):
        from_pipeline(pipeline)


@pytest.mark.parametrize(
    "dtype, device, expected",
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.float16),
        ("bf16", "cpu", torch.bfloat16),
        (torch.float16, "cpu", torch.float16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_dtype_names(dtype, device, expected):
    assert resolve_dtype(dtype, torch.device(device)) is expected


def test_unknown_types_and_devices_are_refused(folder):
    with pytest.raises(InvalidRequest, match="int8"):
        load_components(folder, dtype="int8")
    with pytest.raises(InvalidRequest, match="abacus"):
        load_components(folder, device="abacus")
    with pytest.raises(InvalidRequest, match="cuda:99"):
        load_components(folder, device="cuda:99")


def test_the_embedded_model_loads_like_any_other():
    components = load_components("tiny")
    layout = AttentionLayout.from_config(components.unet_config)
    assert components.name == "tiny"
    assert {"down_blocks.2.attentions.1", "up_blocks.0.attentions.1"} <= set(layout.modules)
    assert len(layout.modules) == 11


@pytest.mark.slow
def test_the_real_sdxl_config_has_its_published_parameters_and_attention_calls():
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sdxl_unet_config())
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    layout = AttentionLayout.from_config(dict(unet.config))
    assert 2 * len(layout.layers) == len(unet.attn_processors) == 140
    calls = [f"{layer.name}.{attention}.processor" for layer in layout.layers for attention in ("attn1", "attn2")]
    assert calls == list(unet.attn_processors)
    assert len(layout.modules) == 11
    for layer in layout.layers:
        module = unet.get_submodule(layer.name)
        assert (module.attn1.heads, module.attn1.inner_dim) == (layer.heads, layer.channels)


def test_an_index_that_contradicts_its_folder_is_done_as_diffusers_does_or_refused(pipeline, folder, tmp_path, caplog):
    changed = shutil.copytree(folder, tmp_path / "changed")
    index = json.loads((folder / "model_index.json").read_text())
    write = (changed / "model_index.json").write_text
    write(json.dumps({**index, "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"], "vae": [None, None]}))
    components = load_components(changed, vae=pipeline.vae)
    assert components.scheduler_config["_class_name"] == "EulerAncestralDiscreteScheduler"
    assert "the first is used" in caplog.text
    with pytest.raises(ModelFormatError, match="vae=.None, None., but an SDXL model needs this part"):
        load_components(changed)
