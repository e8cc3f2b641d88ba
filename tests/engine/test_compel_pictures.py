"""Pictures of long weighted prompts against diffusers with the embeddings that the package compel makes of them."""

import pytest
import torch

import stylefast as sf
from tests.support.compel_states import states_of
from tests.support.fp64 import close, measured
from tests.support.scene import SIZE, apart

STEPS, GUIDANCE = 2, 5.0
SENTENCE = "a red cat on the house, a dog in the style of an house. "
WEIGHTED = "a (red cat)1.4 on the house++, a dog in the (style)0.7 of an house. "
BLURRED = "a dog++ on the (red)1.3 painting, in the style of an house. "
PLAIN = "a dog on the red painting, in the style of an house. "


def conditions(pipe, written, words):
    """[1, tokens, width] of both encoders by compel, and the pooled state of the first chunk's words by diffusers."""
    parts = ((pipe.text_encoder, pipe.tokenizer), (pipe.text_encoder_2, pipe.tokenizer_2))
    states = torch.cat([states_of(encoder, tokenizer, written) for encoder, tokenizer in parts], dim=-1)
    # compel ends a chunk behind the last full stop that fits
    fitting = max(n for n in range(1, 40) if len(pipe.tokenizer(words * n, truncation=False).input_ids) <= 77)
    with torch.no_grad():
        _, _, pooled, _ = pipe.encode_prompt(words * fitting, do_classifier_free_guidance=False)
    return states[None], pooled


def theirs(pipe, count, guidance):
    """Latents of diffusers for `count` sentences, and as many unwanted ones where there is guidance."""
    given = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), conditions(pipe, WEIGHTED * count, SENTENCE)))
    if guidance > 1:
        negative = conditions(pipe, BLURRED * count, PLAIN)
        given |= dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), negative))
    width, height = SIZE
    return pipe(
        **given,
        generator=[torch.Generator().manual_seed(3)],
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        height=height,
        width=width,
        output_type="latent",
    ).images


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
def test_a_long_weighted_prompt_gives_the_picture_of_diffusers_with_compel(pipe, engine, guidance):
    pipe.set_progress_bar_config(disable=True)
    count = 12  # three chunks
    request = sf.Request(
        WEIGHTED * count,
        negative_prompt=BLURRED * count if guidance > 1 else "",
        prompt_syntax="compel",
        guidance=guidance,
        steps=STEPS,
        size=SIZE,
        seed=3,
    )
    # beside a short one, whose text is shorter
    found = engine.generate([request, sf.Request("a cat", steps=STEPS, size=SIZE)], output="latents").latents[:1]
    close(found, measured(theirs, pipe, count, guidance))
    plain = engine.generate(
        sf.Request(SENTENCE * count, guidance=guidance, steps=STEPS, size=SIZE, seed=3), output="latents"
    )
    apart(found, plain.latents)
