"""Benchmarks; `python -m benchmarks` runs them by name."""

from stylefast.threads import wait_shortly

# before torch is imported, which reads it once
wait_shortly()
