"""Files that are no SDXL checkpoint are refused by their true name; memory is measured before it is needed."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from stylefast.errors import ModelFormatError, StyleFastError
from stylefast.models import weight_files
from stylefast.models.checkpoint import load_components
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.layout import AttentionLayout
from stylefast.models.lora_file import read_lora
from stylefast.styles.bank import StyleBank
from stylefast.styles.embeddings import load_embedding
from tests.support.small_unet import CONFIG, CROSS_DIM

FOREIGN_TENSORS = {
    "LoRA": {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(2, 4)},
    "IP-Adapter": {"image_proj.proj.weight": torch.zeros(2, 2), "ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2)},
    "Stable Diffusion 1": {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 768),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.zeros(4),
    },
    "Stable Diffusion 2": {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 1024),
        "cond_stage_model.model.ln_final.weight": torch.zeros(4),
    },
    "SDXL refiner": {
        "model.diffusion_model.label_emb.0.0.weight": torch.zeros(4, 2560),
        "conditioner.embedders.0.model.ln_final.weight": torch.zeros(4),
    },
    "Flux": {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)},
    "a VAE": {"decoder.mid.block_1.conv1.weight": torch.zeros(2, 2, 1, 1)},
    "ControlNet": {"controlnet_cond_embedding.conv_in.weight": torch.zeros(2, 2, 1, 1)},
    "image encoder": {"vision_model.post_layernorm.weight": torch.zeros(2)},
    "textual-inversion": {"clip_l": torch.zeros(1, 8), "clip_g": torch.zeros(1, 8)},
    "unknown kind": {"weights": torch.zeros(2)},
}


@pytest.mark.parametrize("name", FOREIGN_TENSORS)
def test_a_file_that_is_no_sdxl_checkpoint_is_refused_by_its_true_name(name, tmp_path):
    save_file(FOREIGN_TENSORS[name], tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=name):
        load_components(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6938040682\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "pickled"),
        (b"", "no valid safetensors header"),
        (b"\xff" * 64, "no valid safetensors header"),
        (b"\x10" + bytes(7) + b"{not json at all" + bytes(20), "damaged"),
        (b"\x02" + bytes(7) + b"[]", "damaged"),
    ],
    ids=["web page", "lfs pointer", "zip", "empty", "noise", "broken json", "json of another kind"],
)
def test_a_file_that_is_no_safetensors_is_refused(content, said, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFormatError, match=said):
        load_components(tmp_path / "model.safetensors")


READERS = {
    "checkpoint": load_components,
    "LoRA": lambda file: read_lora(file, {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}),
    "IP-Adapter": lambda file: IPAdapter.load(file, AttentionLayout.from_config(CONFIG), CROSS_DIM),
    "bank": StyleBank.load,
    "learned style": load_embedding,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("before", ["", "lora_unet_", "image_proj.", "ip_adapter.1.to_k_ip.", "model.diffusion_model."])
def test_messages_name_a_part_of_a_long_name_of_a_tensor(read, before, tmp_path):
    # an adapter's file has both kinds of names
    names = [f"{before}{letter * 5000}.lora_down.weight" for letter in "xyz"]
    names += ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"] if "_" in before and "lora" not in before else []
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(StyleFastError) as raised:
        read(tmp_path / "a.safetensors")
    assert len(str(raised.value)) < 800


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_name_of_a_tensor_that_is_no_text_is_refused_in_text(read, tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"\ud800 lora_unet_x.lora_down.weight": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(StyleFastError, match="name of a tensor contains half of a character") as raised:
        read(tmp_path / "a.safetensors")
    assert str(raised.value).encode()
    torch.save({"\ud800": torch.zeros(1)}, tmp_path / "a.bin")
    with pytest.raises(StyleFastError) as raised:
        read(tmp_path / "a.bin")
    assert str(raised.value).encode()


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickled_checkpoints_are_refused_and_safetensors_named(suffix, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / f"model{suffix}")
    with pytest.raises(ModelFormatError, match="pickled.*safetensors"):
        load_components(tmp_path / f"model{suffix}")


def test_free_memory_of_this_machine_is_a_sane_number():
    assert 2**20 < weight_files.available_memory("cpu") < 2**50


def test_a_containers_limit_counts_less_what_is_in_use(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\nactive_file 100\n")
    assert weight_files._container_memory(str(tmp_path)) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert weight_files._container_memory(str(tmp_path)) is None
