"""Write docs/reference.md from the signatures and docstrings of the public names: `make reference`."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("reference.md")
HEAD = """# API reference

Made by `make reference` from the signatures and docstrings of the code: change those, not this page. In the examples
`sf` is stylefast, and `engine` is `sf.Engine.from_pretrained("tiny")`.

"""
# title, module, names; None: all that the module offers and no section above has
SECTIONS = (
    ("Engines, requests and styles", "stylefast", None),
    ("Jobs", "stylefast.runtime.jobs", ("Job", "Preview")),
    ("Samplers and guidance", "stylefast.sampling", None),
    (
        "Writing a style",
        "stylefast.styles.style",
        ("Style", "ReferenceStyle", "ImageStyle", "References", "Texts", "Rows", "ModelFacts"),
    ),
    ("Writing a backend", "stylefast.runtime.backends.base", ("Backend", "StepNeeds", "TorchBackend")),
    ("Kernels", "stylefast.kernels", None),
    ("The engine in short", "stylefast.naive", ("generate",)),
    ("All errors", "stylefast.errors", None),
)
CONSTANTS = {
    "BRANCHES": "Branches of a guided prediction, in the order of their columns",
    "FEW_STEP_PRESETS": "Samplers of few-step models by name, for `Request.scheduler`",
    "KARRAS_SCHEDULERS": 'Samplers that also take the suffix "_karras" or "_exponential"',
    "SCHEDULERS": "Samplers by name, for `Request.scheduler`",
    "SDXL_SCHEDULER": "Scheduler config that stands for keys which a model's own lacks",
    "TIMESTEP_SCHEDULERS": "Samplers that take explicit timesteps",
}
# what only the engine makes or calls
INTERNAL = {
    "Engine.__init__",
    "EngineOptions.of",
    "EngineOptions.loading",
    "StyleBank.source",
    *(f"Job.{name}" for name in ("__init__", "plan", "may_step", "before_step", "after_step", "wants_previews")),
    *(f"Job.{name}" for name in ("start", "show", "finish")),
}


def sections() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the title, the module and the public objects by name of each section; no object comes twice."""
    seen = set()
    for title, module, names in SECTIONS:
        found = import_module(module)
        names = names or getattr(found, "__all__", [name for name in vars(found) if name[0].isupper()])
        objects = {name: getattr(found, name) for name in names if name not in seen and name != "errors"}
        seen |= {*objects}
        yield title, module, objects


def members(kind: Any) -> dict[str, Any]:
    """Return the public functions of a class by name, without those that a base class describes."""
    found = {}
    for name, value in vars(kind).items() if inspect.isclass(kind) else ():
        function = getattr(value, "fget", None) or getattr(value, "__func__", value)
        inherited = any(name in vars(base) for base in kind.__mro__[1:])
        if inspect.isfunction(function) and not name.startswith("_") and not inherited:
            found[f"{kind.__name__}.{name}"] = function
    return {name: function for name, function in found.items() if name not in INTERNAL}


def markdown() -> str:
    """Return the page."""
    parts = [HEAD, *(f"- [{title}](#{_anchor(title)})\n" for title, *_ in SECTIONS)]
    for title, module, objects in sections():
        parts.append(f"\n## {title}\n\nImport from `{module}`.\n")
        for name, value in objects.items():
            parts.append(_entry("###", f"naive.{name}" if module == "stylefast.naive" else name, value))
            parts += [_entry("####", member, function) for member, function in members(value).items()]
    return "".join(parts)


def _anchor(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))


def _entry(level: str, name: str, value: Any) -> str:
    content = _constant(name, value) if name in CONSTANTS else f"{_fenced(signature(value))}\n{_described(value)}"
    return f"\n{level} {name}\n\n{content}"


def _fenced(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```\n"


def _constant(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return f"{CONSTANTS[name]}: {', '.join(f'`{entry}`' for entry in value)}.\n"
    return "\n".join([f"{CONSTANTS[name]}:\n", *(f"- `{key}`: `{entry}`" for key, entry in value.items()), ""])


def signature(value: Any) -> str:
    """Return the head of a function, or that of a class with its fields and constructor, as the code has it."""
    source = textwrap.dedent(inspect.getsource(value))
    (node,) = ast.parse(source).body
    lines = _head(source, node)
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            made = isinstance(part, ast.FunctionDef) and part.name == "__init__"
            if made and f"{node.name}.__init__" not in INTERNAL and not issubclass(value, Exception):
                lines += _head(source, part)
            elif isinstance(part, ast.AnnAssign) and not ("ClassVar" in ast.unparse(part) and is_dataclass(value)):
                lines += _field(source, part)
    return "\n".join(lines).rstrip(":")


def _head(source: str, node: Any) -> list[str]:
    """Return the lines of a definition above its body, decorators included."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return source.splitlines()[first - 1 : node.body[0].lineno - 1]


def _field(source: str, node: ast.AnnAssign) -> list[str]:
    """Return the lines of a field; of an engine's option only its type and default."""
    if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "_option":
        default = ast.unparse(node.value.args[0]).replace("'", '"')
        return [f"    {ast.unparse(node.target)}: {ast.unparse(node.annotation)} = {default}"]
    return source.splitlines()[node.lineno - 1 : node.end_lineno]


def _described(value: Any) -> str:
    """Return a docstring as markdown: arguments as a list, examples as code."""
    parts = re.split(
        r"^(Args|Attributes|Examples):\n((?:(?: {4}.*)?\n)+)", f"{inspect.getdoc(value)}\n\n", flags=re.MULTILINE
    )
    blocks = [parts[0].strip()]
    for kind, body, after in zip(parts[1::3], parts[2::3], parts[3::3]):
        body = textwrap.dedent(body).strip()
        blocks.append(_fenced(body, "pycon").strip() if kind == "Examples" else _listed(body))
        blocks.append(after.strip())
    if is_dataclass(value) and all("text" in option.metadata for option in fields(value)):
        blocks.append("\n".join(f"- `{option.name}`: {option.metadata['text']}" for option in fields(value)))
    return "\n\n".join(filter(None, blocks)) + "\n"


def _listed(arguments: str) -> str:
    """Return the arguments of a docstring, one "name: text" each, as a list."""
    return re.sub(
        r"^(\w+(?:, \w+)*): |^(?=\S)", lambda found: f"- `{found[1]}`: " if found[1] else "- ", arguments, flags=re.M
    )


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
