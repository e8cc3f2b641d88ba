"""Stage 6: the IP-Adapter (global kind) of the tiny model, trained with everything else frozen.

The task is the published one: reconstruct a picture from its own embedding and a caption. Captions name the content
only, so the picture has to bring the style. In half of the steps just the style block sees the picture, so that it can
carry style alone (stage 4 has taught the UNet to listen there); in the other half all layers do.
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.tiny_model.clip import embed_pictures, load_image_encoder
from benchmarks.tiny_model.data import load_pool
from benchmarks.tiny_model.pictures import CONTENTS
from benchmarks.tiny_model.text import HIDDEN, load_text_tower
from benchmarks.tiny_model.unet import cumulative_alphas, lifted_weights, predict_noise, stratified_timesteps

IMAGE_TOKENS = 4
STYLE_BLOCK = "up_blocks.0.attentions.1"
_CROSS_DIM = 2 * HIDDEN


class ImageProjection(nn.Module):
    """An image embedding `[rows, 64]` to 4 tokens `[rows, 4, 128]`: LayerNorm(reshape(W e + b))."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(HIDDEN, IMAGE_TOKENS * _CROSS_DIM)
        self.norm = nn.LayerNorm(_CROSS_DIM)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(embeddings).reshape(-1, IMAGE_TOKENS, _CROSS_DIM))


class ImageBranch(nn.Module):
    """Decoupled cross-attention of one layer: text attention + strength * image attention, before `to_out`."""

    def __init__(self, width: int):
        super().__init__()
        self.to_k = nn.Linear(_CROSS_DIM, width, bias=False)
        self.to_v = nn.Linear(_CROSS_DIM, width, bias=False)
        self.tokens: torch.Tensor | None = None
        self.strength = 0.0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **_):
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        key, value = heads(attn.to_k(encoder_hidden_states)), heads(attn.to_v(encoder_hidden_states))
        out = F.scaled_dot_product_attention(query, key, value)
        if self.strength and self.tokens is not None:
            key, value = heads(self.to_k(self.tokens)), heads(self.to_v(self.tokens))
            out = out + self.strength * F.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


class TinyAdapter(nn.Module):
    """The trainable parts, installed in a diffusers UNet; saves in the published layout."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.image_proj = ImageProjection()
        self.branches = nn.ModuleDict()
        processors = dict(unet.attn_processors)
        self.numbers = {}
        for place, name in enumerate(processors):
            if name.endswith("attn2.processor"):
                attention = unet.get_submodule(name.removesuffix(".processor"))
                branch = ImageBranch(attention.to_q.in_features)
                # start as the text's own projections, which read vectors of the same width and meaning
                branch.to_k.weight.data.copy_(attention.to_k.weight)
                branch.to_v.weight.data.copy_(attention.to_v.weight * 0.5)
                processors[name] = branch
                key = name.replace(".", "/")
                self.branches[key], self.numbers[key] = branch, place
        unet.set_attn_processor(processors)

    def condition(self, embeddings: torch.Tensor | None, block: str = "", strength: float = 1.0) -> None:
        """Set the pictures of the next UNet call, `[rows, 64]`, seen by layers whose name contains `block`."""
        tokens = None if embeddings is None else self.image_proj(embeddings)
        for key, branch in self.branches.items():
            branch.tokens = tokens
            branch.strength = strength if block in key.replace("/", ".") else 0.0

    def save(self, path: Path) -> None:
        """Write `image_proj.*` and `ip_adapter.{k}.to_{k,v}_ip.weight` in fp16."""
        from safetensors.torch import save_file

        state = {f"image_proj.{name}": value for name, value in self.image_proj.state_dict().items()}
        for key, branch in self.branches.items():
            number = self.numbers[key]
            state[f"ip_adapter.{number}.to_k_ip.weight"] = branch.to_k.weight.detach()
            state[f"ip_adapter.{number}.to_v_ip.weight"] = branch.to_v.weight.detach()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in state.items()}, str(path), {"format": "pt"})


def _captions(rng: torch.Generator, labels: torch.Tensor) -> list[str | None]:
    draws = torch.rand(len(labels), generator=rng).tolist()
    names = [CONTENTS[index] for index in labels[:, 0].tolist()]
    return [None if draw < 0.15 else f"a {name}" for draw, name in zip(draws, names, strict=True)]


def train_adapter(work: Path, out: Path, minutes: float, seed: int = 5) -> dict:
    """Train on the cached latents and write `out/ip_adapter/ip-adapter_tiny.safetensors`; returns the record."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train, alphas = torch.load(work / "train.pt", weights_only=True), cumulative_alphas()
    latents, labels = train["latents"], train["labels"]
    embeddings = embed_pictures(load_image_encoder(out), load_pool(work, "train").pictures)
    unet = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)
    unet = unet.to(memory_format=torch.channels_last).requires_grad_(False).train()
    tower = load_text_tower(out).requires_grad_(False)
    adapter = TinyAdapter(unet)
    adapter.requires_grad_(True)
    parameters = list(adapter.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, step, pictures, recent, budget = time.time(), 0, 0, [], 60 * minutes
    while (elapsed := time.time() - start) < budget:
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * elapsed / budget)) + 1e-6
        chosen = torch.randint(0, len(latents), (64,), generator=generator)
        timesteps, noise = stratified_timesteps(64), torch.randn(64, *latents.shape[1:])
        signal = alphas[timesteps][:, None, None, None]
        noisy = signal.sqrt() * latents[chosen] + (1 - signal).sqrt() * noise
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        kept = (torch.rand(64, 1, generator=generator) >= 0.1).float()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                states, pooled = tower(_captions(generator, labels[chosen]))
            # a dropped picture is a zero embedding, as at inference without a picture
            adapter.condition(embeddings[chosen] * kept, STYLE_BLOCK if step % 2 else "")
            predicted = predict_noise(unet, noisy, timesteps, states, pooled).float()
        loss = (lifted_weights(alphas[timesteps]) * (predicted - noise).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step, pictures, recent = step + 1, pictures + 64, [*recent[-99:], loss.item()]
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.995, (1 + step) / (10 + step)))
        if step % 50 == 0:
            print(f"adapter {elapsed:.0f}s step {step} loss {sum(recent) / len(recent):.4f}", flush=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    adapter.save(out / "ip_adapter" / "ip-adapter_tiny.safetensors")
    wall = round((time.time() - start) / 60, 2)
    return dict(minutes=wall, steps=step, pictures=pictures, loss=round(sum(recent) / len(recent), 4))
