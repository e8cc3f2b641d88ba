"""The model repository in the real Triton Inference Server, with a real client; skipped where the server is absent."""

import math
import re
import time
from contextlib import ExitStack
from io import BytesIO

import numpy as np
import pytest

import stylefast as sf
from stylefast.export.triton_repo import Serving, Shape, write_repository
from stylefast.export.triton_repo.write import QueuePolicy
from stylefast.models.vae import downscale
from tests.export.triton_server import Answer, TritonServer, log_end, missing, triton_server
from tests.support.shared_exports import SERVED, served_export, served_model
from tests.support.small_adapter import small_picture
from tests.support.small_graphs import translations  # noqa: F401

reason = missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")

SLOTS, QUEUE = 2, 2
# steps of a picture this large take long enough to be counted from outside
LARGE = {"prompt": "a fish", "size": [160, 160], "steps": 900}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with a model of one attention layer, an IP-Adapter beside it, and the model as it is exported."""
    return served_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(served):
    return sf.Engine.from_pretrained(served[0], adapter=served[0].parent / "adapter.bin")


@pytest.fixture(scope="module")
def running(served, tmp_path_factory):
    """A server with that model."""
    folder, (model, source) = tmp_path_factory.mktemp("server"), served
    adapter = str(model.parent / "adapter.bin")
    write_repository(
        served_export(source),
        folder / "repository",
        unet=source.unet,
        model=str(model),
        serving=Serving(slots=SLOTS, queue=QueuePolicy(QUEUE), engine={"adapter": adapter}),
        shapes=[Shape(64, 64), Shape(64, 96, 4)],
        downscale=4,
    )
    with triton_server(folder / "repository", folder) as server:
        yield server


@pytest.fixture
def server(running: TritonServer):
    """The server; the end of its log is shown where a test fails."""
    yield running
    print(log_end(running.log))


def psnr(answer: Answer, result: sf.Result) -> float:
    """Of all pictures together, in dB."""
    expected = np.stack([np.asarray(image) for image in result.images]).astype(float)
    assert expected.std() > 20, "a flat picture proves nothing"
    error = np.square(answer.images - expected).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def png(picture) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def error_of(server: TritonServer, order, pictures=(), **options) -> str:
    """What the server says to a request that it does not take."""
    from tritonclient.utils import InferenceServerException

    with server.ask(order, pictures, **options) as answers, pytest.raises(InferenceServerException) as caught:
        list(answers)
    return caught.value.message()


def draws(server: TritonServer) -> bool:
    """Whether the server has room for a request, and answers it."""
    from tritonclient.utils import InferenceServerException

    try:
        return server.picture({"prompt": "a cat", "steps": 1}).final
    except InferenceServerException as error:
        assert "Exceeds maximum queue size" in error.message()
        return False


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} seconds"
        time.sleep(0.02)


def test_every_model_of_the_repository_is_ready(server):
    found = {model.name: model.state for model in server.client.get_model_repository_index().models}
    graphs = ("unet_plain", "unet_banked", *SERVED[1:])
    assert found == dict.fromkeys((*graphs, "stylefast"), "READY")
    config = server.client.get_model_config("stylefast", as_json=True)["config"]
    assert config["model_transaction_policy"] == {"decoupled": True}
    policy = config["dynamic_batching"]["default_queue_policy"]
    assert policy["max_queue_size"] == QUEUE and policy.get("timeout_action", "REJECT") == "REJECT"


ALIGNED = {"method": "aligned", "prompt": "a house", "adain": {"q": 0.5}, "shift": 0.5}
INSTANT = {"method": "instant", "image": 0, "blocks": "all"}


@pytest.mark.parametrize(
    "style, pictures, make, flavour",
    [
        (None, 0, lambda _: None, "plain"),
        (ALIGNED, 0, lambda _: sf.StyleAligned(prompt="a house", adain={"q": 0.5}, shift=0.5), "banked"),
        ({"method": "aligned", "reference": 1}, 2, lambda given: sf.StyleAligned(given[1]), "banked"),
        (INSTANT, 1, lambda given: sf.InstantStyle(given[0], "all"), "plain"),
        (
            [ALIGNED | {"share_group_norm": True}, INSTANT | {"scale": 0.5}],
            1,
            lambda given: [
                sf.StyleAligned(prompt="a house", adain={"q": 0.5}, shift=0.5, share_group_norm=True),
                sf.InstantStyle(given[0], "all", 0.5),
            ],
            "banked",
        ),
    ],
    ids=["no style", "a reference prompt", "a reference picture", "an InstantStyle picture", "both"],
)
def test_pictures_are_those_of_the_engine(server, engine, style, pictures, make, flavour):
    files = [png(small_picture(seed)) for seed in range(pictures)]
    steps = server.calls(f"unet_{flavour}")
    order = {
        "prompt": ["a cat", "a dog in oil"],
        "seed": 4,
        "steps": 3,
        "size": [56, 72],
        "scheduler": "dpmpp_2m",
        "guidance": 4.0,
        "negative_prompt": "neon",
    }
    answer = server.picture(order | ({} if style is None else {"style": style}), files)
    expected = engine.generate(
        ["a cat", "a dog in oil"],
        make(files),
        seed=4,
        steps=3,
        size=(56, 72),
        scheduler="dpmpp_2m",
        guidance=4.0,
        negative_prompt="neon",
    )
    assert psnr(answer, expected) >= 40
    assert (answer.step, answer.steps, answer.final) == (3, 3, True)
    assert [entry["seed"] for entry in answer.metadata] == [4, 5]
    assert server.calls(f"unet_{flavour}") == steps + 3


def test_text_encoders_and_decoder_run_as_models_of_the_server(server):
    models = ("text_encoder", "text_encoder_2", "vae_decoder")
    before = [server.calls(model) for model in models]
    server.picture({"prompt": f"a fish {time.time()}", "steps": 1})
    assert [server.calls(model) for model in models] == [count + 1 for count in before]


def test_previews_come_in_order_before_the_picture(server):
    with server.ask(LARGE | {"steps": 9, "preview_every": 3}) as stream:
        *previews, last = stream
    assert previews and [p.step for p in previews] == sorted({p.step for p in previews})
    assert all(b.step - a.step >= 3 for a, b in zip(previews, previews[1:])) and previews[0].step >= 3
    assert all(p.steps == 9 and p.step < 9 and not p.final and not p.metadata for p in previews)
    assert (last.step, last.final, last.images.shape) == (9, True, (1, 160, 160, 3))
    assert all(p.images.shape == last.images.shape for p in previews)


def test_requests_of_several_clients_share_their_steps(server):
    before = server.calls("unet_plain")
    long, short = 400, 60
    order = LARGE | {"size": [96, 96]}
    with (
        server.ask(order | {"seed": 1, "steps": long}) as one,
        server.ask(order | {"seed": 2, "steps": short, "preview_every": 1}) as two,
    ):
        first = next(iter(two))
        joined = server.calls("unet_plain") - before  # the second has had a step after so many, whenever it came
        pictures = [list(stream)[-1].images for stream in (one, two)]
    assert not np.array_equal(*pictures) and first.step < short
    assert joined < long <= server.calls("unet_plain") - before <= max(long, joined + short)


def test_a_stream_that_is_cancelled_stops_the_loop(server):
    start = server.calls("unet_plain")
    with server.ask(LARGE):
        wait_for(lambda: server.calls("unet_plain") >= start + 3)
        at = server.calls("unet_plain")
    # a picture of its own, which is told from the cancelled one by the steps: of those some run while the news travels
    assert server.picture({"prompt": "a cat", "steps": 1}).final
    stopped = server.calls("unet_plain")
    assert stopped - at < LARGE["steps"] / 2
    assert server.picture({"prompt": "a cat", "steps": 1}).final
    assert server.calls("unet_plain") == stopped + 1


def fill_slots(server: TritonServer, streams: ExitStack) -> None:
    """Ask for as many pictures as are drawn at once, and wait until each is being drawn."""
    for seed in range(SLOTS):
        stream = streams.enter_context(server.ask(LARGE | {"seed": seed, "preview_every": 5}))
        assert next(iter(stream)).step < LARGE["steps"]


def test_requests_beyond_slots_and_queue_are_rejected_at_once(server):
    from tritonclient.utils import InferenceServerException

    with ExitStack() as streams:
        fill_slots(server, streams)
        before = server.calls("unet_plain")
        waiting = [streams.enter_context(server.ask(LARGE | {"seed": seed})) for seed in range(QUEUE + 1)]
        wait_for(lambda: any(stream.answered for stream in waiting))
        (rejected,) = (stream for stream in waiting if stream.answered)
        with pytest.raises(InferenceServerException, match="Exceeds maximum queue size"):
            next(iter(rejected))
        assert server.calls("unet_plain") - before < LARGE["steps"]  # while those before it still ran
        assert sum(stream.answered for stream in waiting) == 0
    # those in the queue were cancelled too, and leave it when their turn comes
    wait_for(lambda: draws(server))


def test_a_request_that_waits_longer_than_its_timeout_is_rejected(server):
    with ExitStack() as streams:
        fill_slots(server, streams)
        assert "timeout expired" in error_of(server, LARGE, timeout=100_000)


@pytest.mark.parametrize(
    "order, wanted",
    [
        ({"prompt": " "}, "PromptError: the prompt is empty"),
        ({"prompt": "a", "size": [60, 64]}, "InvalidRequest: width is 60; it must be divisible by 8"),
        ({"prompt": "a", "scheduler": "eul"}, "InvalidRequest: .*eul"),
        ({"prompt": "a", "stesp": 3}, "InvalidRequest: the request has no 'stesp'"),
        (b"\x00", "InvalidRequest: the request is not valid JSON"),
        ({"prompt": "a", "style": INSTANT}, "ImageError: a picture is 0; 0 pictures were sent"),
        ({"prompt": "a", "deadline": -1}, "InvalidRequest: deadline"),
        (LARGE | {"deadline": 0.5}, "DeadlineExceeded: the deadline of 0.5 seconds passed"),
    ],
)
def test_bad_input_is_answered_in_our_words(server, order, wanted):
    assert re.search(wanted, error_of(server, order))


def test_a_damaged_picture_is_answered_in_our_words(server):
    damaged = png(small_picture(0))[:100]
    assert "ImageError: " in error_of(server, {"prompt": "a", "style": INSTANT}, [damaged])


def test_a_graph_that_is_unloaded_fails_its_requests_by_name_until_it_is_back(server):
    server.client.unload_model("unet_plain")
    wait_for(lambda: not server.client.is_model_ready("unet_plain"))
    assert "unet_plain" in error_of(server, {"prompt": "a cat", "steps": 1})
    server.client.load_model("unet_plain")
    assert server.picture({"prompt": "a cat", "steps": 1}).final


def test_the_loop_can_be_unloaded_and_loaded_again(server, engine):
    server.client.unload_model("stylefast")
    wait_for(lambda: not server.client.is_model_ready("stylefast"))
    server.client.load_model("stylefast")
    assert psnr(server.picture({"prompt": "a cat", "steps": 2}), engine.generate("a cat", steps=2)) >= 40


@pytest.mark.slow
def test_a_repository_of_the_embedded_model_draws_what_the_engine_draws(tmp_path):
    from stylefast.export.options import Options, load_source
    from stylefast.export.pipeline import export_onnx

    source, banks = load_source("tiny", "float32"), tmp_path / "banks"
    options = Options("onnx", flavours=("plain", "banked"), components=("unet", "vae_decoder"))
    export_onnx(source, tmp_path / "onnx", options)
    write_repository(
        tmp_path / "onnx",
        tmp_path / "repository",
        unet=source.unet,
        model="tiny",
        serving=Serving(banks=str(banks)),
        downscale=downscale(source.vae),
    )
    banks.mkdir()
    engine = sf.Engine.from_pretrained("tiny", device="cpu")
    bank = engine.bake(sf.StyleAligned(prompt="a boat"), steps=4, path=banks / "boat.bank")
    with triton_server(tmp_path / "repository", tmp_path) as server:
        answer = server.picture({"prompt": ["a fish", "a tree"], "steps": 4, "seed": 1})
        assert psnr(answer, engine.generate(["a fish", "a tree"], steps=4, seed=1)) >= 40
        style = {"method": "aligned", "bank": "boat"}
        answer = server.picture({"prompt": "a fish", "steps": 4, "style": style})
        assert psnr(answer, engine.generate("a fish", sf.StyleAligned(bank), steps=4)) >= 40
        assert "not on this server; there are boat" in error_of(
            server, {"prompt": "a fish", "style": style | {"bank": "car"}}
        )
