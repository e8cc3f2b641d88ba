"""Stage 5: the image encoder, a small CLIP vision tower in the space of text encoder 2.

A picture's embedding is taught to be the sum of what the text encoder says of its content, its style and its palette
(each as its difference from the mean of its kind), so that taking `s * text("a fish")` away takes the fish away.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.tiny_model.data import load_pool
from benchmarks.tiny_model.pictures import CONTENTS, PALETTES, STYLES
from benchmarks.tiny_model.text import HIDDEN, load_text_tower

MEAN = (0.5, 0.5, 0.5)
DEVIATION = (0.5, 0.5, 0.5)
VISION_CONFIG = dict(
    hidden_size=112,
    intermediate_size=336,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=64,
    patch_size=8,
    projection_dim=HIDDEN,
    hidden_act="gelu",
)
# half of the content's words, so that the usual subtraction at strength 0.5 takes away what the picture says of it
CONTENT_SHARE, PALETTE_SHARE = 0.5, 0.7


class TextAnchors:
    """Embeddings of each content, style and palette word by text encoder 2, and those that pictures should get."""

    def __init__(self, folder: Path):
        tower = load_text_tower(folder)
        with torch.no_grad():
            self.content, self.style, self.palette = (
                tower(captions)[1]
                for captions in (
                    [f"a {name}" for name in CONTENTS],
                    [f"{name} style" for name in STYLES],
                    [f"{name} palette" for name in PALETTES],
                )
            )

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Embeddings `[n, 64]` for labels `[n, 3]` of content, style, palette."""
        content, style, palette = ((rows - rows.mean(0))[labels[:, i]] for i, rows in enumerate(self._kinds()))
        middle = torch.stack([rows.mean(0) for rows in self._kinds()]).mean(0)
        return middle + CONTENT_SHARE * content + style + PALETTE_SHARE * palette

    def word_loss(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of finding each picture's words: how far it lies along a word's direction, in units of what it
        should be. Contents differ by less than styles do, so the squared error alone would let them go."""
        middle = torch.stack([rows.mean(0) for rows in self._kinds()]).mean(0)
        loss = embeddings.new_zeros(())
        for i, (rows, share) in enumerate(zip(self._kinds(), (CONTENT_SHARE, 1.0, PALETTE_SHARE), strict=True)):
            directions = rows - rows.mean(0)
            along = (embeddings - middle) @ (directions / directions.square().sum(1, keepdim=True)).T / share
            loss = loss + F.cross_entropy(6 * along, labels[:, i])
        return loss

    def _kinds(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.content, self.style, self.palette

    def nearest(self, embeddings: torch.Tensor, kind: str) -> torch.Tensor:
        """Index of the word of a kind (content, style, palette) whose direction from the mean fits best, `[n]`."""
        rows = getattr(self, kind)
        middle = torch.stack([part.mean(0) for part in self._kinds()]).mean(0)
        return (F.normalize(embeddings - middle, dim=1) @ F.normalize(rows - rows.mean(0), dim=1).T).argmax(1)


def pixel_values(pictures: np.ndarray) -> torch.Tensor:
    """uint8 `[n, 64, 64, 3]` to the encoder's input `[n, 3, 64, 64]`, as the saved CLIPImageProcessor does."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def load_image_encoder(folder: Path):
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", dtype=torch.float32).eval()


@torch.no_grad()
def embed_pictures(encoder, pictures: np.ndarray) -> torch.Tensor:
    """Image embeddings `[n, 64]`, not normalised."""
    parts = np.array_split(pictures, max(1, len(pictures) // 200))
    return torch.cat([encoder(pixel_values(part)).image_embeds for part in parts])


def encoder_scores(folder: Path, pictures: np.ndarray, labels: torch.Tensor) -> dict[str, float]:
    """Return how often words are found, before and after the picture's own content is taken away (strength 0.5)."""
    anchors, embeddings = TextAnchors(folder), embed_pictures(load_image_encoder(folder), pictures)
    removed = embeddings - 0.5 * anchors.content[labels[:, 0]]
    kinds = ("content", "style", "palette")
    found = {kind: anchors.nearest(embeddings, kind) == labels[:, i] for i, kind in enumerate(kinds)}
    found["content_after_subtraction"] = anchors.nearest(removed, "content") == labels[:, 0]
    found["style_after_subtraction"] = anchors.nearest(removed, "style") == labels[:, 1]
    scores = {kind: round(hits.float().mean().item(), 4) for kind, hits in found.items()}
    for name, rows in (("image", embeddings), ("style", anchors.style), ("content", anchors.content)):
        scores[f"{name}_norm"] = round(rows.norm(dim=1).mean().item(), 3)
    return scores


def _augment(x: torch.Tensor) -> torch.Tensor:
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    row, column = torch.randint(0, 7, (2,)).tolist()
    return padded[:, :, row : row + 64, column : column + 64] + torch.randn_like(x) * 0.1 * torch.rand(len(x), 1, 1, 1)


def train_clip(work: Path, out: Path, minutes: float, seed: int = 4) -> dict:
    """Train `out/image_encoder` on the pool, write it with `out/feature_extractor`; returns the record."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pool, anchors = load_pool(work, "train"), TextAnchors(out)
    labels = torch.from_numpy(pool.labels)
    targets = anchors.targets(labels)
    spread = (targets - targets.mean(0)).square().mean()
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION_CONFIG)).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    start, step, budget = time.time(), 0, 60 * minutes
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * elapsed / budget)) + 1e-6
        chosen = rng.integers(0, len(labels), 96)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = encoder(_augment(pixel_values(pool.pictures[chosen]))).image_embeds
        embeddings, wanted = embeddings.float(), targets[chosen]
        loss = (embeddings - wanted).square().mean() / spread + 0.3 * anchors.word_loss(embeddings, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"clip {elapsed:.0f}s step {step} loss {loss.item():.4f}", flush=True)
    wall = round((time.time() - start) / 60, 2)
    encoder.eval().half().save_pretrained(out / "image_encoder")
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=MEAN, image_std=DEVIATION
    ).save_pretrained(out / "feature_extractor")
    held = load_pool(work, "validation")
    return dict(minutes=wall, steps=step, **encoder_scores(out, held.pictures, torch.from_numpy(held.labels)))
