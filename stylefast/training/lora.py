"""Training of a LoRA: low-rank changes of a frozen UNet that make it draw like a set of pictures.

Each step draws pictures, noise and timesteps, and lowers the plain diffusion loss (arXiv 2006.11239, eq. 14, or that of
the velocity, arXiv 2202.00512, appendix D) in the changes alone. The UNet is diffusers', around the engine's own
tensors, which stay as they are.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import stylefast
from stylefast import values
from stylefast.errors import InvalidRequest, ModelFormatError, NumericsError, StyleFastError
from stylefast.models import vae as vaes
from stylefast.models.config_files import build
from stylefast.models.text import Prompt
from stylefast.sampling.edm import is_edm
from stylefast.sampling.noise_levels import alphas_cumprod
from stylefast.training.low_rank import LAYERS, Changes, LowRank, attached, kohya_tensors, text_layers, unet_layers
from stylefast.training.pictures import CaptionedPicture, cropped
from stylefast.whole_files import write_whole

if TYPE_CHECKING:
    from stylefast.engine import Engine

logger = logging.getLogger(__name__)

# called after a step with (step, steps, loss of the step)
Report = Callable[[int, int, float], object]
MOST_STEPS, HIGHEST_RANK, LARGEST_BATCH, LARGEST_SIDE, LARGEST_ALPHA = 1_000_000, 1024, 1024, 4096, 65504
_WARMUP = 0.05  # share of the steps in which the learning rate rises
_MOST_PROMPTS = 32  # encoded at once
_SDXL_WIDTH = 2048  # of the cross-attention of SDXL and of all whose LoRAs are named after it


@dataclass(frozen=True)
class LoraSettings:
    """Settings of the training of a LoRA.

    Args:
        rank: of every change, 1 to 1024.
        alpha: changes are scaled by alpha / rank; None: the rank.
        steps: optimiser steps (AdamW).
        learning_rate: its largest value: it rises over the first 5 % of the steps and falls to 0 along a cosine.
        batch: pictures in a step.
        resolution: side of the squares that pictures are cropped to, in pixels; None: the model's native size.
        layers: "attention", "attention+ff" (all of the transformers) or "all" (resnets and resamplers as well).
        blocks: parts of layer names, such as "up_blocks", one of which must occur in a trained layer's; none: all.
        text_encoders: whether both text encoders are trained too.
        caption_dropout: share of the pictures that are shown without their caption, 0 to 1.
        min_snr: limit of the loss's min-SNR weights (arXiv 2303.09556), see `loss_weights`; None: no weights.
        seed: of the drawn changes, pictures, noise and timesteps.
        gradient_checkpointing: whether the UNet's blocks are computed again for their gradients, instead of keeping
            what they computed: the same LoRA, in less memory, for one more forward pass a step.

    Raises InvalidRequest for anything out of range.
    """

    rank: int = 16
    alpha: float | None = None
    steps: int = 1000
    learning_rate: float = 1e-4
    batch: int = 1
    resolution: int | None = None
    layers: str = "attention"
    blocks: Sequence[str] = ()
    text_encoders: bool = False
    caption_dropout: float = 0.1
    min_snr: float | None = None
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self):
        rank = values.whole_number("rank", self.rank, 1, HIGHEST_RANK)
        alpha = rank if self.alpha is None else self.alpha
        checked: dict[str, Any] = {
            "rank": rank,
            "alpha": values.real_number("alpha", alpha, above=0, high=LARGEST_ALPHA),
            "steps": values.whole_number("steps", self.steps, 1, MOST_STEPS),
            "learning_rate": values.real_number("learning_rate", self.learning_rate, above=0, high=1),
            "batch": values.whole_number("batch", self.batch, 1, LARGEST_BATCH),
            "layers": values.one_of("layers", self.layers, LAYERS),
            "text_encoders": values.flag("text_encoders", self.text_encoders),
            "caption_dropout": values.real_number("caption_dropout", self.caption_dropout, 0, 1),
            "seed": values.whole_number("seed", self.seed, 0, 2**64 - 1),
            "gradient_checkpointing": values.flag("gradient_checkpointing", self.gradient_checkpointing),
        }
        blocks = values.several("blocks", [self.blocks] if isinstance(self.blocks, str) else self.blocks)
        checked["blocks"] = tuple(values.text("a name in blocks", block, empty=False) for block in blocks)
        if self.resolution is not None:
            checked["resolution"] = values.whole_number("resolution", self.resolution, 16, LARGEST_SIDE)
        if self.min_snr is not None:
            checked["min_snr"] = values.real_number("min_snr", self.min_snr, above=0, high=1e6)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def train_lora(
    engine: "Engine",
    pictures: Sequence[CaptionedPicture],
    out: str | Path,
    settings: LoraSettings | None = None,
    report: Report | None = None,
) -> Path:
    """Train a LoRA and write it in kohya's layout, fp16; return the file's path.

    Args:
        engine: in float32 or bfloat16. It must not make pictures meanwhile if text encoders are trained.
        pictures: see `read_folder`.
        out: a `.safetensors` file; an older one is replaced.
        settings: None: the defaults.
        report: called after every step with (step, steps, loss).

    On KeyboardInterrupt, saves what was learned, then re-raises.
    Raises InvalidRequest or ImageError before the first step, NumericsError if the loss is not finite.
    """
    path = check_out(out)
    values.function("report", report, "(step, steps, loss)")
    training = LoraTraining(engine, pictures, settings or LoraSettings())
    try:
        while training.done < training.settings.steps:
            loss = training.step()
            if report is not None:
                report(training.done, training.settings.steps, loss)
    except KeyboardInterrupt:
        if training.done:
            try:
                training.save(path)
            except StyleFastError as error:
                logger.error("what was learned is lost: %s", error)
        raise
    training.save(path)
    return path


def check_out(out: str | Path) -> Path:
    """Return the path of a file to write. Raises InvalidRequest for another ending, or a folder that does not exist."""
    path = values.path("out", out)
    if path.suffix != ".safetensors":
        raise InvalidRequest(f"out is {values.shown_path(path)}; its name must end in .safetensors")
    if path.is_dir():
        raise InvalidRequest(f"{values.shown_path(path)} is a folder; choose another file")
    if not path.absolute().parent.is_dir():
        raise InvalidRequest(f"the folder of {values.shown_path(path)} does not exist; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InvalidRequest(f"can't write into the folder of {values.shown_path(path)}; choose another")
    return path


class LoraTraining:
    """A LoRA in training. `done` counts its steps; `changes` holds what has been learned.

    Raises InvalidRequest, ImageError and ModelFormatError, see `train_lora`.
    """

    def __init__(self, engine: "Engine", pictures: Sequence[CaptionedPicture], settings: LoraSettings):
        self.settings, self.done, self.pictures = settings, 0, tuple(pictures)
        if not self.pictures:
            raise InvalidRequest("there are no pictures to train on; give at least one")
        self._engine, self._device = engine, engine.unet.device
        self._prediction = _prediction(engine)
        if engine.unet.dtype == torch.float16:
            raise InvalidRequest("the model is in float16, in which gradients overflow; load it with dtype='bfloat16'")
        self.side = self._side()
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._unet = _diffusers_unet(engine, settings.gradient_checkpointing)
        self._layers = {"unet": unet_layers(self._unet, settings.layers, settings.blocks)}
        if not self._layers["unet"]:
            raise InvalidRequest(
                f"blocks is {values.quoted(list(settings.blocks))}, which no layer of {values.quoted(settings.layers)} "
                "has in its name; an example is 'up_blocks.0.attentions.1'"
            )
        if settings.text_encoders:
            for part, encoder in zip(("text_encoder", "text_encoder_2"), engine.text_encoder.encoders):
                self._layers[part] = text_layers(encoder)
        assert settings.alpha is not None  # since `__post_init__`
        self.changes: Changes = {}
        for part, layers in self._layers.items():
            self.changes[part] = {
                name: LowRank(layer, settings.rank, settings.alpha, self._generator) for name, layer in layers.items()
            }
        self._parameters = [p for found in self.changes.values() for one in found.values() for p in one.parameters()]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01)
        self._alphas = torch.from_numpy(alphas_cumprod(engine.scheduler_config))
        self._warn_of_long_captions()
        self._latents, self._time_ids = self._encoded_pictures()
        self._states = {} if settings.text_encoders else self._encoded_captions()
        self._order: list[int] = []

    def step(self) -> float:
        """Take one optimiser step and return its loss. Raises NumericsError, changing nothing, if it is not finite."""
        settings, draw = self.settings, self._generator
        chosen = [self._next() for _ in range(settings.batch)]
        kept = torch.rand(len(chosen), generator=draw) >= settings.caption_dropout
        captions = [self.pictures[i].caption if keep else None for i, keep in zip(chosen, kept.tolist(), strict=True)]
        timesteps = torch.randint(0, len(self._alphas), (len(chosen),), generator=draw)
        latents = self._latents[chosen]
        noise = torch.randn(latents.shape, generator=draw)
        signal = self._alphas[timesteps].float()[:, None, None, None]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        target = noise if self._prediction == "epsilon" else signal.sqrt() * noise - (1 - signal).sqrt() * latents
        weights = loss_weights(self._alphas[timesteps], self._prediction, settings.min_snr)
        with torch.enable_grad(), attached(self._pairs()):
            hidden, pooled = self._text(captions)
            added = {"text_embeds": pooled, "time_ids": self._time_ids[chosen].to(self._device)}
            given = noisy.to(self._device, hidden.dtype), timesteps.to(self._device)
            found = self._unet(*given, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
            errors = (found.float() - target.to(self._device)).square().mean((1, 2, 3))
            loss = (weights.to(self._device, torch.float32) * errors).mean()
            # of these alone: the model's own weights need none. Layers whose output is not read have none
            gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        value = loss.item()
        if not math.isfinite(value):
            raise NumericsError(
                f"the loss is {value} in step {self.done + 1}; lower the learning rate (it is "
                f"{settings.learning_rate:g}), or train in float32"
            )
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.done)
        self._optimizer.step()
        self.done += 1
        return value

    def metadata(self) -> dict[str, str]:
        """Return what the file says of itself, under kohya's names."""
        settings, config, name = self.settings, self._engine.unet.config, self._engine.name
        is_sdxl = config["cross_attention_dim"] == _SDXL_WIDTH
        known = {
            "ss_base_model_version": "sdxl_base_v1-0" if is_sdxl else f"SDXL-shaped: {name}",
            "ss_sd_model_name": name,
            "ss_network_module": "networks.lora",
            "ss_network_dim": settings.rank,
            "ss_network_alpha": settings.alpha,
            "ss_steps": self.done,
            "ss_max_train_steps": settings.steps,
            "ss_learning_rate": settings.learning_rate,
            "ss_resolution": f"({self.side}, {self.side})",
            "ss_batch_size_per_device": settings.batch,
            "ss_num_train_images": len(self.pictures),
            "ss_caption_dropout_rate": settings.caption_dropout,
            "ss_min_snr_gamma": settings.min_snr,
            "ss_seed": settings.seed,
            "ss_gradient_checkpointing": settings.gradient_checkpointing,
            "modelspec.prediction_type": "v" if self._prediction == "v_prediction" else "epsilon",
            "stylefast.version": stylefast.__version__,
            "stylefast.layers": settings.layers,
            "stylefast.blocks": json.dumps(settings.blocks),
        }
        return {"format": "pt"} | {key: str(value) for key, value in known.items()}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises NumericsError, and InvalidRequest if it can't be written."""
        from safetensors.torch import save

        modules = [name for name, _ in self._unet.named_modules()]
        content = save(kohya_tensors(self.changes, modules), self.metadata())
        try:
            write_whole(path, content)
        except OSError as error:
            raise InvalidRequest(
                f"can't write {values.shown_path(path)} ({error.strerror or error}); choose another file"
            ) from error

    def _side(self) -> int:
        side = self.settings.resolution or min(self._engine.native_size)
        # each level of the UNet but the last halves the latents
        unit = self._engine.downscale * 2 ** (len(self._engine.unet.config["block_out_channels"]) - 1)
        if side % unit:
            near = max(unit, round(side / unit) * unit)
            raise InvalidRequest(f"resolution is {side}; this model needs a multiple of {unit}, such as {near}")
        return side

    def _next(self) -> int:
        """Return the number of the next picture: all of them in random order, again and again."""
        if not self._order:
            self._order = torch.randperm(len(self.pictures), generator=self._generator).tolist()
        return self._order.pop()

    def _pairs(self) -> list[tuple[nn.Module, LowRank]]:
        found = [(part, name, layer) for part, layers in self._layers.items() for name, layer in layers.items()]
        return [(layer, self.changes[part][name]) for part, name, layer in found]

    def _encoded_pictures(self) -> tuple[Tensor, Tensor]:
        """Return latents [pictures, channels, h, w] and time ids [pictures, 6] in host memory. Raises ImageError."""
        latents, time_ids = [], []
        for picture in self.pictures:
            pixels, ids = cropped(picture.path, self.side)
            latents.append(vaes.encode(self._engine.vae, pixels[None].to(self._device))[0].float().cpu())
            time_ids.append(torch.tensor(ids, dtype=torch.float32))
        return torch.stack(latents), torch.stack(time_ids)

    def _warn_of_long_captions(self) -> None:
        most, tokenizer = self._engine.text_encoder.max_tokens, self._engine.text_encoder.tokenizers[0]
        long = [one for one in self.pictures if len(tokenizer(one.caption, verbose=False).input_ids) > most]
        if long:
            logger.warning(
                "%d captions are longer than %d tokens, of which the first are used; one is that of %s",
                len(long),
                most,
                values.quoted(long[0].path.name),
            )

    def _encoded_captions(self) -> Mapping[str | None, tuple[Tensor, Tensor]]:
        """Return the text states of every caption, and of none, in host memory."""
        encoder = self._engine.text_encoder
        texts: list[str | None] = [None, *dict.fromkeys(picture.caption for picture in self.pictures)]
        found = {}
        for start in range(0, len(texts), _MOST_PROMPTS):
            part = texts[start : start + _MOST_PROMPTS]
            with torch.no_grad():
                # so many words fill the first window, which alone is kept
                first = [text and " ".join(text.split()[: encoder.max_tokens]) for text in part]
                states = encoder.encode([Prompt(text) for text in first])
            for text, state in zip(part, states, strict=True):
                found[text] = state.hidden[: encoder.max_tokens].cpu(), state.pooled.cpu()
        return found

    def _text(self, captions: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """Return hidden [rows, tokens, width] and pooled states [rows, width] on the device."""
        if not self.settings.text_encoders:
            hidden, pooled = zip(*(self._states[caption] for caption in captions), strict=True)
            return torch.stack(hidden).to(self._device), torch.stack(pooled).to(self._device)
        encoder, texts = self._engine.text_encoder, [caption or "" for caption in captions]
        given = {"padding": "max_length", "max_length": encoder.max_tokens, "truncation": True}
        hidden, pooled = [], None
        for tokenizer, model in zip(encoder.tokenizers, encoder.encoders, strict=True):
            ids = tokenizer(texts, return_tensors="pt", **given).input_ids.to(self._device)
            outputs = model(ids, output_hidden_states=True)
            hidden.append(outputs.hidden_states[-2])
            pooled = getattr(outputs, "text_embeds", None)
        assert pooled is not None
        # without a caption: the null prompt, zeros in models trained that way
        null = torch.tensor([caption is None and encoder.force_zeros for caption in captions], device=self._device)
        return torch.cat(hidden, -1).where(~null[:, None, None], 0), pooled.where(~null[:, None], 0)


def learning_rate(settings: LoraSettings, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    rising = min(1.0, (step + 1) / max(1, round(_WARMUP * settings.steps)))
    return settings.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def loss_weights(alphas: Tensor, prediction: str, min_snr: float | None) -> Tensor:
    """Return the factors of the squared errors at signal powers `alphas`, of the same shape.

    With SNR = alpha / (1 - alpha) they are min(SNR, min_snr) / SNR for noise ("epsilon") and min(SNR, min_snr) /
    (SNR + 1) for velocities (arXiv 2303.09556, section 3.4); 1 without `min_snr`.
    """
    if min_snr is None:
        return torch.ones_like(alphas)
    snr = alphas / (1 - alphas)
    if prediction == "epsilon":
        return (min_snr / snr).clamp(max=1)
    return snr.clamp(max=min_snr) / (snr + 1)


def _prediction(engine: "Engine") -> str:
    """Return what the model predicts. Raises ModelFormatError for other kinds of models."""
    config = engine.scheduler_config
    if is_edm(config):
        raise ModelFormatError(
            f"{engine.name} is an EDM model ({config['_class_name']}), trained on continuous noise levels; LoRAs can "
            "only be trained for models that predict noise or velocity at discrete timesteps"
        )
    known = ("epsilon", "v_prediction")
    return values.one_of(
        "the model's prediction_type", config.get("prediction_type", "epsilon"), known, error=ModelFormatError
    )


def _diffusers_unet(engine: "Engine", checkpointing: bool) -> nn.Module:
    """Return diffusers' UNet around the engine's tensors, with gradient checkpoints or without; nothing is copied."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    state, config = engine.unet.state_dict(), engine.unet.config
    unet = build(lambda: UNet2DConditionModel.from_config(config), config, len(state), engine.name)
    assert isinstance(unet, nn.Module)  # the library declares a tuple too, which nothing asked for
    unet.load_state_dict(state, assign=True)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.eval().requires_grad_(False)
