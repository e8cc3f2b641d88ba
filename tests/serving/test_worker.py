"""Calls in the engine's process: each gets an answer, however early it is cancelled."""

import asyncio
from types import SimpleNamespace

from stylefast.serving import engine_process
from stylefast.serving.messages import Cancel, Failed, LoadStyle, Run, Stop


class Connection:
    """Stand-in for the pipe: gives what it has, and notes what is sent."""

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)


def worker(connection, monkeypatch):
    monkeypatch.setattr(engine_process, "named_styles", lambda engine: {})
    monkeypatch.setattr(engine_process, "_Notices", object)  # which would change this process's log
    return engine_process._Worker(connection, SimpleNamespace(runner=SimpleNamespace()), {})


def test_a_call_that_is_cancelled_before_it_began_is_answered(monkeypatch):
    connection = Connection()

    async def run():
        found = worker(connection, monkeypatch)
        for message in (Run("1", {"requests": []}), LoadStyle("2", "neon")):
            found._take(message)
        found._take(Cancel("1"))
        found._take(Stop())  # which cancels what makes no pictures
        for _ in range(5):
            await asyncio.sleep(0)
        assert not found._tasks and not found._errands

    asyncio.run(run())
    assert [(message.ticket, message.error) for message in connection.sent if isinstance(message, Failed)] == [
        ("1", "JobCancelled"),
        ("2", "JobCancelled"),
    ]
