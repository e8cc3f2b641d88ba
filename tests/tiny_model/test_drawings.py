import numpy as np
import pytest

from benchmarks.tiny_model.captions import WORDS, panel_caption, single_caption
from benchmarks.tiny_model.pictures import CONTENTS, HELD_OUT, LORA_STYLES, PALETTES, STYLES, UNSEEN_STYLE, render
from stylefast.errors import InvalidRequest


def draw(seed, content="fish", style="neon", palette="cool", size=64):
    return render(np.random.default_rng(seed), content, style, palette, size)


@pytest.mark.parametrize("style", [*STYLES, UNSEEN_STYLE, *LORA_STYLES])
def test_the_same_seed_draws_the_same_pixels_and_another_seed_others(style):
    first = draw(3, style=style)
    assert np.array_equal(first, draw(3, style=style))
    assert not np.array_equal(first, draw(4, style=style))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("content", CONTENTS)
def test_every_content_fills_a_part_of_the_picture(content, size):
    picture = draw(0, content, "ink", "mono", size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    dark = (picture.mean(-1) < 128).mean()
    assert 0.04 < dark < 0.5


def test_palettes_change_colours_of_flat_pictures():
    means = [draw(1, style="flat", palette=palette).reshape(-1, 3).mean(0) for palette in PALETTES]
    distances = [np.abs(a - b).max() for i, a in enumerate(means) for b in means[:i]]
    assert min(distances) > 5


def test_styles_look_different_on_the_same_object():
    pictures = [draw(5, style=style).astype(float) for style in (*STYLES, UNSEEN_STYLE, *LORA_STYLES)]
    distances = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(distances) > 4


def test_one_combination_of_each_content_and_each_style_is_held_out():
    assert len(HELD_OUT) == 12
    assert {content for content, _ in HELD_OUT} == set(CONTENTS)
    assert {style for _, style in HELD_OUT} == set(STYLES)


def test_training_pool_holds_no_held_out_combination_and_the_validation_pool_all(tmp_path):
    from benchmarks.tiny_model.data import HELD_OUT_INDICES, load_pool, make_pools

    make_pools(tmp_path, seed=0, train=132, validation=144)
    train = {tuple(row[:2]) for row in load_pool(tmp_path, "train").labels.tolist()}
    validation = {tuple(row[:2]) for row in load_pool(tmp_path, "validation").labels.tolist()}
    assert len(train) == 132 and not train & HELD_OUT_INDICES
    assert validation == train | HELD_OUT_INDICES
    assert set(load_pool(tmp_path, "unseen").labels[:, 1].tolist()) == {len(STYLES)}


def test_the_unseen_style_is_in_no_caption_and_not_in_the_vocabulary():
    assert UNSEEN_STYLE not in STYLES and UNSEEN_STYLE not in WORDS


def test_most_panel_captions_name_no_style():
    rng = np.random.default_rng(0)
    captions = [panel_caption(rng, ["fish", "house"], "neon", "warm") for _ in range(400)]
    named = [caption for caption in captions if caption is not None]
    assert 0.15 < np.mean(["neon" in caption for caption in named]) < 0.4
    assert all("fish" in caption and "house" in caption for caption in named)


def test_single_captions_cover_empty_content_only_and_style():
    rng = np.random.default_rng(0)
    captions = [single_caption(rng, "fish", "neon", "warm") for _ in range(1000)]
    assert 0.04 < np.mean([caption is None for caption in captions]) < 0.11
    named = [caption for caption in captions if caption]
    assert 0.1 < np.mean(["fish" in c and "neon" not in c and "warm" not in c for c in named]) < 0.25
    assert np.mean(["fish" in c and "neon" in c for c in named]) > 0.5


def test_every_word_is_one_token_and_the_end_token_has_the_highest_id():
    from benchmarks.tiny_model.text import TOKENS, build_tokenizer

    tokenizer = build_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in WORDS)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    longest = "a mushroom, a flower and a house in the style of pointillism, pastel palette"
    assert len(tokenizer(longest).input_ids) <= TOKENS


@pytest.mark.parametrize(
    "names", [("dog", "neon", "cool"), ("fish", "cubism", "cool"), ("fish", "neon", "acid")], ids=lambda n: " ".join(n)
)
def test_an_unknown_name_is_refused_with_the_known_ones(names):
    with pytest.raises(InvalidRequest, match="is unknown; choose one of"):
        render(np.random.default_rng(0), *names)


@pytest.mark.parametrize("size", [0, 63, 100])
def test_a_size_that_is_no_multiple_of_64_is_refused(size):
    with pytest.raises(InvalidRequest, match="multiple of 64"):
        draw(0, size=size)
