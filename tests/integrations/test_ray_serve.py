"""The service on Ray Serve: what its arguments mean, and two replicas on a real local Ray, one of which is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace
from urllib.error import HTTPError

import openai
import pytest
import yaml

from stylefast.errors import InvalidRequest
from stylefast.serving.registry import StyleRegistry
from tests.serving.test_registry import add

ray_serve = pytest.importorskip(
    "stylefast.integrations.ray_serve",
    reason="needs Ray Serve: pip install 'stylefast[ray]', or `make test-ray`",
    exc_type=ImportError,
)
WAIT = 600  # seconds for what takes ten on an idle machine
SLOTS = 4
REQUESTS = 24
DRAWN = re.compile(r'pid=(\d+).*"request_id": "([\w-]+)", "replica": "(\w+)", "style": "(\w*)"')


# arguments


def options(application, name="engine"):
    """Return what Ray was told of a deployment."""
    front = application._bound_deployment
    return front if name == "front" else front.init_args[1]._bound_deployment


def test_arguments_are_the_options_of_the_command(tmp_path):
    words = {"model": "tiny", "max_running": "3", "accept_any_model": "true", "no_auth": True, "cpus": "2", "gpus": 0}
    found = ray_serve.app({**words, "replicas": 2, "styles": str(tmp_path)})
    load, settings = options(found).init_args
    assert (settings.max_running, settings.accept_any_model, settings.styles_dir) == (3, True, str(tmp_path))
    assert load.choice.options is not None and options(found).num_replicas == 2
    assert options(found).ray_actor_options["num_cpus"] == 2 and options(found).ray_actor_options["num_gpus"] == 0
    assert options(found).max_ongoing_requests >= 3


def test_a_range_of_replicas_follows_the_queue():
    found = options(ray_serve.app({"replicas": "2-5", "no_auth": "true", "max_running": 4, "gpus": 0}))
    scaling = found._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 4)
    target = SimpleNamespace(get_target_ongoing_requests=lambda: 4)
    context = SimpleNamespace(config=target, total_num_requests=8.0, aggregated_metrics=None)
    assert ray_serve.by_queue(context)[0] == 2
    context.aggregated_metrics = {ray_serve.WAITING: {"r1": 6.0, "r2": 7.0}, "other": {"r1": 99.0}}
    assert ray_serve.by_queue(context)[0] == (8 + 7) / 4


@pytest.mark.parametrize(
    "args, words",
    [
        ({}, "there are no API keys"),
        ({"no_auth": "true", "replicas": "0"}, "replicas is 0"),
        ({"no_auth": "true", "replicas": "4-2"}, "smaller number first"),
        ({"no_auth": "true", "replicas": "many"}, "replicas is 'many'"),
        ({"no_auth": "true", "gpus": "-1"}, "gpus is -1"),
        ({"no_auth": "true", "gpus": "all"}, "gpus is 'all'"),
        ({"no_auth": "true", "port": 9000}, "port is Ray's"),
        ({"no_auth": "true", "max_runing": 3}, "max-runing"),
        ({"no_auth": "true", "max_running": "many"}, "max-running"),
        ({"no_auth": "treu"}, "no_auth is 'treu'"),
        ({"api_keys": "alice:0123456789abcdef"}, "api_keys come from STYLEFAST_SERVE_API_KEYS"),
    ],
)
def test_wrong_arguments_are_refused_by_name(args, words):
    with pytest.raises(InvalidRequest) as caught:
        ray_serve.app({"gpus": 0, **args})
    assert words in str(caught.value) and "0123456789abcdef" not in str(caught.value)


def test_a_list_of_hosts_is_taken_whole():
    found = ray_serve.app({"no_auth": True, "allow_image_urls": True, "image_url_hosts": ["a.example", "b.example"]})
    assert tuple(options(found).init_args[1].image_url_hosts) == ("a.example", "b.example")


def test_settings_that_may_change_while_it_runs_are_checked():
    assert ray_serve._known(None, ("styles",)) == {} and ray_serve._known({"styles": []}, ("styles",)) == {"styles": []}
    with pytest.raises(InvalidRequest, match="max_runing"):
        ray_serve._known({"max_runing": 3}, ("max_waiting",))


# a real one


class Cluster:
    """A local Ray with the service, started as docs/deployment.md says."""

    def __init__(self, folder, checkout):
        registry = StyleRegistry(folder)
        add(registry, "ours")
        add(registry, "theirs")
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        config = yaml.safe_load((checkout / "deploy" / "ray.yaml").read_text())
        config["http_options"]["port"] = self.port
        application = config["applications"][0]
        application["args"] |= {"styles": str(folder), "replicas": 2, "max_running": SLOTS, "cpus": 0.5, "gpus": 0}
        application["deployments"][1]["user_config"]["styles"] = ["ours"]
        (folder.parent / "ray.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", "ray.yaml"]
        given = {"RAY_ADDRESS": "local", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        given["RAY_raylet_start_wait_time_s"] = str(WAIT)  # where other tests take the cores
        given["PYTHONPATH"] = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            command,
            cwd=folder.parent,
            env={**os.environ, **given},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def _read(self):
        for line in self.process.stdout:
            self.lines.append(line)

    def wait(self, test, what):
        """Wait until a test passes."""
        until = time.monotonic() + WAIT
        while time.monotonic() < until and self.process.poll() is None:
            if test():
                return
            time.sleep(0.2)
        raise AssertionError(f"{what} did not happen:\n" + "".join(self.lines[-50:]))

    def get(self, path):
        """Return the body of a GET; None if there is no reply."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=WAIT) as reply:
                return reply.read().decode()
        except OSError:
            return None

    def metric(self, name):
        """Return a metric."""
        page = self.get("/metrics") or ""
        return next((float(line.split()[-1]) for line in page.splitlines() if line.startswith(name + " ")), None)

    @property
    def drawn(self):
        """Return (process, request, replica, style) of all that the replicas have begun."""
        return [found.groups() for line in list(self.lines) if (found := DRAWN.search(line))]

    def post(self, number, style, steps=4):
        """Ask for a picture; return the status and the reply."""
        body = {"prompt": "a fish", "model": f"tiny/{style}", "stylefast": {"seed": 1, "steps": steps}}
        headers = {"content-type": "application/json", "x-request-id": number}
        request = urllib.request.Request(self.url + "/v1/images/generations", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as reply:
                assert reply.headers.get_all("x-request-id") == [number]
                return reply.status, json.load(reply)
        except HTTPError as error:
            return error.code, json.load(error)

    def close(self):
        """End it, and all that it has started."""
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self._reader.join(10)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, checkout):
    folder = tmp_path_factory.mktemp("ray") / "styles"
    folder.mkdir()
    found = Cluster(folder, checkout)
    try:
        found.wait(lambda: found.metric("stylefast:picture_slots") == 2 * SLOTS, "both replicas being ready")
        yield found
    finally:
        found.close()


@pytest.mark.slow
def test_the_clients_of_the_service_are_served(cluster):
    client = openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", timeout=WAIT, max_retries=0)
    assert {"tiny", "tiny/neon", "tiny/ours"} <= {model.id for model in client.models.list()}
    reply = client.images.generate(prompt="a fish", model="tiny/ours", extra_body={"stylefast": {"steps": 4}})
    assert reply.data[0].b64_json
    events = client.images.generate(
        prompt="a fish", model="tiny/neon", stream=True, partial_images=2, extra_body={"stylefast": {"steps": 8}}
    )
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a fish", model="tiny", extra_body={"stylefast": {"style": "nothing"}})
    assert caught.value.code == "style_not_found"
    for name in ("step_seconds_count", "step_pictures_sum", "loras_registered", "memory_bytes"):
        cluster.wait(lambda name=name: cluster.metric(f"stylefast:{name}"), f"{name} in the metrics")


@pytest.mark.slow
def test_requests_go_to_a_replica_that_holds_their_style(cluster):
    cluster.post("first", "theirs")
    time.sleep(1)  # Ray tells its routers ten times a second
    for i in range(6):
        assert cluster.post(f"same-{i}", "theirs")[0] == 200
    cluster.wait(lambda: any(number == "same-5" for _, number, _, _ in cluster.drawn), "the last line in the log")
    replicas = {replica for _, number, replica, style in cluster.drawn if style == "theirs"}
    assert len(replicas) == 1


@pytest.mark.slow
def test_a_cancelled_request_is_drawn_no_further(cluster):
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cluster.post, "long", "neon", 900)
        cluster.wait(lambda: asked.done() or json.loads(cluster.get("/v1/images/long") or "{}").get("step"), "a step")
        request = urllib.request.Request(cluster.url + "/v1/images/long", method="DELETE")
        with urllib.request.urlopen(request, timeout=WAIT) as reply:
            assert json.load(reply)["cancelled"]
        status, reply = asked.result()
        assert status == 499 and reply["error"]["code"] == "request_cancelled"
    cluster.wait(lambda: cluster.metric("stylefast:num_pictures_running") == 0, "the place being free")


@pytest.mark.slow
def test_a_killed_replica_costs_no_request_but_those_it_had_and_none_is_drawn_twice(cluster):
    before = cluster.metric("stylefast:images_total")
    styles = ["ours", "theirs", "neon", "chalk"]
    numbers = [f"load-{i}" for i in range(REQUESTS)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = [pool.submit(cluster.post, number, styles[i % 4], 12) for i, number in enumerate(numbers)]

        def begun():
            return Counter(process for process, number, _, _ in cluster.drawn if number.startswith("load-"))

        cluster.wait(lambda: len(begun()) == 2, "both replicas drawing")
        os.kill(int(begun().most_common()[0][0]), signal.SIGKILL)
        replies = [one.result() for one in asked]
    made = [reply for status, reply in replies if status == 200]
    lost = [(status, reply["error"]["code"]) for status, reply in replies if status != 200]
    assert set(lost) == {(503, "engine_lost")} and len(lost) <= SLOTS and len(made) == REQUESTS - len(lost)
    assert all(len(reply["data"]) == 1 and reply["data"][0]["b64_json"] for reply in made)
    assert cluster.metric("stylefast:images_total") - before == len(made)
    counts = Counter(number for _, number, _, _ in cluster.drawn if number.startswith("load-"))
    # what the killed one said last may not have reached the log
    assert set(counts.values()) == {1} and len(made) <= len(counts) <= REQUESTS
    cluster.wait(lambda: cluster.metric("stylefast:picture_slots") == 2 * SLOTS, "another replica in its place")
    assert cluster.post("after", "ours")[0] == 200
