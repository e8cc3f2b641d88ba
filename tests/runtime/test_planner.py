"""The batch planner: pages, order, refusals, and the C++ and Python forms against each other."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stylefast._extension import extension
from stylefast.errors import InvalidRequest, MissingDependency
from stylefast.runtime.steps import planner
from stylefast.runtime.steps.planner import LIVE, plan_arrays, plan_segments
from tests.runtime.backends import backends, needs_extension


def outcome(batch, backend):
    """Arrays as lists, or the message of the refusal."""
    images, branches, references, width, mutual = batch
    try:
        page, order = plan_segments(images, branches, references, width=width, mutual=mutual, backend=backend)
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
    images, branches = [key[0] for key in keys], [key[1] for key in keys]
    return images, branches, references, draw(st.integers(0, 4)), draw(st.booleans())


@st.composite
def valid_batches(draw):
    """A few references without references, and readers in the branches that their reference has."""
    images, branches, references = [], [], []
    rows = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=6, unique=True))
    for image, branch in rows:
        images.append(image)
        branches.append(branch)
        references.append([])
    for target in range(draw(st.integers(0, 8))):
        image, branch = draw(st.sampled_from(rows))
        one = st.one_of(st.just((image, LIVE)), st.tuples(st.just(99), st.integers(0, 3)))
        images.append(100 + target)
        branches.append(branch)
        references.append(draw(st.lists(one, max_size=2)))
    shuffle = draw(st.permutations(range(len(images))))
    return [images[i] for i in shuffle], [branches[i] for i in shuffle], [references[i] for i in shuffle], 0, False


@needs_extension
@given(batches())
def test_cpp_and_python_agree_on_every_batch_and_every_refusal(batch):
    assert outcome(batch, "cpp") == outcome(batch, "python")


@backends
@given(batch=valid_batches())
def test_a_page_is_the_references_row_of_the_same_branch_or_lies_behind_the_rows(backend, batch):
    images, branches, references, _, _ = batch
    page, _ = plan_segments(images, branches, references, backend=backend)
    for row, own in enumerate(references):
        for column, (image, bank) in enumerate(own):
            found = page[row, column]
            if bank == LIVE:
                assert (images[found], branches[found]) == (image, branches[row])
            else:
                assert found == len(images) + bank
        assert (page[row, len(own) :] == -1).all()


@backends
@given(batch=valid_batches())
def test_the_order_is_a_permutation_in_which_rows_connected_by_pages_are_one_run(backend, batch):
    images, branches, references, _, _ = batch
    page, order = plan_segments(images, branches, references, backend=backend)
    rows = len(images)
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


@backends
def test_a_style_set_reads_its_reference_branch_by_branch(backend):
    plan = plan_segments([7, 7, 8, 8], [0, 3, 0, 3], [[], [], [(7, LIVE)], [(7, LIVE)]], backend=backend)
    assert plan.page.tolist() == [[-1], [-1], [0], [1]]
    assert plan.order.tolist() == [0, 2, 1, 3]


@backends
def test_rows_without_references_keep_their_order_and_need_no_columns(backend):
    plan = plan_segments([3, 1, 2], [3, 3, 3], [[], [], []], backend=backend)
    assert plan.page.shape == (3, 0)
    assert plan.order.tolist() == [0, 1, 2]


@backends
def test_an_empty_batch_has_an_empty_plan(backend):
    plan = plan_segments([], [], [], width=2, backend=backend)
    assert plan.page.shape == (0, 2) and plan.order.shape == (0,)


@backends
def test_the_width_can_be_raised_but_never_cuts(backend):
    batch = [1], [3], [[(0, 4), (0, 2)]]
    assert plan_segments(*batch, width=3, backend=backend).page.tolist() == [[5, 3, -1]]
    assert plan_segments(*batch, width=1, backend=backend).page.tolist() == [[5, 3]]


@backends
def test_readers_of_one_bank_page_become_neighbours(backend):
    plan = plan_segments([1, 2, 3, 4], [3] * 4, [[(0, 5)], [(0, 6)], [(0, 5)], []], backend=backend)
    assert plan.order.tolist() == [0, 2, 1, 3]


@backends
def test_mutual_references_are_allowed_when_asked_for(backend):
    batch = [1, 2], [3, 3], [[(2, LIVE)], [(1, LIVE)]]
    assert plan_segments(*batch, mutual=True, backend=backend).page.tolist() == [[1], [0]]


@backends
def test_a_reference_without_a_row_in_the_branch_names_image_and_branch(backend):
    with pytest.raises(InvalidRequest, match="row 1 refers to image 7, branch 2, which has no row"):
        plan_segments([7, 8], [3, 2], [[], [(7, LIVE)]], backend=backend)


@backends
@pytest.mark.parametrize("middle", [(1, LIVE), (0, 0)], ids=["to a live row", "to a bank page"])
def test_a_chain_of_references_is_refused(backend, middle):
    with pytest.raises(ValueError, match="image 2, branch 3, which refers to another page itself"):
        plan_segments([1, 2, 3], [3, 3, 3], [[], [middle], [(2, LIVE)]], backend=backend)


@backends
def test_an_image_that_refers_to_itself_is_a_chain(backend):
    with pytest.raises(InvalidRequest, match="chained"):
        plan_segments([1], [3], [[(1, LIVE)]], backend=backend)


@backends
def test_two_rows_of_one_image_and_branch_are_refused(backend):
    with pytest.raises(InvalidRequest, match="rows 0 and 2 are both image 4, branch 1"):
        plan_segments([4, 5, 4], [1, 1, 1], [[], [], []], backend=backend)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([1], [4], [[]]), "branches hold 4"),
        (([1], [0], [[(1, -2)]]), "bank pages hold -2"),
        (([1], [0], [[(1, 2**31)]]), "bank pages hold 2147483648"),
        (([2**63], [0], [[]]), "images hold 9223372036854775808"),
        (([1.5], [0], [[]]), "images hold 1.5"),
        (([1, 2], [0], [[]]), "2 images, 1 branches"),
        (([1], [0], [[(1, 2, 3)]]), "pair"),
    ],
    ids=str,
)
def test_values_out_of_range_are_named(arguments, message):
    with pytest.raises(InvalidRequest, match=message):
        plan_segments(*arguments)


def test_unknown_backends_and_negative_widths_are_refused():
    with pytest.raises(InvalidRequest, match="'rust'.*cpp"):
        plan_segments([], [], [], backend="rust")
    with pytest.raises(InvalidRequest, match="width is -1"):
        plan_segments([], [], [], width=-1)


def test_asking_for_cpp_without_the_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(planner, "extension", lambda: None)
    monkeypatch.setattr(planner, "extension_error", lambda: "not built; `make extension`")
    with pytest.raises(MissingDependency, match="make extension"):
        plan_segments([], [], [], backend="cpp")
    assert plan_segments([1], [0], [[]]).order.tolist() == [0]


def arrays(images=(7, 8), branches=(3, 3), offsets=(0, 0, 1), reference_images=(7,), pages=(LIVE,), shape=(2, 2)):
    """Arguments of `plan_arrays`, with outputs that hold rubbish."""
    given = [np.array(values, np.int64) for values in (images, branches, offsets, reference_images, pages)]
    return [*given, np.full(shape, 99), np.full(shape[:1], 99)]


@backends
def test_ready_arrays_are_filled_in_place(backend):
    batch = arrays()
    assert plan_arrays(*batch, backend=backend) == 1
    assert batch[5].tolist() == [[-1, -1], [0, -1]] and batch[6].tolist() == [0, 1]


@backends
def test_an_empty_batch_of_ready_arrays_has_no_references(backend):
    assert plan_arrays(*arrays((), (), (0,), (), (), (0, 3)), backend=backend) == 0


@backends
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"branches": (3, 4)}, "branches hold 4, but must be integers from 0 to 3"),
        ({"branches": (-1, 3)}, "branches hold -1"),
        ({"pages": (-2,)}, "bank pages hold -2, but must be integers from -1 to 2147483647"),
        ({"pages": (2**31,)}, "bank pages hold 2147483648"),
        ({"offsets": (0, 1, 0)}, "offsets must run from 0 to the number of references, 1"),
        ({"offsets": (1, 1, 1)}, "offsets must run from 0"),
        ({"offsets": (0, 2, 1)}, "offsets must not fall"),
        ({"offsets": (0, 1)}, "lengths do not fit"),
        ({"branches": (3,)}, "lengths do not fit"),
        ({"pages": ()}, "lengths do not fit"),
        ({"shape": (3, 1)}, "lengths do not fit"),
        ({"shape": (2, 0)}, "a row has 1 references, but page has 0 columns"),
        ({"reference_images": (9,)}, "row 1 refers to image 9, branch 3, which has no row"),
        ({"images": (8, 8)}, "rows 0 and 1 are both image 8, branch 3"),
    ],
    ids=str,
)
def test_ready_arrays_are_checked_for_what_they_hold(backend, changes, message):
    with pytest.raises(InvalidRequest, match=message):
        plan_arrays(*arrays(**changes), backend=backend)


@backends
@pytest.mark.parametrize(
    "index, change, message",
    [
        (0, lambda a: a.astype(np.int32), "images is a int32 array, but must be a contiguous int64 array"),
        (1, lambda a: a.tolist(), "branches is a list"),
        (5, lambda a: np.asfortranarray(a), "page_out is a int64 array, but must be a contiguous"),
        (6, lambda a: np.broadcast_to(a[:1].copy(), 1), "order_out can't be written to"),
    ],
    ids=["another type", "no array", "another order", "read-only"],
)
def test_arrays_are_never_copied_to_make_them_fit(backend, index, change, message):
    batch = arrays()
    if index == 6:
        batch = arrays((7,), (3,), (0, 0), (), (), (1, 2))
    batch[index] = change(batch[index])
    with pytest.raises(InvalidRequest, match=message):
        plan_arrays(*batch, backend=backend)


@needs_extension
@given(batch=batches())
def test_a_planner_that_has_planned_before_plans_as_a_new_one(batch):
    images, branches, references, _, mutual = batch
    entries = [entry for row in references for entry in row]
    offsets = np.cumsum([0, *map(len, references)])
    outcomes = []
    for planner_ in (extension().BatchPlanner(), planner._planner("cpp")):
        filled = arrays(images, branches, offsets, [i for i, _ in entries], [p for _, p in entries], (len(images), 3))
        try:
            outcomes.append((planner_.plan(*filled, mutual), filled[5].tolist(), filled[6].tolist()))
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@needs_extension
def test_many_threads_plan_at_once():
    batch = list(range(2000)), [3] * 2000, [[]] + [[(0, LIVE)]] * 1999
    results = []
    threads = [threading.Thread(target=lambda: results.append(plan_segments(*batch))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all((page == results[0].page).all() and order.tolist() == list(range(2000)) for page, order in results)
