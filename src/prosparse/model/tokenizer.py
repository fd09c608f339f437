"""Text to token ids and back, from GGUF metadata or a Hugging Face folder."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class TokenizerData:
    """A tokenizer as found in a model file: raw material, nothing built yet."""

    source: Literal["gguf", "hf", "none"] = "none"
    gguf: Mapping[str, Any] = field(default_factory=dict)  # the tokenizer.* keys of a GGUF
    folder: Path | None = None  # holds tokenizer.json or tokenizer.model, and tokenizer_config.json
