"""The measurements behind the README: `python -m benchmarks.memory` from the repository root, and so on."""
