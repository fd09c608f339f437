"""Model files. `open_model` reads any of them into a `Model`; this package knows files and nothing else."""

from prosparse.formats.open import open_model

__all__ = ["open_model"]
