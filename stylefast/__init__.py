"""stylefast: StyleAligned, InstantStyle and DreamStyler for SDXL, in one engine and one batch.

Importing this package loads neither torch nor diffusers; the names below are imported on first use.
"""

import sys
from importlib import import_module
from importlib.util import spec_from_file_location
from pathlib import Path

from stylefast import errors, threads

__version__ = "0.1.0"

_EXPORTS = {
    "Engine": "stylefast.engine",
    "EngineOptions": "stylefast.options",
    "Request": "stylefast.engine",
    "Result": "stylefast.engine",
    "Control": "stylefast.runtime.plan.control",
    "StyleAligned": "stylefast.styles.style_aligned",
    "StyleBank": "stylefast.styles.bank",
    "InstantStyle": "stylefast.styles.instant_style",
    "CleanStyle": "stylefast.styles.clean_style",
    "DreamStyler": "stylefast.styles.dream_styler",
    "StyleContextGuidance": "stylefast.sampling.guidance",
    "outpaint": "stylefast.models.repaint",
    "canny": "stylefast.models.preprocessors",
    "preprocess": "stylefast.models.preprocessors",
}

__all__ = [*_EXPORTS, "errors"]


def _sibling_packages() -> dict[str, Path]:
    # a checkout has `kernels` and `export` next to this folder, an installed copy inside it; a `kernels` package next
    # to an installed copy is Hugging Face's
    package = Path(__file__).parent
    checkout = package.parent
    if not (checkout / "setup.py").is_file():
        return {}
    names = [name for name in ("kernels", "export") if not (package / name).exists()]
    return {f"{__name__}.{name}": checkout / name for name in names if (checkout / name / "__init__.py").is_file()}


class _CheckoutFinder:
    """Import hook that finds `stylefast.kernels` and `stylefast.export` in the folders of a checkout."""

    folders = _sibling_packages()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        folder = cls.folders.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


threads.wait_shortly()
if _CheckoutFinder.folders:
    sys.meta_path.insert(0, _CheckoutFinder)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'stylefast' has no attribute '{name}'; it has {', '.join(__all__)}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_EXPORTS})
