"""Model repository for Triton Inference Server: exported graphs, and the denoising loop that calls them."""

from stylefast.export.triton_repo.write import Serving, Shape, write_repository

__all__ = ["Serving", "Shape", "write_repository"]
