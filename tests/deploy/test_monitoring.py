"""The dashboard and the alarms ask for metrics, labels and values that the service has."""

import json
import re

import pytest
import yaml

from stylefast.serving import tickets
from tests.docs.test_serving import families, metric_names

NAME = re.compile(r"\bstylefast:\w+")


@pytest.fixture(scope="module")
def dashboard(checkout):
    return json.loads((checkout / "deploy" / "grafana.json").read_text())


@pytest.fixture(scope="module")
def rules(checkout):
    (group,) = yaml.safe_load((checkout / "deploy" / "alarms.yaml").read_text())["groups"]
    return group["rules"]


@pytest.fixture(scope="module")
def expressions(dashboard, rules):
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*asked, *(rule["expr"] for rule in rules)]


def test_every_metric_exists(expressions):
    asked = {name for expression in expressions for name in NAME.findall(expression)}
    assert len(asked) > 8 and asked <= metric_names()


def test_every_metric_is_shown(dashboard):
    asked = {
        name for panel in dashboard["panels"] for target in panel["targets"] for name in NAME.findall(target["expr"])
    }
    shown = {re.sub(r"_(total|bucket)$", "", name) for name in asked}
    assert shown == {family.name for family in families()}


def test_every_label_exists(expressions):
    own = {"instance", "job", "le"}
    labels = {}
    for family in families():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for expression in expressions:
        (*_, known) = [labels.get(name, set()) for name in NAME.findall(expression)] or [set()]
        used = set(re.findall(r"(\w+)\s*(?:=~|!=|=)\s*\"", expression))
        used |= {name for inner in re.findall(r"by \((.*?)\)", expression) for name in re.split(r",\s*", inner)}
        assert used <= known | own, expression


def test_the_values_of_status_are_those_of_requests_and_of_http(expressions):
    for expression in expressions:
        for value in re.findall(r'status(?:=~|!=|=)"(.*?)"', expression):
            assert value in tickets.OVER or re.fullmatch(r"[1-5][0-9.]{2}", value), expression


def test_the_panels_do_not_overlap_and_have_titles(dashboard):
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24 and panel["title"] and panel["description"]
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_an_alarm_says_what_is_wrong_and_how_urgent_it_is(rules):
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket") and rule["annotations"]["summary"]
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_the_page_has_all_alarms(checkout, rules):
    page = (checkout / "docs" / "deployment.md").read_text()
    assert re.findall(r"^\| `(Stylefast\w+)` \|", page, re.MULTILINE) == [rule["alert"] for rule in rules]
