"""ONNX exports that tests only read: made once for all test processes, and kept in `build/` for the next run.

A folder is named after all that decides its files: code, package versions, weights, configs and options. So one that is
found is the one that would be made.
"""

import hashlib
import json
import shutil
from pathlib import Path

from stylefast.export import pipeline
from stylefast.export.manifest import check_files, read_manifest
from stylefast.export.options import Options, Source, load_source
from tests.support.small_checkpoints import write_folder
from tests.support.small_graphs import one_layer_pipeline, write_adapter

_TESTS = Path(__file__).parent
FOLDER = _TESTS.parents[1] / "build" / "test-exports"
_MOST = 8  # folders that are kept


def shared_export(source: Source, **given) -> Path:
    """Return the folder of a source's export; to change a file, copy the folder first. given: of `Options`."""
    options = Options("onnx", **given)
    configs = [source.unet.config, dict(source.vae.config)]
    helpers = [file.read_text() for file in sorted([*_TESTS.glob("small_*.py"), *(_TESTS / "oracle").glob("*.py")])]
    made_of = json.dumps([source.identity(), options.to_json(), configs, helpers], sort_keys=True, default=str)
    folder = FOLDER / hashlib.sha256(made_of.encode()).hexdigest()[:32]
    if not folder.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        finished = [path for path in FOLDER.iterdir() if (path / pipeline.MANIFEST).is_file()]
        for old in sorted(finished, key=lambda path: path.stat().st_mtime)[: 1 - _MOST]:
            shutil.rmtree(old, ignore_errors=True)
    pipeline.ensure(source, options, folder)
    check_files(folder, read_manifest(folder))  # no test has changed it
    return folder


SERVED = ("unet", "text_encoder", "text_encoder_2", "vae_decoder", "image_encoder")


def served_model(folder: Path) -> tuple[Path, Source]:
    """Write a model that attends in one layer, and `adapter.bin` beside it; return its folder and its source."""
    pipe = one_layer_pipeline()
    adapter = write_adapter(pipe.unet, folder).rename(folder / "adapter.bin")
    model = write_folder(pipe, folder / "model")
    return model, load_source(model, "float32", adapter=adapter)


def served_export(source: Source) -> Path:
    """Return the shared export that model repositories are made of: two flavours and other parts."""
    return shared_export(source, flavours=("plain", "banked"), components=SERVED)
