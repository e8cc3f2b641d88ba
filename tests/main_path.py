"""Count the calls from `Engine.generate` to a kernel, and the files and lines that take part in one request.

Makes a picture with a baked StyleAligned reference on the embedded model, and watches which functions run. Prints the
section of docs/architecture.md that shows them; `--write` puts it there.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- begin: python tests/main_path.py -->", "<!-- end: python tests/main_path.py -->"
MOST_CALLS = 14

# files that also run, but need not be read: their names and docstrings say what they do
ASIDE = {
    "checks and messages": (
        "stylefast/values.py",
        "stylefast/runtime/plan/checks.py",
        "stylefast/runtime/plan/control.py",
        "stylefast/runtime/plan/notices.py",
        "stylefast/runtime/plan/instructions.py",
        "stylefast/models/config_files.py",
        "kernels/checks.py",
    ),
    "the record in a picture's file": ("stylefast/record.py", "stylefast/record_values.py"),
    "text encoders and VAE": (
        "stylefast/models/text.py",
        "stylefast/models/text_chunks.py",
        "stylefast/models/prompt_syntax.py",
        "stylefast/models/vae.py",
        "stylefast/models/vae_tiles.py",
        "stylefast/models/vae_copies.py",
        "stylefast/runtime/decoding.py",
    ),
    "LoRAs, of which the request has none": ("stylefast/runtime/loras.py", "stylefast/models/row_loras.py"),
    "weights and memory": (
        "stylefast/_extension.py",
        "stylefast/models/prepacked.py",
        "stylefast/models/weight_files.py",
        "stylefast/models/lora.py",
        "stylefast/slots.py",
        "stylefast/runtime/memory.py",
        "stylefast/runtime/streams.py",
        "stylefast/runtime/helper.py",
        "stylefast/styles/bank_size.py",
        "stylefast/styles/bank_info.py",
    ),
    "samplers' tables": (
        "stylefast/sampling/schedule.py",
        "stylefast/sampling/few_step.py",
        "stylefast/sampling/edm.py",
        "stylefast/runtime/plan/pinning.py",
    ),
    "operations besides self-attention": (
        "kernels/gated_cross_attention.py",
        "kernels/geglu.py",
        "kernels/group_norm_silu.py",
        "kernels/guided_step.py",
        "kernels/layer_norm.py",
    ),
}
# the short form and what it says that a request becomes
SHORT = (
    "stylefast/naive.py",
    "stylefast/models/row_table.py",
    "stylefast/models/unet.py",
    "kernels/shared_attention.py",
)


class Watch:
    """Functions of the project that run, and the calls above the first launch of shared attention."""

    def __init__(self) -> None:
        self.codes: dict[str, set[CodeType]] = defaultdict(set)
        self.calls: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            path = _own(frame.f_code)
            if path is not None:
                self.codes[path].add(frame.f_code)
            elif not self.calls and frame.f_code.co_filename.endswith("triton/runtime/interpreter.py"):
                self._take(frame.f_back, "kernel", stop=True)
        elif event == "c_call" and not self.calls and getattr(argument, "__name__", "") == "shared_attention":
            self._take(frame, "C++")

    def _take(self, frame: FrameType | None, last: str, stop: bool = False) -> None:
        calls = []
        while frame is not None and frame.f_code.co_qualname != "Engine.generate":
            calls.append(frame.f_code)
            frame = frame.f_back
        calls = [
            code for code in [*calls, frame.f_code if frame is not None else None] if code is not None and _own(code)
        ]
        if not any("shared_attention" in code.co_filename for code in calls):
            return
        self.calls = [*(f"{code.co_qualname}` {_own(code)}" for code in reversed(calls)), f"{last}`"]
        if stop:
            raise KeyboardInterrupt

    def lines(self, path: str) -> int:
        """Return how many lines of a file belong to functions that ran."""
        found: set[int] = set()
        for code in self.codes[path]:
            if code.co_name != "<module>":
                found |= set(range(code.co_firstlineno, max(line for *_, line in code.co_lines() if line) + 1))
        return len(found)


def _own(code: CodeType) -> str | None:
    path = Path(code.co_filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) and ".venv" not in path.parts else None


def watched(form: str) -> Watch:
    """Return what runs for one request.

    form: "cpp"; "triton", up to the first launch of shared attention, chosen as on a GPU; "naive", by the short form.
    """
    import stylefast as sf
    from stylefast import naive
    from stylefast.kernels import registry
    from stylefast.kernels.gpu import shared_attention  # noqa: F401  (importing it is no part of the way)

    watch, choose = Watch(), registry.choose
    with sf.Engine.from_pretrained("tiny", device="cpu") as engine:
        style = sf.StyleAligned(next(iter(engine.references().values())))
        request = sf.Request(
            "a fish", style=style if form == "naive" else sf.StyleAligned(engine.bake(style, 2)), steps=2
        )
        while engine.scheduler._helper._thread is not None:  # threads that run already are not watched
            time.sleep(0.05)
        if form == "triton":
            registry.operation("shared_attention")._choices.clear()
            registry.choose = lambda one, given: (form, "") if one.name == "shared_attention" else choose(one, given)
        threading.setprofile(watch)
        sys.setprofile(watch)
        try:
            if form == "naive":
                naive.generate(engine, [request])
            else:
                engine.generate(request)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            registry.choose = choose
    return watch


def _calls_of(form: str) -> list[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if form == "triton" else "0", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, __file__, "--calls", form]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()


def section() -> str:
    """Return the section of the page: the calls, and the files with their lines."""
    watch, short = watched("cpp"), watched("naive")
    aside = {path for paths in ASIDE.values() for path in paths}
    know = sorted((path for path in watch.codes if path not in aside), key=watch.lines, reverse=True)
    text = [BEGIN, ""]
    for form, where in (("triton", "with Triton"), ("cpp", "on a CPU")):
        calls = _calls_of(form)
        text += [f"Calls from `Engine.generate` to shared attention {where}: {len(calls)}.", ""]
        text += [f"{i}. `{call}" for i, call in enumerate(calls, 1)] + [""]
    lines = sum(map(watch.lines, know))
    text += [
        f"Files with code specific to this request: {len(know)}, with {lines:,} lines of functions that run, in "
        f"{sum(map(_length, know)):,} lines. On a GPU, add `kernels/gpu/shared_attention.py`, "
        "`shared_attention_pointers.py` and `launch.py`.",
        "",
        "| file | lines | run |",
        "|---|---|---|",
    ]
    text += [f"| `{path}` | {_length(path)} | {watch.lines(path)} |" for path in know] + [""]
    used = {why: sum(path in watch.codes for path in paths) for why, paths in ASIDE.items()}
    counts = [f"{why} ({count} file{'s' if count > 1 else ''})" for why, count in used.items() if count]
    text += [f"These run too, and need not be read: {', '.join(counts)}.", ""]
    text += [
        f"The short form: {len(SHORT)} files with {sum(map(short.lines, SHORT)):,} lines of functions that run, in "
        f"{sum(map(_length, SHORT)):,} lines: {', '.join(f'`{path}`' for path in SHORT)}.",
        "",
        END,
    ]
    return "\n".join(text)


def _length(path: str) -> int:
    return len((ROOT / path).read_text().splitlines())


def main() -> None:
    """Print the section, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", choices=("cpp", "triton"), help="print only the calls, with these kernels")
    parser.add_argument("--write", action="store_true", help="put the section into docs/architecture.md")
    arguments = parser.parse_args()
    if arguments.calls:
        print("\n".join(watched(arguments.calls).calls))
    elif arguments.write:
        page = PAGE.read_text()
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(before + section() + rest.partition(END)[2])
    else:
        print(section())


if __name__ == "__main__":
    main()
