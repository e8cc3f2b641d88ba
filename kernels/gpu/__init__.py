"""Triton kernels and their launchers, one operation per file; importing them needs the triton package.

The public operations in the parent folder check arguments and choose a form; don't call these launchers directly.
"""
