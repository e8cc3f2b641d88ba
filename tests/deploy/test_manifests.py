"""What `deploy` has for containers, Kubernetes and systemd fits the command, its settings and its routes."""

import argparse
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml

from stylefast.commands import serve
from stylefast.serving import links
from stylefast.serving.guard import OPEN_PATHS
from stylefast.serving.server import _CLOSE_SECONDS
from stylefast.serving.settings import PREFIX, ServeSettings
from tests.docs.test_serving import metric_names

NAMES = {f"{PREFIX}{name.upper()}" for name in ServeSettings.__dataclass_fields__} | {f"{PREFIX}CONFIG"}
LABELS = {"app.kubernetes.io/name": "stylefast"}


@pytest.fixture(scope="module")
def folder(checkout):
    return checkout / "deploy"


@pytest.fixture(scope="module")
def objects(folder):
    """The objects of Kubernetes, by kind; there may be several of one."""
    found = {}
    for path in sorted((folder / "kubernetes").glob("*.yaml")):
        for one in yaml.safe_load_all(path.read_text()):
            if "kind" in one:
                found.setdefault(one["kind"], []).append(one)
    return found


@pytest.fixture(scope="module")
def pod(objects):
    return objects["Deployment"][0]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    return pod["containers"][0]


@pytest.fixture(scope="module")
def unit(folder):
    return keys_of((folder / "stylefast.service").read_text())


def keys_of(text):
    """Return (section, key) -> values of a unit of systemd, where keys may come several times."""
    found, section = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault((section, key), []).append(value)
    return found


def parsed(words):
    """Return the options of `stylefast serve` in words; SystemExit for unknown ones."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    serve.add_arguments(parser)
    return parser.parse_args(list(words))


def known_variables(checkout, names):
    """Return which of the names the server reads, or its documentation has."""
    page = (checkout / "docs" / "env.md").read_text()
    return [name for name in names if name in NAMES or f"`{name}`" in page]


# Kubernetes


def test_every_object_has_its_kind_and_name(folder):
    for path in (folder / "kubernetes").glob("*.yaml"):
        for one in yaml.safe_load_all(path.read_text()):
            if path.name == "prometheus-adapter.yaml":  # values of a chart
                assert set(one) == {"rules"}
            else:
                assert one["apiVersion"] and one["kind"], path.name
                assert one["kind"] == "Kustomization" or one["metadata"]["name"].startswith("stylefast")


def test_the_list_of_files_is_whole(folder):
    listed = set(yaml.safe_load((folder / "kubernetes" / "kustomization.yaml").read_text())["resources"])
    there = {path.name for path in (folder / "kubernetes").glob("*.yaml")}
    assert listed == there - {"kustomization.yaml", "secret.yaml", "prometheus-adapter.yaml"}


def test_the_pods_settings_are_those_of_the_command(checkout, container, objects, tmp_path):
    given = {one["name"]: one for one in container["env"]}
    assert known_variables(checkout, given) == list(given)
    arguments = parsed(container["args"])
    flags = {name: getattr(arguments, name) for name in ServeSettings.flags()}
    secrets = objects["Secret"][0]
    environment = {}
    for name, one in given.items():
        if "valueFrom" in one:
            reference = one["valueFrom"]["secretKeyRef"]
            assert reference["name"] == secrets["metadata"]["name"]
            environment[name] = secrets["stringData"][reference["key"]]
        else:
            environment[name] = one["value"]
    environment[f"{PREFIX}STYLES_DIR"] = str(tmp_path)
    settings = ServeSettings.of(flags, environment)
    assert settings.api_keys and settings.admin_keys and settings.open_metrics
    assert settings.port == container["ports"][0]["containerPort"]


def test_a_pod_that_ends_gets_the_time_to_drain(pod, container):
    given = {one["name"]: one.get("value") for one in container["env"]}
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    needed = int(seconds) + float(given[f"{PREFIX}GRACE"]) + 2 * _CLOSE_SECONDS
    assert command == "sleep" and pod["terminationGracePeriodSeconds"] > needed


def test_probes_need_no_key_and_a_lost_engine_does_not_kill_the_pod(container):
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    assert set(paths.values()) <= set(OPEN_PATHS)
    assert all(container[name]["httpGet"]["port"] == container["ports"][0]["name"] for name in paths)


def test_a_pod_may_do_little(pod, container):
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
    assert mounts["/styles"]["readOnly"] and mounts["/models"]["readOnly"]
    assert {"/tmp", "/var/cache/stylefast"} <= set(mounts)
    assert {one["name"] for one in mounts.values()} == {one["name"] for one in pod["volumes"]}


def test_volumes_can_be_filled(objects):
    assert {tuple(one["spec"]["accessModes"]) for one in objects["PersistentVolumeClaim"]} == {("ReadWriteMany",)}


def test_all_objects_mean_the_same_pods(objects, container):
    deployment = objects["Deployment"][0]
    assert deployment["spec"]["selector"]["matchLabels"] == LABELS
    assert deployment["spec"]["template"]["metadata"]["labels"] == LABELS
    assert objects["Service"][0]["spec"]["selector"] == LABELS
    assert objects["PodDisruptionBudget"][0]["spec"]["selector"]["matchLabels"] == LABELS
    policy = objects["NetworkPolicy"][0]["spec"]
    assert policy["podSelector"]["matchLabels"] == LABELS
    assert policy["ingress"][0]["ports"][0]["port"] == container["ports"][0]["containerPort"]
    scaler = objects["HorizontalPodAutoscaler"][0]["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["minReplicas"] <= deployment["spec"]["replicas"] <= scaler["maxReplicas"]
    assert objects["PodDisruptionBudget"][0]["spec"]["minAvailable"] < scaler["minReplicas"]
    claims = {one["metadata"]["name"] for one in objects["PersistentVolumeClaim"]}
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    used = {one["persistentVolumeClaim"]["claimName"] for one in volumes if "persistentVolumeClaim" in one}
    assert used == claims


def test_the_autoscaler_follows_the_queue(objects, folder):
    rule = yaml.safe_load((folder / "kubernetes" / "prometheus-adapter.yaml").read_text())["rules"]["custom"][0]
    wanted = objects["HorizontalPodAutoscaler"][0]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert rule["name"]["as"] == wanted and re.fullmatch(r"[a-z_]+", wanted)
    asked = re.findall(r"stylefast:\w+", rule["seriesQuery"] + rule["metricsQuery"])
    assert set(asked) == {"stylefast:num_requests_waiting"} <= metric_names()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kustomize_takes_them(folder):
    done = subprocess.run(["kubectl", "kustomize", str(folder / "kubernetes")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = [one["kind"] for one in yaml.safe_load_all(done.stdout)]
    assert sorted(kinds) == sorted(
        ["Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"]
        + 2 * ["PersistentVolumeClaim"]
    )


# the container


def test_the_container_is_pinned_and_has_no_rights(checkout, folder):
    text = (folder / "Containerfile").read_text().replace("\\\n", " ")
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2 and len(set(bases)) == 1
    assert re.fullmatch(r"docker\.io/library/python:\d+\.\d+\.\d+-slim-\w+", bases[0])
    last = text[text.rindex("FROM ") :]
    assert re.search(r"^USER 10001:10001$", last, re.MULTILINE) and "readyz" in re.search(r"HEALTHCHECK.*", last)[0]
    assert re.search(r'^ENTRYPOINT \["stylefast", "serve"\]$', last, re.MULTILINE)
    parsed(re.findall(r'"([^"]+)"', re.search(r"^CMD (.*)", last, re.MULTILINE)[1]))
    variables = re.findall(r"\b(STYLEFAST_\w+)=", last)
    assert variables and known_variables(checkout, variables) == variables
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    extras = re.search(r"/src\[(.*?)\]", text)[1].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    copied = re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE)
    assert all((checkout / name).exists() for name in copied)


def test_the_container_has_what_the_pods_expect(folder, container):
    text = (folder / "Containerfile").read_text()
    for mount in ("/styles", "/models", "/var/cache/stylefast"):
        assert mount in text and mount in {one["mountPath"] for one in container["volumeMounts"]}
    assert f"EXPOSE {container['ports'][0]['containerPort']}" in text


# systemd


def test_the_units_settings_are_those_of_the_command(checkout, unit):
    ((program, *words),) = (line.split() for line in unit["Service", "ExecStart"])
    assert program.endswith("/bin/stylefast") and words[0] == "serve"
    arguments = parsed(words[1:])
    variables = [one.partition("=")[0] for one in unit["Service", "Environment"]]
    assert "STYLEFAST_SERVE_CONFIG" in variables
    known = known_variables(checkout, variables)
    assert [name for name in variables if name.startswith("STYLEFAST")] == [n for n in known if n.startswith("STYLEF")]
    assert arguments.grace is None  # what stands here, the file can't change
    assert float(unit["Service", "TimeoutStopSec"][0]) > 2 * ServeSettings.grace + 2 * _CLOSE_SECONDS
    assert unit["Service", "KillSignal"] == ["SIGTERM"] and unit["Service", "Restart"] == ["on-failure"]


def test_no_address_of_a_picture_gets_into_nginxs_log(folder):
    text = (folder / "nginx.conf").read_text()
    assert not re.search(r"log_format[^;]*\$(uri|request|request_uri|args)\b", text)
    (hidden,) = re.findall(r"map \$uri \$shown_uri \{\s*~(\S+) ", text)
    path = f"/v1/images/img_{'x' * 32}/0.png"
    assert links.PATH.fullmatch(path) and re.match(hidden, path) and "$shown_uri" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(folder, tmp_path):
    text = (folder / "stylefast.service").read_text()
    copy = tmp_path / "stylefast.service"
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0 and "stylefast.service" not in done.stderr, done.stderr
    rated = ["systemd-analyze", "security", "--offline=true", "--threshold=25", str(copy)]
    done = subprocess.run(rated, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
