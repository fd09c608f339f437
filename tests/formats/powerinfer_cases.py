"""Models, files and edits that the tests of PowerInfer's formats share."""

import argparse
from dataclasses import replace

import powerinfer_reader
from test_predictor_gguf import predictors

from prosparse.formats.gguf import POWERINFER_MAGIC, read_gguf, write_gguf
from prosparse.formats.powerinfer import prepare
from prosparse.model.tokenizer import TokenizerData
from tiny import make_tiny

SCALES = {"embedding_scale": 12.0, "residual_scale": 0.75, "logit_scale": 6.0}


def falling(*first):
    """Thresholds of three recalls, from those of the default (the middle one)."""
    return tuple((t + 0.25, t, t - 0.25) for t in first)


def make(architecture="llama", type="F32", *, thresholds=(0.5, 2.0), ranks=(32, 64), **options):
    """A tiny model with lowrank predictors that see the residual stream."""
    options = {"act": "relu", "intermediate": 256} | options
    model = make_tiny(architecture, type, **options)
    found = predictors(model.config, ranks=ranks)
    return replace(model, predictors=replace(found, thresholds=falling(*thresholds)))


def written(model, folder, *args, **options):
    """(keys, tensors) of the second reader, and the path of the file."""
    path = folder / "m.pwri.gguf"
    prepare(model, *args, **options).write(path)
    return *powerinfer_reader.read(path.read_bytes()), path


def run_verb(module, *args):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.main(parser.parse_args([str(arg) for arg in args]))


def matrix(model, name, layer=None):
    name = name if layer is None else f"model.layers.{layer}.{name}"
    return model.tensors[f"{name}.weight"].dequantize()


def published(source, target, *, drop=("prosparse.",), metadata=(), tensors=(), without=()):
    """A file as others have written it: without our keys, and with changes."""
    file = read_gguf(source)
    keys = {k: v for k, v in file.metadata.items() if not k.startswith(tuple(drop))} | dict(metadata)
    held = {k: v for k, v in (dict(file.tensors) | dict(tensors)).items() if k not in without}
    write_gguf(target, keys, held, POWERINFER_MAGIC)
    return target


def spm_tokenizer(n):
    """A SentencePiece vocabulary as a 2023 converter writes it: bytes, MiniCPM's marks, no template."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "<用户>", "<AI>"]
    types = [2, 3, 3] + [6] * 256 + [4, 4]
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz?", "▁a", "▁b", "th", "▁th", "the", "▁the"]
    tokens += words
    types += [1] * (n - len(types))
    tokens += [f"▁w{i}" for i in range(n - len(tokens))]
    scores = [0.0] * 261 + [-float(i) for i in range(n - 261)]
    return TokenizerData(
        "gguf",
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        },
    )
