"""Keys, ids and labels: what every request meets first, on a stand-in for the engine."""

import ast
import asyncio
import time
from statistics import median

import pytest

from stylefast.errors import InvalidRequest
from stylefast.serving.guard import OPEN_PATHS, Keys
from stylefast.serving.settings import ServeSettings
from tests.serving.bench import bench

KEY, ADMIN = "0123456789abcdefXYZ", "root0123456789abcdef"


async def ask(app, method, path, authorization=None, body=b""):
    """Return the status of a request that comes without a connection."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    if authorization is not None:
        headers.append((b"authorization", authorization.encode("latin-1")))
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1), "state": {},
    }  # fmt: skip
    statuses, sent = [], False

    async def receive():
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    return statuses[0]


def in_service(running, work):
    """Run a coroutine in the service's loop."""
    return asyncio.run_coroutine_threadsafe(work, running.loop).result()


def routes_of(owner):
    """Return (method, path) of all routes, those of included routers too."""
    found = []
    for route in owner.routes:
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if getattr(route, "methods", None):
            found += [(method, route.path) for method in route.methods]
        elif hasattr(inner, "routes"):
            prefix = getattr(route, "prefix", "")
            found += [(method, prefix + path) for method, path in routes_of(inner)]
    return found


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer ",
    f"Bearer {KEY[:-1]}",
    f"Bearer {KEY}x",
    f"Bearer {KEY.lower()}",
    f"Bearer {KEY.upper()}",
    f"Bearer alice:{KEY}",
    f"Digest {KEY}",
    KEY,
    "Basic eDp5",
    "Basic !!!",
    "Bearer \xff\xfe",
]


def test_every_route_of_the_live_table_is_closed_also_one_that_is_added():
    with bench(api_keys=[f"alice:{KEY}"], admin_keys=[f"root:{ADMIN}"]) as running:
        running.app.add_api_route("/added/{name}", lambda name: {}, methods=["GET", "POST"])
        routes = routes_of(running.app)
        assert {path for _, path in routes} >= {
            "/v1/images/generations",
            "/v1/styles",
            "/sdapi/v1/txt2img",
            "/added/{name}",
        }

        async def check():
            for method, path in [*routes, ("GET", "/nothing"), ("PUT", "/v1/models"), ("TRACE", "/metrics")]:
                place = path.replace("{name:path}", "x").replace("{number}", "x").replace("{name}", "x")
                for wrong in WRONG:
                    status = await ask(running.app, method, place, wrong)
                    if place in OPEN_PATHS:
                        assert status not in (401, 403), (method, place)
                    else:
                        assert status == 401, (method, place, wrong)
            assert await ask(running.app, "GET", "/added/x", f"Bearer {KEY}") == 200
            assert await ask(running.app, "DELETE", "/v1/styles/x", f"Bearer {KEY}") == 403

        in_service(running, check())


@pytest.mark.parametrize(
    "path", ["/livez/", "//livez", "/livez/../metrics", "/LIVEZ", "/livez;x", "/playground/../metrics"]
)
def test_open_paths_are_open_as_they_are_written_alone(path):
    with bench(api_keys=[KEY]) as running:
        assert in_service(running, ask(running.app, "GET", path)) == 401


def test_pages_of_other_sites_do_not_reach_a_server_that_has_keys_for_admins_alone():
    with bench(admin_keys=[f"root:{ADMIN}"]) as running:
        assert running.call("GET", "/v1/models")[0] == 200
        for headers in ({"origin": "https://elsewhere.example"}, {"host": "elsewhere.example"}):
            assert running.call("GET", "/v1/models", headers=headers)[0] == 403
            with_key = {**headers, "authorization": f"Bearer {ADMIN}"}
            assert running.call("GET", "/v1/models", headers=with_key)[0] == 200


@pytest.mark.parametrize("key", ["schl\u00fcssel-0123456789", "0123456789 abcdef", "0123456789\tabcdef"])
def test_keys_that_no_header_can_carry_are_refused_at_the_start(key):
    with pytest.raises(InvalidRequest, match="no header can carry") as caught:
        ServeSettings.of({}, {"STYLEFAST_SERVE_API_KEYS": f"alice:{key}"})
    assert key not in str(caught.value)


def test_keys_are_compared_by_their_digests_alone(checkout):
    """Names of keys meet no == anywhere, and nobody but the guard reads the keys."""
    for path in (checkout / "stylefast" / "serving").glob("**/*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            name = getattr(node, "attr", None) or getattr(node, "id", None)
            if name in ("api_keys", "admin_keys"):
                assert path.name in ("guard.py", "settings.py"), path
            equal = isinstance(node, ast.Compare) and any(isinstance(one, ast.Eq | ast.NotEq) for one in node.ops)
            if path.name == "guard.py" and equal:
                inside = [getattr(one, "attr", None) or getattr(one, "id", None) for one in ast.walk(node)]
                assert not {"key", "given", "digest", "_digests"}.intersection(inside), ast.unparse(node)
            assert not (path.name == "guard.py" and isinstance(node, ast.Match))
    assert "hmac.compare_digest(digest, given)" in (checkout / "stylefast" / "serving" / "guard.py").read_text()


def test_a_wrong_key_takes_as_long_wherever_it_is_wrong():
    keys = Keys([f"k{i}:{KEY}{i}" for i in range(8)], "key")
    first, last = "x" + KEY[1:] + "0", KEY + "x"
    times = {"first": [], "last": [], "again": []}
    for _ in range(20_000):
        for name, key in (("first", first), ("last", last), ("again", first)):
            began = time.perf_counter_ns()
            keys.owner(key)
            times[name].append(time.perf_counter_ns() - began)
    middle = {name: median(values) for name, values in times.items()}
    noise = abs(middle["first"] - middle["again"])
    assert abs(middle["first"] - middle["last"]) < 1000 + 5 * noise
    assert keys.owner(KEY + "0") == "k0" and keys.owner(KEY + "7") == "k7"


def test_ten_thousand_names_make_no_new_series():
    with bench() as running:

        def series():
            return running.service.metrics.page()[0].count(b"\n")

        async def storm(count):
            for i in range(count):
                body = b'{"prompt": "a", "model": "m%d", "style": "s%d"}' % (i, i)
                kind = i % 6
                if kind == 0:
                    await ask(running.app, "GET", f"/nothing/{i}")
                elif kind == 1:
                    await ask(running.app, "POST", "/v1/images/generations", body=body)
                elif kind == 2:
                    await ask(running.app, "POST", "/sdapi/v1/txt2img", body=b'{"styles": ["s%d"]}' % i)
                elif kind == 3:
                    await ask(running.app, f"M{i}", "/v1/models")
                elif kind == 4:
                    await ask(running.app, "GET", f"/v1/models/tiny/{i}")
                else:
                    await ask(running.app, "GET", f"/v1/images/{i}")

        in_service(running, storm(12))
        before = series()
        in_service(running, storm(10_000))
        assert series() == before


def test_pictures_steps_and_previews_are_counted():
    with bench() as running:
        assert running.draw(n=2)[0] == running.draw(stream=True, partial_images=1)[0] == 200
        assert running.metric("images_total") == running.metric('style_images_total{kind="none"}') == 3
        assert running.metric("first_preview_seconds_count") == 1 and running.metric("queue_time_seconds_count") == 2
        from stylefast.serving.messages import Counts, Done

        dispatcher = running.service.dispatcher
        dispatcher._take(Counts({"bank_page_loads": 3}, {"bank_pages": 5}, [(0.2, 4), (0.1, 1)]))
        dispatcher._take(Counts({"bank_page_loads": 4}, {"bank_pages": 2}, []))
        assert running.metric("bank_page_loads_total") == 4 and running.metric("bank_pages") == 2
        assert running.metric("step_seconds_count") == 2 and running.metric("step_pictures_sum") == 5
        dispatcher.drawn(Done("x", [], 0.0, kinds=[["StyleAligned"], ["InstantStyle", "StyleAligned"], ["Mine"]]))
        for kind in ("StyleAligned", "several", "other"):
            assert running.metric(f'style_images_total{{kind="{kind}"}}') == 1
