"""The official client of the Model Context Protocol, against `stylefast mcp` as agents start it."""

import asyncio
import base64
import sys
from io import BytesIO

from mcp import Client, StdioServerParameters
from PIL import Image


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
    tools, (styles, drawn, again, wrong) = ask(
        server.url,
        ("list_styles", {}),
        ("generate_image", arguments),
        ("generate_image", arguments),
        ("generate_image", {"prompt": "a fish", "style": "neom"}),
    )
    assert set(tools) == {"list_styles", "generate_image"}
    assert {"neon", "chalk"} <= set(styles.structured_content["result"])
    image, text = drawn.content
    assert Image.open(BytesIO(base64.b64decode(image.data))).size == (64, 64) and text.text.startswith("seed 7, 64x64")
    assert again.content[0].data == image.data
    assert wrong.is_error and "neon" in wrong.content[0].text


def test_a_service_that_is_not_there_is_said():
    _, (found,) = ask("http://127.0.0.1:9", ("list_styles", {}))
    assert found.is_error and "start one: stylefast serve" in found.content[0].text
