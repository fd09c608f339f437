"""Memory, load time and start-up time: peak resident memory against file + KV cache, and what a user waits for.

    python -m benchmarks.memory [--model M ...]

Every figure is of a fresh process. Writes benchmarks/results/memory_<machine>_<yyyymm>.json.
"""
