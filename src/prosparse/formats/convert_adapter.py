"""`prosparse convert --base`: what a tuned model adds to the one it was made from, as an adapter."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prosparse.formats import adapter as files
from prosparse.formats.convert import provenance
from prosparse.formats.open import open_model
from prosparse.model.adapter import ROUNDING, Adapter, change, extract, kept, parse_levels, parse_ranks

RANK = "64"
TYPE = "Q8_0"


def write_adapter(
    source: str | Path,
    target: str | Path,
    base: str | Path,
    ranks: int | Mapping[str, int] | None = None,
    kind: str = TYPE,
    *,
    levels: int | Mapping[str, int] | None = None,
    name: str | None = None,
    measured: Mapping[str, Any] | None = None,
) -> tuple[Adapter, dict[str, float], tuple[str, ...]]:
    """Write the adapter that makes the model at `source` of the one at `base`, with factors of type `kind`;
    `ranks` and `levels` as for `extract`.

    Returns it, the share of the difference that it keeps by kind of matrix, and notes for users. `name` is
    that of the model it makes (default: the source's); the licence is the base's.
    """
    target = Path(target)
    if target.suffix != ".gguf":
        raise ValueError(f"an adapter is one file: let {target} end in .gguf")
    tuned, original = open_model(source), open_model(base)
    made = replace(
        extract(original, tuned, ranks, levels),
        name=name or tuned.name,
        license=str(provenance(base).get("general.license", "")),
        measured=dict(measured or {}),
    )
    made = files.with_types(made, kind)
    files.write(target, made)
    notes = []
    if (left_out := change(original, tuned)) > ROUNDING:
        notes.append(f"embedding or head differ by {left_out:.1%} of their size: adapters leave them alone")
    return made, kept(original, tuned, made), tuple(notes)


def parse_forms(
    rank: str | None, levels: str | None, kind: str | None
) -> tuple[dict[str, int], dict[str, int], str]:
    """(ranks, levels, type of factors) of --rank, --levels and --type; ValueError if one has no effect."""
    coded = parse_levels(levels) if levels else {}
    ranks = {name: r for name, r in parse_ranks(rank or RANK).items() if name not in coded}
    if not ranks and (rank or kind):
        raise ValueError(
            f"--levels {levels} leaves no factors, of which --rank and --type are: leave them out, or give "
            "FFNs or attention 0 levels, as --levels 3:0"
        )
    if coded and ":" in (rank or ""):
        raise ValueError(f"--rank {rank} has a rank too many: with --levels {levels} there is one to give")
    return ranks, coded, kind or TYPE


def read_measured(path: Path) -> dict[str, Any]:
    """The JSON object of --measured."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found
