"""Where pictures go, and what is written into them: numbered names, whole files or none, records in PNG text chunks."""

import json
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stylefast.errors import ImageError, InvalidRequest
from stylefast.values import load_json

CHUNK = "stylefast"
# above this a chunk is compressed; some readers refuse long plain ones
PLAIN_LIMIT = 60_000
_NUMBER = re.compile(r"(\d{4,})-.*\.png")
_SAMPLERS = {"ddim": "DDIM", "euler": "Euler", "euler_ancestral": "Euler a", "dpmpp_2m": "DPM++ 2M",
             "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_3m": "DPM++ 3M", "dpmpp_3m_sde": "DPM++ 3M SDE",
             "dpmpp_sde": "DPM++ SDE", "unipc": "UniPC", "lcm": "LCM", "tcd": "TCD"}  # fmt: skip
_SPREADS = {"_karras": " Karras", "_exponential": " Exponential"}


class Destination:
    """The files of one call, chosen before any work is done.

    `out` ending in ".png" is a file (numbered behind its stem for several prompts), anything else a folder of files
    `0001-a-fish.png`. Without `overwrite`, numbers go on behind those in the folder, and a file that exists is refused.
    Raises InvalidRequest.
    """

    def __init__(self, out: str | Path, prompts: Sequence[str], overwrite: bool = False):
        out, self.overwrite = Path(out).expanduser(), overwrite
        if out.suffix.lower() in (".jpg", ".jpeg", ".webp"):
            raise InvalidRequest(f"--out is {out}; pictures are written as PNG, so that they carry their settings")
        if out.suffix.lower() == ".png":
            self.folder = out.parent
            names = [out.name] if len(prompts) == 1 else [f"{out.stem}-{i}.png" for i in range(1, len(prompts) + 1)]
            grid = f"{out.stem}-grid.png"
        else:
            self.folder = out
            first = 1 if overwrite else _highest_number(out) + 1
            names = [f"{first + i:04d}-{slug(prompt)}.png" for i, prompt in enumerate(prompts)]
            grid = f"{first:04d}-grid.png"
        self.paths, self.grid = [self.folder / name for name in names], self.folder / grid
        self._check(self.paths)

    def write(self, images: Sequence[Image.Image], metadata: Sequence[dict], sheet: Image.Image | None) -> list[Path]:
        """Write all pictures, then give them their names; returns the paths."""
        wanted = [(path, image, png_info(one)) for path, image, one in zip(self.paths, images, metadata, strict=True)]
        if sheet is not None:
            wanted.append((self.grid, sheet, None))
        self._check([path for path, _, _ in wanted])
        parts = [path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path, _, _ in wanted]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part, (_, image, info) in zip(parts, wanted):
                image.save(part, "PNG", pnginfo=info)
            for part, (path, _, _) in zip(parts, wanted):
                os.replace(part, path)
        except OSError as error:
            reason = error.strerror or error
            raise InvalidRequest(f"can't write to {self.folder} ({reason}); choose another --out") from error
        finally:
            for part in parts:
                # the parent may be a file, which is no folder to look into
                if part.parent.is_dir():
                    part.unlink(missing_ok=True)
        return [path for path, _, _ in wanted]

    def _check(self, paths: Sequence[Path]) -> None:
        holder = next((parent for parent in (self.folder, *self.folder.parents) if parent.exists()), Path())
        if not holder.is_dir():
            raise InvalidRequest(f"{holder} is a file, so no folder of that name can be made; choose another --out")
        if not os.access(holder, os.W_OK):
            raise InvalidRequest(f"{holder} can't be written to; choose another --out")
        for path in paths:
            if path.is_dir():
                raise InvalidRequest(f"{path} is a folder; choose another --out")
            if path.exists() and not self.overwrite:
                raise InvalidRequest(f"{path} exists; pass --overwrite to replace it, or choose another --out")


def png_info(metadata: dict) -> PngInfo:
    """Text chunks "stylefast" (the record, JSON) and "parameters" (the line that other tools read)."""
    info = PngInfo()
    text = json.dumps(metadata, separators=(",", ":"))
    info.add_text(CHUNK, text, zip=len(text) > PLAIN_LIMIT)
    info.add_text("parameters", parameters_line(metadata))
    return info


def parameters_line(metadata: dict) -> str:
    """Prompt, negative prompt and settings of a picture in the form that A1111 introduced."""
    request = metadata["call"]["requests"][metadata["index"]]
    settings = {
        "Steps": request["steps"],
        "Sampler": sampler_name(request["scheduler"]),
        "CFG scale": request["guidance"],
        "Seed": request["seed"],
        "Size": "x".join(map(str, metadata["size"])),
        "Model hash": metadata["fingerprint"][:10],
        "Model": metadata["model"],
        "Version": f"stylefast {metadata['stylefast']}",
    }
    lines = [request["prompt"]]
    if request["negative_prompt"]:
        lines.append(f"Negative prompt: {request['negative_prompt']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def sampler_name(scheduler: str) -> str:
    """A scheduler's name in that form; of a few-step preset, the sampler that it uses."""
    from stylefast.sampling.few_step import FEW_STEP_PRESETS

    name = FEW_STEP_PRESETS[scheduler].scheduler if scheduler in FEW_STEP_PRESETS else scheduler
    ending = next((ending for ending in _SPREADS if name.endswith(ending)), "")
    base = name.removesuffix(ending)
    return _SAMPLERS.get(base, base) + _SPREADS.get(ending, "")


def read_metadata(path: str | Path) -> tuple[dict, Image.Image]:
    """The record inside a picture, and its pixels. Raises ImageError, and InvalidRequest where there is no record."""
    path = Path(path).expanduser()
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
            text = picture.info.get(CHUNK)
            pixels = picture.convert("RGB")
    except FileNotFoundError as error:
        raise ImageError(f"there is no picture at {path}; check the path") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{path} can't be read as PNG ({error}); settings survive only in the file as made") from error
    if text is None:
        raise InvalidRequest(
            f"{path} carries no settings; only pictures that `stylefast generate` wrote do (grids don't), until "
            "another program saves them anew"
        )
    try:
        metadata = load_json(text, "their text", kind=dict)
        place, call, fingerprint = metadata["index"], metadata["call"], metadata["fingerprint"]
        whole = isinstance(fingerprint, str) and isinstance(place, int) and 0 <= place < len(call["requests"])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"the settings in {path} are damaged ({error}); use an unedited copy") from error
    if not whole:
        raise InvalidRequest(f"the settings in {path} are damaged (index {place!r}); use an unedited copy")
    return metadata, pixels


def _highest_number(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return max((int(match[1]) for file in folder.iterdir() if (match := _NUMBER.fullmatch(file.name))), default=0)


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
