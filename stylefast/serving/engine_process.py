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
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from stylefast.errors import ImageError, JobCancelled, StyleError, StyleFastError
from stylefast.serving.media import Pixels
from stylefast.serving.messages import (
    Answer,
    BakeStyle,
    Cancel,
    Counts,
    Done,
    Failed,
    LoadStyle,
    Made,
    NotReady,
    Progress,
    Ready,
    Run,
    Stop,
)
from stylefast.serving.registry import StyleRegistry
from stylefast.serving.tickets import USUAL_STEPS
from stylefast.values import quoted

if TYPE_CHECKING:
    from PIL.Image import Image

    from stylefast.engine import Engine
    from stylefast.runtime.jobs import Job
    from stylefast.runtime.plan.request import Request
    from stylefast.serving.engine_styles import Shelved, StyleShelf
    from stylefast.serving.uploads import Uploads

logger = logging.getLogger(__name__)

TELL_SECONDS = 0.1  # between two reports of steps done
COUNT_SECONDS = 1.0
MOST_STEPS = 10_000  # between two reports
WARM_UP_STEPS = 2

# loads the model: the engine, and what its pictures record of what was loaded
Load = Callable[[], "tuple[Engine, Mapping[str, Any]]"]


@dataclass(frozen=True)
class StylesOf:
    """A folder of registered styles. first: whether the server starts now, and a clash of names shall end it."""

    folder: str
    first: bool = True


def main(connection: Connection, load: Load, warm_up: bool, styles: StylesOf | None = None) -> None:
    """Run until the server says stop, or is gone."""
    # the server decides what a signal to the whole group means
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        engine, loaded = load()
        if styles is not None and styles.first:
            StyleRegistry(styles.folder, sorted(named_styles(engine))).check_clashes()
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
        asyncio.run(_Worker(connection, engine, loaded, styles).serve(facts))


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
        "controls": sorted(engine.controls),
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
    """Handler that passes the engine's warnings to the client: they quote prompts, which must not be in the log."""

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


class _Meter:
    """Counter of what the engine does and holds, for metrics."""

    def __init__(self, engine: "Engine"):
        self._engine = engine
        self._steps: deque[tuple[float, int]] = deque(maxlen=MOST_STEPS)
        # pools of pages come and go, and begin to count evictions anew when they grow
        self._seen: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()
        self._loads = self._evictions = 0
        engine.runner.on_step = lambda seconds, pictures: self._steps.append((seconds, pictures))

    def read(self) -> Counts:
        """Return what there is to report."""
        from stylefast.runtime.memory import resident_bytes

        runner, loras = self._engine.runner, self._engine.runner.conditions.loras
        resident = slots = room = 0
        for pool in list(runner.bank_pages.values()):
            counts, (loads, evictions) = pool.counts(), self._seen.get(pool, (0, 0))
            self._loads += pool.loads - loads
            self._evictions += counts.evictions - (evictions if evictions <= counts.evictions else 0)
            self._seen[pool] = pool.loads, counts.evictions
            resident, slots, room = resident + counts.resident, slots + pool.slots, room + pool.nbytes
        values = {"unet_calls": runner.calls, "picture_steps": runner.steps_run}
        values |= {"bank_page_loads": self._loads, "bank_page_evictions": self._evictions}
        levels = {
            "bank_pages": resident,
            "bank_page_slots": slots,
            "bank_bytes": room,
            "loras_registered": len(self._engine.loras),
            "loras_resident": len(loras.resident),
            "lora_bytes": loras.nbytes,
            "memory_bytes": resident_bytes(),
        }
        steps = [self._steps.popleft() for _ in range(len(self._steps))]
        return Counts(values, levels, steps)


class _Worker:
    """Calls in progress, and the pipe to the server."""

    def __init__(
        self, connection: Connection, engine: "Engine", loaded: Mapping[str, Any], styles: StylesOf | None = None
    ):
        self._connection, self._engine, self._loaded = connection, engine, loaded
        self._styles = named_styles(engine)
        self._shelf: StyleShelf | None = None
        if styles is not None:
            from stylefast.serving import engine_styles

            self._shelf = engine_styles.StyleShelf(engine, styles.folder)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sending = threading.Lock()
        self._decoders = ThreadPoolExecutor(2, "stylefast-uploads")
        self._bakers = ThreadPoolExecutor(1, "stylefast-bakes")
        self._errands: set[str] = set()
        self._stop = asyncio.Event()
        self._notices = _Notices()
        self._meter = _Meter(engine)

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
            await asyncio.sleep(0)  # until those that have ended are taken out
        counting.cancel()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(1)  # the server is gone, and nobody waits for the pictures
            loop.call_soon_threadsafe(self._take, message)

    def _take(self, message: Run | Cancel | LoadStyle | BakeStyle | Stop) -> None:
        if isinstance(message, Run):
            self._begin(message.ticket, self._made(message))
        elif isinstance(message, LoadStyle | BakeStyle):
            work = self._loaded_style(message) if isinstance(message, LoadStyle) else self._bake(message)
            self._begin(message.ticket, work)
            self._errands.add(message.ticket)
        elif isinstance(message, Cancel):
            task = self._tasks.get(message.ticket)
            if task is not None:
                task.cancel()
        else:
            for errand in self._errands:
                self._tasks[errand].cancel()
            self._stop.set()

    def _begin(self, ticket: str, work: Coroutine[Any, Any, Done | Answer]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            del self._tasks[ticket]
            self._errands.discard(ticket)
            if task.cancelled():  # before it began
                work.close()
                self._send(_cancelled(ticket))

        self._tasks[ticket] = asyncio.create_task(self._reported(ticket, work))
        self._tasks[ticket].add_done_callback(ended)

    async def _reported(self, ticket: str, work: Coroutine[Any, Any, Done | Answer]) -> None:
        try:
            self._send(await work)
        except asyncio.CancelledError:
            self._send(_cancelled(ticket))
        except StyleFastError as error:
            self._send(Failed(ticket, _public_name(error), str(error)))
        except Exception as error:
            logger.exception("a request failed for a reason of ours")
            self._send(Failed(ticket, type(error).__name__, str(error)))

    # registered styles

    async def _loaded_style(self, message: LoadStyle) -> Answer:
        shelf = self._known_shelf()
        if message.folder is None:
            read = partial(shelf.get, message.name)
        else:
            read = partial(shelf.try_out, message.name, message.folder)
        found = await asyncio.get_running_loop().run_in_executor(self._decoders, read)
        return Answer(message.ticket, {"kinds": [type(style).__name__ for style in found.styles]})

    async def _bake(self, message: BakeStyle) -> Answer:
        loop, stop = asyncio.get_running_loop(), threading.Event()
        steps = await loop.run_in_executor(self._decoders, self._bakeable, message)
        self._send(Progress(message.ticket, 0, steps))
        baking = loop.run_in_executor(self._bakers, self._baked, message, stop)
        try:
            await asyncio.wait([baking])
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([baking])  # it removes what it has written
            baking.exception()
            raise
        return Answer(message.ticket, baking.result())

    def _bakeable(self, message: BakeStyle) -> int:
        """Return the steps of a bake. Raises StyleError and InvalidRequest for what can't be baked."""
        from stylefast.runtime.banks.baking import bake_request
        from stylefast.styles.style_aligned import StyleAligned

        found = self._known_shelf().get(message.name)
        readers = [style for style in found.styles if isinstance(style, StyleAligned)]
        if not readers or readers[0].reads.of_call or readers[0].bank is not None:
            raise StyleError(
                f"the style {quoted(message.name)} has nothing to bake: only a StyleAligned with pictures or a prompt "
                "has"
            )
        settings = {name: value for name, value in message.settings.items() if name not in ("store", "dtype")}
        return bake_request(found.styles, {"loras": found.loras, **settings}).steps

    def _baked(self, message: BakeStyle, stop: threading.Event) -> Mapping[str, Any]:
        """Bake a style in this thread, beside all requests. Returns the settings of requests that fit the bank."""
        from stylefast.styles.style_aligned import StyleAligned

        def advance(step: int, steps: int) -> None:
            check()
            self._send(Progress(message.ticket, step, steps))

        def check() -> None:
            if stop.is_set():
                raise JobCancelled("the bake was cancelled")

        check()
        found, settings = self._known_shelf().get(message.name), dict(message.settings)
        bank = self._engine.bake(list(found.styles), loras=found.loras, path=message.path, callback=advance, **settings)
        number = next(i for i, style in enumerate(found.styles) if isinstance(style, StyleAligned))
        fitting = {name: list(one) if isinstance(one, tuple) else one for name, one in bank.settings.items()}
        fitting |= {name: settings[name] for name in ("spacing", "guidance") if settings.get(name) is not None}
        fitting = {name: one for name, one in fitting.items() if one not in ("", None)}
        return {"style": number, "settings": fitting}

    def _known_shelf(self) -> "StyleShelf":
        if self._shelf is None:
            raise StyleError("this server has no folder of styles; start it with --styles DIR")
        return self._shelf

    async def _made(self, run: Run) -> Done:
        began, loop = time.monotonic(), asyncio.get_running_loop()
        ways, uploads = await loop.run_in_executor(self._decoders, self._requests, run)
        left = None if run.seconds is None else max(run.seconds - (time.monotonic() - began), 1e-3)
        job, said = self._submitted(ways, left)
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
        kinds = [[type(style).__name__ for style in request.styles] for request in job.requests]
        spent = time.monotonic() - began
        return await loop.run_in_executor(self._decoders, self._done, run, result, uploads, said, spent, kinds)

    def _submitted(self, ways: "Sequence[list[Request]]", seconds: float | None) -> "tuple[Job, list[str]]":
        """Submit the first of several ways to make the same pictures that the engine takes: banks fit some requests."""
        for requests in ways[:-1]:
            try:
                with self._notices as said:
                    return self._engine.submit(requests, deadline=seconds), said
            except StyleError:
                continue
        with self._notices as said:
            return self._engine.submit(ways[-1], deadline=seconds), said

    def _requests(self, run: Run) -> "tuple[list[list[Request]], Uploads]":
        """Return the ways to make a call's pictures: with the banks of its styles, if they have some, and without.

        The uploads are those that came with it.
        """
        from stylefast.record import from_record
        from stylefast.sampling.few_step import FEW_STEP_PRESETS
        from stylefast.serving.engine_styles import Shelved
        from stylefast.serving.uploads import Uploads

        requests, strengths = [], []
        for request in run.call["requests"]:
            strengths.append(request.get("a1111", {}).get("strengths", ()))
            scheduler = request.get("scheduler")
            # what is no text is refused with the other fields, in `from_record`
            preset = FEW_STEP_PRESETS.get(scheduler) if isinstance(scheduler, str) else None
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
        uploads = Uploads(run.uploads, requests, self._engine)
        sources = _served_sources(uploads, self._engine)
        plans, plain = [], []
        for request in requests:
            plan = [self._shelved(style) or style for style in request.get("style") or ()]
            shelved = [one for one in plan if isinstance(one, Shelved)]
            loras = {name: strength for one in shelved for name, strength in one.loras.items()}
            if loras:
                request = {**request, "loras": {**loras, **(request.get("loras") or {})}}
            plans.append(plan)
            plain.append({**request, "style": [one for one in plan if not isinstance(one, Shelved)]})
        found = from_record({"requests": plain, "styles": named}, sources=sources)
        ways, weaker = [], _Weaker()
        for banks in (True, False):
            planned = zip(found, plans, strengths, strict=True)
            ways.append([_planned(request, plan, banks, weaker, given) for request, plan, given in planned])
        has_banks = any(one.manifest.banks for plan in plans for one in plan if isinstance(one, Shelved))
        return (ways if has_banks else ways[1:]), uploads

    def _shelved(self, style: Any) -> "Shelved | None":
        """Return the registered style that a request names; None for one of the model's, and for one in full."""
        if self._shelf is None or not isinstance(style, str) or style in self._styles:
            return None
        return self._shelf.get(style)

    def _done(
        self,
        run: Run,
        result: Any,
        uploads: "Uploads",
        said: Sequence[str],
        seconds: float,
        kinds: Sequence[Sequence[str]],
    ) -> Done:
        from stylefast.infotext import write

        pictures = []
        for image, entry in zip(result.images, result.metadata, strict=True):
            record = {**entry, "size": list(image.size), "load": dict(self._loaded)}
            text = write(record)
            if self._shelf is not None:
                record = self._shelf.recorded(record)
            pictures.append(
                Made(
                    _pixels(image),
                    json.dumps(record, separators=(",", ":")),
                    text,
                    record["seed"],
                    (*said, *record["warnings"]),
                    uploads.short(record),
                )
            )
        return Done(run.ticket, pictures, seconds, self._text_tokens(run), kinds)

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
            self._send(self._meter.read())
            await asyncio.sleep(COUNT_SECONDS)

    def _send(self, message: Any) -> None:
        with self._sending:
            self._connection.send(message)


def _cancelled(ticket: str) -> Failed:
    return Failed(ticket, "JobCancelled", "the request was cancelled")


def _planned(
    request: "Request", plan: Sequence[Any], banks: bool, weaker: "_Weaker", strengths: Sequence[float]
) -> "Request":
    """Return a request with its registered styles in their places among the others, weaker where it says so."""
    from stylefast.serving.engine_styles import Shelved

    others, styles = iter(request.styles), []
    for one, strength in zip(plan, strengths or [1.0] * len(plan), strict=True):
        its = (one.with_banks if banks else one.styles) if isinstance(one, Shelved) else [next(others)]
        styles += [weaker(style, strength) for style in its]
    return replace(request, style=styles)


class _Weaker:
    """Styles at a part of their strength; the same object for the same style, so that requests share it."""

    def __init__(self):
        self._made: dict[tuple[int, float], Any] = {}

    def __call__(self, style: Any, strength: float) -> Any:
        if strength == 1:
            return style
        if not hasattr(style, "scale"):
            raise StyleError(f"a {type(style).__name__} has no strength; write <style:name> without a number")
        key = id(style), strength
        if key not in self._made:
            scale, layout = style.scale, getattr(style, "composition_scale", None)
            several = isinstance(scale, list | tuple)
            changes: dict[str, Any] = {"scale": [strength * one for one in scale] if several else strength * scale}
            if layout is not None:
                changes["composition_scale"] = strength * layout
            self._made[key] = replace(style, **changes)
        return self._made[key]


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


def _served_sources(uploads: "Uploads", engine: "Engine") -> Any:
    """Return the sources of a call from outside: uploads, and what comes with the model, but no file by its path."""
    from stylefast.models.checkpoint import TINY
    from stylefast.record_values import Sources

    known = {**engine.references(), **engine.styles()}
    allowed = {str(path) for path in known.values()}

    class Served(Sources):
        def picture(self, entry, mask: bool = False):
            if isinstance(entry, str):
                return entry if entry in allowed else str(self._known(entry, engine.references(), ImageError))
            if isinstance(entry, Mapping) and "upload" in entry:
                return uploads.picture(entry, mask)
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
