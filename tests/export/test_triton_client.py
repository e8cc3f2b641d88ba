"""The loop's side of one client: what it asks of the server, and when it no longer does."""

import importlib.util
import sys
import threading
import time
from types import SimpleNamespace

import pytest

FINAL = 1


@pytest.fixture
def client_class(checkout, monkeypatch):
    """`Client` of the loop's model, with a stand-in for the server's module."""
    folder = checkout / "export" / "triton_repo" / "models"
    monkeypatch.syspath_prepend(str(folder))
    server = SimpleNamespace(TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    spec = importlib.util.spec_from_file_location("loop_model", folder / "loop_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("json_request", None)
    return module.Client


class Sender:
    """What Triton gives; falls over where the real one takes the server with it."""

    def __init__(self):
        self.sent, self.asked, self._freed, self._busy = [], 0, False, 0

    def is_cancelled(self) -> bool:
        assert not self._freed, "asked after the last answer"
        self._busy += 1
        time.sleep(0.001)
        assert not self._freed, "the last answer was sent while it was asked"
        self._busy -= 1
        self.asked += 1
        return False

    def send(self, response, flags: int = 0) -> None:
        assert not self._freed, "sent after the last answer"
        self._freed = flags == FINAL
        assert not (self._freed and self._busy)
        self.sent.append((response, flags))


def test_nothing_is_asked_or_sent_after_the_last_answer(client_class):
    sender = Sender()
    client = client_class(sender)
    assert not client.gone()
    client.send("preview")
    client.send("picture", last=True)
    client.send("too late")
    assert not client.gone() and sender.asked == 1
    assert sender.sent == [("preview", 0), ("picture", FINAL)]


def test_the_last_answer_waits_for_a_question_on_its_way(client_class):
    for _ in range(20):
        sender, failed = Sender(), []
        client = client_class(sender)

        def ask(client=client, failed=failed):
            try:
                for _ in range(5):
                    client.gone()
            except AssertionError as error:
                failed.append(error)

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        client.send("picture", last=True)
        for thread in asking:
            thread.join()
        assert not failed and sender.sent == [("picture", FINAL)]
