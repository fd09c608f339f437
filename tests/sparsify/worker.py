"""One process of a training run, for tests that start several or kill them.

torchrun ... worker.py FOLDER STOP MICRO LORA_RANK OPTIMIZER SHARD
"""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from prosparse.model.activation import Activation
from prosparse.model.adapter import parse_ranks
from prosparse.sparsify import distributed, hf_model, lora
from prosparse.sparsify.batches import Mixture
from prosparse.sparsify.config import TrainConfig
from prosparse.sparsify.controller import TargetControl
from prosparse.sparsify.schedule import LearningRate
from prosparse.sparsify.trainer import Feed, Trainer
from tiny import make_tiny

CONTEXT = 32


def trainer(
    folder: Path,
    micro: int,
    rank: int = 0,
    optimizer: str = "adamw",
    *,
    shard: bool = False,
    steps: int = 20,
    checkpoint_every: int = 5,
    device: str = "cpu",
    compile: bool = False,
) -> Trainer:
    """A run of `steps` steps of 4 sequences on the alphabet."""
    world, place = distributed.join(device, shard)
    tokens = np.tile(np.arange(97, 123, dtype=np.uint32), 400)
    offsets = np.arange(0, len(tokens) + 1, 26)
    store = SimpleNamespace(
        tokens=tokens, loss=np.ones(len(tokens), np.uint8), offsets=offsets, source="alphabet"
    )
    mixture = Mixture([store], [1.0], context=CONTEXT, seed=0, vocab_size=288)
    original = make_tiny(tied=True)
    sparse = replace(original, config=replace(original.config, activation=Activation("fatrelu", 0.0)))
    student = hf_model.load(sparse, device=place)
    if rank:
        torch.manual_seed(0)
        lora.add(student, parse_ranks(str(rank)))
    config = TrainConfig(
        steps=steps,
        micro_sequences=micro,
        learning_rate=LearningRate("constant", 3e-3, steps),
        control=TargetControl(0.8, start=0.2, end=0.8),
        checkpoint_every=checkpoint_every,
        optimizer=optimizer,
        compile=compile,
    )
    teacher = hf_model.load(original, device=place)
    return Trainer(student, teacher, [Feed(mixture, 4, steps)], config, folder, world)


def main(folder: Path, stop: int, micro: int, rank: int, optimizer: str, shard: bool) -> None:
    """Runs, up to step `stop` if that is not 0; then the weights that came out are written."""
    torch.set_num_threads(1)
    run = trainer(folder, micro, rank, optimizer, shard=shard)

    class Stopped(Exception):
        pass

    def on_step(metrics: dict) -> None:
        if metrics["step"] == stop:
            raise Stopped

    with contextlib.suppress(Stopped):
        run.run(on_step)
        weights = hf_model.weights(run.student)
        if run.world.is_main:
            torch.save(weights, folder / "weights.pt")
    distributed.leave()
    distributed.end(0)


if __name__ == "__main__":
    folder, stop, micro, rank, optimizer, shard = sys.argv[1:]
    main(Path(folder), int(stop), int(micro), int(rank), optimizer, shard == "True")
