"""Files of learned styles: own ones, those of other trainers, and those that are neither."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stylefast.errors import StyleError
from stylefast.styles.embeddings import StageEmbedding, load_embedding, save_embedding
from tests.support.small_text import small_pipeline, small_text_parts

L, G = 768, 1280


def diffusers_pair(embedding: StageEmbedding, folder: Path) -> tuple[Path, Path]:
    """Write the collapsed vectors as the two one-key files that diffusers' trainer writes."""
    single, key = embedding.collapsed(), f"<{embedding.name}>"
    paths = folder / "learned_embeds.safetensors", folder / "learned_embeds_2.safetensors"
    for path, vectors in zip(paths, (single.clip_l, single.clip_g)):
        save_file({key: vectors[0].contiguous()}, path)
    return paths


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def multi_stage(stages=6, count=2, widths=(L, G)):
    return StageEmbedding(
        "brand",
        rows(stages, count, widths[0]),
        rows(stages, count, widths[1], seed=1),
        pooled_policy="first_added_token",
        metadata={"initializer": "painting"},
    )


def test_round_trip_keeps_every_bit_and_the_metadata(tmp_path):
    path = save_embedding(multi_stage(), tmp_path / "file.safetensors")
    found = load_embedding(path)
    assert torch.equal(found.clip_l, multi_stage().clip_l) and torch.equal(found.clip_g, multi_stage().clip_g)
    assert (found.name, found.stages, found.widths, found.pooled_policy) == ("brand", 6, (L, G), "first_added_token")
    assert found.metadata["initializer"] == "painting"
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "stylefast-msti/1" and file.metadata()["stage_order"] == "low_noise_first"
        assert sorted(file.keys()) == ["clip_g", "clip_l", "stages.clip_g", "stages.clip_l"]


def test_fallback_points_along_the_mean_at_the_mean_length(tmp_path):
    style = multi_stage()
    found = load_file(save_embedding(style, tmp_path / "file.safetensors"))["clip_g"]
    cosine = torch.nn.functional.cosine_similarity(found, style.clip_g.mean(dim=0))
    torch.testing.assert_close(cosine, torch.ones(2))
    torch.testing.assert_close(found.norm(dim=-1), style.clip_g.norm(dim=-1).mean(dim=0))


def test_collapsed_file_holds_one_stage_only(tmp_path):
    path = save_embedding(multi_stage(), tmp_path / "file.safetensors", collapsed=True)
    assert sorted(load_file(path)) == ["clip_g", "clip_l"]
    found = load_embedding(path)
    assert (found.stages, found.name, found.pooled_policy) == (1, "brand", "first_added_token")
    again = load_embedding(save_embedding(found, tmp_path / "again.safetensors"))
    assert torch.equal(again.clip_l, found.clip_l)


@pytest.mark.parametrize("collapsed", [True, False])
def test_saved_file_loads_in_diffusers_for_both_encoders(tmp_path, collapsed):
    style = multi_stage(widths=(32, 48))
    state = load_file(save_embedding(style, tmp_path / "file.safetensors", collapsed=collapsed))
    pipe = small_pipeline(*small_text_parts(24))
    pairs = (("clip_l", pipe.text_encoder, pipe.tokenizer), ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2))
    for key, model, tokenizer in pairs:
        pipe.load_textual_inversion(state[key], token="<brand>", text_encoder=model, tokenizer=tokenizer)
        table = model.get_input_embeddings().weight
        torch.testing.assert_close(table[-2:].detach(), getattr(style.collapsed(), key)[0])


def test_diffusers_pair_round_trip_from_folder_and_from_paths(tmp_path):
    paths = diffusers_pair(multi_stage(), tmp_path)
    for source in (tmp_path, paths, [str(p) for p in paths]):
        found = load_embedding(source)
        assert (found.name, found.pooled_policy) == ("brand", "first_added_token")
        assert torch.equal(found.clip_l, multi_stage().collapsed().clip_l)
    assert load_embedding(paths, pooled_policy="eos", name="own").name == "own"


@pytest.mark.parametrize(
    ("keys", "policy"),
    [(("clip_l", "clip_g"), "eos"), (("text_encoders_0", "text_encoders_1"), "first_added_token")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_files_with_both_encoders_are_recognised(tmp_path, keys, policy, dtype, suffix):
    state = {keys[0]: rows(3, L).to(dtype), keys[1]: rows(3, G).to(dtype)}
    path = tmp_path / f"my style.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    found = load_embedding(path)
    assert (found.name, found.stages, found.pooled_policy) == ("my-style", 1, policy)
    assert torch.equal(found.clip_g, state[keys[1]].float()[None])


def test_dreamstyler_files_of_both_encoders_keep_their_stages(tmp_path):
    # twelve stages, so that a lexical order of the keys would be wrong
    for name, width in (("one", L), ("two", G)):
        state = {f"<sks03>-T{k}": torch.full((width,), float(k)) for k in reversed(range(12))}
        torch.save(state, tmp_path / f"{name}.bin")
    found = load_embedding((tmp_path / "one.bin", tmp_path / "two.bin"))
    assert (found.name, found.stages) == ("sks03", 12)
    assert found.clip_l[:, 0, 0].tolist() == found.clip_g[:, 0, 0].tolist() == list(range(12))


def test_a1111_and_bare_tensors_work_as_a_pair(tmp_path):
    torch.save({"string_to_param": {"*": rows(2, L)}, "name": "inked", "step": 500}, tmp_path / "a.pt")
    torch.save(rows(2, G), tmp_path / "b.pt")
    found = load_embedding((tmp_path / "a.pt", tmp_path / "b.pt"))
    assert (found.name, found.clip_l.shape, found.clip_g.shape) == ("inked", (1, 2, L), (1, 2, G))


@pytest.mark.parametrize(
    "state",
    [
        {f"<sks03>-T{k}": torch.ones(L) for k in range(6)},
        {"string_to_param": {"*": torch.ones(2, L)}, "name": "old"},
        {"emb_params": torch.ones(1, L)},
        {"<token>": torch.ones(1024)},
        torch.ones(L),
    ],
    ids=["DreamStyler", "A1111", "A1111 safetensors", "SD 2", "bare tensor"],
)
def test_embeddings_of_earlier_models_are_refused_by_name(tmp_path, state):
    torch.save(state, tmp_path / "old.bin")
    with pytest.raises(StyleError, match="Stable Diffusion 1.x or 2.x embedding can't be used with SDXL"):
        load_embedding(tmp_path / "old.bin")


def test_half_a_pair_and_a_swapped_pair_say_what_to_do(tmp_path):
    first, second = diffusers_pair(multi_stage(), tmp_path)
    with pytest.raises(StyleError, match="give both files of the pair"):
        load_embedding(second)
    with pytest.raises(StyleError, match="swap them"):
        load_embedding((second, first))
    with pytest.raises(StyleError, match="3 files"):
        load_embedding((first, second, first))
    second.unlink()
    with pytest.raises(StyleError, match="no learned_embeds_2.safetensors"):
        load_embedding(tmp_path)


def test_wrong_widths_are_refused_with_both_figures(tmp_path):
    path = save_embedding(multi_stage(), tmp_path / "file.safetensors")
    with pytest.raises(StyleError, match="768 and 1280 wide.*need 64 and 64"):
        load_embedding(path, widths=(64, 64))
    assert load_embedding(path, widths=None).widths == (L, G)


@pytest.mark.parametrize("share", [0.999, 0.5, 0.02])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_files_are_refused(tmp_path, share, suffix):
    path = tmp_path / f"file.{suffix}"
    if suffix == "pt":
        torch.save({"clip_l": rows(2, L), "clip_g": rows(2, G)}, path)
    else:
        save_embedding(multi_stage(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(StyleError, match="damaged"):
        load_embedding(path)


class Code:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "neither safetensors nor a torch file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "neither safetensors nor a torch file"),
        (b"PK\x03\x04" + bytes(100), "damaged"),
        (pickle.dumps(Code()), "code, which stylefast does not run"),
    ],
    ids=["empty", "a picture", "a foreign archive", "a pickle with code"],
)
def test_foreign_files_are_refused(tmp_path, content, match, capsys):
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(StyleError, match=match):
        load_embedding(tmp_path / "file.safetensors")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"unet.a": torch.ones(2), "unet.b": torch.ones(2)}, "it is not a learned style"),
        ({"clip_l": torch.ones(2, L, dtype=torch.int64), "clip_g": torch.ones(2, G)}, "not a tensor of floating-point"),
        ({"clip_l": torch.ones(2, 2, 2, L), "clip_g": torch.ones(2, G)}, "shape"),
        ({"clip_l": torch.ones(2, L), "clip_g": torch.ones(3, G)}, "both must agree"),
        ({"clip_l": torch.full((1, L), torch.nan), "clip_g": torch.ones(1, G)}, "NaN"),
        ({"<s>-T0": torch.ones(L), "<s>-T2": torch.ones(L)}, "stages T0, T1"),
    ],
)
def test_files_with_other_content_are_refused(tmp_path, state, match):
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(StyleError, match=match):
        load_embedding(tmp_path / "file.safetensors")


def test_edited_metadata_and_later_versions_are_refused(tmp_path):
    path = save_embedding(multi_stage(), tmp_path / "file.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata | {"stage_order": "high_noise_first"})
    with pytest.raises(StyleError, match="stage_order='high_noise_first'"):
        load_embedding(path)
    save_file(tensors, path, metadata | {"format": "stylefast-msti/2"})
    with pytest.raises(StyleError, match="update stylefast"):
        load_embedding(path)


def test_missing_files_and_checkpoints_are_refused(tmp_path):
    with pytest.raises(StyleError, match="no style file found"):
        load_embedding(tmp_path / "none.safetensors")
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.truncate(300 * 2**20)
    with pytest.raises(StyleError, match="300 MiB.*256 MiB"):
        load_embedding(tmp_path / "big.safetensors")
    with pytest.raises(StyleError, match="not int"):
        load_embedding(3)


def test_failed_writing_leaves_nothing_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = save_embedding(multi_stage(), tmp_path / "file.safetensors")
    before = path.read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stylefast.whole_files.os.replace", refuse)
    with pytest.raises(StyleError, match="No space left"):
        save_embedding(multi_stage(count=1), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize("name", ["two words", "<brand>", "a{b", "", 3])
def test_names_that_can_not_stand_in_a_prompt_are_refused(name):
    with pytest.raises(StyleError, match="can't be called"):
        StageEmbedding(name, torch.ones(1, 1, L), torch.ones(1, 1, G))


def bundle(*names, extra=()):
    state = {"lora_unet_x.lora_down.weight": torch.ones(2, 2)}
    for i, name in enumerate(names):
        state |= {f"bundle_emb.{name}.clip_l": rows(2, L) + i, f"bundle_emb.{name}.clip_g": rows(2, G) + i}
        state |= {f"bundle_emb.{name}.{key}": torch.ones(2, 8) for key in extra}
    return state


def test_an_embedding_inside_of_a_lora_file_is_read_however_large_the_file_is(tmp_path, monkeypatch):
    monkeypatch.setattr("stylefast.styles.embedding_files.MAX_BYTES", 100)
    save_file(bundle("chalk"), tmp_path / "one.safetensors")
    for name in (None, "pen"):
        found = load_embedding(tmp_path / "one.safetensors", name)
        assert found.name == (name or "chalk") and torch.equal(found.clip_g[0], rows(2, G))
    save_file(bundle("chalk", "ink"), tmp_path / "two.safetensors")
    assert torch.equal(load_embedding(tmp_path / "two.safetensors", "ink").clip_l[0], rows(2, L) + 1)
    with pytest.raises(StyleError, match="contains the embeddings chalk, ink; choose one"):
        load_embedding(tmp_path / "two.safetensors")
    save_file({"bundle_emb.old.string_to_param.*": rows(2, L)}, tmp_path / "old.safetensors")
    with pytest.raises(StyleError, match="Stable Diffusion 1.x or 2.x"):
        load_embedding(tmp_path / "old.safetensors")


@pytest.mark.parametrize("key", ["t5xxl", "clip_l_out"])
def test_vectors_for_encoders_that_sdxl_does_not_have_are_refused_by_name(tmp_path, key):
    save_file({"clip_l": rows(2, L), "clip_g": rows(2, G), key: torch.ones(2, 4096)}, tmp_path / "sd3.safetensors")
    save_file(bundle("chalk", extra=[key]), tmp_path / "lora.safetensors")
    for file in ("sd3", "lora"):
        with pytest.raises(StyleError, match=f"also contains {key}"):
            load_embedding(tmp_path / f"{file}.safetensors")


def test_vectors_of_any_plain_type_become_float32():
    for kind in (torch.float8_e4m3fn, torch.float16, torch.uint8):
        rows = torch.ones(1, 1, 8).to(kind)
        assert torch.equal(StageEmbedding("chalk", rows, rows).clip_l, torch.ones(1, 1, 8))
