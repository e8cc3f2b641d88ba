import pytest
import torch

from stylefast.errors import InvalidRequest, StyleError
from stylefast.models.text import Prompt, TextEncoder
from stylefast.styles.textual_inversion import InversionSettings, initial_vectors, invert_style, stage_timesteps
from tests.support.fp64 import close, measured
from tests.support.small_sdxl import small_tokenizer
from tests.support.small_text import WORDS, small_encoder

WIDTH = 32
ALPHAS = torch.linspace(0.999, 0.005, 1000)
CAPTIONS = ["a cat in the style of <chalk>", "a dog in the style of <chalk>"]


@pytest.fixture(scope="module")
def encoder():
    tokenizers = tuple(small_tokenizer(words=WORDS, max_tokens=24) for _ in range(2))
    encoders = (small_encoder(tokenizers[0], WIDTH), small_encoder(tokenizers[1], WIDTH, WIDTH, seed=1))
    for model in encoders:
        model.requires_grad_(False)
    return TextEncoder(tokenizers, encoders, force_zeros=True)


def predict(noisy, timesteps, hidden, pooled):
    """A stand-in for the UNet: noise tinted by the words."""
    return noisy + hidden.mean((1, 2))[:, None, None, None] + 0.1 * pooled.mean(1)[:, None, None, None]


def learn(encoder, captions=CAPTIONS, **changes):
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)) + 0.5
    settings = InversionSettings(**dict(stages=3, steps=12, per_stage=4, learning_rate=0.3) | changes)
    return invert_style(predict, encoder, latents, captions, ALPHAS, "chalk", settings)


def test_vectors_have_one_row_per_stage_and_encoder_and_the_loss_falls(encoder):
    style, losses = learn(encoder, steps=40)
    assert style.clip_l.shape == (3, 1, WIDTH) and style.clip_g.shape == (3, 1, WIDTH)
    assert sum(losses[-8:]) < sum(losses[:8])


def test_stages_part_only_after_the_shared_steps(encoder):
    together, _ = learn(encoder, shared=1.0)
    apart, _ = learn(encoder, shared=0.0)
    assert torch.allclose(together.clip_l[0], together.clip_l[2], atol=1e-6)
    assert not torch.allclose(apart.clip_l[0], apart.clip_l[2], atol=1e-3)


def test_the_same_seed_learns_the_same_vectors(encoder):
    first, second, other = learn(encoder, seed=1), learn(encoder, seed=1), learn(encoder, seed=2)
    assert torch.equal(first[0].clip_g, second[0].clip_g)
    assert not torch.equal(first[0].clip_g, other[0].clip_g)


def test_several_vectors_of_a_stage_learn_different_things(encoder):
    style, _ = learn(encoder, vectors=2)
    assert style.clip_l.shape == (3, 2, WIDTH)
    assert not torch.allclose(style.clip_l[:, 0], style.clip_l[:, 1], atol=1e-4)


def test_encoders_stay_as_they_are(encoder):
    before = [p.clone() for model in encoder.encoders for p in model.parameters()]
    learn(encoder)
    after = [p for model in encoder.encoders for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("stages", [1, 3, 6, 7])
def test_every_stage_gets_as_many_timesteps_of_its_own(stages):
    timesteps = stage_timesteps(stages, 50, 1000, torch.Generator().manual_seed(0))
    found = timesteps * stages // 1000
    assert torch.equal(found, torch.arange(stages).repeat_interleave(50))


def test_several_words_start_one_vector_each(encoder):
    # a rate so small that no step moves anything
    style, _ = learn(encoder, vectors=2, initializer="red cat", learning_rate=1e-30)
    red, cat = (initial_vectors(encoder, word)[0][0] for word in ("red", "cat"))
    assert torch.equal(style.clip_l, torch.stack([red, cat]).expand(3, -1, -1))


def test_the_initializer_stands_for_its_word(encoder):
    def hidden(tokenizers, encoders, prompt):
        with torch.no_grad():
            return TextEncoder(tokenizers, encoders, force_zeros=True).encode([prompt])[0].hidden

    given = encoder.tokenizers, encoder.encoders
    placed = hidden(*given, Prompt("a <chalk> of a cat", {"chalk": initial_vectors(encoder, "painting")}))
    close(placed, measured(hidden, *given, Prompt("a painting of a cat")))


def test_a_caption_without_the_placeholder_is_refused(encoder):
    with pytest.raises(StyleError, match="does not hold the placeholder <chalk>"):
        learn(encoder, captions=["a cat in the style of <chalk>", "a dog"])


def test_an_initializer_of_several_tokens_is_refused(encoder):
    with pytest.raises(StyleError, match="choose a word that is a single token"):
        learn(encoder, initializer="zebra")


@pytest.mark.parametrize(
    "wrong", [{"stages": 0}, {"steps": 1.5}, {"shared": 2.0}, {"learning_rate": float("nan")}], ids=str
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InvalidRequest):
        InversionSettings(**wrong)
