"""Texts of unequal length in one call of the UNet: every row gets what it gets alone."""

import pytest
import torch

from stylefast.kernels import registry
from stylefast.kernels.gated_cross_attention import operation as gated_cross_attention
from tests.support.fp64 import close, measured
from tests.support.rows import plain_rows
from tests.support.small_unet import CROSS_DIM, Inputs, random_inputs

SHORT, LONG = 77, 154


def texts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, length, CROSS_DIM, generator=generator) for length in lengths]


def run(unet, inputs: Inputs, kv, lengths=None) -> torch.Tensor:
    with torch.no_grad():
        time = unet.embed(inputs.timesteps, inputs.pooled, inputs.time_ids)
        table = plain_rows(unet.layout, len(inputs.latents))
        return unet(inputs.latents, time, kv, None, table, text_lengths=lengths)


def together(unet, given: list[torch.Tensor], beyond: float):
    """Keys and values of texts in pages as long as the longest, with `beyond` behind the others."""
    layers, longest = [unet.project_text(text) for text in given], max(text.shape[1] for text in given)

    def joined(parts):
        pages = parts[0].new_full((len(parts), longest, *parts[0].shape[2:]), beyond)
        for page, part in zip(pages, parts):
            page[: part.shape[1]] = part[0]
        return pages

    return tuple(tuple(joined(parts) for parts in zip(*pairs)) for pairs in zip(*layers))


def alone(unet, inputs: Inputs, text: torch.Tensor, row: int) -> torch.Tensor:
    """A row's result; a call of one row sums in another order elsewhere, so all rows have this one's text."""
    return run(unet, inputs, together(unet, [text] * len(inputs.latents), torch.nan))[row]


@pytest.mark.parametrize("form", ["torch", "cpp"])
def test_rows_with_texts_of_77_and_154_tokens_get_what_each_gets_alone(ours, form):
    inputs, given, lengths = random_inputs(2, 4), texts(SHORT, LONG), torch.tensor([SHORT, LONG])
    with registry.using(form, "gated_cross_attention"):
        found = run(ours, inputs, together(ours, given, torch.nan), lengths)
        peers = [measured(alone, ours, inputs, text, row) for row, text in enumerate(given)]
        # what stands there must matter, else this test would see nothing
        padded = run(ours, inputs, together(ours, given, 0.0))
    assert (padded[0] - found[0]).abs().max() > 1e-3
    with registry.using("torch"):  # the one form that takes fp64
        for row, peer in zip((found[0], found[1], padded[1]), (*peers, peers[1]), strict=True):
            close(row, peer)


def test_lengths_reach_every_cross_attention_and_none_reaches_none(ours, monkeypatch):
    seen, plain = [], gated_cross_attention.run

    def watched(*arguments):
        seen.append(arguments[4])
        return plain(*arguments)

    monkeypatch.setattr(gated_cross_attention, "run", watched)
    inputs, lengths = random_inputs(2), torch.tensor([7, 5])
    kv = ours.project_text(inputs.text)
    run(ours, inputs, kv, lengths)
    assert len(seen) == len(ours.layout.layers) and all(x is lengths for x in seen)
    seen.clear()
    run(ours, inputs, kv)
    assert seen == [None] * len(ours.layout.layers)
