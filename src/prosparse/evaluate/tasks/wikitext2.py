"""WikiText-2: perplexity of encyclopaedic text (Merity et al., arXiv 1609.07843)."""

from pathlib import Path

from prosparse.evaluate.tasks.reading import text


def load(folder: Path) -> str:
    """The raw test set, lines ended by "\\n": `wiki.test.raw.lf`."""
    return text(folder / "wiki.test.raw.lf")
