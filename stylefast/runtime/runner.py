"""One model with everything that requests share: pages, slots, step buffers, and the step itself.

`Runner` does not deal with jobs, threads or picture files. The scheduler lets one thread at a time use it.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from stylefast.errors import EngineClosed, ExportError, NumericsError, OutOfMemory, StyleFastError
from stylefast.models.row_features import Recorder
from stylefast.models.unet import UNet
from stylefast.runtime.backends.base import Backend, LatentSlots, ModelInputs, run_step
from stylefast.runtime.banks.bank_pages import BankPages, pages_of
from stylefast.runtime.memory import MemoryBudget, going_on, is_out_of_memory
from stylefast.runtime.plan.sample import Pin, Sample, SampleGroup
from stylefast.runtime.steps.conditions import Conditions, ConditionStore
from stylefast.runtime.steps.step_buffers import BatchShape, StepBuffers, StepColumns, bank_keys
from stylefast.runtime.streams import SideStream, StepStream
from stylefast.slots import LruDict
from stylefast.styles.bank import StyleBank
from stylefast.values import listed

Value = TypeVar("Value")

# max number of batch shapes whose step buffers are kept
_MOST_BUFFERS = 32
# max number of idle sizes whose latents stay allocated
_IDLE_SIZES = 3


class Runner:
    """State that all requests share, and the steps of their groups.

    buckets: row counts to which batches are padded, ascending, so that shapes repeat; empty: no padding.
    """

    def __init__(
        self,
        unet: UNet,
        conditions: ConditionStore,
        backend: Backend,
        budget: MemoryBudget,
        buckets: Sequence[int] = (),
    ):
        self.unet, self.conditions, self.backend, self.budget = unet, conditions, backend, budget
        conditions.text.check_room = self._check_texts
        conditions.loras.free = partial(budget.free, unet.device)
        self.buckets = tuple(buckets) or backend.buckets
        self.stream = StepStream(unet.device)
        self.closed, self._process = False, os.getpid()
        self._beside, self._beside_lock = SideStream(unet.device), threading.RLock()
        self.latents: dict[tuple[int, int, int], LatentSlots] = {}
        self.bank_pages: dict[tuple[int, int], BankPages] = {}
        self._buffers: LruDict[BatchShape, StepBuffers] = LruDict()
        self.max_rows: int | None = None  # of one UNet call; a larger group runs alone
        self.steps_run = 0
        self.calls = 0  # of the UNet
        self.on_step: Callable[[float, int], None] | None = None  # told of each call: its seconds and pictures

    def beside(self, call: Callable[[], Value]) -> Value:
        """Call a function alongside steps, such as an encoder, a decoder or a file reader; for one thread at a time.

        The function must not touch pages, slots or step buffers, except for what `staging` yields.
        """
        with self._beside_lock:
            self.check_open()
            return self._beside.call(call, self.stream)

    def close(self) -> None:
        """Refuse further work and free the backend's resources; no step may be running.

        In a forked process nothing is freed, because the threads needed for it do not exist there.
        """
        self.closed = True
        if os.getpid() == self._process:
            with self._beside_lock:  # a call may be using the backend's resources
                self.backend.close()

    def check_open(self) -> None:
        """Raise EngineClosed if the engine was closed, or in a process forked from the engine's."""
        if self.closed:
            raise EngineClosed("the engine was closed; load another one")
        self.check_process()

    def check_process(self) -> None:
        """Raise EngineClosed in a process forked from the engine's, where its threads do not exist."""
        if os.getpid() != self._process:
            raise EngineClosed(
                "the engine was loaded in another process, whose threads do not exist in this one; load an engine here"
            )

    @torch.inference_mode()
    def admit(
        self,
        samples: Sequence[Sample],
        conditions: Conditions,
        latent_shape: tuple[int, int, int],
        pins: Mapping[Sample, Pin],
    ) -> SampleGroup:
        """Make a group of samples and give it slots; `retire` releases the conditions.

        Raises OutOfMemory for a group that can't fit even alone, and StyleError for contradictions in its styles; the
        conditions are then released at once.
        """
        try:
            self.check_open()
            group = SampleGroup(samples, conditions, pins, self.unet.layout, latent_shape)
            self._check_room(group.most_rows, latent_shape[1:])
            if latent_shape not in self.latents:
                self._drop_idle_latents()
                more = self.unet.config["in_channels"] - latent_shape[0]
                self.latents[latent_shape] = LatentSlots(latent_shape, self.unet.device, more)
            group.put(self.latents[latent_shape].take(*group.first_latents()), self.unet.device)
        except BaseException:
            self.conditions.release(conditions)
            raise
        return group

    def retire(self, group: SampleGroup) -> None:
        """Release everything that a group holds; a second call does nothing."""
        self.conditions.release(group.conditions)
        for buffers in self._buffers.values():
            buffers.drop(group)
        if len(group.slots):
            self.latents[group.latent_shape].release(group.slots)
            group.put(np.zeros(0, dtype=np.int64), self.unet.device)

    @property
    def pictures(self) -> int:
        """Count the pictures in progress, including references."""
        return sum(slots.used for slots in self.latents.values())

    def forget_pages(self) -> None:
        """Drop the pages of banks that were computed with weights that have changed."""
        for pool in self.bank_pages.values():
            pool.clear()

    def latents_of(self, group: SampleGroup) -> torch.Tensor:
        """Return a copy of a group's latents [pictures, channels, h, w] as they are now."""
        return self.latents[group.latent_shape].latents[group.places]

    def shown_of(self, group: SampleGroup) -> torch.Tensor:
        """Return the latents of the requested pictures, without references; does not wait for the device."""
        return _shown(group, self.latents[group.latent_shape].latents)

    def results_of(self, group: SampleGroup) -> dict[int, torch.Tensor]:
        """Return output number -> latents [channels, h, w] of the requested pictures."""
        outputs = [sample.output for sample in group.samples if sample.output is not None]
        return dict(zip(outputs, _shown(group, self.latents[group.latent_shape].latents), strict=True))

    def denoised_of(self, group: SampleGroup) -> torch.Tensor:
        """Return those pictures' last noise-free estimates [shown, channels, h, w], or latents before any step."""
        state = self.latents[group.latent_shape]
        return _shown(group, state.history[:, 0] if group.done else state.latents)

    def rows_that_fit(self, latent_size: tuple[int, int]) -> int:
        """Return how many rows of one UNet call fit into memory, at most `max_rows` and the backend's limit."""
        room = self.budget.rows(self.unet, latent_size)
        return min([room, *(limit for limit in (self.max_rows, self.backend.limits.get("rows")) if limit is not None)])

    @torch.inference_mode()
    def step(
        self, groups: Sequence[SampleGroup], recorder: Recorder | None = None
    ) -> dict[SampleGroup, StyleFastError]:
        """Run one step of groups of one size; return those that failed and why. `recorder` records it.

        If memory runs out, the step is tried again without what is kept for later requests. If it runs out again, or
        no exported graph fits the batch, halves are tried, down to single groups: only one that can't be run alone
        fails. On a CPU a picture with latents that are not finite fails in this step, on a GPU when `finite` is called.
        Raises EngineClosed if the engine was closed.
        """
        self.check_open()
        failed: dict[SampleGroup, StyleFastError] = {}
        fits = True
        short: OutOfMemory | None = None
        began = time.perf_counter()
        try:
            # what is recorded are the group's own rows, so no idle ones
            with self._inputs(groups, padded=bool(self.buckets) and recorder is None) as inputs:
                if recorder is None:
                    self.backend.run(*inputs)
                else:
                    run_step(self.unet, *inputs[1:], recorder)
            self.calls += 1
            pictures = sum(g.pictures for g in groups)
            self.steps_run += pictures
            if self.on_step is not None:
                self.on_step(time.perf_counter() - began, pictures)
        except ExportError as error:
            if len(groups) == 1:
                return {groups[0]: error}
            fits = False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits, short = False, _no_room(groups[0], error)
        if not fits:
            if short is not None:
                # outside the handler, so that the error no longer keeps the failed call's tensors
                short = short.with_traceback(None)
                if len(groups) > 1:
                    self.backend.reset()
                if self.make_room():
                    return self.step(groups, recorder)
                if len(groups) == 1:
                    return {groups[0]: short}
            half = len(groups) // 2
            return {**self.step(groups[:half]), **self.step(groups[half:])}
        for group in groups:
            for calibration in group.calibrated:
                calibration.apply(self.latents[group.latent_shape], group.step)
            group.step += 1
            for pin, place in group.repainted:
                pin.put_back(self.latents[group.latent_shape].latents[place], group.step)
            if group.windows is not None:
                group.windows.agree(self.latents[group.latent_shape], group.window_places)
            if group.trail is not None:
                group.trail.append(self.latents_of(group)[0])
            if self.unet.device.type == "cpu":
                bad = self.finite(group)
                if bad is not None:
                    failed[group] = bad
        return failed

    def finite(self, group: SampleGroup) -> NumericsError | None:
        """Return the error of a group with NaN or infinity in its latents, else None; waits for the device."""
        state = self.latents[group.latent_shape]
        good = state.finite[group.places].tolist()
        if all(good):
            return None
        bad = [sample for sample, fine in zip(group.samples, good, strict=True) if not fine]
        outputs = {(sample.window_of or sample).output for sample in bad}  # once for all windows of a picture
        return not_finite(
            sorted(output for output in outputs if output is not None),
            [str(use) for sample in bad for use in sample.loras],
        )

    def staging(self, group: SampleGroup) -> Iterator[Callable[[], object]]:
        """Bring the first bank pages that a group reads, before it joins.

        Yields calls to make with `beside`. Raises OutOfMemory if there is no room for one page.
        """
        steps = [step for step in range(group.first, group.steps) if bank_keys(group, step)][:2]
        if steps:
            keys, *later = (bank_keys(group, step) for step in steps)
            with torch.inference_mode():
                pages = self._pages_for(group.latent_shape[1:], {bank for bank, *_ in keys})
            assert pages is not None
            yield from pages.stage(keys, *later)

    def prefetch(self, groups: Sequence[SampleGroup]) -> None:
        """Start to load the bank pages for the next steps of `groups`."""
        for group in groups:
            pages = self.bank_pages.get(group.latent_shape[1:])
            if pages is not None and pages.reads_ahead and not group.finished:
                later = group.step + 1
                pages.prefetch(bank_keys(group), bank_keys(group, later) if later < group.steps else ())

    def awaits_pages(self, group: SampleGroup) -> bool:
        """Return whether a group's next step would wait for bank pages that are being read into host memory."""
        pages = self.bank_pages.get(group.latent_shape[1:])
        return pages is not None and pages.reads_ahead and not group.finished and pages.awaited(bank_keys(group))

    def _check_room(self, rows: int, latent_size: tuple[int, int]) -> None:
        """Raise OutOfMemory if a call of `rows` rows does not fit, even without what is kept for later requests."""
        try:
            self.budget.check(self.unet, rows, latent_size)
        except OutOfMemory:
            if not self.make_room():
                raise
            self.budget.check(self.unet, rows, latent_size)

    def _check_texts(self, needed: int) -> None:
        """Raise OutOfMemory if buffers of that many bytes for texts do not fit, even without unused LoRAs."""
        try:
            self.budget.check_texts(self.unet.device, needed)
        except OutOfMemory:
            if not self.conditions.loras.shrink():
                raise
            self.budget.check_texts(self.unet.device, needed)

    def make_room(self) -> bool:
        """Free what is kept for later: unused LoRAs and prompts, idle sizes' latents and bank pages.

        Returns whether there was any. No step may be running.
        """
        made = self._drop_idle_pools()
        made = self._drop_idle_latents(0) or made
        made = self.conditions.loras.shrink() or made
        for pages in (self.conditions.text, self.conditions.images):
            with going_on():
                made = (pages is not None and pages.shrink()) or made
        return made

    @contextmanager
    def _inputs(
        self, groups: Sequence[SampleGroup], padded: bool
    ) -> Iterator[tuple[tuple, LatentSlots, StepColumns, ModelInputs]]:
        """Hold the pages that a step reads while it runs; yields the arguments of `Backend.run`.

        padded: whether the batch is padded to a bucket.
        """
        latent_shape = groups[0].latent_shape
        self._check_room(sum(g.rows + g.rows_at().control_rows for g in groups), latent_shape[1:])
        keys = [bank_keys(g) for g in groups]
        flat = [key for group_keys in keys for key in group_keys]
        pages = self._pages_for(latent_shape[1:], {bank for bank, *_ in flat})
        slots = pages.hold(flat) if pages is not None and flat else np.zeros(0, dtype=np.int64)
        try:
            shape = self._shape(groups, padded)
            buffers = self._buffers.use(shape)
            if buffers is None:
                for oldest in self._buffers.beyond(_MOST_BUFFERS - 1):
                    del self._buffers[oldest]
                buffers = self._buffers[shape] = StepBuffers(shape, self.unet.device)
            bounds = np.cumsum([0, *map(len, keys)])
            buffers.fill(groups, [slots[a:b] for a, b in zip(bounds, bounds[1:])])
            state, store = self.latents[latent_shape], self.conditions
            masks = store.masks.get(latent_shape[1:])
            inputs = ModelInputs(
                store.text.layers,
                store.text.extra,
                store.image_kv if shape.segments else None,
                pages.pages if pages is not None else None,
                masks.levels if masks is not None else (),
                self._graph_inputs(latent_shape[1:]),
                store.loras.rows_for(lora for g in groups for lora in g.conditions.held_loras) if shape.loras else None,
                self._text_lengths(groups),
                buffers.controls,
            )
            units = 0 if inputs.loras is None else inputs.loras.units.shape[2]
            key = (shape, units, state.generation, store.generation, id(pages), inputs.text_lengths is not None)
            yield key, state, buffers.columns, inputs
        finally:
            if pages is not None and flat:
                pages.release(flat)

    def _text_lengths(self, groups: Sequence[SampleGroup]) -> torch.Tensor | None:
        """Return the lengths of all texts if a row's is shorter than the pages, else None: a step without is faster."""
        text = self.conditions.text
        # with and without are different code, so compiled steps keep them once there are any
        always = bool(self.buckets) and not self.backend.pads_columns
        if text.uneven and (always or any(text.any_shorter(g.rows_at().text_page[g.step]) for g in groups)):
            return text.lengths
        return None

    def _graph_inputs(self, latent_size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return all pages and masks, by the input names of exported graphs."""
        store, pool, found = self.conditions, self.bank_pages.get(latent_size), {}
        levels = [("text_kv", store.text.by_level)]
        found["text_lengths"] = store.text.lengths
        if store.images is not None:
            levels.append(("image_kv", store.images.by_level))
            found["image_lengths"] = store.images.lengths
        masks = store.masks.get(latent_size)
        if masks is not None and len(masks.levels[0]):  # the first mask may still be on its way
            levels.append(("mask", masks.levels))
        for name, tensors in levels:
            found |= {f"{name}_{level}": tensor for level, tensor in enumerate(tensors)}
        return found | (pool.by_name if pool is not None else {})

    def _shape(self, groups: Sequence[SampleGroup], padded: bool) -> BatchShape:
        all_rows, layout = [g.rows_at() for g in groups], self.unet.layout
        rows, pictures = sum(p.rows for p in all_rows), sum(g.pictures for g in groups)
        references, segments = max(p.width for p in all_rows), max(p.segment_width for p in all_rows)
        loras = max(p.lora_width for p in all_rows)
        norms = any(bool(p.columns.takes_norms.any()) for p in all_rows)
        if padded:
            # one shape for all mixes: unused rows and columns are idle
            rows = next((b for b in self.buckets if b >= rows), rows)
            pictures, norms = max(rows, pictures), True
        if padded and not self.backend.pads_columns:
            references = _power_of_two(references)
            segments = _power_of_two(segments) if self.conditions.images is not None else 0
            loras = _power_of_two(loras) if loras else 0  # without any, a step is another graph, which is faster
        layers, modules = len(layout.layers), len(layout.modules)
        return BatchShape(rows, pictures, references, segments, loras, norms, layers, modules, groups[0].latent_shape)

    def _pages_for(self, latent_size: tuple[int, int], banks: Collection[StyleBank]) -> BankPages | None:
        """Return the pool of a size with room for all pages of `banks`, as far as the budget allows.

        It is created with the first bank and grows with others; with buckets, batches without a bank use it too.
        """
        pool = self.bank_pages.get(latent_size)
        if not banks:
            return pool if self.buckets and not self.backend.pads_columns else None
        if pool is None:
            self._drop_idle_pools(latent_size)
            others = sum(other.host_bytes for other in self.bank_pages.values())
            slots = min(self._most_slots(latent_size), pages_of(banks))
            pool = BankPages(self.unet, latent_size, slots, self.budget.host_room(self.unet.device, others))
            pool.expected(banks)
            self.bank_pages[latent_size] = pool
        elif (wanted := pool.expected(banks)) > pool.slots:
            # twice as many, so that it need not grow with every further bank
            self._grow(pool, max(wanted, 2 * pool.slots))
        return pool

    def _grow(self, pool: BankPages, wanted: int) -> None:
        """Make a pool larger if the budget allows; a pool too small for all its banks still works."""
        try:
            slots = min(self._most_slots(pool.latent_size, pool), wanted)
        except OutOfMemory:
            return
        if slots <= pool.slots:
            return
        try:
            pool.grow(slots)
        except BaseException:
            if not pool.slots:
                pool.close()
                del self.bank_pages[pool.latent_size]
            raise

    def _most_slots(self, latent_size: tuple[int, int], pool: BankPages | None = None) -> int:
        """Return how many pages a size may hold; `pool`: its current pool. Raises OutOfMemory if not even one fits."""
        others = [other for size, other in self.bank_pages.items() if size != latent_size]
        slots = self.budget.bank_slots(self.unet, latent_size, others, 0 if pool is None else pool.nbytes)
        return min(slots, self.backend.limits.get("pages", slots))

    def _drop_idle_latents(self, kept: int = _IDLE_SIZES) -> bool:
        """Free the latents of idle sizes, except for the last few, which are likely to be used again."""
        idle = [shape for shape, slots in self.latents.items() if not slots.used]
        dropped = idle[: max(0, len(idle) - kept)]
        for shape in dropped:
            del self.latents[shape]
        return bool(dropped)

    def _drop_idle_pools(self, but: tuple[int, int] | None = None) -> bool:
        """Free the pools of idle sizes, except for one, to make room."""
        busy = {shape[1:] for shape, slots in self.latents.items() if slots.used} | {but}
        idle = [size for size in self.bank_pages if size not in busy]
        for size in idle:
            self.bank_pages.pop(size).close()
        return bool(idle)

    def buffer_bytes(self) -> int:
        """Return the bytes of all step buffers."""
        return sum(buffers.nbytes for buffers in self._buffers.values())


def not_finite(pictures: Sequence[int], loras: Sequence[str] = ()) -> NumericsError:
    """Return the error for pictures with NaN or infinity in their latents; for a reference if `pictures` is empty.

    loras: names and strengths of those that they use.
    """
    pictures, loras = sorted(pictures), list(dict.fromkeys(loras))
    what = f"picture(s) {', '.join(map(str, pictures))}" if pictures else "the style's reference"
    return NumericsError(
        f"the latents of {what} contain NaN or infinity. Try {f'weaker LoRAs ({listed(loras)}), ' if loras else ''}"
        "dtype='float32' or 'bfloat16', a lower guidance, or an adapter scale below 2",
        pictures=pictures,
        loras=loras,
    )


def joined(errors: Sequence[Exception]) -> Exception:
    """Return one error for a call with failed groups: the first, or one naming all pictures that are not finite."""
    numeric = [error for error in errors if isinstance(error, NumericsError)]
    if len(numeric) == len(errors):
        return not_finite(
            *([one for error in numeric for one in getattr(error, name)] for name in ("pictures", "loras"))
        )
    return errors[0]


def _power_of_two(count: int) -> int:
    return 1 if count <= 1 else 1 << (count - 1).bit_length()


def _shown(group: SampleGroup, buffer: torch.Tensor) -> torch.Tensor:
    """Return the part of a buffer of all slots that belongs to the requested pictures, windows joined."""
    if group.windows is not None:
        return group.windows.join(buffer[group.window_places])[None]
    return buffer[group.shown]


def _no_room(group: SampleGroup, error: BaseException) -> OutOfMemory:
    if isinstance(error, OutOfMemory):
        return error
    outputs = [sample.output for sample in group.samples if sample.output is not None]
    return OutOfMemory(
        f"picture(s) {', '.join(map(str, outputs))} don't fit into memory even alone ({group.rows} rows at "
        f"{group.latent_shape[2]}x{group.latent_shape[1]} latents); ask for smaller ones, or load the model in half "
        f"precision ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    )
