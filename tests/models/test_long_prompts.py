"""Prompts beyond one window and with weights, against the arithmetic of docs/prompts.md written out in fp64."""

import math
from types import SimpleNamespace

import pytest
import torch

from stylefast.errors import ExportError, PromptError
from stylefast.models.text import Prompt, TextEncoder
from stylefast.models.text_chunks import MAX_CHUNKS
from tests.support.fp64 import close, measured
from tests.support.small_text import small_text_parts

ROOM, WINDOW = 75, 77


def vectors(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, width, generator=generator) for width in (32, 48))


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(*small_text_parts(), force_zeros=True)


def windows(tokenizer, contents):
    """[windows, 77] ids of lists of words."""
    ids = [
        [tokenizer.bos_token_id, *tokenizer(" ".join(words), add_special_tokens=False).input_ids] for words in contents
    ]
    ids = [one + [tokenizer.eos_token_id] for one in ids]
    return torch.tensor([one + [tokenizer.pad_token_id] * (WINDOW - len(one)) for one in ids])


def in_windows(weights):
    return torch.tensor([[1.0, *one, *[1.0] * (WINDOW - 1 - len(one))] for one in weights])


def states_of(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]


def literal_a1111(model, ids, weights):
    """Each window times its weights; its mean restored."""
    found = []
    for z, w in zip(states_of(model, ids), weights, strict=True):
        scaled = z * w[:, None]
        found.append(scaled * (z.mean() / scaled.mean()) if (w != 1).any() else z)
    return torch.cat(found)


def literal_compel(model, ids, weights, empty, lowered):
    """lowered: weight -> mask [windows, tokens] of the tokens that are kept without its part."""

    def weighted(mask=None):
        base = states_of(model, empty)
        return base + (states_of(model, ids, mask) - base) * weights[:, :, None]

    total, found = 1.0, weighted()
    for weight, mask in lowered.items():
        share = math.tan((1 - weight) * math.pi / 2)
        total, found = total + share, found + share * weighted(mask)
    return (found / total).flatten(0, 1)


def alone(parts, field, prompt, clip_skip=0):
    """A field of what an encoder of these tokenizers and models gives for a prompt in a call of its own."""
    return getattr(TextEncoder(*parts, force_zeros=True).encode([prompt], clip_skip=clip_skip)[0], field)


def by_itself(encoder, field, prompt, clip_skip=0):
    return measured(alone, (encoder.tokenizers, encoder.encoders), field, prompt, clip_skip)


def assert_states(encoder, prompt, literal, *arguments_of):
    """Compare both encoders' halves; arguments_of: functions of the tokenizer."""
    (states,) = encoder.encode([prompt])
    halves = states.hidden.split([32, 48], dim=-1)
    for half, tokenizer, model in zip(halves, encoder.tokenizers, encoder.encoders, strict=True):
        close(half, measured(literal, model, *(one(tokenizer) for one in arguments_of)))
    return states


@pytest.mark.parametrize("words", [74, 75, 76, 150, 151])
def test_long_plain_text_is_encoded_in_chunks_of_75_tokens(encoder, words):
    text = ["a", "red", "cat", "on", "house"] * 31
    contents = [text[:words][i : i + ROOM] for i in range(0, words, ROOM)]
    ones = in_windows([[1.0] * len(one) for one in contents])
    prompt = Prompt(" ".join(text[:words]))
    states = assert_states(encoder, prompt, literal_a1111, lambda t: windows(t, contents), lambda _: ones)
    close(states.pooled, by_itself(encoder, "pooled", Prompt(" ".join(contents[0]))))


def test_a1111_weights_multiply_and_restore_the_mean_of_each_chunk(encoder):
    long = ["a"] * 70
    prompt = Prompt(f"{' '.join(long)} (red cat:1.5) [on] house BREAK dog BREAK (cat:-0.5) in", syntax="a1111")
    contents = [[*long, "red", "cat", "on", "house"], ["dog"], ["cat", "in"]]
    weights = in_windows([[1.0] * 70 + [1.5, 1.5, 1 / 1.1, 1.0], [1.0], [-0.5, 1.0]])
    assert_states(encoder, prompt, literal_a1111, lambda t: windows(t, contents), lambda _: weights)


def test_compel_weights_move_away_from_the_empty_text_and_blend_with_masks(encoder):
    long = ["a"] * 74
    prompt = Prompt(f"{' '.join(long)} (red cat)0.5 on house++ (in)0.8 dog", syntax="compel")
    contents = [[*long, "red"], ["cat", "on", "house", "in", "dog"]]
    weights = in_windows([[1.0] * 74 + [0.5], [0.5, 1.0, 1.1**2, 0.8, 1.0]])
    masks = {weight: (weights != weight).long() for weight in (0.5, 0.8)}
    assert sum((mask == 0).sum().item() for mask in masks.values()) == 3
    assert_states(
        encoder,
        prompt,
        literal_compel,
        lambda t: windows(t, contents),
        lambda _: weights,
        lambda t: windows(t, [[]]),
        lambda _: masks,
    )


def contents_of(encoder, prompt):
    """The words of each chunk of encoder 1, a placeholder as its number of vectors."""
    chunks = encoder._chunks(prompt, ([], []))[0]
    return [
        [len(word.ids) if word.placeholder else encoder.tokenizers[0].decode(list(word.ids)) for word in chunk.words]
        for chunk in chunks
    ]


def test_a1111_ends_a_full_chunk_at_a_comma_among_its_last_20_tokens(encoder):
    def lengths(before, after):
        text = "a " * before + ", " + "cat " * after
        return [len(chunk) for chunk in contents_of(encoder, Prompt(text, syntax="a1111"))]

    assert lengths(55, 30) == [56, 30]  # the comma is the 56th token, 20 before the end
    assert lengths(54, 30) == [75, 10]
    assert lengths(74, 1) == [75, 1]
    assert lengths(75, 1) == [75, 2]  # a comma that does not fit takes nothing with it
    assert lengths(60, 14) == [75]

    # of several commas, which may be one word, the last token counts, and the one that does not fit decides
    def commas(text):
        return [len(chunk) for chunk in contents_of(encoder, Prompt(text, syntax="a1111"))]

    assert commas("a " * 55 + ",, " + "cat " * 30) == [56, 30]
    assert commas("a " * 56 + ", " + "cat " * 18 + ",,") == [57, 19]
    assert commas("a " * 56 + ", " + "cat " * 17 + ",,") == [74, 1]
    plain = contents_of(encoder, Prompt("a " * 60 + ", " + "cat " * 30))
    assert [len(chunk) for chunk in plain] == [75, 16]


def test_compel_ends_a_chunk_at_a_sentence_or_a_phrase(encoder):
    def lengths(text):
        return [len(chunk) for chunk in contents_of(encoder, Prompt(text, syntax="compel"))]

    assert lengths("a " * 10 + ". " + "cat, " * 20 + "dog " * 60) == [11, 40, 60]
    assert lengths("a " * 80) == [75, 5]
    assert lengths("a cat. " * 25) == [75]


def test_no_border_divides_a_word(encoder):
    word = "unforeseen"
    size = len(encoder.tokenizers[0](word, add_special_tokens=False).input_ids)
    assert 2 < size < 20
    for syntax in ("plain", "a1111", "compel"):
        assert contents_of(encoder, Prompt("a " * 74 + word, syntax=syntax)) == [["a"] * 74, [word]]
    # unless it is longer than a window
    assert len(contents_of(encoder, Prompt("x" * 100))) == 2


@pytest.mark.parametrize("syntax", ["plain", "a1111", "compel"])
@pytest.mark.parametrize("before", [70, 71, 72, 73, 74, 75])
def test_no_border_divides_a_style_token(encoder, syntax, before):
    prompt = Prompt("a " * before + "<x> cat", {"x": vectors(4)}, syntax=syntax)
    found = contents_of(encoder, prompt)
    if before == 70:
        assert found == [["a"] * before + [4, "cat"]]
    elif before == 71:
        assert found == [["a"] * before + [4], ["cat"]]
    else:
        assert found == [["a"] * before, [4, "cat"]]
    assert encoder.encode([prompt])[0].hidden.shape == (WINDOW * len(found), 80)


def test_style_tokens_take_weights(encoder):
    """As words do, so a placeholder of a word's own embedding is that word."""
    tables = [model.get_input_embeddings().weight for model in encoder.encoders]
    ids = [tokenizer("cat", add_special_tokens=False).input_ids for tokenizer in encoder.tokenizers]
    cat = tuple(table[one].detach() for table, one in zip(tables, ids, strict=True))
    for syntax, text in (("a1111", "a (red {}:1.4) on"), ("compel", "a (red {})0.6 on {}++")):
        (learned,) = encoder.encode([Prompt(text.format(*["<x>"] * 2), {"x": cat}, syntax=syntax)])
        close(learned.hidden, by_itself(encoder, "hidden", Prompt(text.format("cat", "cat"), syntax=syntax)))


def test_both_encoders_have_equally_many_chunks(encoder):
    prompt = Prompt("a cat", text_2="a red house " * 30)
    (states,) = encoder.encode([prompt])
    assert states.hidden.shape == (2 * WINDOW, 80)
    for window, text in zip(states.hidden.split(WINDOW), ("a cat", ""), strict=True):
        close(window[:, :32], by_itself(encoder, "hidden", Prompt(text))[:, :32])


def test_prompts_of_any_length_share_a_call(encoder):
    prompts = [
        Prompt("a cat"),
        Prompt("a red house " * 60),
        Prompt("a (cat:1.3)", syntax="a1111"),
        Prompt("a (cat)0.4", syntax="compel"),
        Prompt(None),
        Prompt("a cat", text_2="a dog"),
    ]
    together = encoder.encode(prompts, clip_skip=[0, 1, 0, 1, 0, 0])
    for prompt, skip, found in zip(prompts, [0, 1, 0, 1, 0, 0], together, strict=True):
        for field in ("hidden", "pooled"):
            close(getattr(found, field), by_itself(encoder, field, prompt, skip))
    assert len({prompt.identity() for prompt in prompts}) == len(prompts)


def test_syntax_without_weights_is_plain_text(encoder):
    plain, a1111, compel = encoder.encode([Prompt("a red cat", syntax=one) for one in ("plain", "a1111", "compel")])
    # rows of one batch; a library's products may sum the last rows in another order
    for one in (plain, a1111, compel):
        close(one.hidden, by_itself(encoder, "hidden", Prompt("a red cat")))


def test_limits_are_named(encoder):
    with pytest.raises(PromptError, match=f"2000 tokens in 27 chunks; at most {MAX_CHUNKS} chunks of 75"):
        encoder.encode([Prompt("a " * 2000)])
    with pytest.raises(PromptError, match="<x> has 76 vectors.*only 75"):
        encoder.check([Prompt("<x>", {"x": vectors(76)})])
    assert encoder.check([Prompt("a"), Prompt("a " * 76), Prompt(None)]) == 2 * WINDOW


def test_weights_whose_mean_cannot_be_restored_are_refused(monkeypatch, encoder):
    monkeypatch.setattr(encoder, "runner", _Zeros(encoder.runner))
    with pytest.raises(PromptError, match="cancel"):
        encoder.encode([Prompt("(a:2)", syntax="a1111")])


class _Zeros:
    takes_masks = True
    most_skipped = 0

    def __init__(self, runner):
        self._runner = runner

    def __call__(self, *arguments):
        states, pooled = self._runner(*arguments)
        return states * 0, pooled


def test_runners_without_masks_refuse_lowered_weights_of_compel(monkeypatch, encoder):
    monkeypatch.setattr(encoder, "runner", SimpleNamespace(takes_masks=False, most_skipped=0))
    with pytest.raises(ExportError, match="weights below 1 in compel's syntax"):
        encoder.check([Prompt("a cat-", syntax="compel")])
    encoder.check([Prompt("a cat+", syntax="compel")])
    encoder.check([Prompt("a [cat]", syntax="a1111")])
