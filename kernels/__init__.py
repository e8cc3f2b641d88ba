"""Operations of stylefast, one idea in a file; import them as `stylefast.kernels`.

Each holds the formula and shapes, a plain PyTorch `*_ref` to read and to test against, the public function, and its
custom op with the forms that `registry` chooses from: Triton (in `gpu/`), C++ (in csrc/), PyTorch. Engine code skips
the checks by `operation.run` of the same file.
"""

if __name__ == "kernels":
    # with a checkout on sys.path, this folder shadows Hugging Face's `kernels` package; load that one instead
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _checkout = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() != _checkout])
    if _spec is not None and _spec.loader is not None:
        sys.modules[__name__] = _module = module_from_spec(_spec)
        _spec.loader.exec_module(_module)
    else:
        # transformers and diffusers import any package called `kernels` to read its version, so the import must succeed
        # and only attribute access fails
        def __getattr__(name):
            if name.startswith("__"):
                raise AttributeError(name)
            raise ImportError(
                f"`kernels` is a folder of the stylefast checkout; import {name} from `stylefast.kernels`. "
                "If Hugging Face's package of that name is meant: it is not installed",
                name=__name__,
            )
else:
    # eager: a submodule and its function share a name, and the function must win
    from stylefast.kernels.adain import adain_affine, token_stats
    from stylefast.kernels.dequantise import dequantise
    from stylefast.kernels.gated_cross_attention import gated_cross_attention
    from stylefast.kernels.geglu import geglu
    from stylefast.kernels.group_norm_silu import group_norm_silu
    from stylefast.kernels.guided_step import guided_step
    from stylefast.kernels.layer_norm import add_layer_norm, layer_norm
    from stylefast.kernels.row_lora import LoraPool, LoraRows, row_lora
    from stylefast.kernels.shared_attention import Affine, shared_attention

    __all__ = [
        "Affine",
        "LoraPool",
        "LoraRows",
        "adain_affine",
        "add_layer_norm",
        "dequantise",
        "gated_cross_attention",
        "geglu",
        "group_norm_silu",
        "guided_step",
        "layer_norm",
        "row_lora",
        "shared_attention",
        "token_stats",
    ]
