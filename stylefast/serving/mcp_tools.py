"""A server of the Model Context Protocol: a running `stylefast serve` as tools for agents."""

import base64
from collections.abc import Mapping
from typing import Any

import httpx2
from mcp.server import MCPServer
from mcp.server.mcpserver import Image
from mcp.server.mcpserver.exceptions import ToolError

import stylefast
from stylefast.values import did_you_mean, listed, quoted

INSTRUCTIONS = (
    "Draws pictures in registered styles. Call list_styles first, then generate_image with one of its names, or with a "
    "picture whose style to take. edit_image changes a picture, or a part of it."
)
_SECONDS = 900.0


class _Tools(MCPServer):
    """The protocol's server, which would pass over arguments that a tool does not have; this one refuses them."""

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        known = {tool.name: list(tool.input_schema["properties"]) for tool in await self.list_tools()}
        odd = [one for one in arguments if one not in known.get(name, arguments)]
        if odd:
            near = did_you_mean(odd[0], known[name])
            raise ToolError(f"{name} has no argument {quoted(odd[0])}; it takes {listed(known[name])}{near}")
        return await super().call_tool(name, arguments, context)


def make_tools(url: str, key: str | None = None, transport: httpx2.AsyncBaseTransport | None = None) -> MCPServer:
    """Return the server whose tools ask the service at `url`, such as http://localhost:8000.

    key: its API key. transport: replaces the network.
    """
    tools = _Tools("stylefast", version=stylefast.__version__, instructions=INSTRUCTIONS)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}

    async def ask(method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            async with httpx2.AsyncClient(headers=headers, timeout=_SECONDS, transport=transport) as client:
                reply = await client.request(method, url.rstrip("/") + path, json=body)
                found = reply.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise ToolError(f"there is no service at {url} ({error}); start one: stylefast serve") from None
        if reply.status_code != 200:
            raise ToolError(_message(found) or f"the service answered with status {reply.status_code}")
        return found

    @tools.tool()
    async def list_styles() -> list[str]:
        """List the names that generate_image takes as `style`."""
        styles = (await ask("GET", "/v1/styles"))["data"]
        return sorted(style["id"] for style in styles if style["fault"] is None)

    async def drawn(route: str, fields: Mapping[str, Any], own: Mapping[str, Any]) -> list[Any]:
        body = {"output_format": "png", **fields, "stylefast": {k: v for k, v in own.items() if v is not None}}
        reply = await ask("POST", route, {k: v for k, v in body.items() if v is not None})
        said = reply["stylefast"]
        words = [f"seed {said['seeds'][0]}, {reply['size']} pixels", *said["warnings"]]
        return [Image(data=base64.b64decode(reply["data"][0]["b64_json"]), format="png"), "; ".join(words)]

    @tools.tool(structured_output=False)
    async def generate_image(
        prompt: str,
        style: str | None = None,
        style_image: str | None = None,
        negative_prompt: str = "",
        size: str = "auto",
        quality: str = "auto",
        seed: int = -1,
    ) -> list[Any]:
        """Draw one picture.

        Args:
            prompt: what it shows.
            style: a name of list_styles.
            style_image: a PNG, JPEG or WebP in base64 whose style to take, instead of a registered one.
            negative_prompt: what to steer away from.
            size: WIDTHxHEIGHT in pixels, each divisible by 8; auto: the model's own.
            quality: low, medium, high, xhigh or max: more steps take longer.
            seed: draws the same picture again; -1: another one each time.
        """
        if style is not None and style_image is not None:
            raise ToolError("style and style_image both say whose style to take; give one of them")
        route = "/v1/images/generations" if style_image is None else "/v1/images/edits"
        fields = {"prompt": prompt, "size": size, "quality": quality, "image": style_image}
        return await drawn(route, fields, {"seed": seed, "negative_prompt": negative_prompt, "style": style})

    @tools.tool(structured_output=False)
    async def edit_image(
        prompt: str,
        image: str,
        mask: str | None = None,
        strength: float = 0.6,
        style: str | None = None,
        negative_prompt: str = "",
        quality: str = "auto",
        seed: int = -1,
    ) -> list[Any]:
        """Change a picture, or the part of it that a mask leaves open.

        Args:
            prompt: what it shows afterwards.
            image: a PNG, JPEG or WebP in base64.
            mask: a PNG in base64 whose transparent parts are what changes; without one, everything does.
            strength: how much changes, 0 to 1; 1 leaves nothing of what was there.
            style: a name of list_styles.
            negative_prompt: what to steer away from.
            quality: low, medium, high, xhigh or max: more steps take longer.
            seed: draws the same picture again; -1: another one each time.
        """
        fields = {"prompt": prompt, "quality": quality, "image": image, "mask": mask}
        own = {"seed": seed, "negative_prompt": negative_prompt, "style": style, "strength": strength}
        return await drawn("/v1/images/edits", fields, own)

    return tools


def _message(found: Any) -> str:
    """Return an error's words; "" where something in front of the service answered in a shape of its own."""
    error = found.get("error") if isinstance(found, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else ""
