"""What the package compel makes of a prompt, as a peer for `prompt_syntax="compel"`."""

import compel
import torch


def states_of(encoder, tokenizer, text):
    """[tokens, width] of one encoder, by compel."""
    dtype = next(encoder.parameters()).dtype
    kind = compel.ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    peer = compel.Compel(
        tokenizer,
        encoder,
        dtype_for_device_getter=lambda _: dtype,
        truncate_long_prompts=False,
        returned_embeddings_type=kind,
    )
    with torch.no_grad():
        return peer(text)[0]
