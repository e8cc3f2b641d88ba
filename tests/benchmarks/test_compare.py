"""Two checkouts in turn: the ratio is that of their times, and neither always goes first."""

from benchmarks.compare import WORKER, compared, measured


class Fake:
    """A checkout whose cases take given seconds."""

    def __init__(self, name: str, seconds: float, log: list[str]):
        self.name, self.seconds, self.log, self.cases = name, seconds, log, ["a", "b"]

    def run(self, case: str) -> float:
        self.log.append(f"{self.name} {case}")
        return self.seconds * (2 if case == "b" else 1)


def test_the_ratio_is_new_over_old_and_both_take_turns_at_the_beginning():
    log: list[str] = []
    rows = compared(measured(Fake("old", 0.010, log), Fake("new", 0.012, log), rounds=2))
    assert [(row["case"], row["ratio"], row["new_ms"]) for row in rows] == [("a", 1.2, 12), ("b", 1.2, 24)]
    assert log == ["old a", "new a", "old b", "new b", "new a", "old a", "new b", "old b"]


def test_the_program_of_a_checkout_is_python():
    compile(WORKER, "worker", "exec")
