"""Options of loading as people type them, and model folders that are incomplete, edited or damaged."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import stylefast as sf
from stylefast.errors import InvalidRequest, ModelFormatError, ModelNotFound
from stylefast.models import hub, load_options
from stylefast.models.checkpoint import load_components
from stylefast.models.hub import HubOptions, is_whole, pick_weights
from stylefast.models.load_options import sort_options
from tests.support.small_checkpoints import write_folder, write_vae_folder
from tests.support.small_sdxl import small_pipeline, small_text_encoders, small_tiny_vae, small_vae_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(small_pipeline(seed=3), tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the folder that a test may damage."""
    shutil.copytree(folder, tmp_path / "own")
    return tmp_path / "own"


# what diffusers' users type


def sort(dtype="auto", device="auto", **options):
    return sort_options(options, ("adapter", "dtype", "device"), dtype, device)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"torch_dtype": torch.float16}, ({}, torch.float16, "auto")),
        ({"torch_dtype": "float16", "dtype": torch.float16}, ({}, "float16", "auto")),
        ({"torch_dtype": "auto"}, ({}, "auto", "auto")),
        ({"torch_dtype": None}, ({}, "auto", "auto")),
        ({"device_map": "cuda"}, ({}, "auto", "cuda")),
        ({"use_auth_token": "hf_x"}, ({"token": "hf_x"}, "auto", "auto")),
        ({"revision": "main", "variant": "fp16"}, ({"revision": "main", "variant": "fp16"}, "auto", "auto")),
        (
            {"use_safetensors": True, "safety_checker": None, "low_cpu_mem_usage": True, "add_watermarker": False},
            ({}, "auto", "auto"),
        ),
    ],
    ids=str,
)
def test_options_are_done_under_their_own_name(given, expected):
    assert sort(**given) == expected


@pytest.mark.parametrize(
    "given, said",
    [
        ({"torch_dtype": torch.float16, "dtype": "bfloat16"}, "torch_dtype is .*float16 and dtype 'bfloat16'"),
        ({"device_map": "balanced"}, "device='cuda'"),
        ({"use_safetensors": False}, "use_safetensors=False is not supported"),
        ({"use_safetensors": 1}, "use_safetensors=1 is not supported"),
        ({"safety_checker": "a checker"}, "SDXL has none"),
        ({"scheduler": "euler"}, "a request names its sampler"),
        ({"quantization_config": {}}, "dtype='float16'"),
        ({"proxies": {"https": "x"}}, "HTTPS_PROXY"),
        ({"token": "a", "use_auth_token": "b"}, "mean the same"),
        ({"revison": "main"}, "'revison' is not a loading option.*did you mean 'revision'"),
        ({"adaptor": "x"}, "did you mean 'adapter'"),
        ({"torch_dtpye": "x"}, "did you mean 'torch_dtype'"),
    ],
    ids=str,
)
def test_other_options_are_refused_by_name(given, said):
    with pytest.raises(InvalidRequest, match=said):
        sort(**given)


def test_every_refused_option_can_be_left_at_its_default():
    for name, (harmless, reason) in load_options._REFUSED.items():
        assert None in harmless and reason, name
        assert sort(**{name: None}) == ({}, "auto", "auto")


def test_an_engine_takes_them_and_refuses_unknown_ones_before_it_loads(monkeypatch):
    loading = "stylefast.engine.load_components"
    monkeypatch.setattr(loading, lambda *_, **options: pytest.fail(f"loaded with {options}"))
    with pytest.raises(InvalidRequest, match="did you mean 'backend'"):
        sf.Engine.from_pretrained("tiny", backed="torch")
    with pytest.raises(InvalidRequest, match="dtype is 'int8'"):
        sf.Engine.from_pretrained("tiny", torch_dtype="int8")
    with pytest.raises(pytest.fail.Exception, match="torch.bfloat16.*'cache_dir': 'here'"):
        sf.Engine.from_pretrained("tiny", torch_dtype=torch.bfloat16, cache_dir="here")


@pytest.mark.parametrize(
    "name, said",
    [
        ("torch_dtype", "pipeline.to"),
        ("device", "pipeline.to"),
        ("vae", "put the part into the pipeline"),
        ("revision", "Engine.from_pretrained"),
        ("safety_checker", "Engine.from_pretrained"),
        ("bakend", "did you mean 'backend'"),
    ],
)
def test_options_that_mean_nothing_for_a_pipeline_are_refused(name, said):
    with pytest.raises(InvalidRequest, match=f"{name}.*{said}"):
        sf.Engine.from_pipeline(None, **{name: None})


@pytest.mark.parametrize(
    "options, said",
    [
        ({"revision": "main"}, "revision= and force_download= apply to ids on the hub"),
        ({"force_download": True}, "revision= and force_download= apply to ids on the hub"),
        ({"force_download": True, "local_files_only": True}, "contradict"),
        ({"force_download": "yes"}, "force_download is 'yes'"),
        ({"revision": 3}, "revision is 3"),
        ({"token": 3}, "token is a int"),
        ({"cache_dir": 3}, "cache_dir is 3"),
        ({"config": "somewhere"}, "config= applies to single files"),
        ({"variant": 3}, "variant is 3"),
        ({"vae": 3}, "the VAE .* is 3"),
        ({"tokenizer": 3}, "tokenizers or configs is 3"),
        ({"dtype": torch.float64}, "dtype is 'float64'.*did you mean 'float16'"),
        ({"device": "mps"}, "device is 'mps'"),
        ({"prediction_type": "v"}, "prediction_type is 'v'; choose one of epsilon, v_prediction"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_for_a_folder_are_refused(options, said, folder):
    with pytest.raises(InvalidRequest, match=said):
        load_components(folder, **options)


def test_a_variant_of_a_single_file_is_refused(tmp_path):
    (tmp_path / "small.safetensors").touch()
    with pytest.raises(InvalidRequest, match="variant='fp16' selects among the files of a folder"):
        load_components(tmp_path / "small.safetensors", variant="fp16")


def test_a_token_is_not_shown():
    assert "hf_secret" not in repr(HubOptions(token="hf_secret"))


def test_a_models_prediction_type_can_be_set_and_is_recorded(folder):
    assert load_components(folder, prediction_type="v_prediction").scheduler_config["prediction_type"] == "v_prediction"
    plain = sf.Engine.from_pretrained(folder)
    forced = sf.Engine.from_pretrained(folder, prediction_type="v_prediction")
    pipeline = small_pipeline(seed=3)
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    expected = sf.Engine.from_pipeline(pipeline)
    results = [engine.generate("a fish", steps=2, output="latents") for engine in (plain, forced, expected)]
    assert torch.equal(results[1].latents[0], results[2].latents[0])
    assert not torch.equal(results[0].latents[0], results[1].latents[0])
    assert [result.metadata[0]["prediction_type"] for result in results] == ["epsilon", "v_prediction", "v_prediction"]


# the hub


@pytest.fixture
def snapshot(monkeypatch, tmp_path, folder):
    """The folder of a cached repository "someone/small", as of the revision "v2", and nobody may ask the network."""
    cache, commit = tmp_path / "hub", "1" * 40
    home = cache / "models--someone--small"
    (home / "refs").mkdir(parents=True)
    for name in ("main", "v2"):
        (home / "refs" / name).write_text(commit)
    shutil.copytree(folder, home / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: pytest.fail("asked the network"))
    monkeypatch.setattr(hub, "offline", lambda: False)
    return home / "snapshots" / commit


def cached(snapshot, **options):
    return load_components("someone/small", cache_dir=snapshot.parents[2], **options)


def test_a_part_that_is_given_by_hand_is_not_missed_in_a_snapshot(snapshot, tmp_path):
    assert cached(snapshot, revision="v2").name == "someone/small"
    shutil.move(snapshot / "tokenizer", tmp_path / "given" / "tokenizer")
    shutil.move(snapshot / "tokenizer_2", tmp_path / "given" / "tokenizer_2")
    shutil.rmtree(snapshot / "vae")
    vae = write_vae_folder(small_tiny_vae(), tmp_path / "taesd")
    found = cached(snapshot, vae=vae, tokenizer=tmp_path / "given")
    assert type(found.vae).__name__ == "AutoencoderTiny"
    with pytest.raises(ModelNotFound, match="not complete in the cache"):
        cached(snapshot, vae=vae, local_files_only=True)
    with pytest.raises(ModelNotFound, match="not complete in the cache"):
        cached(snapshot, tokenizer=tmp_path / "given", local_files_only=True)


@pytest.mark.parametrize(
    "lost",
    [
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer_2/vocab.json",
        "text_encoder_2/model.safetensors",
    ],
)
def test_a_snapshot_that_lacks_any_needed_file_is_completed_from_the_hub(lost, snapshot):
    names = [lost] if lost != "tokenizer_2/vocab.json" else [lost, "tokenizer_2/tokenizer.json"]
    for name in names:
        (snapshot / name).unlink(missing_ok=True)
    with pytest.raises(pytest.fail.Exception, match="asked the network"):
        cached(snapshot)


def test_a_download_leaves_out_what_is_given_by_hand_and_passes_options_on(snapshot, monkeypatch, tmp_path, folder):
    asked = {}

    def model_info(self, repo_id, **options):
        asked["info"] = {"token": self.token, **options}
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        return type("Info", (), {"siblings": [type("File", (), {"rfilename": name}) for name in names]})

    real = huggingface_hub.snapshot_download

    def snapshot_download(repo_id, **options):
        if options.get("local_files_only"):
            return real(repo_id, **options)
        asked["download"] = options
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    vae = write_vae_folder(small_tiny_vae(), tmp_path / "taesd")
    cached(snapshot, vae=vae, tokenizer=folder, revision="v2", token="hf_x", force_download=True)
    assert asked["info"] == {"token": "hf_x", "revision": "v2", "timeout": 15}
    wanted = asked["download"]
    assert (wanted["revision"], wanted["token"], wanted["force_download"]) == ("v2", "hf_x", True)
    assert not [name for name in wanted["allow_patterns"] if name.startswith(("vae/", "tokenizer"))]
    assert "unet/diffusion_pytorch_model.safetensors" in wanted["allow_patterns"]


def test_a_revision_that_is_not_cached_is_named_in_the_command(snapshot):
    with pytest.raises(ModelNotFound, match="hf download someone/small --revision v3 --local-dir small"):
        cached(snapshot, revision="v3", local_files_only=True)


# shards


def test_a_missing_shard_is_named(own):
    whole = own / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(whole), whole.with_name("diffusion_pytorch_model-00002-of-00003.safetensors"))
    whole.unlink()
    with pytest.raises(ModelNotFound, match="lacks 2 of its 3 weight files .*00001-of-00003.*00003-of-00003"):
        load_components(own)
    assert not is_whole(own / "unet", half=False)


@pytest.mark.parametrize(
    "names, expected",
    [
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model-00001-of-00003.safetensors",
            ],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            ["model.fp16-00002-of-00002.safetensors"],
            ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
        ),
        (
            ["model-00001-of-00002.fp16.safetensors"],
            ["model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors"],
        ),
        (["model-00001-of-00000.safetensors", "model-1-of-999999999999.safetensors"], []),
    ],
    ids=["two sets", "mark in front", "mark behind", "no set"],
)
def test_shards_are_taken_as_one_whole_set(names, expected):
    assert pick_weights(names, half=False) == expected


# configs that were edited or damaged


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("model_index.json", b"{", "model_index.json in .* is not valid JSON"),
        ("unet/config.json", b"[]", "unet/config.json in .* must be an object"),
        ("vae/config.json", b"\xff\xfe\xff", "config.json in .*"),
        ("text_encoder/config.json", b"[" * 200_000, "nested too deep"),
        ("stylefast.json", b'{"style_modules": "up_blocks"}', "must be a list"),
        (
            "stylefast.json",
            b'{"style_modules": ["up_blocks.9.attentions.0"]}',
            "'up_blocks.9.attentions.0'; choose one of",
        ),
        ("stylefast.json", b'{"style_module": []}', "may contain only style_modules"),
        ("stylefast.json", b"{}", "may contain only style_modules"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_a_damaged_json_file_is_named(file, content, said, own):
    (own / file).write_bytes(content)
    with pytest.raises(ModelFormatError, match=said):
        load_components(own)


def test_a_byte_order_mark_in_a_config_is_passed_over(own):
    file = own / "unet" / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_components(own).unet_config["in_channels"] == 4


def test_a_tokenizers_file_of_another_form_is_refused(own):
    (own / "tokenizer" / "special_tokens_map.json").write_text("5")
    with pytest.raises(ModelFormatError, match="tokenizer.* can't be read"):
        load_components(own)


@pytest.mark.parametrize(
    "part, change, said",
    [
        ("unet", {"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ("unet", {"layers_per_block": 500, "transformer_layers_per_block": 500}, "layers, but its weights have only"),
        ("unet", {"block_out_channels": [32, 64, 10**12]}, "block_out_channels"),
        ("unet", {"norm_num_groups": 0}, "norm_num_groups=0, but it must be a whole number from 1"),
        ("unet", {"cross_attention_dim": "64"}, "cross_attention_dim='64', but it must be a whole number"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ("text_encoder", {"hidden_size": 10**10}, "hidden_size=10000000000, which no model has"),
        ("text_encoder", {"hidden_size": None}, "does not describe a model of its kind"),
        ("text_encoder_2", {"num_attention_heads": 0}, "num_attention_heads=0, but it must be a whole number"),
        ("text_encoder_2", {"vocab_size": 2**30}, "do not fit its config"),
        ("vae", {"layers_per_block": 10**9}, "layers_per_block=1000000000"),
        ("vae", {"block_out_channels": [32] * 100}, "100 entries for block_out_channels"),
        ("vae", {"down_block_types": ["x"]}, "does not describe a model of its kind"),
    ],
    ids=str,
)
def test_sizes_that_no_model_has_are_refused_at_once(part, change, said, own):
    file = own / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelFormatError, match=said):
        load_components(own)


# parts that are sound and don't belong together


def test_a_text_encoder_of_another_width_is_refused_while_loading(own):
    small_text_encoders(width=48)[0].save_pretrained(own / "text_encoder")
    with pytest.raises(ModelFormatError, match="48 and 32 wide, the UNet's cross-attention 64"):
        load_components(own)


def test_a_vae_of_another_family_is_refused_while_loading(folder, tmp_path):
    from diffusers import AutoencoderKL

    vae = write_vae_folder(AutoencoderKL(**small_vae_config(latent_channels=16)), tmp_path / "vae")
    with pytest.raises(ModelFormatError, match="the VAE has 16 latent channels, the UNet 4"):
        load_components(folder, vae=vae)


def test_sizes_that_the_unet_was_not_made_for_are_refused_while_loading(own):
    file = own / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"addition_time_embed_dim": 16}))
    with pytest.raises(ModelFormatError, match="gives 32 and the picture's sizes 96"):
        load_components(own)
