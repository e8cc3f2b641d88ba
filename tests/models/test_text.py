"""Text encoding against stock diffusers: without placeholders, with added tokens, and at every pooling rule."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stylefast.errors import ModelFormatError, PromptError, StyleError
from stylefast.models.text import Prompt, TextEncoder
from tests.support.fp64 import close, measured
from tests.support.small_text import small_pipeline, small_text_parts

WIDTHS = (32, 48)


def vectors(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, width, generator=generator) for width in WIDTHS)


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(*small_text_parts(), force_zeros=True)


def stock_state(pipe, index, text, **arguments):
    with torch.no_grad():
        return pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=True, **arguments)[index][0]


def stock_states(pipe, text, **arguments):
    """diffusers' hidden states of the prompt and of the negative one, then the pooled states of both."""
    return [measured(stock_state, pipe, index, text, **arguments) for index in range(4)]


def state(parts, field, prompt, policy="eos"):
    """What our encoder on these tokenizers and models gives for one prompt alone."""
    return getattr(TextEncoder(*parts, force_zeros=True).encode([prompt], policy)[0], field)


def parts_of(encoder):
    return encoder.tokenizers, encoder.encoders


def pipeline_with_added_tokens(**styles):
    pipe = small_pipeline(*small_text_parts())
    for name, pair in styles.items():
        for part, tokenizer, model in zip(
            pair, (pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2), strict=True
        ):
            pipe.load_textual_inversion(part, token=f"<{name}>", tokenizer=tokenizer, text_encoder=model)
    return pipe


@pytest.mark.parametrize(
    "text", ["a cat on a red house", "", "An unknown word, Ümlaut & 3 signs!!", "  two   spaces\n"]
)
@pytest.mark.parametrize("negative", [None, "", "a dog"])
def test_plain_prompts_equal_diffusers(encoder, text, negative):
    expected = stock_states(small_pipeline(encoder.tokenizers, encoder.encoders), text, negative_prompt=negative)
    states = encoder.encode([Prompt(text), Prompt(negative)])
    found = (states[0].hidden, states[1].hidden, states[0].pooled, states[1].pooled)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


def test_null_prompt_is_the_empty_text_where_the_model_does_not_force_zeros():
    encoder = TextEncoder(*small_text_parts(24), force_zeros=False)
    null, empty = encoder.encode([Prompt(None), Prompt("")])
    assert torch.equal(null.hidden, empty.hidden)
    assert null.hidden.abs().max() > 0.1
    assert null.hidden.shape == (24, sum(WIDTHS))


@pytest.mark.parametrize("eos_token_id", [2, 540], ids=["legacy end token id", "true end token id"])
def test_pooling_at_the_end_does_not_depend_on_the_legacy_config(eos_token_id):
    tokenizers, encoders = small_text_parts(eos_token_id=eos_token_id)
    found = TextEncoder(tokenizers, encoders, True).encode([Prompt("a <x> cat", {"x": vectors(1)})])[0]
    close(found.pooled, measured(state, small_text_parts(), "pooled", Prompt("a <x> cat", {"x": vectors(1)})))


@pytest.mark.parametrize("count", [1, 3], ids=["one vector", "three vectors"])
def test_placeholders_equal_added_tokens_of_diffusers(encoder, count):
    text = "a painting of a dog in the style of <brand>, red house"
    rows = vectors(count)
    hidden, _, pooled, _ = stock_states(pipeline_with_added_tokens(brand=rows), text)
    prompt = Prompt(text, {"brand": rows})
    (ours,) = encoder.encode([prompt])
    (compatible,) = encoder.encode([prompt], "first_added_token")
    close(ours.hidden, hidden)
    # diffusers pools at the largest id, which is the last vector of the added token
    close(compatible.pooled, pooled)
    assert (ours.pooled - pooled.value).abs().max() > 0.1


@pytest.mark.parametrize("text", ["a <sks> cat", "a cat, <sks>", "<sks>, <sks> on a house", "<sks> <one>", "a <one>"])
def test_tokens_added_to_the_tokenizers_equal_diffusers_also_where_one_stands_for_several_vectors(text):
    pipe = pipeline_with_added_tokens(sks=vectors(3), one=vectors(1, seed=1))
    hidden, _, pooled, _ = stock_states(pipe, text)
    encoder = TextEncoder((pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2), True)
    states = encoder.encode([Prompt(text)])[0]
    close(states.hidden, hidden)
    close(states.pooled, pooled)


def test_a_token_whose_further_vectors_are_spelled_out_is_not_doubled():
    pipe = pipeline_with_added_tokens(sks=vectors(3))
    encoder = TextEncoder((pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2), True)
    short, spelled = encoder.encode([Prompt("a <sks> cat"), Prompt("a <sks> <sks>_1 <sks>_2 cat")])
    assert torch.equal(short.hidden, spelled.hidden)


def test_a_token_beyond_the_encoders_embeddings_is_refused():
    tokenizers, encoders = small_text_parts()
    tokenizers[1].add_tokens("<sks>")
    with pytest.raises(ModelFormatError, match="<sks>.*beyond the .* embeddings"):
        TextEncoder(tokenizers, encoders, force_zeros=True)


def test_pooling_at_the_end_equals_the_state_at_the_end_token(encoder):
    rows = vectors(2)
    pipe = pipeline_with_added_tokens(brand=rows)
    text = "a cat in the style of <brand>"
    ids = pipe.tokenizer_2(f"{text} <brand>_1", padding="max_length", return_tensors="pt").input_ids

    def at_the_end(model):
        with torch.no_grad():
            return model.text_projection(model(ids).last_hidden_state[0, ids[0].tolist().index(540)])

    (states,) = encoder.encode([Prompt(text, {"brand": rows})])
    close(states.pooled, measured(at_the_end, pipe.text_encoder_2))


def test_two_styles_in_one_prompt_equal_two_added_tokens(encoder):
    first, second = vectors(1, 1), vectors(2, 2)
    text = "a cat in the style of <one>, <two>"
    hidden = stock_states(pipeline_with_added_tokens(one=first, two=second), text)[0]
    (states,) = encoder.encode([Prompt(text, {"two": second, "one": first, "absent": vectors(1, 3)})])
    close(states.hidden, hidden)


def test_ids_equal_added_tokens_except_at_the_placeholder(encoder):
    text, rows = "a dog on <brand>!! a red <foo> house", vectors(2)
    pipe = pipeline_with_added_tokens(brand=rows)
    for index, tokenizer in enumerate((pipe.tokenizer, pipe.tokenizer_2)):
        expected = tokenizer(text.replace("<brand>", "<brand> <brand>_1"), padding="max_length").input_ids
        (chunk,) = encoder._chunks(Prompt(text, {"brand": rows}), ([], []))[index]
        found = encoder._window(chunk, index).ids
        assert [t if t <= 540 else -1 for t in expected] == [max(t, -1) for t in found]
        assert [t for t in found if t < 0] == [-1, -2]


def test_mixed_batch_equals_single_encodings(encoder):
    prompts = [
        Prompt("a cat"),
        Prompt("a <x> cat", {"x": vectors(1, 1)}),
        Prompt(None),
        Prompt("a <x> cat", {"x": vectors(1, 2)}),
        Prompt("a cat"),
    ]
    policies = ["eos", "first_added_token", "eos", "eos", "first_added_token"]
    together = encoder.encode(prompts, policies)
    for prompt, policy, states in zip(prompts, policies, together, strict=True):
        for field in ("hidden", "pooled"):
            close(getattr(states, field), measured(state, parts_of(encoder), field, prompt, policy))


def test_equal_prompts_are_encoded_once(encoder):
    rows = vectors(1)
    same = [Prompt("a <x>", {"x": tuple(r.clone() for r in rows)}) for _ in range(4)]
    other = Prompt("a <x>", {"x": vectors(1, 9)})
    batches = []
    handle = encoder.encoders[1].register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    states = encoder.encode([*same, other])
    handle.remove()
    assert batches == [2]
    assert all(s.hidden is states[0].hidden and s.pooled is states[0].pooled for s in states[:4])
    assert not torch.equal(states[0].hidden, states[4].hidden)


def test_encoding_changes_nothing_in_the_models(encoder):
    before = [{k: v.clone() for k, v in e.state_dict().items()} for e in encoder.encoders]
    sizes = [len(t) for t in encoder.tokenizers]
    encoder.encode([Prompt("a <x> cat", {"x": vectors(2)})])
    assert sizes == [len(t) for t in encoder.tokenizers]
    for state, model in zip(before, encoder.encoders, strict=True):
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_threads_can_share_the_encoders(encoder):
    prompts = [Prompt("a <x> cat", {"x": vectors(1, seed)}) for seed in range(8)]
    expected = [measured(state, parts_of(encoder), "hidden", prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: encoder.encode([prompt])[0], prompts * 4))
    for ours, theirs in zip(found, expected * 4, strict=True):
        close(ours.hidden, theirs)


def test_gradients_reach_the_vectors_and_nothing_else(encoder):
    rows = tuple(r.requires_grad_() for r in vectors(2))
    (states,) = encoder.encode([Prompt("a <x>", {"x": rows})])
    (states.hidden.sum() + states.pooled.sum()).backward()
    assert all(r.grad.abs().sum(dim=1).min() > 0 for r in rows)
    assert all(e.get_input_embeddings().weight.grad is None for e in encoder.encoders)
    (plain,) = encoder.encode([Prompt("a <x>", {"x": vectors(2)})])
    assert not plain.hidden.requires_grad
    for model in encoder.encoders:
        model.zero_grad()


def test_unregistered_angle_brackets_are_ordinary_text(encoder):
    expected = stock_states(small_pipeline(encoder.tokenizers, encoder.encoders), "a <foo> cat")[0]
    (states,) = encoder.encode([Prompt("a <foo> cat", {"bar": vectors(1)})])
    close(states.hidden, expected)


def test_registered_name_without_vectors_is_refused(encoder):
    with pytest.raises(PromptError, match="<brand>.*add it to the styles"):
        encoder.encode([Prompt("a <brand> cat")], known_names=("brand",))


def test_the_first_chunk_of_a_long_prompt_is_what_diffusers_keeps_of_it(encoder):
    text = "a " * 70 + "red house on the painting dog cat"
    hidden, _, pooled, _ = stock_states(small_pipeline(encoder.tokenizers, encoder.encoders), text)
    (states,) = encoder.encode([Prompt(text)])
    assert states.hidden.shape == (154, 80)
    close(states.hidden[:77], hidden)
    close(states.pooled, pooled)


@pytest.mark.parametrize("first", ["a cat", None])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_a_prompt_for_each_encoder_equals_diffusers(encoder, first, clip_skip):
    pipe = small_pipeline(encoder.tokenizers, encoder.encoders)
    options = {"prompt_2": "a red house", "clip_skip": clip_skip, "negative_prompt_2": "a dog"}
    expected = stock_states(pipe, "a cat", negative_prompt=first or "", **options)
    prompts = [Prompt("a cat", text_2="a red house"), Prompt(first or "", text_2="a dog")]
    # the negative prompt skips no layers
    states = encoder.encode(prompts, clip_skip=[clip_skip, 0])
    found = (states[0].hidden, states[1].hidden, states[0].pooled, states[1].pooled)
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


def test_vectors_of_another_model_are_refused(encoder):
    with pytest.raises(StyleError, match="768 and 1280 wide.*32 and 48"):
        encoder.encode([Prompt("<x>", {"x": (torch.zeros(1, 768), torch.zeros(1, 1280))})])
    with pytest.raises(StyleError, match="same n"):
        Prompt("<x>", {"x": (torch.zeros(1, 32), torch.zeros(2, 48))})


def test_wrong_arguments_are_refused(encoder):
    with pytest.raises(PromptError, match="string or None"):
        Prompt(3)
    with pytest.raises(PromptError, match="null prompt has no text"):
        Prompt(None, text_2="a")
    with pytest.raises(PromptError, match="syntax is 'a1'.*plain, a1111, compel"):
        Prompt("a", syntax="a1")
    with pytest.raises(PromptError, match="'last' is unknown"):
        encoder.encode([Prompt("a")], "last")
    with pytest.raises(PromptError, match="2 pooled policies for 1"):
        encoder.encode([Prompt("a")], ["eos", "eos"])


def test_encoders_that_do_not_belong_together_are_refused():
    (short, _), (small, _) = small_text_parts(24)
    (_, long), (_, large) = small_text_parts(32)
    with pytest.raises(ModelFormatError, match="24 and 32 tokens"):
        TextEncoder((short, long), (small, large), True)
    with pytest.raises(ModelFormatError, match="without a text projection"):
        TextEncoder((short, short), (small, small), True)
