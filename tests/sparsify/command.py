"""The command line of a small run."""


def arguments(folders, *more: str) -> list[str]:
    """`folders` is the fixture."""
    options = {"-m": folders / "tiny", "--data": folders / "data.jsonl", "--out": folders / "out"}
    sizes = ["--context", "32", "--batch-tokens", "128", "--tokens", "10240", "--micro", "4", "--lr", "3e-3"]
    flat = [str(part) for pair in options.items() for part in pair]
    return ["sparsify", *flat, *sizes, "--device", "cpu", "--workers", "1", "--json", *more]
