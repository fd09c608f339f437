"""A short run of the fuzzer; `make fuzz` does the long one."""

from fuzz_gguf import fields, fuzz, open_bytes, seed_file


def test_the_seed_file_opens():
    open_bytes(seed_file())
    assert len(fields(seed_file())) > 100


def test_mutated_files_open_or_are_refused():
    opened, refused = fuzz(2000, seed=1)
    assert opened > 20 and refused > 1000
