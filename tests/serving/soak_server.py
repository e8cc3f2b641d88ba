"""`stylefast serve`, which says how many tasks it has when it gets SIGUSR1, and forgets nothing if it is told so.

python -m tests.serving.soak_server [--leak] OPTIONS
"""

import asyncio
import signal
import sys

LEAK = 100_000  # bytes a request


def main(words):
    if words[:1] == ["--leak"]:
        from stylefast.serving.guard import Guard

        words, kept, log = words[1:], [], Guard._log

        def leaky(self, *arguments):
            kept.append(b"x" * LEAK)
            log(self, *arguments)

        Guard._log = leaky

    def tell(*_):
        print(f"tasks {len(asyncio.all_tasks())}", file=sys.stderr, flush=True)

    signal.signal(signal.SIGUSR1, tell)
    from stylefast.cli import main as stylefast

    return stylefast(["serve", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
