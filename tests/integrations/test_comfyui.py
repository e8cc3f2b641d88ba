"""The nodes for ComfyUI: loaded and run as ComfyUI does, with a real server and a real engine."""

import inspect
import json
import sys
import threading
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import numpy
import pytest
import torch

from tests.serving.conftest import serving

KEY = "0123456789abcdef"
WIDGETS = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}
SOCKETS = {"IMAGE", "STYLEFAST_SERVER", "STYLEFAST_ENGINE", "STYLEFAST_STYLES"}


class Interrupted(Exception):
    """Stand-in for the exception by which ComfyUI stops a workflow."""


@pytest.fixture(scope="module")
def pack(checkout):
    """The package as ComfyUI loads a folder of custom_nodes: under a name of its own, from its __init__.py."""
    folder = checkout / "integrations" / "comfyui"
    name = str(folder).replace(".", "_x_")
    spec = spec_from_file_location(name, folder / "__init__.py")
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for one in [one for one in sys.modules if one == name or one.startswith(name + ".")]:
        del sys.modules[one]


@pytest.fixture
def comfy(monkeypatch):
    """What ComfyUI offers to nodes: bars, of which the steps are kept, and the stop button."""
    utils, management = ModuleType("comfy.utils"), ModuleType("comfy.model_management")
    utils.shown, management.stopped = [], threading.Event()

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            utils.shown.append((value, total))

    def throw_exception_if_processing_interrupted():
        if management.stopped.is_set():
            raise Interrupted

    utils.ProgressBar = ProgressBar
    management.throw_exception_if_processing_interrupted = throw_exception_if_processing_interrupted
    for module in (utils, management):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return ModuleType("comfy"), utils, management


def run(pack, name, **given):
    """Run a node as ComfyUI does: defaults for fields that are not given, in inference mode."""
    kind = pack.NODE_CLASS_MAPPINGS[name]
    fields = kind.INPUT_TYPES()
    values = {}
    for field, (shown, *options) in fields["required"].items():
        if field in given:
            values[field] = given.pop(field)
        else:
            assert isinstance(shown, list) or shown in WIDGETS, f"{name} needs {field}"
            values[field] = options[0]["default"]
    assert set(given) <= set(fields.get("optional", ())), given
    with torch.inference_mode():
        found = getattr(kind(), kind.FUNCTION)(**values, **given)
    assert isinstance(found, tuple) and len(found) == len(kind.RETURN_TYPES)
    return found


def is_image(found, count=1, side=64):
    return (
        found.shape == (count, side, side, 3) and found.dtype == torch.float32 and 0 <= found.min() < found.max() <= 1
    )


# the contract


def test_every_node_has_what_comfyui_asks_for(pack):
    assert set(pack.NODE_CLASS_MAPPINGS) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)
    assert len(set(pack.NODE_DISPLAY_NAME_MAPPINGS.values())) == len(pack.NODE_CLASS_MAPPINGS)
    for kind in pack.NODE_CLASS_MAPPINGS.values():
        assert kind.CATEGORY and kind.DESCRIPTION and isinstance(kind.RETURN_TYPES, tuple)
        assert set(kind.RETURN_TYPES) <= SOCKETS | set(WIDGETS)
        assert len(getattr(kind, "RETURN_NAMES", kind.RETURN_TYPES)) == len(kind.RETURN_TYPES)
        assert inspect.ismethod(kind.INPUT_TYPES), "a class method"
        fields = kind.INPUT_TYPES()
        assert "required" in fields and set(fields) <= {"required", "optional", "hidden"}
        json.dumps(fields)  # the page gets it
        for field, (shown, *options) in {**fields["required"], **fields.get("optional", {})}.items():
            options = options[0] if options else {}
            if isinstance(shown, list):
                assert options["default"] in shown, field
            elif shown in WIDGETS:
                assert isinstance(options["default"], WIDGETS[shown]), field
                assert options.get("min", options["default"]) <= options["default"], field
            else:
                assert shown in SOCKETS, field
        taken = inspect.signature(getattr(kind, kind.FUNCTION)).parameters
        if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
            assert set(taken) - {"self"} == {*fields["required"], *fields.get("optional", ())}


def test_the_registry_takes_its_description(checkout, pack):
    found = tomllib.loads((checkout / "integrations" / "comfyui" / "pyproject.toml").read_text())
    project, comfy = found["project"], found["tool"]["comfy"]
    import stylefast

    assert project["version"] == stylefast.__version__ and "comfyui" not in project["name"].lower()
    assert comfy["PublisherId"] and comfy["DisplayName"] and project["urls"]["Repository"]
    page = (checkout / "integrations" / "comfyui" / "README.md").read_text()
    for name in pack.NODE_DISPLAY_NAME_MAPPINGS.values():
        assert name.partition(" (")[0].lower() in page.lower(), name


def test_the_servers_nodes_need_no_stylefast(pack, monkeypatch):
    monkeypatch.setitem(sys.modules, "stylefast", None)
    (client,) = run(pack, "StylefastServer")
    assert client.url == "http://localhost:8000"
    with pytest.raises(RuntimeError, match="pip install stylefast"):
        run(pack, "StylefastEngine")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000", "", "ftp://localhost"])
def test_an_address_must_be_of_http(pack, url):
    with pytest.raises(RuntimeError, match="http://"):
        run(pack, "StylefastServer", url=url)


def test_a_server_that_is_not_there_is_said_so(pack):
    (client,) = run(pack, "StylefastServer", url="http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match="stylefast serve"):
        run(pack, "StylefastListStyles", server=client)


# with a server


@pytest.fixture(scope="module")
def server():
    with serving("--model", "tiny", env={"STYLEFAST_SERVE_API_KEYS": f"comfy:{KEY}"}) as running:
        yield running


@pytest.fixture
def client(pack, server, monkeypatch):
    monkeypatch.setenv("STYLEFAST_API_KEY", KEY)
    return run(pack, "StylefastServer", url=server.url)[0]


def test_pictures_come_from_a_server(pack, client, comfy):
    names = run(pack, "StylefastListStyles", server=client)[0].split("\n")
    assert {"neon", "chalk"} <= set(names)
    (plain,) = run(pack, "StylefastGenerate", server=client, steps=4, seed=2**64 - 1)
    (styled,) = run(pack, "StylefastGenerate", server=client, style="neon", steps=4, seed=2**64 - 1)
    assert is_image(plain) and is_image(styled) and not torch.equal(plain, styled)
    (several,) = run(pack, "StylefastGenerate", server=client, steps=2, count=3, width=64, height=64)
    assert is_image(several, 3) and not torch.equal(several[0], several[1])


@pytest.mark.parametrize("method", ["auto", "instant", "aligned"])
def test_pictures_in_the_style_of_others_come_from_a_server(pack, client, method):
    images = torch.rand(1 if method == "aligned" else 2, 64, 64, 4)
    found = [
        run(pack, "StylefastEdit", server=client, images=images, method=method, strength=strength, steps=3)[0]
        for strength in ("low", "high")
    ]
    assert all(map(is_image, found)) and not torch.equal(*found)


def test_what_the_server_says_reaches_the_user_and_the_key_does_not(pack, server, client, monkeypatch):
    with pytest.raises(RuntimeError, match="neom"):
        run(pack, "StylefastGenerate", server=client, style="neom")
    with pytest.raises(RuntimeError, match="64 x 0"):
        run(pack, "StylefastGenerate", server=client, width=64)
    monkeypatch.setenv("STYLEFAST_API_KEY", "f" * 16)
    with pytest.raises(RuntimeError, match="key") as caught:
        run(pack, "StylefastListStyles", server=client)
    assert "f" * 16 not in str(caught.value) and KEY not in repr(client)


def test_the_stop_button_cancels_a_request(pack, client, comfy):
    _, utils, management = comfy

    def stop():
        while not utils.shown:
            if finished.wait(0.05):
                return
        management.stopped.set()

    finished = threading.Event()
    stopping = threading.Thread(target=stop)
    stopping.start()
    try:
        with pytest.raises(Interrupted):
            run(pack, "StylefastGenerate", server=client, steps=900)
    finally:
        finished.set()
        stopping.join()
    assert utils.shown and all(total == 900 for _, total in utils.shown)
    page = client.ask("GET", "/v1/models")  # and the server goes on
    assert page["data"]


# with an engine


@pytest.fixture(scope="module")
def engine(pack):
    return run(pack, "StylefastEngine", device="cpu")[0]


def test_nodes_with_the_same_fields_share_an_engine(pack, engine):
    assert run(pack, "StylefastEngine", device="cpu")[0] is engine


def test_pictures_come_from_an_engine_in_styles_that_compose(pack, engine, comfy):
    _, utils, _ = comfy
    images = torch.rand(1, 64, 64, 3)
    (plain,) = run(pack, "StylefastDraw", engine=engine, steps=3, seed=7)
    (instant,) = run(pack, "StylefastInstantStyle", images=images, scale=0.8)
    (both,) = run(pack, "StylefastAlignedStyle", images=images, others=instant)
    assert len(instant) == 1 and len(both) == 2 and both[0] is instant[0]
    found = [run(pack, "StylefastDraw", engine=engine, styles=styles, steps=3, seed=7)[0] for styles in (instant, both)]
    assert all(map(is_image, [plain, *found]))
    assert not torch.equal(plain, found[0]) and not torch.equal(*found)
    assert (3, 3) in utils.shown
    (drawn,) = run(pack, "StylefastAlignedStyle", prompt="a star in neon style")
    assert is_image(run(pack, "StylefastDraw", engine=engine, styles=drawn, steps=2, count=2)[0], 2)
    with pytest.raises(ValueError, match="pictures, or a prompt"):
        run(pack, "StylefastAlignedStyle")


def test_the_picture_is_that_of_the_library(pack, engine):
    import stylefast
    from stylefast.models.checkpoint import TINY

    reference = TINY / "references" / "neon.png"
    images = sys.modules[f"{pack.__name__}.images"].from_files([reference.read_bytes()])
    (style,) = run(pack, "StylefastInstantStyle", images=images)
    (found,) = run(pack, "StylefastDraw", engine=engine, styles=style, steps=4, seed=5, prompt="a cat")
    with torch.inference_mode(False):
        wanted = engine.generate("a cat", stylefast.InstantStyle(str(reference)), steps=4, seed=5, guidance=5.0)
    pixels = torch.from_numpy(numpy.array(wanted.images[0]))
    assert torch.equal((found[0] * 255).round().to(torch.uint8), pixels)


def test_the_stop_button_ends_an_engines_work(pack, engine, comfy):
    _, utils, management = comfy
    management.stopped.set()
    with pytest.raises(Interrupted):
        run(pack, "StylefastDraw", engine=engine, steps=50)
    management.stopped.clear()
    assert is_image(run(pack, "StylefastDraw", engine=engine, steps=2)[0])
