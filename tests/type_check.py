"""Check types by the basic rules of pyright, and let no file get worse than `type_errors.json` says.

    python tests/type_check.py            # fails if a file has more errors than it had
    python tests/type_check.py --write    # after errors were mended: writes down how many are left

`kernels` and `export` lie outside the package that they are installed in, which a type checker can't know, so it looks
at a copy in which they lie inside.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
COPY = CHECKOUT / "build" / "types"
ALLOWED = CHECKOUT / "tests" / "type_errors.json"
SETTINGS = {
    "include": ["stylefast"],
    "typeCheckingMode": "basic",
    "pythonVersion": "3.11",
    "reportMissingModuleSource": "none",
    # of optional packages, which not every machine has
    "reportMissingImports": "none",
}


def source_of(file: str) -> str:
    """Return the path in the checkout of a file of the copy."""
    parts = Path(file).relative_to(COPY).parts
    return "/".join(parts[1:] if parts[1] in ("kernels", "export") else parts)


def check() -> dict[str, list[str]]:
    """Return the errors of every file that has some, one line each. Raises SystemExit if the checker can't run."""
    shutil.rmtree(COPY, ignore_errors=True)
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "tiny")
    shutil.copytree(CHECKOUT / "stylefast", COPY / "stylefast", ignore=left_out)
    for folder in ("kernels", "export"):
        shutil.copytree(CHECKOUT / folder, COPY / "stylefast" / folder, ignore=left_out)
    (COPY / "pyrightconfig.json").write_text(json.dumps(SETTINGS))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=COPY, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise SystemExit(f"the type checker failed:\n{done.stderr or done.stdout}") from None
    errors = defaultdict(list)
    for entry in found["generalDiagnostics"]:
        if entry["severity"] == "error":
            file, line = source_of(entry["file"]), entry["range"]["start"]["line"] + 1
            errors[file].append(f"{file}:{line}: {entry['message'].splitlines()[0]} ({entry.get('rule', 'syntax')})")
    return errors


def main() -> int:
    """Compare with what is allowed; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {ALLOWED.name} anew")
    write = parser.parse_args().write
    errors = check()
    counts = Counter({file: len(lines) for file, lines in sorted(errors.items())})
    if write:
        ALLOWED.write_text(json.dumps(counts, indent=2) + "\n")
    allowed = Counter(json.loads(ALLOWED.read_text()))
    worse = counts - allowed
    for file in worse:
        print(*errors[file], sep="\n")
        print(f"{file} has {counts[file]} type errors; {allowed[file]} are allowed")
    fewer = allowed - counts
    if fewer and not worse:
        print(f"{sum(fewer.values())} fewer than allowed; if they were mended: python tests/type_check.py --write")
    print(f"{sum(counts.values())} type errors in {len(counts)} files")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
