"""What generation gives back."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer and what it cost."""

    text: str
    token_ids: list[int]  # generated, without the token that ended the turn
    n_prompt: int
    n_gen: int
    prompt_tok_s: float  # prompt tokens computed (not those a context already held) per second
    gen_tok_s: float  # decoded tokens per second, sampling and text included; 0 if none
    sparsity: float  # of this answer's decoded tokens; 0 if none
    bytes_per_token: int  # weight bytes read per decoded token; 0 if none
    mode: str
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of streamed text; the last chunk also carries the completion."""

    text: str
    completion: Completion | None = None

    def __str__(self) -> str:
        return self.text
