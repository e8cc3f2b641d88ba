"""The peer: the published methods on diffusers, behind a plain FastAPI handler with a lock.

    python -m benchmarks.serving.published --port 8001

What a careful user writes with diffusers' own pipeline: StyleAligned as a processor of self-attention, InstantStyle as
diffusers' IP-Adapter with scales for its blocks, and DreamStyler as learned tokens whose prompt changes with the noise
stage, in a callback. It answers the bodies of the mix (`mix.py`) at /v1/images/generations, in a stream of the same
events, and makes one picture at a time. All that can be prepared before the first request is: a UNet for each kind of
attention, over the same weights, so that changing the style loads nothing, and the embeddings of pictures and stages.
"""

import argparse
import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Mapping
from io import BytesIO
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from safetensors.torch import load_file

from benchmarks.runtime.published import align
from stylefast.models.checkpoint import TINY
from stylefast.models.previews import PreviewDecoder

# where InstantStyle acts in the embedded model: its stylefast.json names the same modules
STYLE_BLOCKS = {"up": {"block_1": 1.0}}
TEMPLATE = "{}, in the style of {}"
Show = Callable[[Image.Image], None]


class Painter:
    """diffusers' pipeline of the embedded model with the three methods; makes one picture at a time."""

    def __init__(self, folder=TINY):
        self.pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32, add_watermarker=False)
        self.pipe.set_progress_bar_config(disable=True)
        self.plain, self.aligned = self.pipe.unet, _same_weights(self.pipe.unet)
        self.sharing = align(self.aligned)
        self.stages = {path.stem: self._learn(path) for path in sorted((folder / "styles").glob("*.safetensors"))}
        self.adapted = self.pipe.unet = _same_weights(self.plain)
        self.pipe.load_ip_adapter(str(folder), subfolder="ip_adapter", weight_name="ip-adapter_tiny.safetensors")
        self.pipe.set_ip_adapter_scale(STYLE_BLOCKS)
        self.pictures = {path.stem: self._embed(path) for path in sorted((folder / "references").glob("*.png"))}
        self.previews = PreviewDecoder.load(None, self.pipe.vae, torch.float32, "cpu")

    def paint(self, body: Mapping[str, Any], show: Show | None = None) -> Image.Image:
        """Return the picture that a body asks for; `show` gets a preview after half of the steps."""
        own = body["stylefast"]
        width, height = map(int, body["size"].split("x"))
        guided, style = own["guidance"] > 1, own.get("style")
        steps, seeds, prompts = own["steps"], [own["seed"]], [body["prompt"]]
        given: dict[str, Any] = {}
        change = None
        self.pipe.unet = self.plain
        if isinstance(style, dict):
            # the reference stands in front of the picture
            self.pipe.unet, self.sharing.branches = self.aligned, 2 if guided else 1
            prompts, seeds = [style["prompt"], *prompts], [style["seed"], *seeds]
        elif style in self.pictures:
            self.pipe.unet = self.adapted
            given["ip_adapter_image_embeds"] = self.pictures[style][guided]
        elif style is not None:
            self.pipe.scheduler.set_timesteps(steps)
            first = stage_of(self.pipe.scheduler.timesteps[0], len(self.stages[style]))
            change = self._stage_change(style, prompts[0], guided)
            prompts = [TEMPLATE.format(prompts[0], self.stages[style][first])]

        def after_step(pipe, step: int, timestep, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            if show is not None and step + 1 == round(steps / 2):
                show(Image.fromarray(self.previews.decode(tensors["latents"][-1:])[0].numpy()))
            if change is not None and step + 1 < steps:
                tensors.update(change(pipe.scheduler.timesteps[step + 1]))
            return tensors

        texts = ["prompt_embeds", "add_text_embeds"] if change else []
        return self.pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=own["guidance"],
            width=width,
            height=height,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            callback_on_step_end=after_step,
            callback_on_step_end_tensor_inputs=["latents", *texts],
            **given,
        ).images[-1]

    def _learn(self, path) -> list[str]:
        """Add a learned style's vectors as tokens, a name for each stage; return the names, of least noise first."""
        file, names = load_file(path), []
        parts = [("clip_l", self.pipe.tokenizer, self.pipe.text_encoder)]
        parts.append(("clip_g", self.pipe.tokenizer_2, self.pipe.text_encoder_2))
        for stage in range(len(file["stages.clip_l"])):
            names.append(f"<{path.stem}-{stage}>")
            for part, tokenizer, encoder in parts:
                vectors = file[f"stages.{part}"][stage]
                self.pipe.load_textual_inversion(vectors, names[-1], tokenizer=tokenizer, text_encoder=encoder)
        return names

    def _embed(self, path) -> dict[bool, list[torch.Tensor]]:
        """Return the embeddings of a picture, with guidance and without."""
        with Image.open(path) as picture:
            return {
                guided: self.pipe.prepare_ip_adapter_image_embeds([picture], None, "cpu", 1, guided)
                for guided in (False, True)
            }

    def _stage_change(self, style: str, prompt: str, guided: bool) -> Callable[[Any], dict[str, torch.Tensor]]:
        """Return a function of the timestep: the text that a step reads, encoded when a stage begins."""
        names, kept = self.stages[style], {}

        def texts(timestep: Any) -> dict[str, torch.Tensor]:
            stage = stage_of(timestep, len(names))
            if stage not in kept:
                with torch.no_grad():
                    full, null, pooled, null_pooled = self.pipe.encode_prompt(
                        TEMPLATE.format(prompt, names[stage]), do_classifier_free_guidance=guided
                    )
                if guided:
                    full, pooled = torch.cat([null, full]), torch.cat([null_pooled, pooled])
                kept[stage] = {"prompt_embeds": full, "add_text_embeds": pooled}
            return kept[stage]

        return texts


def stage_of(timestep: Any, stages: int) -> int:
    """Return the noise stage of a timestep below 1000; 0 has the least noise."""
    return min(int(float(timestep) * stages / 1000), stages - 1)


def _same_weights(unet) -> UNet2DConditionModel:
    """Return another UNet object over the same tensors."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.eval()


def create_app(painter: Painter) -> FastAPI:
    """Return the application."""
    app, lock = FastAPI(), asyncio.Lock()  # unlike threading's, it is fair

    def png(picture: Image.Image) -> str:
        stream = BytesIO()
        picture.save(stream, "PNG")
        return base64.b64encode(stream.getvalue()).decode()

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/images/generations", response_model=None)
    async def generations(body: dict[str, Any]) -> JSONResponse | StreamingResponse:
        loop = asyncio.get_running_loop()
        if body.get("stream"):
            return StreamingResponse(events(body), media_type="text/event-stream")
        async with lock:
            picture = await loop.run_in_executor(None, painter.paint, body)
        return JSONResponse({"data": [{"b64_json": png(picture)}]})

    async def events(body: dict[str, Any]) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        async with lock:
            shown: asyncio.Queue[Image.Image | None] = asyncio.Queue()

            def show(picture: Image.Image | None) -> None:
                loop.call_soon_threadsafe(shown.put_nowait, picture)

            def work() -> Image.Image:
                try:
                    return painter.paint(body, show if body.get("partial_images") else None)
                finally:
                    show(None)

            painting = loop.run_in_executor(None, work)
            while (preview := await shown.get()) is not None:
                yield event("image_generation.partial_image", preview)
            picture = await painting
        yield event("image_generation.completed", picture)

    def event(kind: str, picture: Image.Image) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, 'b64_json': png(picture)})}\n\n"

    return app


def main() -> None:
    """Serve until stopped; the address is on stderr, as `stylefast serve` has it."""
    import socket
    import sys

    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    port = parser.parse_args().port
    app = create_app(Painter())
    listener = socket.create_server(("127.0.0.1", port))
    print(f"serving on http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
