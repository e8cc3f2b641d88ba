"""The engine's process: loads the model, takes calls from the server, and reports what becomes of them.

It shares nothing with the server but a pipe, so that a crash here costs the pictures in progress and no more. Only the
main thread's event loop touches the calls; a thread reads the pipe, others decode uploads.
"""

import asyncio
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from stylefast.errors import ImageError, StyleError, StyleFastError
from stylefast.serving.media import Pixels
from stylefast.serving.messages import Cancel, Counts, Done, Failed, Made, NotReady, Progress, Ready, Run, Stop

if TYPE_CHECKING:
    from PIL.Image import Image

    from stylefast.engine import Engine

logger = logging.getLogger(__name__)

TELL_SECONDS = 0.1  # between two reports of steps done
COUNT_SECONDS = 1.0
WARM_UP_STEPS = 2
USUAL_STEPS = 12  # where a request does not say, and its sampler has no preset

# loads the model: the engine, and what its pictures record of what was loaded
Load = Callable[[], "tuple[Engine, Mapping[str, Any]]"]


def main(connection: Connection, load: Load, warm_up: bool) -> None:
    """Run until the server says stop, or is gone."""
    # the server decides what a signal to the whole group means
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        engine, loaded = load()
        if warm_up:
            engine.generate("a picture", steps=WARM_UP_STEPS)
        facts = facts_of(engine)
    except StyleFastError as error:
        connection.send(NotReady(str(error)))
        return
    except Exception as error:
        logger.exception("the model could not be loaded")
        connection.send(NotReady(f"unexpected {type(error).__name__}: {error}"))
        return
    with engine:
        asyncio.run(_Worker(connection, engine, loaded).serve(facts))


def facts_of(engine: "Engine") -> dict[str, Any]:
    """Return what the server needs to know of a model."""
    from stylefast.infotext import sampler_name
    from stylefast.sampling.few_step import FEW_STEP_PRESETS
    from stylefast.sampling.schedule import SCHEDULER_NAMES

    plain = [name for name in SCHEDULER_NAMES if not name.endswith(("_karras", "_exponential"))]
    return {
        "model": engine.name,
        "fingerprint": engine.fingerprint,
        "size": engine.native_size,
        "styles": sorted(named_styles(engine)),
        "adapters": sorted(engine.adapters),
        "loras": sorted(engine.loras),
        "schedulers": [*SCHEDULER_NAMES, *FEW_STEP_PRESETS],
        "samplers": {sampler_name(name): name for name in plain},
        "downscale": engine.downscale,
        "device": str(engine.unet.device),
    }


def named_styles(engine: "Engine") -> dict[str, dict[str, Any]]:
    """Return name -> entry, as in a request file, of the styles that come with the model."""
    found: dict[str, dict[str, Any]] = {}
    for name, path in engine.references().items():
        picture = str(path)
        if engine.adapters:
            found[name] = {"kind": "InstantStyle", "image": picture}
        else:
            found[name] = {"kind": "StyleAligned", "reference": picture}
    for name, path in engine.styles().items():
        found[name] = {"kind": "DreamStyler", "embedding": str(path)}
    return found


class _Notices(logging.Handler):
    """What the engine says of a request goes to its client: it quotes prompts, which the log must not have."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self._thread = threading.get_ident()
        self._said: list[str] | None = None
        log = logging.getLogger("stylefast")
        log.addHandler(self)
        log.propagate = False
        self._others = logging.StreamHandler()

    def __enter__(self) -> list[str]:
        self._said = []
        return self._said

    def __exit__(self, *_: object) -> None:
        self._said = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what is said while a request is submitted, and write the rest to stderr."""
        if self._said is not None and threading.get_ident() == self._thread:
            self._said.append(record.getMessage())
        else:
            self._others.emit(record)


class _Worker:
    """Calls in progress, and the pipe to the server."""

    def __init__(self, connection: Connection, engine: "Engine", loaded: Mapping[str, Any]):
        self._connection, self._engine, self._loaded = connection, engine, loaded
        self._styles = named_styles(engine)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sending = threading.Lock()
        self._decoders = ThreadPoolExecutor(2, "stylefast-uploads")
        self._stop = asyncio.Event()
        self._notices = _Notices()

    async def serve(self, facts: Mapping[str, Any]) -> None:
        """Take calls until the server says stop."""
        loop = asyncio.get_running_loop()
        reader = threading.Thread(target=self._read, args=(loop,), name="stylefast-calls", daemon=True)
        reader.start()
        self._send(Ready(facts))
        counting = asyncio.create_task(self._count())
        await self._stop.wait()
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        counting.cancel()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # the server is gone, and nobody waits for the pictures
            loop.call_soon_threadsafe(self._take, message)

    def _take(self, message: Run | Cancel | Stop) -> None:
        if isinstance(message, Run):
            self._tasks[message.ticket] = asyncio.create_task(self._run(message))
        elif isinstance(message, Cancel):
            task = self._tasks.get(message.ticket)
            if task is not None:
                task.cancel()
        else:
            self._stop.set()

    async def _run(self, run: Run) -> None:
        try:
            self._send(await self._made(run))
        except asyncio.CancelledError:
            self._send(Failed(run.ticket, "JobCancelled", "the request was cancelled"))
        except StyleFastError as error:
            self._send(Failed(run.ticket, _public_name(error), str(error)))
        except Exception as error:
            logger.exception("a request failed for a reason of ours")
            self._send(Failed(run.ticket, type(error).__name__, str(error)))
        finally:
            del self._tasks[run.ticket]

    async def _made(self, run: Run) -> Done:
        began, loop = time.monotonic(), asyncio.get_running_loop()
        requests = await loop.run_in_executor(self._decoders, self._requests, run)
        left = None if run.seconds is None else max(run.seconds - (time.monotonic() - began), 1e-3)
        with self._notices as said:
            job = self._engine.submit(requests, deadline=left)
        telling = asyncio.create_task(self._tell(run, job)) if run.previews == 0 else None
        due = [round(job.steps * (i + 1) / (run.previews + 1)) for i in range(run.previews)]
        try:
            if run.previews:
                async for preview in job:
                    images = ()
                    if due and preview.step >= due[0]:
                        due = [step for step in due if step > preview.step]
                        images = tuple(map(_pixels, preview.images()))
                    self._send(Progress(run.ticket, preview.step, preview.steps, images))
            result = await job
        finally:
            if telling is not None:
                telling.cancel()
        return await loop.run_in_executor(self._decoders, self._done, run, result, said, time.monotonic() - began)

    def _requests(self, run: Run) -> list:
        from stylefast.record import from_record
        from stylefast.sampling.few_step import FEW_STEP_PRESETS

        requests = []
        for request in run.call["requests"]:
            preset = FEW_STEP_PRESETS.get(request.get("scheduler", ""))
            if preset is None:
                defaults: dict[str, Any] = {"steps": USUAL_STEPS}
            else:
                defaults = {"steps": max(preset.steps), "guidance": preset.guidance}
            requests.append(_in_our_words({**defaults, **request}))
        named = {
            name: self._styles[name]
            for request in requests
            for name in request.get("style") or ()
            if isinstance(name, str) and name in self._styles
        }
        sources = _served_sources(run.uploads, self._engine)
        return from_record({"requests": requests, "styles": named}, sources=sources)

    def _done(self, run: Run, result: Any, said: Sequence[str], seconds: float) -> Done:
        from stylefast.infotext import write

        pictures = []
        for image, entry in zip(result.images, result.metadata, strict=True):
            record = {**entry, "size": list(image.size), "load": dict(self._loaded)}
            pictures.append(
                Made(
                    _pixels(image),
                    json.dumps(record, separators=(",", ":")),
                    write(record),
                    record["seed"],
                    (*said, *record["warnings"]),
                )
            )
        return Done(run.ticket, pictures, seconds, self._text_tokens(run))

    def _text_tokens(self, run: Run) -> int:
        tokenizer = self._engine.text_encoder.tokenizers[0]
        texts = [request["prompt"] for request in run.call["requests"]]
        return sum(len(tokenizer(text, verbose=False).input_ids) for text in texts)

    async def _tell(self, run: Run, job: Any) -> None:
        shown = 0
        while not job.done():
            await asyncio.sleep(TELL_SECONDS)
            if job.step != shown:
                shown = job.step
                self._send(Progress(run.ticket, job.step, job.steps))

    async def _count(self) -> None:
        while True:
            runner = self._engine.runner
            self._send(Counts({"unet_calls": runner.calls, "picture_steps": runner.steps_run}))
            await asyncio.sleep(COUNT_SECONDS)

    def _send(self, message: Any) -> None:
        with self._sending:
            self._connection.send(message)


def _pixels(image: "Image") -> Pixels:
    image = image.convert("RGB")
    return Pixels(image.width, image.height, image.tobytes())


def _in_our_words(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request with what A1111's route left for here: names of samplers, and tags in prompts."""
    theirs = request.pop("a1111", None)
    if theirs is None:
        return request
    from stylefast.infotext import scheduler_of, take_tags

    scheduler, spacing = scheduler_of(theirs["sampler"], theirs["schedule_type"])
    prompt, loras = take_tags(request["prompt"])
    negative, others = take_tags(request["negative_prompt"])
    found = {"scheduler": scheduler, "spacing": spacing, "prompt": prompt, "negative_prompt": negative}
    return {**request, **{name: value for name, value in found.items() if value is not None}, "loras": loras | others}


def _public_name(error: StyleFastError) -> str:
    """Return the name of an error's class that users know."""
    from stylefast import errors

    return next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)


def _served_sources(uploads: Any, engine: "Engine") -> Any:
    """Return the sources of a call from outside: uploads, and what comes with the model, but no file by its path."""
    from stylefast.models.checkpoint import TINY
    from stylefast.models.masks import open_mask
    from stylefast.models.pictures import open_picture
    from stylefast.record_values import Sources
    from stylefast.values import quoted, whole_number

    known = {**engine.references(), **engine.styles()}
    allowed = {str(path) for path in known.values()}

    class Served(Sources):
        def picture(self, entry, mask: bool = False):
            if isinstance(entry, str):
                return entry if entry in allowed else str(self._known(entry, engine.references(), ImageError))
            if isinstance(entry, Mapping) and "upload" in entry:
                number = whole_number("upload", entry["upload"], 0, error=ImageError)
                if number >= len(uploads):
                    raise ImageError(f"upload is {number}, and {len(uploads)} pictures were sent along")
                return (open_mask if mask else open_picture)(uploads[number])
            return super().picture(entry, mask)

        def embedding(self, entry):
            if isinstance(entry, str):
                return entry if entry in allowed else str(self._known(entry, engine.styles(), StyleError)), None
            return super().embedding(entry)

        def _known(self, name: str, names: Mapping, error: type):
            if name not in names:
                raise error(f"{quoted(name)} does not come with the model; it has {', '.join(names)}")
            return names[name]

        def _absolute(self, text):
            raise StyleError("a request can't name files of the server; send the picture, or name a registered style")

    return Served(None, TINY)
