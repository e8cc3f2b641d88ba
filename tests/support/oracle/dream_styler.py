"""DreamStyler's inference, literally: one prompt per noise stage, and guidance as the paper's sums of differences."""

from copy import deepcopy

import torch


def stage_of(timestep: float, stages: int) -> int:
    """Noise stage of a training timestep in 0..999: 0 is the least noise, `stages` - 1 the most."""
    return min(stages - 1, int(timestep * stages / 1000))


def context_first(null, context, full, style_weight: float, context_weight: float) -> torch.Tensor:
    """Eq. 9: context alone pushes first, the style is what the full prompt adds to it."""
    return null + context_weight * (context - null) + style_weight * (full - context)


def style_first(null, style, full, style_weight: float, context_weight: float) -> torch.Tensor:
    """Eq. 10: style alone pushes first, the context is what the full prompt adds to it."""
    return null + style_weight * (style - null) + context_weight * (full - style)


def style_and_context(
    null, context, style, full, style_weight: float, context_weight: float, null_weight: float, convention: str
) -> torch.Tensor:
    """Eq. 11: both sums of differences and a push away from null; the released code halves each difference."""
    half = {"paper": 1.0, "code": 0.5}[convention]
    return (
        null
        + null_weight * (full - null)
        + half * (context_weight * (context - null) + style_weight * (full - context))
        + half * (style_weight * (style - null) + context_weight * (full - style))
    )


class Encoder:
    """SDXL's text encoders with learned rows added the ordinary way: new tokens in copies of tokenizers and tables.

    `vectors` maps a token such as "<sks>" to (encoder 1's row [768], encoder 2's row [1280]).
    """

    def __init__(self, pipe, vectors):
        self.tokenizers = [deepcopy(pipe.tokenizer), deepcopy(pipe.tokenizer_2)]
        self.encoders = [deepcopy(pipe.text_encoder), deepcopy(pipe.text_encoder_2)]
        self.ends = [tokenizer.eos_token_id for tokenizer in self.tokenizers]
        for index, (tokenizer, encoder) in enumerate(zip(self.tokenizers, self.encoders)):
            tokenizer.add_tokens(list(vectors))
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            with torch.no_grad():
                for token, rows in vectors.items():
                    encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)] = rows[index]

    def __call__(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt -> (text states [1, 77, cross_dim], pooled [1, d] at the first end token)."""
        states = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders):
            ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            with torch.no_grad():
                out = encoder(ids, output_hidden_states=True)
            states.append(out.hidden_states[-2])
        end = (ids[0] == self.ends[1]).nonzero()[0]
        return torch.cat(states, -1), self.encoders[1].text_projection(out.last_hidden_state[0, end]).detach()
