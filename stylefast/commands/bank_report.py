"""Describe a style bank: for `stylefast info --bank`, and before and after `stylefast bake`."""

from pathlib import Path
from typing import Any

from stylefast.values import quoted

CONTENTS = {"kv": "keys and values", "hidden": "hidden states", "latents": "latents"}
_BRANCHES = {("full",): "without guidance", ("null", "full"): "with guidance"}


def collect_bank(path: Path) -> dict[str, Any]:
    """Return a bank's metadata, size and checksum, and whether its contents match the checksum. Raises StyleError."""
    from stylefast.styles.bank import StyleBank
    from stylefast.styles.bank_file import bank_checksum, read_bank

    path = path.expanduser()
    bank = StyleBank.load(path, verify=False)
    metadata, checksum, tensors = read_bank(path)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "checksum": checksum,
        "unaltered": bank_checksum(metadata, tensors) == checksum,
        "bank": bank.info.to_json(),
    }


def bank_lines(found: dict[str, Any]) -> list[str]:
    """Format the result of `collect_bank` as lines."""
    bank = found["bank"]
    width, height = bank["size"]
    if bank["noise"] == "generated":
        reference = f"generated from {quoted(bank['prompt'])}"
    else:
        reference = "a picture" if bank["references"] == 1 else f"{bank['references']} pictures"
        reference += f", noise {bank['noise']}" + (f", caption {quoted(bank['prompt'])}" if bank["prompt"] else "")
    layers = f" of {len(bank['layers'])} layers" if bank["layers"] else ""
    guidance = _BRANCHES.get(tuple(bank["branches"]), f"branches {', '.join(bank['branches'])}")
    guidance += f" {bank['guidance']:g}" if bank["guidance"] is not None and "null" in bank["branches"] else ""
    guidance += f", negative prompt {quoted(bank['negative_prompt'])}" if bank["negative_prompt"] else ""
    checksum = "holds" if found["unaltered"] else "does not match: the file was altered after it was written"
    return [
        f"style bank  {found['path']}, {shown_bytes(found['bytes'])}",
        f"reference   {reference}, seed {bank['seed']}" + (", with other styles" if bank["styles"] else ""),
        f"schedule    {bank['steps']} steps of {bank['scheduler']} at {width}x{height}, {guidance}",
        f"holds       {CONTENTS[bank['store']]}{layers} in {bank['dtype']}",
        f"model       {bank['model']}, fingerprint {bank['fingerprint'][:12]}",
        f"made        {bank['created']} by stylefast {bank['stylefast']}, format {bank['format']}",
        f"checksum    {found['checksum'][:12]}, {checksum}",
    ]


def shown_bytes(count: int) -> str:
    """Format a size as three digits and a decimal unit: "4.2 MB"."""
    size, unit = float(count), "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
