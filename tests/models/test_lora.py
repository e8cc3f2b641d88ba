"""LoRAs change what diffusers would change, by as much, and come off without a trace."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylefast.errors import AdapterError, InvalidRequest, ModelFormatError, ModelNotFound
from stylefast.models.checkpoint import from_pipeline, load_components
from stylefast.models.lora import LoraSet
from tests.support.fp64 import close, measured
from tests.support.small_checkpoints import random_lora, write_folder, write_kohya_lora, write_peft_lora
from tests.support.small_sdxl import small_pipeline, small_unet_config


def apply_lora(components, source, scale=1.0):
    loras = LoraSet(components.unet_state, components.text_encoders)
    loras.add(source, scale)
    return loras


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """LoRA files by layout."""
    folder = tmp_path_factory.mktemp("loras")
    pipeline = small_pipeline()
    config = pipeline.unet.config
    lora, other = random_lora(pipeline, seed=1), random_lora(pipeline, seed=2, rank=2, text=False)
    convolutions = random_lora(pipeline, seed=3, text=False, convolutions=True)
    return {
        "kohya": write_kohya_lora(lora, folder / "kohya.safetensors", config),
        "peft": write_peft_lora(lora, folder / "peft.safetensors"),
        "kohya with convolutions": write_kohya_lora(convolutions, folder / "convolutions.safetensors", config),
        "other": write_peft_lora(other, folder / "other.safetensors"),
    }


def unet_output(unet):
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 64, generator=generator)
    added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.full((2, 6), 64.0)}
    with torch.no_grad():
        latents, text = latents.to(unet.dtype), text.to(unet.dtype)
        return unet(latents, torch.tensor([400, 30]), text, added_cond_kwargs=added).sample


def text_output(encoder):
    ids = torch.tensor([[541, 5, 77, 300, 542]])
    with torch.no_grad():
        return encoder(ids, output_hidden_states=True).hidden_states[-2]


def clones(components):
    states = [components.unet_state, *(encoder.state_dict() for encoder in components.text_encoders)]
    return [{name: value.clone() for name, value in state.items()} for state in states]


def assert_equal_bits(components, before):
    states = [components.unet_state, *(encoder.state_dict() for encoder in components.text_encoders)]
    for state, old in zip(states, before):
        assert state.keys() == old.keys()
        assert all(torch.equal(state[name], value) for name, value in old.items())


@pytest.mark.parametrize("layout", ["kohya", "peft", "kohya with convolutions"])
def test_a_lora_at_a_scale_equals_diffusers_with_it_loaded(layout, files):
    theirs, ours = small_pipeline(), small_pipeline()
    plain = unet_output(ours.unet)
    theirs.load_lora_weights(str(files[layout]), adapter_name="style")
    theirs.set_adapters("style", 0.7)
    loras = apply_lora(from_pipeline(ours), files[layout], scale=0.7)
    assert (unet_output(ours.unet) - plain).abs().max() > 1e-2
    close(unet_output(ours.unet), measured(unet_output, theirs.unet))
    for encoder in ("text_encoder", "text_encoder_2"):
        close(text_output(getattr(ours, encoder)), measured(text_output, getattr(theirs, encoder)))
    assert any(name.startswith("text_encoder_2.") for name in loras.touched) == ("convolutions" not in layout)


def test_two_loras_add_up_as_in_diffusers_and_each_comes_off_alone(files):
    theirs, ours, single = small_pipeline(), small_pipeline(), small_pipeline()
    theirs.load_lora_weights(str(files["kohya"]), adapter_name="kohya")
    theirs.load_lora_weights(str(files["other"]), adapter_name="other")
    theirs.set_adapters(["kohya", "other"], [0.5, -1.2])
    loras = apply_lora(from_pipeline(ours), files["kohya"], scale=0.5)
    loras.add(files["other"], scale=-1.2)
    close(unet_output(ours.unet), measured(unet_output, theirs.unet))
    loras.remove("kohya")
    apply_lora(from_pipeline(single), files["other"], scale=-1.2)
    assert all(torch.equal(a, b) for a, b in zip(ours.unet.state_dict().values(), single.unet.state_dict().values()))
    assert loras.scales == {"other": -1.2}


def test_taking_loras_off_restores_every_bit_also_in_half_precision(files):
    pipeline = small_pipeline().to(dtype=torch.float16)
    components = from_pipeline(pipeline)
    before = clones(components)
    loras = apply_lora(components, files["kohya"])
    loras.add(files["other"], 0.3)
    loras.set_scale("kohya", 2.0)
    assert not torch.equal(components.unet_state[name := loras.touched[-1].removeprefix("unet.")], before[0][name])
    loras.clear()
    assert_equal_bits(components, before)
    assert loras.touched == () and loras.scales == {} and loras.fingerprint == ""


def test_a_lora_that_overflows_the_weights_type_or_fails_midway_leaves_the_model_as_it_was(
    files, tmp_path, monkeypatch
):
    components = from_pipeline(small_pipeline().to(dtype=torch.float16))
    before = clones(components)
    strong = {key: 1000 * value for key, value in load_file(files["other"]).items()}
    save_file(strong, tmp_path / "strong.safetensors")
    with pytest.raises(AdapterError, match=r"not be finite in torch.float16 with the scales strong: 1000"):
        apply_lora(components, tmp_path / "strong.safetensors", scale=1000)
    assert_equal_bits(components, before)
    loras = apply_lora(components, files["other"], scale=0.5)
    loras.add(tmp_path / "strong.safetensors", 1e-3)
    before = clones(components)
    with pytest.raises(AdapterError, match="lower them"):
        loras.set_scale("strong", -1000)
    assert_equal_bits(components, before)
    loras.remove("strong")
    before = clones(components)
    calls = []

    def fails(change, weight):
        calls.append(weight)
        if len(calls) == 5:
            raise MemoryError
        return torch.ones_like(weight)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr("stylefast.models.lora_changes.LowRank.delta", fails)
        loras.set_scale("other", 1.0)
    assert loras.scales == {"other": 0.5}
    loras.clear()
    loras.add(files["other"], 0.5)
    assert_equal_bits(components, before)


def test_scale_zero_leaves_the_model_as_it_is(files):
    components = from_pipeline(small_pipeline())
    before = clones(components)
    loras = apply_lora(components, files["kohya"], scale=0.0)
    assert_equal_bits(components, before)
    loras.set_scale("kohya", 1.0)
    loras.set_scale("kohya", 0.0)
    assert_equal_bits(components, before)


def test_applying_a_lora_changes_neither_modules_nor_files(files, tmp_path):
    folder = write_folder(small_pipeline(), tmp_path / "model")
    components = load_components(folder)
    names = [list(dict(encoder.named_modules())) for encoder in components.text_encoders]
    places = {name: value.data_ptr() for name, value in components.unet_state.items()}
    apply_lora(components, files["kohya"])
    assert [list(dict(encoder.named_modules())) for encoder in components.text_encoders] == names
    assert {name: value.data_ptr() for name, value in components.unet_state.items()} == places
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in small_pipeline().unet.state_dict().items())


def test_fingerprints_tell_files_and_scales_apart(files):
    loras = LoraSet(*_parts())
    loras.add(files["kohya"])
    prints = [loras.fingerprint]
    loras.set_scale("kohya", 0.5)
    prints.append(loras.fingerprint)
    loras.add(files["other"])
    prints.append(loras.fingerprint)
    loras.set_scale("other", 0)
    assert len(set(prints)) == 3 and loras.fingerprint == prints[1]


def _parts():
    components = from_pipeline(small_pipeline())
    return components.unet_state, components.text_encoders


@pytest.fixture(scope="module")
def components():
    return from_pipeline(small_pipeline())


def test_a_lora_for_a_model_of_other_widths_is_refused_and_changes_nothing(components, tmp_path):
    wide = small_pipeline(unet_config=small_unet_config(widths=(32, 96, 96)))
    path = write_peft_lora(random_lora(wide, text=False), tmp_path / "wide.safetensors")
    before = clones(components)
    with pytest.raises(AdapterError, match="wide.safetensors does not fit this model"):
        apply_lora(components, path)
    assert_equal_bits(components, before)


def test_a_lora_that_matches_nothing_is_refused(components, tmp_path):
    state = {"unet.nowhere.to_q.lora_A.weight": torch.zeros(2, 4), "unet.nowhere.to_q.lora_B.weight": torch.zeros(4, 2)}
    save_file(state, tmp_path / "strange.safetensors")
    with pytest.raises(AdapterError, match="strange.safetensors"):
        apply_lora(components, tmp_path / "strange.safetensors")


def test_a_lora_that_matches_in_part_is_refused(components, files, tmp_path):
    state = load_file(files["peft"])
    for factor in ("A", "B"):
        key = f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{factor}.weight"
        state[key.replace("blocks.0.attn1", "blocks.7.attn1")] = state[key].clone()
    save_file(state, tmp_path / "deeper.safetensors")
    with pytest.raises(AdapterError, match=r"changes \d+ layers, of which this model has \d+"):
        apply_lora(components, tmp_path / "deeper.safetensors")


def test_what_is_no_lora_is_refused(components, tmp_path):
    save_file({"decoder.mid.block_1.conv1.weight": torch.zeros(1, 1, 1, 1)}, tmp_path / "vae.safetensors")
    with pytest.raises(AdapterError, match="is not a LoRA, but: VAE"):
        apply_lora(components, tmp_path / "vae.safetensors")
    torch.save({"made by": print}, tmp_path / "lora.bin")
    with pytest.raises(ModelFormatError, match="contains code"):
        apply_lora(components, tmp_path / "lora.bin")
    with pytest.raises(ModelNotFound, match="no LoRA file"):
        apply_lora(components, tmp_path / "absent.safetensors")
    with pytest.raises(InvalidRequest, match="a LoRA is 'xxx.*at most 255 bytes"):
        apply_lora(components, "x" * 1000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match="holds 0 LoRA files"):
        apply_lora(components, tmp_path / "empty")


def test_names_are_unique_and_unknown_names_refused(files):
    loras = LoraSet(*_parts())
    loras.add(files["other"], name="brush")
    with pytest.raises(InvalidRequest, match="'brush' is already loaded"):
        loras.add(files["kohya"], name="brush")
    with pytest.raises(InvalidRequest, match="known LoRAs: brush"):
        loras.set_scale("other", 1.0)
