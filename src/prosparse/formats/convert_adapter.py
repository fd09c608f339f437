"""`prosparse convert --base`: what a tuned model adds to the one it was made from, as an adapter."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prosparse.formats import adapter as files
from prosparse.formats.convert import provenance
from prosparse.formats.open import open_model
from prosparse.model.adapter import (
    ROUNDING,
    Adapter,
    change,
    check_related,
    extract,
    kept,
    parse_levels,
    parse_ranks,
)
from prosparse.model.model import Model

RANK = "64"
TYPE = "Q8_0"


@dataclass(frozen=True, slots=True)
class Text:
    """What shows how much weights are worth: the first `tokens` of each source, in sequences of `context`, on
    this torch device (None: a GPU if there is one)."""

    sources: Sequence[str]
    tokens: int = 4096
    context: int = 512
    device: str | None = None


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
    tuned, original = _opened(source, target, base)
    made = files.with_types(extract(original, tuned, ranks, levels), kind)
    made, notes = _written(made, original, tuned, Path(target), base, name, measured)
    return made, kept(original, tuned, made), notes


def write_rounded_adapter(
    source: str | Path,
    target: str | Path,
    base: str | Path,
    size: int,
    text: Text,
    *,
    name: str | None = None,
    measured: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Adapter, tuple[str, ...]]:
    """As `write_adapter`, but of codes that are as fine as what they are worth on `text`, in at most `size`
    bytes; needs torch, and some minutes for 100 M weights on a CPU. `progress` is given lines for users, what
    the errors cost among them."""
    from prosparse.sparsify import measure
    from prosparse.sparsify.tokens import Encoder

    tuned, original = _opened(source, target, base)
    check_related(original, tuned)
    # the adapted model's: adapters leave it the base's
    config = original.config
    encoder = Encoder(original.tokenizer, config.bos_token_id, config.eos_token_ids)
    batches = [measure.sample(one, encoder, text.tokens, text.context) for one in text.sources]
    trunk, bfloat16 = measure.load(tuned, text.device)
    from prosparse.sparsify import rounding  # torch is there, or `load` has said so

    progress(f"what weights are worth, on {sum(batch.loss.size for batch in batches)} tokens")
    worth = rounding.worth(trunk, batches, bfloat16=bfloat16)
    made = rounding.adapter(original, tuned, worth, size, progress)
    return _written(made, original, tuned, Path(target), base, name, measured)


def _opened(source: str | Path, target: str | Path, base: str | Path) -> tuple[Model, Model]:
    """The tuned model, and the one it was made from."""
    if Path(target).suffix != ".gguf":
        raise ValueError(f"an adapter is one file: let {target} end in .gguf")
    return open_model(source), open_model(base)


def _written(
    made: Adapter,
    original: Model,
    tuned: Model,
    target: Path,
    base: str | Path,
    name: str | None,
    measured: Mapping[str, Any] | None,
) -> tuple[Adapter, tuple[str, ...]]:
    made = replace(
        made,
        name=name or tuned.name,
        license=str(provenance(base).get("general.license", "")),
        measured=dict(measured or {}),
    )
    files.write(target, made)
    notes = []
    if (left_out := change(original, tuned)) > ROUNDING:
        notes.append(f"embedding or head differ by {left_out:.1%} of their size: adapters leave them alone")
    return made, tuple(notes)


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


def parse_text(
    size: float | None, data: Sequence[str] | None, tokens: int | None, device: str | None
) -> Text | None:
    """Of --size (MB), --data, --tokens and --device: None without a size. ValueError if they do not fit."""
    if size is None:
        if data or tokens is not None or device:
            raise ValueError("--data, --tokens and --device are of --size: give one, or leave them out")
        return None
    if not 0 < size < math.inf:
        raise ValueError(f"--size is in MB, and above 0, not {size:g}")
    if not data:
        raise ValueError("--size needs --data: text on which it shows what weights are worth")
    if len(set(data)) != len(data):
        raise ValueError("a source of --data is there twice: give each once")
    text = Text(data, device=device)
    return text if tokens is None else replace(text, tokens=tokens, context=max(1, min(tokens, text.context)))


def read_measured(path: Path) -> dict[str, Any]:
    """The JSON object of --measured."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object")
    return found
