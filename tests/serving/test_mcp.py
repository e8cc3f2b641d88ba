"""The official client of the Model Context Protocol, against `stylefast mcp` as agents start it."""

import asyncio
import base64
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest
from mcp import Client, StdioServerParameters
from PIL import Image

from stylefast.models.checkpoint import TINY

WOODCUT = TINY / "references" / "woodcut.png"


def ask(url, *calls):
    """Return the tools' names, and the results of calls (name, arguments)."""

    async def talk():
        command = ["-m", "stylefast.cli", "mcp", "--url", url]
        async with Client(StdioServerParameters(command=sys.executable, args=command)) as client:
            tools = [tool.name for tool in (await client.list_tools()).tools]
            return tools, [await client.call_tool(*call) for call in calls]

    return asyncio.run(talk())


def test_an_agent_draws_a_picture(server):
    arguments = {"prompt": "a fish", "style": "neon", "quality": "low", "seed": 7}
    tools, (styles, drawn, again, wrong, odd) = ask(
        server.url,
        ("list_styles", {}),
        ("generate_image", arguments),
        ("generate_image", arguments),
        ("generate_image", {"prompt": "a fish", "style": "neom"}),
        ("generate_image", {"prompt": "a fish", "control": "edges"}),
    )
    assert set(tools) == {"list_styles", "generate_image", "edit_image"}
    assert {"neon", "chalk"} <= set(styles.structured_content["result"])
    image, text = drawn.content
    assert Image.open(BytesIO(base64.b64decode(image.data))).size == (64, 64) and text.text.startswith("seed 7, 64x64")
    assert again.content[0].data == image.data
    assert wrong.is_error and "neon" in wrong.content[0].text
    assert odd.is_error and "no argument 'control'; it takes prompt, style" in odd.content[0].text


def in_text(picture):
    stream = BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def opened(reply):
    assert not reply.is_error, reply.content
    return np.asarray(Image.open(BytesIO(base64.b64decode(reply.content[0].data))).convert("RGB")).astype(int)


def test_an_agent_gives_pictures_as_styles_and_to_change(server):
    reference, few = Image.open(WOODCUT).convert("RGB"), {"quality": "low", "seed": 7}
    mask = Image.new("RGBA", reference.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, reference.width // 2, reference.height))
    given = {"prompt": "a fish", "image": in_text(reference)} | few
    _, (plain, styled, changed, more, half, both, empty) = ask(
        server.url,
        ("generate_image", {"prompt": "a fish"} | few),
        ("generate_image", {"prompt": "a fish", "style_image": in_text(reference)} | few),
        ("edit_image", given | {"strength": 0.3}),
        ("edit_image", given | {"strength": 0.9}),
        ("edit_image", given | {"mask": in_text(mask), "strength": 1.0}),
        ("generate_image", {"prompt": "a fish", "style": "neon", "style_image": in_text(reference)}),
        ("edit_image", given | {"image": "no picture"}),
    )
    assert (opened(plain) != opened(styled)).any()
    before = np.asarray(reference.resize((64, 64))).astype(int)
    assert abs(opened(changed) - before).mean() < abs(opened(more) - before).mean()
    kept = opened(half)[:, 44:]  # beyond the soft border
    assert (kept == before[:, 44:]).all() and (opened(half)[:, :20] != before[:, :20]).any()
    assert both.is_error and "give one of them" in both.content[0].text
    assert empty.is_error and "image" in empty.content[0].text


def test_a_service_that_is_not_there_is_said():
    _, (found,) = ask("http://127.0.0.1:9", ("list_styles", {}))
    assert found.is_error and "start one: stylefast serve" in found.content[0].text


@pytest.mark.parametrize("body", [b'{"error": "no"}', b'["no"]', b"{}"])
def test_what_answers_in_front_of_the_service_is_no_riddle(body):
    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as gateway:
        threading.Thread(target=gateway.serve_forever).start()
        try:
            _, (found,) = ask(f"http://127.0.0.1:{gateway.server_port}", ("list_styles", {}))
        finally:
            gateway.shutdown()
    assert found.is_error and "the service answered with status 401" in found.content[0].text
