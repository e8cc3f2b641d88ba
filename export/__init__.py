"""Exported graphs: the UNet, with the row table as inputs, and the other parts, for runtimes other than PyTorch."""
