"""`prosparse inspect`: what is in a model file."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prosparse.formats import predictors
from prosparse.formats.gguf import read_gguf
from prosparse.formats.hf import read_folder
from prosparse.formats.open import find, model_from_gguf
from prosparse.model.model import Model


def describe(source: str | Path) -> dict[str, Any]:
    """Everything about a model but its numbers, ready for JSON.

    `config` is None and `error` says why when the file is sound but its model is not supported.
    """
    path = find(source)
    report: dict[str, Any] = {"path": str(path), "format": "HF folder" if path.is_dir() else "GGUF"}
    model: Model | None
    if path.is_dir():
        model = read_folder(path)
        stored = dict(model.tensors)
        if model.predictors:
            stored |= predictors.hf_tensors(model.predictors)
    else:
        file = read_gguf(path)
        report["format"] = f"{'PowerInfer (PWRI)' if file.powerinfer else 'GGUF'} v{file.version}"
        report["metadata"] = {key: _short(value) for key, value in file.metadata.items()}
        stored = dict(file.tensors)
        try:
            model = model_from_gguf(file, path)
        except ValueError as error:
            model, report["error"] = None, str(error)
    tensors = [
        {"name": name, "type": tensor.type, "shape": list(tensor.shape), "bytes": tensor.nbytes}
        for name, tensor in stored.items()
    ]
    types: dict[str, dict[str, int]] = {}
    for tensor in stored.values():
        entry = types.setdefault(tensor.type, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += int(np.prod(tensor.shape))
        entry["bytes"] += tensor.nbytes
    return report | {
        "name": model.name if model else None,
        "config": asdict(model.config) if model else None,
        "predictors": predictors.describe(model.predictors) if model and model.predictors else None,
        "weights": sum(entry["weights"] for entry in types.values()),
        "size_bytes": sum(entry["bytes"] for entry in types.values()),
        "types": types,
        "tensors": tensors,
    }


def _short(value: Any) -> Any:
    """A metadata value for people: long arrays and texts become a note of their length."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and len(value) > 16:
        return f"[{len(value)} values]"
    if isinstance(value, str) and len(value) > 200:
        return f"{value[:60]}... [{len(value)} characters]"
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="M", help="GGUF file, HF folder, Hub id, demo, demo-original")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def main(args: argparse.Namespace) -> int:
    report = describe(args.model)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    print(f"{report['path']}\n{report['format']}, {report['weights'] / 1e6:.1f} M weights, ", end="")
    print(f"{report['size_bytes'] / 1e6:.1f} MB")
    for kind, entry in report["types"].items():
        bits = 8 * entry["bytes"] / entry["weights"]
        size = f"{entry['bytes'] / 1e6:.1f} MB"
        print(f"  {kind:<6} {entry['tensors']:>5} tensors {size:>12}  {bits:.2f} bits a weight")
    if report["config"]:
        print("config")
        for key, value in report["config"].items():
            print(f"  {key} = {value}")
    else:
        print(f"cannot be run: {report['error']}")
    if report["predictors"]:
        print("predictors")
        for key, value in report["predictors"].items():
            print(f"  {key} = {value}")
    if "metadata" in report:
        print("metadata")
        for key, value in report["metadata"].items():
            print(f"  {key} = {value!r}")
    if args.tensors:
        print("tensors")
        for tensor in report["tensors"]:
            print(f"  {tensor['name']:<48} {tensor['type']:<6} {tensor['shape']}")
    return 0
