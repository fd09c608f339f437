"""Activation-sparse language models: `prosparse.load("model.gguf").generate("Hello")`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from prosparse.engine.engine import LLM

__all__ = ["__version__", "generate", "load"]
__version__ = "0.1.0"


def load(
    path: "str | Path",
    *,
    hidden_act: str | None = None,
    hidden_act_param: float | None = None,
    **options: Any,
) -> "LLM":
    """Opens a GGUF file, a Hugging Face folder, a Hub id, "demo" or "demo-original"; `options` are those of
    `LLM`.

    `hidden_act` and `hidden_act_param` replace the activation that came with the weights, for experiments.
    """
    from dataclasses import replace

    from prosparse.engine.engine import LLM
    from prosparse.formats import open_model
    from prosparse.model.activation import Activation

    model = open_model(path)
    if hidden_act is not None or hidden_act_param is not None:
        activation = Activation.parse(hidden_act or model.config.activation.name, hidden_act_param)
        model = replace(model, config=replace(model.config, activation=activation))
    return LLM(model, **options)


def generate(path: "str | Path", prompt: str, **options: Any) -> str:
    """The text a model continues `prompt` with; `options` are those of `LLM.generate`."""
    return load(path).generate(prompt, **options).text
