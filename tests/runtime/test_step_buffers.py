"""What one step of a batch is told: rows in buffers that stay where they are."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stylefast.models.layout import AttentionLayout
from stylefast.models.row_table import NO_PAGE, PLAIN
from stylefast.runtime.plan.request import Request
from stylefast.runtime.plan.sample import SampleGroup, plan_samples
from stylefast.runtime.runner import Runner
from stylefast.runtime.steps.conditions import Conditions
from stylefast.runtime.steps.step_buffers import BatchShape, StepBuffers, bank_keys
from stylefast.sampling.schedule import make_schedule
from stylefast.styles.style_aligned import StyleAligned
from tests.support.small_sdxl import small_unet_config

SHAPE = (4, 6, 10)  # latents
CPU = torch.device("cpu")
SECOND_GPU = torch.device("cuda", 1)


@pytest.fixture(scope="module")
def layout():
    return AttentionLayout.from_config(small_unet_config())


@pytest.fixture
def group_of(layout):
    """A group of requests on slots from `slot` on, with text pages numbered from `page` on."""

    def group_of(*requests, slot=1, page=0):
        samples = plan_samples(
            requests, lambda request, begin: make_schedule(request.scheduler, request.steps), (80, 48)
        )
        conditions, steps = Conditions(SHAPE[1:]), requests[0].steps
        for t in samples:
            for branch in t.branches:
                conditions.text_pages[t, branch] = np.full(steps, page + len(conditions.text_pages), dtype=np.int64)
                conditions.image_segments[t, branch] = []
        group = SampleGroup(samples, conditions, {}, layout, SHAPE)
        group.slots = np.arange(slot, slot + len(samples))
        return group

    return group_of


@pytest.fixture
def table_of(layout):
    def table_of(rows, pictures, references=0, norms=False):
        shape = BatchShape(rows, pictures, references, 0, 0, norms, len(layout.layers), len(layout.modules), SHAPE)
        return StepBuffers(shape, CPU)

    return table_of


def fill(table, *groups, pages=None):
    table.fill(groups, pages or [np.zeros(0, dtype=np.int64)] * len(groups))
    return table.columns


def test_every_picture_finds_its_branches_rows_and_its_own_step(group_of, table_of):
    first = group_of(Request("a cat", steps=3), Request("a dog", steps=3, guidance=1.0))
    second = group_of(Request("neon", steps=5, scheduler="ddim"), slot=4, page=9)
    second.step = 2
    columns = fill(table_of(5, 3), first, second)
    assert columns.slot.tolist() == [1, 2, 4]
    for picture, (group, place) in enumerate([(first, 0), (first, 1), (second, 0)]):
        rows = columns.branch_rows[picture]
        used = rows[rows >= 0]
        assert (columns.row_picture[used] == picture).all()
        assert columns.timestep[picture] == group.timestep[group.step, place]
        assert torch.equal(columns.update[picture], torch.from_numpy(group.update[group.step, place]))
    assert (columns.branch_rows >= 0).sum(1).tolist() == [2, 1, 2]
    assert torch.allclose(columns.branch_weights.sum(1), torch.ones(3))
    assert sorted(columns.table.text_page.tolist()) == [0, 1, 2, 9, 10]


def test_rows_that_nobody_uses_are_plain_and_nobody_reads_them(group_of, table_of):
    style = StyleAligned()
    group = group_of(*(Request(p, steps=3, style=style) for p in ("a cat", "a dog")))
    table = table_of(8, 8, references=2, norms=True)
    # what a larger batch left behind must not stay
    fill(
        table,
        group_of(*(Request("a cat", steps=3, style=StyleAligned(full_attention_share=True)),) * 2),
        group_of(Request("a cat", steps=3), Request("a cat", steps=3)),
    )
    columns = fill(table, group)
    assert columns.table.self_mode[4:].tolist() == [PLAIN] * 4
    for name in ("self_page", "adain_page", "norm_page"):
        assert (getattr(columns.table, name)[4:] == NO_PAGE).all()
    assert columns.slot[2:].tolist() == [0] * 6 and (columns.row_picture[4:] >= 2).all()
    assert (columns.branch_rows[2:] == -1).all()
    assert not columns.update[2:].any() and not columns.branch_weights[2:].any()
    assert columns.branch_rows.max() == 3


def test_readers_point_at_the_row_of_their_reference_in_their_own_branch(group_of, table_of):
    style = StyleAligned(share_group_norm=True, shift=0.5)
    group = group_of(*(Request(p, steps=3, style=style) for p in ("a cat", "a dog", "neon")))
    columns = fill(table_of(6, 3, references=1, norms=True), group)
    of = {(int(p), branch): int(row) for p in range(3) for branch, row in enumerate(columns.branch_rows[p]) if row >= 0}
    for (picture, branch), row in of.items():
        expected = of[0, branch] if picture else NO_PAGE
        assert columns.table.self_page[row, 0] == expected
        assert columns.table.adain_page[row] == expected and columns.table.norm_page[row] == expected


def test_pages_of_banks_stand_behind_all_rows_idle_ones_included(group_of, table_of, layout):
    info = SimpleNamespace(references=1, store="kv")
    bank = SimpleNamespace(id=7, info=info)
    group = group_of(Request("a cat", steps=3))
    (target,) = group.samples
    style = StyleAligned(prompt="neon")
    target.bank, target.reader, target.request = bank, style, replace(target.request, style=style)
    remade = SampleGroup(group.samples, group.conditions, {}, layout, SHAPE)
    remade.slots = group.slots
    assert bank_keys(remade) == [(bank, 0, 0, 0, None), (bank, 0, 3, 0, None)]
    columns = fill(table_of(4, 4, references=1), remade, pages=[np.array([5, 2])])
    rows = columns.branch_rows[0]
    assert columns.table.self_page[rows[0], 0] == 4 + 5 and columns.table.self_page[rows[3], 0] == 4 + 2
    assert torch.equal(columns.table.adain_page[:2], columns.table.self_page[:2, 0])


def test_two_batches_that_take_turns_in_one_table_do_not_mix(group_of, table_of):
    table = table_of(4, 2)
    ancestral = {"steps": 4, "scheduler": "euler_ancestral"}
    noisy = [group_of(Request(p, **ancestral), slot=1 + i) for i, p in enumerate(("a cat", "a dog"))]
    calm = [group_of(Request(p, steps=4, guidance_rescale=0.5), slot=3 + i) for i, p in enumerate(("neon", "oil"))]
    for _ in range(3):
        for batch in (noisy, calm):
            actual, expected = fill(table, *batch), fill(table_of(4, 2), *batch)
            for a, b in zip((*actual.table, *actual[1:]), (*expected.table, *expected[1:])):
                assert torch.equal(a, b)
            for group in batch:
                group.step += 1


def test_a_step_writes_into_the_same_buffers_and_plans_once(group_of, table_of):
    table, group = table_of(2, 1), group_of(Request("a cat", steps=5))
    places = [x.data_ptr() for x in (*fill(table, group).table, *table.columns[1:])]
    plans = list(table._plans.values())
    for _ in range(4):
        group.step += 1
        fill(table, group)
    assert list(table._plans.values()) == plans
    assert [x.data_ptr() for x in (*table.columns.table, *table.columns[1:])] == places


def test_a_group_that_left_is_let_go(group_of, table_of):
    table, one, other = table_of(4, 2), group_of(Request("a cat", steps=3)), group_of(Request("a dog", steps=3), slot=2)
    fill(table, one, other)
    table.drop(one)
    assert not table._plans
    third = group_of(Request("neon", steps=3), slot=3, page=20)
    columns = fill(table, third, other)
    assert columns.slot.tolist() == [3, 2] and columns.table.text_page.max() == 21


def test_rescaling_needs_a_second_branch(group_of, table_of):
    options = {"steps": 3, "guidance_rescale": 0.7}
    columns = fill(table_of(3, 2), group_of(Request("a cat", **options), Request("a dog", guidance=1.0, **options)))
    assert columns.rescale.tolist() == [pytest.approx(0.7), 0.0]


def test_host_buffers_are_guarded_by_the_stream_of_their_own_device(group_of, table_of, monkeypatch):
    """On a second GPU the current stream is that of the first one, which knows nothing of the copies."""
    asked, recorded, waited = [], [], []

    class Event:
        def record(self, stream=None):
            recorded.append(stream)

        def synchronize(self):
            waited.append(1)

    def current_stream(device=None):
        asked.append(device)
        return f"stream of {device}"

    table, group = table_of(2, 1), group_of(Request("a cat", steps=8))
    # as on a GPU: a ring of host buffers, each copied to the device
    table._hosts = [{kind: x.clone() for kind, x in table._flat.items()} for _ in range(4)]
    table._arrays = [{k: v.numpy() for k, v in table._views(flat).items()} for flat in table._hosts]
    table._events, table._written, table._device = [None] * 4, [()] * 4, SECOND_GPU
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    for _ in range(6):
        fill(table, group)
        group.step += 1
    assert asked == [SECOND_GPU] * 6 and recorded == ["stream of cuda:1"] * 6
    assert len(waited) == 2  # the ring came round


class Called(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function.overloadpacket))
        return function(*args, **kwargs or {})


def test_latents_are_looked_up_by_indices_that_lie_on_the_device(group_of):
    """An index on the host is copied to the device, for which the host waits."""
    group, meta = group_of(Request("a cat", steps=3), Request("a dog", steps=3)), torch.device("meta")
    group.samples[0].output, group.samples[1].output = None, 0
    group.put(np.array([5, 3]), meta)
    state = SimpleNamespace(latents=torch.empty(8, *SHAPE, device=meta), history=torch.empty(8, 2, *SHAPE, device=meta))
    runner = SimpleNamespace(latents={SHAPE: state})
    with Called() as called:
        assert Runner.latents_of(runner, group).shape == (2, *SHAPE)
        assert Runner.shown_of(runner, group).shape == (1, *SHAPE)
        group.step = 1
        assert Runner.denoised_of(runner, group).shape == (1, *SHAPE)
    assert set(called.names) <= {"aten.index", "aten.select"}
    group.put(np.array([5, 3]), CPU)
    assert group.places.tolist() == [5, 3] and group.shown.tolist() == [3]
