"""Both forms of the runtime's C++ parts, for tests to run on."""

import os

import pytest

from stylefast._extension import extension, extension_error

# only a build that was switched off on purpose excuses its absence; a failed one must show
switched_off = extension() is None and os.environ.get("STYLEFAST_EXTENSION") == "0"
needs_extension = pytest.mark.skipif(switched_off, reason=extension_error() or "built")
backends = pytest.mark.parametrize("backend", ["python", pytest.param("cpp", marks=needs_extension)])
