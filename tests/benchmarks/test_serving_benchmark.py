"""The benchmark of the service: that its peer draws what we draw, what counts as wrong, and what the figures show."""

import json
import threading
from collections import Counter
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import stylefast as sf
from benchmarks.serving import command, faults, load, mix, published, report, service
from stylefast.record import from_record
from stylefast.serving.engine_process import named_styles
from stylefast.styles.dream_styler import stage_of

# the peer


@pytest.fixture(scope="module")
def painter():
    return published.Painter()


@pytest.fixture(scope="module")
def engine():
    with sf.Engine.from_pretrained("tiny", device="cpu") as engine:
        yield engine


def ours(engine, body):
    """The engine's picture for a body of the mix."""
    own = dict(body["stylefast"])
    style = own.pop("style", None)
    request = {"prompt": body["prompt"], "size": list(map(int, body["size"].split("x"))), **own}
    request["style"] = [] if style is None else [style]
    return engine.generate(from_record({"requests": [request], "styles": named_styles(engine)})[0]).images[0]


def levels(one, other):
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


@pytest.mark.parametrize(
    ("size", "steps", "guidance"), [("64x64", 3, 7.5), ("96x64", 4, 1.0)], ids=["guided", "without guidance"]
)
def test_the_peer_draws_our_pictures_in_every_style(painter, engine, size, steps, guidance):
    drawn = {}
    for style in mix.STYLES:
        body = mix.body(style, "a fish", size, steps, guidance, 5)
        drawn[style] = painter.paint(body)
        assert levels(drawn[style], ours(engine, body)) <= load.MOST_LEVELS, style
    for style in set(mix.STYLES) - {"none"}:
        assert levels(drawn[style], drawn["none"]) > 20, style


def test_the_peer_shows_one_preview_after_half_of_the_steps(painter):
    shown = []
    painter.paint(mix.body("none", "a fish", "96x64", 4, 1.0, 5), shown.append)
    assert [picture.size for picture in shown] == [(96, 64)]


def test_the_peers_stages_are_those_of_the_paper():
    for stages in (1, 4, 6):
        assert all(published.stage_of(t, stages) == stage_of(t, stages) for t in range(1000))


def test_the_peer_makes_one_picture_at_a_time_and_streams_as_ours():
    busy, most = [], []

    def paint(body, show=None):
        busy.append(body)
        most.append(len(busy))
        if show is not None:
            show(Image.new("RGB", (8, 8)))
        busy.remove(body)
        return Image.new("RGB", (16, 8))

    replies = []
    with TestClient(published.create_app(SimpleNamespace(paint=paint))) as client:

        def ask(number):
            body = mix.body("none", "a fish", "64x64", 4, 1.0, number) | {"stream": number > 0}
            replies.append(client.post(service.PATH, json=body))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1] * 5 and {reply.status_code for reply in replies} == {200}
    whole = [reply for reply in replies if reply.headers["content-type"] == "application/json"]
    assert len(whole) == 1 and len(whole[0].json()["data"]) == 1
    for reply in set(replies) - set(whole):
        found = service.read_stream(Lines(reply.content), 0.0)
        assert found.first is not None and found.image.size == (16, 8)


# the client


class Lines(list):
    """A reply whose body is there."""

    status = 200

    def __init__(self, content):
        super().__init__(content.splitlines(keepends=True))


def stream_of(*events):
    return Lines(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))


END = {"type": "image_generation.completed", "b64_json": "AAAA"}
PARTIAL = {"type": "image_generation.partial_image", "b64_json": "AAAA"}
LOST = {"type": "error", "error": {"message": "gone", "code": "engine_lost"}}


def test_a_stream_must_have_one_end():
    assert service.read_stream(stream_of(PARTIAL, PARTIAL, END), 0.0).content == b"\0\0\0"
    assert service.read_stream(stream_of(END), 0.0).first is None
    for events in ((), (PARTIAL,), (END, END), (END, LOST)):
        with pytest.raises(RuntimeError, match="ends; it must have one"):
            service.read_stream(stream_of(*events), 0.0)
    with pytest.raises(service.RefusedError, match="engine_lost: gone"):
        service.read_stream(stream_of(PARTIAL, LOST), 0.0)


def test_the_mix_has_every_style_size_and_count():
    bodies = [mix.mixed(seed) for seed in range(300)]
    assert mix.mixed(7) == bodies[7]
    own = [body["stylefast"] for body in bodies]
    assert {json.dumps(one.get("style")) for one in own} == {json.dumps(style) for style in mix.STYLES.values()}
    assert {body["size"] for body in bodies} == set(mix.SIZES) and {one["steps"] for one in own} == set(mix.COUNTS)
    assert {one["guidance"] for one in own} == set(mix.GUIDANCES)
    assert all(body["stream"] and body["partial_images"] == 1 for body in bodies)


# what is wrong


def test_how_requests_end_and_what_of_it_is_wrong():
    tally = faults.Tally()

    def ends(error):
        def work():
            raise error

        tally.run(work)

    tally.run(lambda: "picture")
    assert not tally.wrong
    ends(service.RefusedError(503, "draining", "no"))
    ends(service.RefusedError(400, "invalid_request", "no"))
    ends(ConnectionResetError("gone"))
    assert tally.ends == {"picture": 1, faults.OTHER_ERRORS: 1, "refused": 1, "lost": 1} and len(tally.wrong) == 3


@pytest.mark.parametrize(
    "counted, right",
    [((8, 4, 1), True), ((7, 5, 0), True), ((6, 6, 0), False), ((8, 5, 0), False), ((8, 3, 1), False)],
    ids=["one more", "other way", "picture missing", "twice", "cancel missing"],
)
def test_the_servers_counts_must_be_those_of_its_clients(counted, right):
    ends = Counter({"picture": 6, "too late to cancel": 1, "cancelled": 3, "cut off": 2, "malformed": 1})
    assert faults.agree(ends, dict(zip(faults.STATUSES, counted))) is right


def test_more_failures_than_malformed_requests_are_not_agreed_upon():
    assert not faults.agree({"picture": 1}, {"completed": 1, "cancelled": 0, "failed": 1})


@pytest.mark.slow
def test_the_service_bears_cancels_malformed_bodies_and_a_killed_engine():
    found = faults.soak(20.0, stretches=4, warm_up=3)
    assert not found["wrong"] and found["counts_agree"] and found["ends"]["picture"]
    found = faults.crash(before=2.0, after=2.0)
    assert found["passed"] and found["restarts"] == faults.KILLS and found["ends"]["clear error"], found


# figures


def test_percentiles_are_shown_where_there_are_enough_values():
    found = load.percentiles([float(i) for i in range(300)])
    assert (found["p50"], found["p95"], found["p99"]) == (150.0, 285.0, 297.0)
    assert found["p50_between"][0] < 150 < found["p50_between"][1] and found["p95_between"][0] > 270
    assert load.percentiles(range(299)).keys() == {"p50", "p50_between", "p95", "p95_between"}
    assert load.percentiles(range(59)).keys() == {"p50", "p50_between"} and load.percentiles([]) == {}


def made_up():
    def entry(p50, p95):
        figures = {"p50": p50, "p50_between": [p50 - 0.1, p50 + 0.1], "p95": p95, "p95_between": [p95 - 1, p95 + 1]}
        return {"rate": 1.25, "to_preview": figures, "to_picture": {**figures, "p50": p50 + 1}}

    kinds = {
        kind: {"by_load": {str(share): entry(2.0 + i, 9.0 + 10 * i + share) for share in load.LOADS}}
        for i, kind in enumerate(load.KINDS)
    }
    return {"results": {"load": {"loads": list(load.LOADS), "kinds": kinds}}}


def test_the_table_has_a_line_for_each_load_and_server():
    lines = report.markdown(made_up()).splitlines()
    assert len(lines) == 2 + len(load.LOADS) * len(load.KINDS) and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 0.5 | 1.25 | steps shared | 2.0 s (1.9 to 2.1) | 9.5 s (8.5 to 10.5) | 3.0 s")


def test_the_chart_needs_no_colours_and_says_itself_in_words():
    content = made_up()
    root = ElementTree.fromstring(report.chart(content))
    name = "{http://www.w3.org/2000/svg}"
    words = root.find(f"{name}desc").text
    assert root.get("role") == "img" and root.find(f"{name}title").text
    assert words.count("At load") == len(load.LOADS) * len(load.KINDS) and "picture after 5.0 s (p95 30.1 s)" in words
    assert len(set(report.FILLS.values())) == len(load.KINDS)
    colours = {part.get(which) for part in root.iter() for which in ("fill", "stroke")}
    grey = {colour for colour in colours if colour and colour[0] == "#"}
    assert all(colour[1:3] == colour[3:5] == colour[5:7] for colour in grey), grey
    # the longest bar and line end within the picture
    width = float(root.get("viewBox").split()[2])
    bars = [(float(bar.get("x")), float(bar.get("width"))) for bar in root.iter(f"{name}rect") if bar.get("x")]
    assert len(bars) == 2 * len(load.LOADS) * len(load.KINDS) + len(load.KINDS)
    assert all(start + long < width for start, long in bars)


def test_a_part_that_does_not_exist_is_named(capsys):
    assert command.main(["--only", "load,nothing"]) == 2
    assert "nothing; there are overhead, load" in capsys.readouterr().err


def test_parts_that_are_not_measured_stay(tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"results": {"load": {"kept": 1}, "starts": {"old": 1}}}))
    monkeypatch.setattr(command, "starts", lambda: {"median": 2.0, "passed": True})
    assert command.main(["--only", "starts", "--out", str(path)]) == 0
    found = json.loads(path.read_text())["results"]
    assert found["load"] == {"kept": 1} and found["starts"]["median"] == 2.0 and found["starts"]["environment"]["cpu"]
    monkeypatch.setattr(command, "starts", lambda: {"passed": False})
    assert command.main(["--only", "starts", "--out", str(path)]) == 1
    assert "not passed: starts" in capsys.readouterr().err
