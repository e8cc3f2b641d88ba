"""Exported engines: the UNet with the row table as graph inputs, for runtimes other than PyTorch."""
