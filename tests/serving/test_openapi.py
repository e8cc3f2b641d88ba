"""The OpenAPI document is what the service does: cases made from it, by schemathesis."""

import json

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tests.serving.bench import bench

schemathesis = pytest.importorskip("schemathesis")
jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with bench(styles_dir=str(tmp_path_factory.mktemp("styles")), max_waiting=1000) as found:
        yield found


def cases(url, each):
    """Return tests of all operations at a server, `each` cases of every one, by the operation's name."""
    from schemathesis import checks

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", wait_for_schema=60)
    wanted = [
        checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
    ]
    found = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        def test(case):
            case.call_and_validate(base_url=url, checks=wanted, timeout=600)

        strategy = st.one_of(operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode)
        chosen = settings(
            max_examples=each, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        from hypothesis import given

        found[operation.label] = chosen(given(case=strategy)(test))
    return found


def test_a_few_hundred_cases_are_answered_as_the_document_says(running):
    tests = cases(running.url, 12)
    assert {"POST /v1/images/generations", "POST /v1/images/edits", "DELETE /v1/styles/{name}"} <= set(tests)
    for test in tests.values():
        test()


@pytest.mark.soak
def test_five_thousand_cases_end_without_an_error_of_the_server(server):
    tests = cases(server.url, 1)
    each = -(-5000 // len(tests))
    for test in cases(server.url, each).values():
        test()


@pytest.mark.parametrize("response_format", ["b64_json", "url"])
def test_replies_with_pictures_and_with_addresses_are_as_the_document_says(running, response_format):
    schema = running.app.openapi()["components"]["schemas"]["Images"]
    reply = json.loads(running.draw(response_format=response_format)[2])
    jsonschema.validate(reply, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**reply, "data": [{}]}, schema)


def test_the_document_has_the_envelope_for_every_error(running):
    document = running.app.openapi()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], (method, path)
            for status, reply in operation["responses"].items():
                if int(status) >= 400:
                    assert reply["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
    assert not [name for name in document["components"]["schemas"] if "Validation" in name]
