"""OpenAI's client library of a generation ago, which many programs still have, unmodified."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stylefast.models.checkpoint import TINY

OLD = Path(sys.prefix) / "openai-1"  # where `make dev` puts it
SCRIPT = """
import json, sys
import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0)
own = {"stylefast": {"steps": 2, "seed": 7}}
found = {"version": openai.VERSION}
reply = client.images.generate(prompt="a fish", model="tiny", response_format="b64_json", extra_body=own)
found["picture"] = reply.data[0].b64_json[:8]
with open(sys.argv[2], "rb") as picture:
    found["edit"] = client.images.edit(image=picture, prompt="a fish", extra_body=own).data[0].b64_json[:8]
events = client.images.generate(prompt="a fish", stream=True, partial_images=1, extra_body=own)
found["events"] = [event.type for event in events]
found["models"] = [model.id for model in client.models.list()]
try:
    client.images.generate(prompt="a fish", model="dall-e-3")
except openai.NotFoundError as error:
    found["error"] = [error.code, error.param]
print(json.dumps(found))
"""


@pytest.mark.skipif(not OLD.is_dir(), reason=f"{OLD} is missing; `make dev` installs it")
def test_the_client_of_a_generation_ago(server):
    command = [sys.executable, "-c", SCRIPT, server.url, str(TINY / "references" / "neon.png")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OLD), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"].startswith("1.") and found["picture"] == found["edit"] == "iVBORw0K"
    assert found["events"] == ["image_generation.partial_image", "image_generation.completed"]
    assert "tiny/neon" in found["models"] and found["error"] == ["model_not_found", "model"]
