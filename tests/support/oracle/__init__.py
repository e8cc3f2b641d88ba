"""A slow, literal second implementation of the three methods on diffusers' own UNet and schedulers.

It is written from the papers' equations and shares no code with the engine: what the two agree on at 1e-5 in fp32 is
believed. Nothing here is fast, and nothing here imports `stylefast`.
"""
