"""Triton kernels and their launchers, one operation a file; importing them needs the triton package.

The public operations in the folder above check arguments and choose a backend; nothing here is called directly.
"""
