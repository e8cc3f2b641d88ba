"""Every published layout of a LoRA file is read: each module with its own alpha and rank, and no tensor passed over."""

import copy
import hashlib
import json
import os
import re
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from stylefast.errors import AdapterError, ModelFormatError, ModelNotFound
from stylefast.models.lora_file import lora_digest, read_lora
from stylefast.models.lora_names import original_names
from tests.support.fp64 import close, measured

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
ATTENTION = f"{BLOCK}.attn1"
LAYER = "encoder.layers.0.self_attn"

# (part, module) -> shape of its weight: the corners of SDXL's naming, at small sizes
SHAPES = {
    ("unet", "conv_in"): (6, 4, 3, 3),
    ("unet", "time_embedding.linear_1"): (8, 6),
    ("unet", "add_embedding.linear_2"): (8, 8),
    ("unet", "down_blocks.0.resnets.0.conv1"): (6, 6, 3, 3),
    ("unet", "down_blocks.0.resnets.1.conv1"): (6, 6, 3, 3),
    ("unet", "down_blocks.0.downsamplers.0.conv"): (6, 6, 3, 3),
    ("unet", "down_blocks.1.resnets.0.conv_shortcut"): (8, 6, 1, 1),
    ("unet", "down_blocks.1.resnets.0.norm2"): (8,),
    ("unet", "down_blocks.1.attentions.0.proj_in"): (8, 8),
    ("unet", f"{ATTENTION}.to_q"): (8, 8),
    ("unet", f"{ATTENTION}.to_out.0"): (8, 8),
    ("unet", f"{BLOCK}.attn2.to_k"): (8, 10),
    ("unet", f"{BLOCK}.ff.net.0.proj"): (12, 8),
    ("unet", "mid_block.resnets.1.conv2"): (8, 8, 3, 3),
    ("unet", "mid_block.attentions.0.proj_out"): (8, 8),
    ("unet", "up_blocks.0.resnets.0.time_emb_proj"): (8, 8),
    ("unet", "up_blocks.0.resnets.1.conv1"): (8, 8, 3, 3),
    ("unet", "up_blocks.0.attentions.1.proj_in"): (8, 8),
    ("unet", "up_blocks.0.upsamplers.0.conv"): (8, 8, 3, 3),
    ("text_encoder", f"{LAYER}.q_proj"): (7, 7),
    ("text_encoder", f"{LAYER}.out_proj"): (7, 7),
    ("text_encoder_2", f"text_model.{LAYER}.q_proj"): (9, 9),
    ("text_encoder_2", "text_projection"): (5, 9),
}
WITH_BIAS = ("conv_in", "norm2", "ff.net.0.proj", "to_out.0")


def weights_of(shapes):
    draw = torch.Generator().manual_seed(0)
    weights = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    for (part, module), shape in shapes.items():
        weights[part][f"{module}.weight"] = torch.randn(shape, generator=draw)
        if module.endswith(WITH_BIAS):
            weights[part][f"{module}.bias"] = torch.randn(shape[0], generator=draw)
    return weights


@pytest.fixture(scope="module")
def weights():
    return weights_of(SHAPES)


def factors(shape, rank, seed=1):
    draw = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=draw)
    return torch.randn(rank, *shape[1:], generator=draw), up


def read(tmp_path, weights, state, metadata=None, name="style.safetensors"):
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / name, metadata=metadata)
    return read_lora(tmp_path / name, weights)


def assert_change(lora, weights, place, expected):
    """The change of one weight against its formula in fp64."""
    part, name = place
    got = lora.changes[place].delta(weights[part][name].float())
    torch.testing.assert_close(got.double(), expected.view(got.shape), rtol=1e-5, atol=1e-6)


SPELLINGS = [
    ("lora_unet_", "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", f"{ATTENTION}.to_q"),
    ("lora_unet_", "input_blocks_4_1_transformer_blocks_0_attn1_to_q", f"{ATTENTION}.to_q"),
    ("lora_unet_", "input_blocks_4_1_transformer_blocks_0_attn1_to_out_0", f"{ATTENTION}.to_out.0"),
    ("lora_unet_", "input_blocks_4_1_transformer_blocks_0_ff_net_0_proj", f"{BLOCK}.ff.net.0.proj"),
    ("lora_unet_", "input_blocks_0_0", "conv_in"),
    ("lora_unet_", "input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
    ("lora_unet_", "input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
    ("lora_unet_", "input_blocks_4_0_skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
    ("lora_unet_", "middle_block_1_proj_out", "mid_block.attentions.0.proj_out"),
    ("lora_unet_", "middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
    ("lora_unet_", "output_blocks_0_0_emb_layers_1", "up_blocks.0.resnets.0.time_emb_proj"),
    ("lora_unet_", "output_blocks_1_1_proj_in", "up_blocks.0.attentions.1.proj_in"),
    ("lora_unet_", "output_blocks_1_2_conv", "up_blocks.0.upsamplers.0.conv"),
    ("lora_unet_", "time_embed_0", "time_embedding.linear_1"),
    ("lora_unet_", "label_emb_0_2", "add_embedding.linear_2"),
    ("lora_unet_", "add_embedding_linear_2", "add_embedding.linear_2"),
    ("lycoris_", "down_blocks_1_attentions_0_proj_in", "down_blocks.1.attentions.0.proj_in"),
    ("diffusion_model.", "input_blocks.4.1.transformer_blocks.0.attn2.to_k", f"{BLOCK}.attn2.to_k"),
    ("model.diffusion_model.", "input_blocks.4.1.proj_in", "down_blocks.1.attentions.0.proj_in"),
    ("unet.", f"{ATTENTION}.to_q", f"{ATTENTION}.to_q"),
    ("unet.base_model.model.", f"{ATTENTION}.to_q", f"{ATTENTION}.to_q"),
    ("", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_k"),
    ("lora_te1_", "text_model_encoder_layers_0_self_attn_q_proj", f"text_encoder/{LAYER}.q_proj"),
    ("lora_te_", "text_model_encoder_layers_0_self_attn_out_proj", f"text_encoder/{LAYER}.out_proj"),
    ("lora_te2_", "text_model_encoder_layers_0_self_attn_q_proj", f"text_encoder_2/text_model.{LAYER}.q_proj"),
    ("lora_te2_", "text_projection", "text_encoder_2/text_projection"),
    ("text_encoder.", f"text_model.{LAYER}.q_proj", f"text_encoder/{LAYER}.q_proj"),
    ("text_encoder_2.", f"text_model.{LAYER}.q_proj", f"text_encoder_2/text_model.{LAYER}.q_proj"),
    ("text_encoders.clip_l.transformer.", f"text_model.{LAYER}.q_proj", f"text_encoder/{LAYER}.q_proj"),
    ("clip_g.transformer.", f"text_model.{LAYER}.q_proj", f"text_encoder_2/text_model.{LAYER}.q_proj"),
    ("unet._orig_mod.", f"{ATTENTION}.to_q", f"{ATTENTION}.to_q"),
    ("module.unet.", f"{ATTENTION}.to_q", f"{ATTENTION}.to_q"),
    ("clip_g.", f"text_model.{LAYER}.q_proj", f"text_encoder_2/text_model.{LAYER}.q_proj"),
    ("", f"text_model.{LAYER}.q_proj", f"text_encoder/{LAYER}.q_proj"),  # by the shape
]


@pytest.mark.parametrize(("prefix", "module", "target"), SPELLINGS, ids=lambda text: text or "no prefix")
def test_a_module_is_found_under_every_spelling(prefix, module, target, weights, tmp_path):
    place = tuple(target.split("/")) if "/" in target else ("unet", target)
    down, up = factors(SHAPES[place], rank=3)
    key = prefix + module
    first, second = ("lora_down", "lora_up") if prefix.endswith("_") else ("lora_A", "lora_B")
    state = {f"{key}.{first}.weight": down, f"{key}.{second}.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    lora = read(tmp_path, weights, state)
    name = (place[0], f"{place[1]}.weight")
    assert list(lora.changes) == [name]
    assert_change(lora, weights, name, 2 / 3 * up.double().flatten(1) @ down.double().flatten(1))


@pytest.mark.parametrize(
    ("key", "module"),
    [
        (f"unet.{ATTENTION}.processor.to_q_lora", f"unet/{ATTENTION}.to_q"),
        (f"unet.{ATTENTION}.processor.to_out_lora", f"unet/{ATTENTION}.to_out.0"),
        (f"{ATTENTION}.processor.to_out_lora", f"unet/{ATTENTION}.to_out.0"),
        (f"unet.{ATTENTION}.to_q.lora", f"unet/{ATTENTION}.to_q"),
        (f"text_encoder.text_model.{LAYER}.to_q_lora", f"text_encoder/{LAYER}.q_proj"),
        (f"text_encoder.text_model.{LAYER}.to_out_lora", f"text_encoder/{LAYER}.out_proj"),
        (f"text_encoder_2.text_model.{LAYER}.q_proj.lora_linear_layer", f"text_encoder_2/text_model.{LAYER}.q_proj"),
    ],
)
def test_the_layouts_that_diffusers_wrote_in_2023_are_read(key, module, weights, tmp_path):
    part, name = module.split("/")
    down, up = factors(SHAPES[part, name], rank=2)
    lora = read(tmp_path, weights, {f"{key}.down.weight": down, f"{key}.up.weight": up})
    assert_change(lora, weights, (part, f"{name}.weight"), up.double() @ down.double())


def test_original_names_of_every_module_are_those_of_published_checkpoints():
    from diffusers import UNet2DConditionModel

    from tests.support.small_checkpoints import original_unet_name
    from tests.support.small_sdxl import small_unet_config

    with torch.device("meta"):
        unet = UNet2DConditionModel(**small_unet_config())
    modules = {name.rpartition(".")[0] for name in unet.state_dict()}
    expected = {m: original_unet_name(f"{m}.weight", unet.config).removesuffix(".weight") for m in modules}
    assert original_names(modules) == expected


def test_every_module_has_the_alpha_and_the_rank_that_the_file_says(weights, tmp_path):
    state, expected = {}, {}
    linear = [place for place, shape in SHAPES.items() if len(shape) > 1]
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for i, (part, module) in enumerate(linear):
        rank, alpha = 1 + i % 4, (None, 0.5, -3.0, 8.0, 1e-3)[i % 5]
        down, up = factors(SHAPES[part, module], rank, seed=i)
        name = module if part == "unet" or module.startswith("text_") else f"text_model.{module}"
        key = prefixes[part] + name.replace(".", "_")
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(alpha)
        scale = 1.0 if alpha is None else alpha / rank
        expected[part, f"{module}.weight"] = scale * up.double().flatten(1) @ down.double().flatten(1)
    lora = read(tmp_path, weights, state)
    assert lora.changes.keys() == expected.keys()
    for place, delta in expected.items():
        assert_change(lora, weights, place, delta)


def test_an_alpha_of_zero_changes_nothing_and_is_said(weights, tmp_path, caplog):
    down, up = factors((8, 8), 2)
    key = f"unet.{ATTENTION}.to_q"
    state = {f"{key}.lora.down.weight": down, f"{key}.lora.up.weight": up, f"{key}.alpha": torch.tensor([0])}
    lora = read(tmp_path, weights, state)
    assert not lora.changes["unet", f"{ATTENTION}.to_q.weight"].delta(torch.ones(8, 8)).any()
    assert "gives 1 of its 1 layers the alpha 0" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_factors_in_small_types_are_multiplied_in_float32(dtype, weights, tmp_path):
    down, up = (tensor.to(dtype) for tensor in factors((8, 8), 2))
    key = f"unet.{ATTENTION}.to_q"
    lora = read(tmp_path, weights, {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up})
    assert_change(lora, weights, ("unet", f"{ATTENTION}.to_q.weight"), up.double() @ down.double())


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "style.pt", "style.ckpt"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_pickled_loras_are_read_as_tensors_alone(name, wrapped, weights, tmp_path):
    down, up = factors((8, 8), 2)
    key = f"{ATTENTION}.processor.to_q_lora"
    state = {f"{key}.down.weight": down, f"{key}.up.weight": up}
    torch.save({"state_dict": state} if wrapped else state, tmp_path / name)
    lora = read_lora(tmp_path / name, weights)
    assert_change(lora, weights, ("unet", f"{ATTENTION}.to_q.weight"), up.double() @ down.double())
    assert read_lora(tmp_path, weights).digest == lora.digest  # the only file of its folder


def test_what_a_file_is_stands_in_its_bytes_and_not_in_its_name(weights, tmp_path):
    down, up = factors((8, 8), 2)
    state = {f"unet.{ATTENTION}.to_q.lora_A.weight": down, f"unet.{ATTENTION}.to_q.lora_B.weight": up}
    assert read(tmp_path, weights, state, name="style.bin").changes
    torch.save(state, tmp_path / "style.safetensors")
    assert read_lora(tmp_path / "style.safetensors", weights).changes


def test_changing_the_file_later_does_not_reach_the_model(weights, tmp_path):
    down, up = factors((8, 8), 2)
    state = {f"unet.{ATTENTION}.to_q.lora_A.weight": down, f"unet.{ATTENTION}.to_q.lora_B.weight": up}
    for name in ("style.safetensors", "style.bin"):
        save_file(state, tmp_path / name) if name.endswith("s") else torch.save(state, tmp_path / name)
        change = read_lora(tmp_path / name, weights).changes["unet", f"{ATTENTION}.to_q.weight"]
        before = change.delta(torch.zeros(8, 8))
        with (tmp_path / name).open("r+b") as file:
            file.write(bytes((tmp_path / name).stat().st_size))
        assert torch.equal(change.delta(torch.zeros(8, 8)), before)


# peft


def peft_folder(folder, state, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6} | config))
    return folder


def peft_state(rank=2):
    state = {}
    for module in (f"{ATTENTION}.to_q", f"{BLOCK}.attn2.to_k"):
        down, up = factors(SHAPES["unet", module], rank)
        state |= {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
    return state


def test_peft_s_patterns_and_rank_stabilised_scaling_are_followed(weights, tmp_path):
    state = peft_state(rank=4)
    folder = peft_folder(tmp_path / "style", state, r=4, use_rslora=True, alpha_pattern={"attn2.to_k": 3, "to_x": 9})
    for source in (folder, folder / "adapter_model.safetensors"):
        lora = read_lora(source, weights)
        for module, alpha in ((f"{ATTENTION}.to_q", 6), (f"{BLOCK}.attn2.to_k", 3)):
            key = f"base_model.model.{module}.lora"
            product = state[f"{key}_B.weight"].double() @ state[f"{key}_A.weight"].double()
            assert_change(lora, weights, ("unet", f"{module}.weight"), alpha / 2 * product)


def test_a_folder_has_one_digest_with_and_without_reading_its_tensors(weights, tmp_path):
    folder = peft_folder(tmp_path / "style", peft_state())
    files = [folder / "adapter_model.safetensors", folder / "adapter_config.json"]
    expected = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert lora_digest(folder) == read_lora(folder, weights).digest == expected


def test_what_peft_itself_saves_changes_weights_as_peft_merges_it(tmp_path):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, get_peft_model

    from tests.support.small_sdxl import small_unet_config

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**small_unet_config(layers_per_block=1, depth=(1, 1, 1)))
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["to_q", "to_k", "conv1", "ff.net.2"],
        init_lora_weights=False,
        use_dora=True,
        rank_pattern={"attn2.to_k": 2},
        alpha_pattern={"down_blocks.1.*attn1.to_q": 3},
        modules_to_save=["conv_in"],
        bias="lora_only",
    )
    model = get_peft_model(unet, config)
    with torch.no_grad():
        model.base_model.model.conv_in.modules_to_save["default"].weight += 1
        model.base_model.model.mid_block.resnets[0].conv1.base_layer.bias += 1
        for name, value in model.named_parameters():
            if "magnitude" in name:
                value *= 1.5
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path, {"unet": weights, "text_encoder": {}, "text_encoder_2": {}})

    @cache
    def merged(model):
        return copy.deepcopy(model).merge_and_unload().state_dict()

    changed = {name for name in weights if not torch.equal(merged(model)[name], weights[name])}
    assert {name for _, name in lora.changes} > changed > {"conv_in.weight", "mid_block.resnets.0.conv1.bias"}
    for name in changed:
        got = weights[name] + lora.changes["unet", name].delta(weights[name])
        close(got, measured(lambda model, name: merged(model)[name], model, name))


def test_text_encoders_of_a_peft_folder_are_told_apart_by_subfolder_class_or_shape(weights, tmp_path):
    down, up = factors((7, 7), 2)
    key = f"base_model.model.text_model.{LAYER}.q_proj.lora"
    state = {f"{key}_A.weight": down, f"{key}_B.weight": up}
    assert ("text_encoder", f"{LAYER}.q_proj.weight") in read_lora(peft_folder(tmp_path / "1", state), weights).changes
    equal = {**weights, "text_encoder_2": {f"text_model.{LAYER}.q_proj.weight": torch.zeros(7, 7)}}
    with pytest.raises(AdapterError, match="does not say to which text encoder"):
        read_lora(tmp_path / "1", equal)
    mapping = {"base_model_class": "CLIPTextModelWithProjection"}
    folder = peft_folder(tmp_path / "2", state, auto_mapping=mapping)
    assert [part for part, _ in read_lora(folder, equal).changes] == ["text_encoder_2"]
    peft_folder(tmp_path / "3" / "text_encoder_2", state)
    peft_folder(tmp_path / "3" / "unet", peft_state())
    assert [part for part, _ in read_lora(tmp_path / "3", equal).changes] == ["unet", "unet", "text_encoder_2"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"tomorrows_setting": {"x": 1}}, "tomorrows_setting"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern"),
    ],
)
def test_settings_of_peft_that_are_not_done_are_refused_by_name(config, message, weights, tmp_path):
    with pytest.raises(AdapterError, match=re.escape(message)):
        read_lora(peft_folder(tmp_path, peft_state(), **config), weights)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 64}, "r=64, but the tensors of down_blocks.1"),
        ({"rank_pattern": {"attn2.to_k": 8}}, "rank_pattern={'attn2.to_k': 8}, but the tensors of"),
        ({"use_dora": True}, "use_dora=True, but down_blocks.1"),
        ({"lora_bias": True}, "lora_bias=True, but down_blocks.1"),
        ({"bias": "all"}, "bias='all', but 4 of 4 such tensors are missing: conv_in.bias"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save=['conv_in'], but 2 of 2 such tensors are missing"),
        ({"modules_to_save": ["gone"]}, "neither the model nor the file has gone"),
    ],
)
def test_an_adapter_without_what_its_settings_speak_of_is_refused_by_their_names(config, message, weights, tmp_path):
    with pytest.raises(AdapterError, match=re.escape(message)) as caught:
        read_lora(peft_folder(tmp_path / "a", peft_state(), **config), weights)
    assert "adapter_config.json has" in str(caught.value)
    state = {key.replace("base_model.model.", "unet."): value for key, value in peft_state().items()}
    said = {f"unet.{name}": value for name, value in ({"r": 2, "lora_alpha": 5} | config).items()}
    with pytest.raises(AdapterError, match=re.escape(message)):
        read(tmp_path, weights, state, {"lora_adapter_metadata": json.dumps(said)})


def test_biases_of_the_layers_that_have_a_lora_are_missed_where_the_layers_have_some(weights, tmp_path):
    assert len(read_lora(peft_folder(tmp_path / "1", peft_state(), bias="lora_only"), weights).changes) == 2
    key = f"base_model.model.{ATTENTION}.to_out.0"
    down, up = factors((8, 8), 2)
    state = peft_state() | {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    with pytest.raises(AdapterError, match=r"bias='lora_only', but 1 of 1 such tensors are missing: .*to_out.0.bias"):
        read_lora(peft_folder(tmp_path / "2", state, bias="lora_only"), weights)
    state[f"{key}.base_layer.bias"] = torch.zeros(8)
    assert len(read_lora(peft_folder(tmp_path / "3", state, bias="lora_only"), weights).changes) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"use_dora": True},
        {"lora_bias": True},
        {"rank_pattern": {"to_k": 1}, "modules_to_save": ["conv_in", "time_embedding"]},
        {"use_rslora": True, "modules_to_save": []},
    ],
    ids=str,
)
def test_what_peft_saves_of_each_kind_is_whole(settings, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = torch.nn.ModuleDict({"conv_in": torch.nn.Conv2d(4, 6, 3), "attn": torch.nn.ModuleDict()})
    model["time_embedding"] = torch.nn.Sequential(torch.nn.Linear(6, 8))
    model["attn"].update({"to_k": torch.nn.Linear(8, 8, "lora_bias" in settings), "to_out": torch.nn.Linear(8, 8)})
    weights = {"unet": {name: value.clone() for name, value in model.state_dict().items()}}
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["to_k", "to_out"], **settings))
    peft.save_pretrained(tmp_path)
    lora = read_lora(tmp_path, weights | {"text_encoder": {}, "text_encoder_2": {}})
    assert {("unet", "attn.to_k.weight"), ("unet", "attn.to_out.weight")} <= lora.changes.keys()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"lora_alpha": "8"}',
        '{"lora_alpha": 1e999}',
        '{"use_rslora": "false"}',
        '{"use_dora": "no"}',
        '{"r": 0}',
        '{"bias": "some"}',
        '{"modules_to_save": "conv_in"}',
        '{"rank_pattern": {"to_k": 1.5}}',
        '{"alpha_pattern": [1]}',
    ],
)
def test_a_damaged_config_of_peft_is_refused(text, weights, tmp_path):
    folder = peft_folder(tmp_path, peft_state())
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ModelFormatError):
        read_lora(folder, weights)


def test_peft_s_tensors_without_their_config_have_no_alpha_and_are_refused(weights, tmp_path):
    with pytest.raises(AdapterError, match="alphas are in adapter_config.json"):
        read(tmp_path, weights, peft_state())


def test_alphas_in_the_metadata_that_diffusers_writes_are_followed(weights, tmp_path):
    state = {key.replace("base_model.model.", "unet."): value for key, value in peft_state().items()}
    config = {"unet.r": 2, "unet.lora_alpha": 5, "unet.alpha_pattern": {"attn2.to_k": 1}, "unet.use_rslora": False}
    lora = read(tmp_path, weights, state, {"lora_adapter_metadata": json.dumps(config)})
    for module, alpha in ((f"{ATTENTION}.to_q", 5), (f"{BLOCK}.attn2.to_k", 1)):
        product = state[f"unet.{module}.lora_B.weight"].double() @ state[f"unet.{module}.lora_A.weight"].double()
        assert_change(lora, weights, ("unet", f"{module}.weight"), alpha / 2 * product)
    with pytest.raises(AdapterError, match=r"'transformer\.r'"):
        read(tmp_path, weights, state, {"lora_adapter_metadata": '{"transformer.r": 2}'})
    with pytest.raises(ModelFormatError, match="lora_adapter_metadata"):
        read(tmp_path, weights, state, {"lora_adapter_metadata": "{"})


# refusals


def sound():
    down, up = factors((8, 8), 2)
    return {f"unet.{ATTENTION}.to_q.lora_A.weight": down, f"unet.{ATTENTION}.to_q.lora_B.weight": up}


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("lora_unet_x.oft_blocks", "OFT or BOFT"),
        ("lora_unet_x.on_input", r"\(IA\)\^3"),
        ("lora_unet_x.a1.weight", "GLoRA"),
        ("base_model.model.x.vera_lambda_b", "VeRA"),
        ("lllite_unet_x.down.0.weight", "ControlNet-LLLite"),
        ("lora_controlnet", "Control-LoRA"),
        ("unet.x.attn2.processor.to_k_custom_diffusion.weight", "Custom Diffusion"),
        ("down_blocks.0.motion_modules.0.x.lora_A.weight", "AnimateDiff"),
        ("ip_adapter.1.to_q_lora.down.weight", "IP-Adapter"),
    ],
)
def test_other_methods_are_refused_by_name(key, method, weights, tmp_path):
    with pytest.raises(AdapterError, match=method):
        read(tmp_path, weights, {key: torch.zeros(2, 2)} | sound())


def test_a_key_of_no_known_layout_is_refused_and_no_other_model_is_blamed(weights, tmp_path):
    for key in ("unet.mystery", "sparkle_unet_x.lora_down.weight", f"unet.{BLOCK}.attn7.to_q.lora_A.weight"):
        with pytest.raises(AdapterError, match="unknown") as caught:
            read(tmp_path, weights, {key: torch.zeros(2, 2)} | sound())
        assert key.removesuffix(".lora_down.weight").removesuffix(".lora_A.weight") in str(caught.value)
        assert "made for another" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "model"),
    [
        ({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (2, 768)}, "Stable Diffusion 1"),
        ({"lora_unet_input_blocks_7_1_transformer_blocks_0_attn2_to_k": (2, 1024)}, "Stable Diffusion 2"),
        ({"lora_unet_double_blocks_0_img_attn_qkv": (2, 8)}, "Flux"),
        ({"transformer.single_transformer_blocks.0.attn.to_q": (2, 8)}, "Flux"),
        ({"lora_te3_encoder_block_0_layer_0_SelfAttention_q": (2, 8)}, "Stable Diffusion 3"),
    ],
)
def test_another_model_is_named_where_keys_or_shapes_prove_it(state, model, weights, tmp_path):
    tensors = {}
    for key, shape in state.items():
        tensors |= {f"{key}.lora_down.weight": torch.zeros(shape), f"{key}.lora_up.weight": torch.zeros(8, 2)}
    with pytest.raises(AdapterError, match=rf"made for another model \({model}\)"):
        read(tmp_path, weights, tensors)


def test_metadata_names_the_model_of_a_file_that_fits_nowhere(weights, tmp_path):
    state = {f"lora_unet_x.lora_{way}.weight": torch.zeros(2, 2) for way in ("down", "up")}
    with pytest.raises(AdapterError, match=r"made for another model \(it says: sd_v1\)"):
        read(tmp_path, weights, state, {"ss_base_model_version": "sd_v1"})
    with pytest.raises(AdapterError, match="the layout of its keys is unknown"):
        read(tmp_path, weights, state, {"ss_base_model_version": "sdxl_base_v1-0"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": torch.zeros(3, 8)}, "ranks differ"),
        ({"A": torch.zeros(0, 8), "B": torch.zeros(8, 0)}, "rank 0"),
        ({"A": torch.full((2, 8), float("nan"))}, "NaN or infinity"),
        ({"B": torch.full((8, 2), float("inf"), dtype=torch.float16)}, "NaN or infinity"),
        ({"A": torch.zeros(2, 9)}, r"changes a weight of \[8, 9\], but this model's has \[8, 8\]"),
        ({"B": None}, "do not form a weight change"),
        ({"A": torch.zeros(2)}, "ranks differ"),
        ({"A": torch.tensor(1.0)}, "ranks differ"),
        ({"B": torch.tensor(1.0)}, "ranks differ"),
        ({"A": torch.ones(2, 8, dtype=torch.int8)}, "as int8, quantised in an unsupported way; get the edition"),
        ({"B": torch.ones(8, 2, dtype=torch.uint8)}, "as uint8, quantised"),
        ({"A": torch.ones(2, 8).to(torch.float8_e8m0fnu)}, "as float8_e8m0fnu, quantised"),
    ],
)
def test_damaged_factors_are_refused_by_name(changes, message, weights, tmp_path):
    state = sound() | {f"unet.{ATTENTION}.to_q.lora_{letter}.weight": value for letter, value in changes.items()}
    with pytest.raises(AdapterError, match=message) as caught:
        read(tmp_path, weights, {key: value for key, value in state.items() if value is not None})
    assert "to_q" in str(caught.value)


def test_numbers_without_axes_are_refused_wherever_they_stand(weights, tmp_path):
    with pytest.raises(AdapterError, match=r"magnitude of \[\]"):
        read(tmp_path, weights, sound() | {f"unet.{ATTENTION}.to_q.dora_scale": torch.tensor(1.0)})
    state = {f"{LAYER}.q_proj.lora_{way}.weight": torch.tensor(1.0) for way in ("down", "up")}
    with pytest.raises(AdapterError, match="does not say to which text encoder"):
        read(tmp_path, weights, state)


def test_packed_weights_are_refused_by_the_name_of_their_format(weights, tmp_path):
    with pytest.raises(ModelFormatError, match="8-bit weights of bitsandbytes"):
        read(tmp_path, weights, sound() | {f"unet.{ATTENTION}.to_q.lora_A.SCB": torch.ones(2)})


def test_alphas_that_are_no_number_are_refused(weights, tmp_path):
    for alpha, message in ((torch.ones(2), "one number"), (torch.tensor(float("inf")), "NaN or infinity")):
        with pytest.raises(AdapterError, match=message):
            read(tmp_path, weights, sound() | {f"unet.{ATTENTION}.to_q.alpha": alpha})


def test_a_module_that_two_spellings_name_is_refused(weights, tmp_path):
    twin = {key.replace("unet.", ""): value.clone() for key, value in sound().items()}
    with pytest.raises(AdapterError, match="twice"):
        read(tmp_path, weights, sound() | twin)


def test_alphas_left_over_from_layers_that_were_cut_out_change_nothing(weights, tmp_path):
    extra = {f"unet.{BLOCK}.attn2.to_k.alpha": torch.tensor(1.0), "unet.gone.alpha": torch.tensor(1.0)}
    assert len(read(tmp_path, weights, sound() | extra).changes) == 1
    with pytest.raises(AdapterError, match="changes nothing"):
        read(tmp_path, weights, extra)


def test_an_embedding_in_the_file_is_announced_and_the_rest_used(weights, tmp_path, caplog):
    bundled = {f"bundle_emb.chalk.{key}": torch.zeros(2, 4) for key in ("clip_l", "clip_g")}
    assert len(read(tmp_path, weights, sound() | bundled).changes) == 1
    assert "embedding chalk" in caplog.text and "DreamStyler(" in caplog.text


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_a_pipe_in_a_folder_is_not_waited_for(name, weights, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelFormatError, match="is a pipe or a device"):
        read_lora(tmp_path, weights)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["bundle_emb.chalk.clip_l", "bundle_emb.chalk.clip_g"], "contains only learned embeddings .*DreamStyler"),
        (["unet.x.lora_A.mine.weight", "unet.x.lora_B.mine.weight"], "name in memory, 'mine' .*save_pretrained"),
        (["lora_unet_x.lora_down.sideways"], r"unknown layout \(lora_unet_x.lora_down.sideways\)"),
    ],
    ids=["embeddings", "a name", "another layout"],
)
def test_a_file_that_is_nearly_a_lora_is_told_what_it_is(keys, message, weights, tmp_path):
    with pytest.raises(AdapterError, match=message) as caught:
        read(tmp_path, weights, {key: torch.zeros(2, 2) for key in keys})
    assert "not a LoRA, but: LoRA" not in str(caught.value)


def test_pickled_tensors_without_numbers_at_hand_are_refused(weights, tmp_path):
    for tensor, message in ((torch.ones(2, 8).to_sparse(), "sparse_coo"), (torch.ones(2, 8, device="meta"), "meta")):
        torch.save(sound() | {f"unet.{ATTENTION}.to_q.lora_A.weight": tensor}, tmp_path / "a.bin")
        with pytest.raises(ModelFormatError, match=message):
            read_lora(tmp_path / "a.bin", weights)


def test_a_folder_must_hold_one_lora(weights, tmp_path):
    save_file(sound(), tmp_path / "a.safetensors")
    save_file(sound(), tmp_path / "b.safetensors")
    with pytest.raises(ModelNotFound, match="holds 2 LoRA files"):
        read_lora(tmp_path, weights)
