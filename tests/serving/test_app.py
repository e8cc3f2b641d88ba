"""Parts of the application that no client of a running server reaches by itself."""

import asyncio
from types import SimpleNamespace

import pytest

from stylefast.serving.app import Asker, while_connected
from stylefast.serving.messages import Cancel
from tests.serving.test_dispatcher import Bench, in_loop


class Connected:
    """A request whose client is there."""

    async def is_disconnected(self):
        return False


@pytest.mark.parametrize("stay", [False, True])
def test_a_handler_that_is_cancelled_ends_its_request_unless_it_shall_stay(stay):
    @in_loop
    async def run():
        bench = Bench().ready()
        ticket = bench.submit("a")
        service = SimpleNamespace(dispatcher=bench.dispatcher)

        async def answer():
            with Asker(service, ticket, stay):
                await while_connected(Connected(), SimpleNamespace(stay=stay), ticket)

        waiting = asyncio.ensure_future(answer())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled() and ticket.over is not stay
        assert (Cancel("a") in bench.engine.sent) is not stay

    run()
