"""The batch planner: pages, order, refusals, and C++ against the plain reference."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stylefast._extension import extension
from stylefast.errors import InvalidRequest
from stylefast.runtime.steps import step_buffers
from stylefast.runtime.steps.step_buffers import LIVE, plan_pages, plan_pages_ref
from tests.support.cpp_forms import needs_extension

forms = pytest.mark.parametrize(
    "plan", [plan_pages_ref, pytest.param(plan_pages, marks=needs_extension)], ids=["python", "cpp"]
)


def outcome(plan, batch):
    """Arrays as lists, or the message of the refusal."""
    pictures, branches, references, width, mutual = batch
    try:
        page, order = plan(pictures, branches, references, width=width, mutual=mutual)
    except InvalidRequest as error:
        return str(error)
    assert page.dtype == order.dtype == np.int64
    return page.shape, page.tolist(), order.tolist()


@st.composite
def batches(draw):
    """Small id ranges, so that duplicates, missing branches and chains all happen."""
    keys = draw(st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 3)), max_size=12, unique=draw(st.booleans())))
    reference = st.tuples(st.integers(-1, 5), st.one_of(st.just(LIVE), st.integers(0, 3)))
    references = [draw(st.one_of(st.just([]), st.lists(reference, max_size=3))) for _ in keys]
    pictures, branches = [key[0] for key in keys], [key[1] for key in keys]
    return pictures, branches, references, draw(st.integers(0, 4)), draw(st.booleans())


@st.composite
def valid_batches(draw):
    """A few references without references, and readers in the branches that their reference has."""
    pictures, branches, references = [], [], []
    rows = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6, unique=True))
    for picture, branch in rows:
        pictures.append(picture)
        branches.append(branch)
        references.append([])
    for target in range(draw(st.integers(0, 8))):
        picture, branch = draw(st.sampled_from(rows))
        one = st.one_of(st.just((picture, LIVE)), st.tuples(st.just(99), st.integers(0, 3)))
        pictures.append(100 + target)
        branches.append(branch)
        references.append(draw(st.lists(one, max_size=2)))
    shuffle = draw(st.permutations(range(len(pictures))))
    return [pictures[i] for i in shuffle], [branches[i] for i in shuffle], [references[i] for i in shuffle], 0, False


@needs_extension
@given(batches())
def test_cpp_and_the_reference_agree_on_every_batch_and_every_refusal(batch):
    pictures, branches, references, width, mutual = batch
    expected = outcome(plan_pages_ref, batch)
    arrays, columns = step_buffers._arrays(pictures, branches, references, width)
    page, order = np.full((len(pictures), columns), 99), np.full(len(pictures), 99)
    for planner_ in (extension().BatchPlanner(), planned_before()):
        accepted = planner_.plan(*arrays, page, order, mutual)
        assert accepted == (not isinstance(expected, str))
        assert not accepted or (page.shape, page.tolist(), order.tolist()) == expected
    assert outcome(plan_pages, batch) == expected


def planned_before():
    """The planner of this thread, with the scratch that other batches left in it."""
    plan_pages([1, 2, 3, 4], [0] * 4, [[], [(1, LIVE)], [(0, 5)], [(0, 5)]])
    return step_buffers._own.planner


@forms
@given(batch=valid_batches())
def test_a_page_is_the_references_row_of_the_same_branch_or_lies_behind_the_rows(plan, batch):
    pictures, branches, references, _, _ = batch
    page, _ = plan(pictures, branches, references)
    for row, own in enumerate(references):
        for column, (picture, bank) in enumerate(own):
            found = page[row, column]
            if bank == LIVE:
                assert (pictures[found], branches[found]) == (picture, branches[row])
            else:
                assert found == len(pictures) + bank
        assert (page[row, len(own) :] == -1).all()


@forms
@given(batch=valid_batches())
def test_the_order_is_a_permutation_in_which_rows_connected_by_pages_are_one_run(plan, batch):
    pictures, branches, references, _, _ = batch
    page, order = plan(pictures, branches, references)
    rows = len(pictures)
    assert sorted(order.tolist()) == list(range(rows))

    # connected sets by repeated merging, the slow and plain way
    sets = [{row} | {int(p) for p in page[row] if p >= 0} for row in range(rows)]
    merged = True
    while merged:
        merged = False
        for a in range(len(sets)):
            for b in range(a + 1, len(sets)):
                if sets[a] & sets[b]:
                    sets[a] |= sets.pop(b)
                    merged = True
                    break
            if merged:
                break
    places = {row: place for place, row in enumerate(order.tolist())}
    runs = sorted(sorted(places[row] for row in one if row < rows) for one in sets)
    assert [place for run in runs for place in run] == list(range(rows))
    firsts = [min(order[place] for place in run) for run in runs]
    assert firsts == sorted(firsts)


@forms
def test_a_style_set_reads_its_reference_branch_by_branch(plan):
    found = plan([7, 7, 8, 8], [0, 3, 0, 3], [[], [], [(7, LIVE)], [(7, LIVE)]])
    assert found.page.tolist() == [[-1], [-1], [0], [1]]
    assert found.order.tolist() == [0, 2, 1, 3]


@forms
def test_rows_without_references_keep_their_order_and_need_no_columns(plan):
    found = plan([3, 1, 2], [3, 3, 3], [[], [], []])
    assert found.page.shape == (3, 0)
    assert found.order.tolist() == [0, 1, 2]


@forms
def test_an_empty_batch_has_an_empty_plan(plan):
    found = plan([], [], [], width=2)
    assert found.page.shape == (0, 2) and found.order.shape == (0,)


@forms
def test_the_width_can_be_raised_but_never_cuts(plan):
    batch = [1], [3], [[(0, 4), (0, 2)]]
    assert plan(*batch, width=3).page.tolist() == [[5, 3, -1]]
    assert plan(*batch, width=1).page.tolist() == [[5, 3]]


@forms
def test_readers_of_one_bank_page_become_neighbours(plan):
    found = plan([1, 2, 3, 4], [3] * 4, [[(0, 5)], [(0, 6)], [(0, 5)], []])
    assert found.order.tolist() == [0, 2, 1, 3]


@forms
def test_mutual_references_are_allowed_when_asked_for(plan):
    batch = [1, 2], [3, 3], [[(2, LIVE)], [(1, LIVE)]]
    assert plan(*batch, mutual=True).page.tolist() == [[1], [0]]


@forms
def test_a_reference_without_a_row_in_the_branch_names_picture_and_branch(plan):
    with pytest.raises(InvalidRequest, match="row 1 refers to picture 7, branch 2, which has no row"):
        plan([7, 8], [3, 2], [[], [(7, LIVE)]])


@forms
@pytest.mark.parametrize("middle", [(1, LIVE), (0, 0)], ids=["to a live row", "to a bank page"])
def test_a_chain_of_references_is_refused(plan, middle):
    with pytest.raises(ValueError, match="picture 2, branch 3, which refers to another page itself"):
        plan([1, 2, 3], [3, 3, 3], [[], [middle], [(2, LIVE)]])


@forms
def test_a_picture_that_refers_to_itself_is_a_chain(plan):
    with pytest.raises(InvalidRequest, match="chained"):
        plan([1], [3], [[(1, LIVE)]])


@forms
def test_two_rows_of_one_picture_and_branch_are_refused(plan):
    with pytest.raises(InvalidRequest, match="rows 0 and 2 are both picture 4, branch 1"):
        plan([4, 5, 4], [1, 1, 1], [[], [], []])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1], [4], [[]]), "branches hold 4"),
        (([1], [0], [[(1, -2)]]), "bank pages hold -2"),
        (([1], [0], [[(1, 2**31)]]), "bank pages hold 2147483648"),
        (([2**63], [0], [[]]), "pictures hold 9223372036854775808"),
        (([1.5], [0], [[]]), "pictures hold 1.5"),
        (([1, 2], [0], [[]]), "2 pictures, 1 branches"),
        (([1], [0], [[(1, 2, 3)]]), "pair"),
        (([1, 2], [0, 0], [[(1, 2)], [(1,)]]), "pair"),
        (([1], [-1], [[]]), "branches hold -1, but must be integers from 0 to 3"),
        (([1], ["x"], [[]]), "branches hold 'x'"),
        (([1], [0], [[(1.5, 0)]]), "reference pictures hold 1.5"),
        ((np.array([2**63], np.uint64), [0], [[]]), "pictures hold .*9223372036854775808"),
    ],
    ids=str,
)
@forms
def test_values_out_of_range_are_named(plan, arguments, message):
    with pytest.raises(InvalidRequest, match=message):
        plan(*arguments)


@forms
def test_a_negative_width_is_refused(plan):
    with pytest.raises(InvalidRequest, match="width is -1"):
        plan([], [], [], width=-1)


@forms
def test_numpys_integers_and_arrays_of_any_width_are_taken(plan):
    pictures, branches = np.array([7, 8], np.int32), np.array([3, 3], np.uint8)
    found = plan(pictures, branches, [[], [(np.int64(7), np.int16(LIVE))]])
    assert found.page.tolist() == [[-1], [0]] and found.page.dtype == found.order.dtype == np.int64


def test_without_the_extension_the_reference_plans(monkeypatch):
    monkeypatch.setattr(step_buffers, "extension", lambda: None)
    assert plan_pages([1], [0], [[]]).order.tolist() == [0]


@needs_extension
def test_many_threads_plan_at_once():
    batch = list(range(2000)), [3] * 2000, [[]] + [[(0, LIVE)]] * 1999
    results = []
    threads = [threading.Thread(target=lambda: results.append(plan_pages(*batch))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all((page == results[0].page).all() and order.tolist() == list(range(2000)) for page, order in results)
