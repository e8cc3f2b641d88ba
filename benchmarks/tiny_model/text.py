"""Tokenizer and text encoders of the tiny model: SDXL's pair of CLIP towers, 64 wide."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from benchmarks.tiny_model.captions import WORDS

TOKENS = 24
HIDDEN = 64
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer():
    """Make a CLIPTokenizer: each known word is one token, other words fall into letters, and EOS has the top id."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary: dict[str, int] = {}
    for symbol in bytes_to_unicode().values():
        for piece in (symbol, symbol + "</w>"):
            vocabulary.setdefault(piece, len(vocabulary))
    merges: dict[tuple[str, str], None] = {}
    # words grow from their last letter, so that the merges of one word can't cut through another
    for word in sorted(WORDS, key=lambda word: (len(word), word)):
        suffix = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            merges[letter, suffix] = None
            suffix = letter + suffix
            vocabulary.setdefault(suffix, len(vocabulary))
    for special in (_START, _END):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=TOKENS)


def build_text_encoders(tokenizer) -> tuple[nn.Module, nn.Module]:
    """SDXL's pair: CLIPTextModel (quick GELU) and CLIPTextModelWithProjection (GELU)."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        projection_dim=HIDDEN,
        attention_dropout=0.0,
    )
    first = CLIPTextModel(CLIPTextConfig(**shape, hidden_act="quick_gelu"))
    return first, CLIPTextModelWithProjection(CLIPTextConfig(**shape, hidden_act="gelu"))


class TextTower(nn.Module):
    """Both encoders as SDXL reads them: penultimate states side by side, and the second encoder's pooled projection."""

    def __init__(self, tokenizer, first: nn.Module, second: nn.Module):
        super().__init__()
        self.tokenizer, self.first, self.second = tokenizer, first, second
        self.ids = lru_cache(maxsize=50_000)(self._ids)

    def _ids(self, caption: str) -> tuple[int, ...]:
        encoded = self.tokenizer(caption, padding="max_length", max_length=TOKENS, truncation=True)
        return tuple(encoded["input_ids"])

    def forward(self, captions: list[str | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `[rows, 24, 128]` and pooled `[rows, 64]`; rows of `None` are zero, as SDXL's empty prompt."""
        ids = torch.tensor([self.ids(caption or "") for caption in captions])
        kept = torch.tensor([float(caption is not None) for caption in captions])
        states = self.first(ids, output_hidden_states=True).hidden_states[-2]
        second = self.second(ids, output_hidden_states=True)
        states = torch.cat([states, second.hidden_states[-2]], -1)
        return states * kept[:, None, None], second.text_embeds * kept[:, None]


def load_text_tower(folder: Path) -> TextTower:
    """Load the tower of a model folder, in fp32 and evaluation mode."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    first = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32)
    return TextTower(tokenizer, first, second).eval()
