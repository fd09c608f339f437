"""Trains in child processes that are killed at random moments, again and again, then lets one finish.

killed.py FOLDER KILLS SEED; prints how many children were killed before they had finished.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from worker import hf_model, trainer


def train(folder: Path) -> None:
    torch.set_num_threads(1)
    run = trainer(folder, 2, steps=60, checkpoint_every=2)
    run.run()
    torch.save(hf_model.weights(run.student), folder / "weights.pt")


def child(folder: Path) -> int:
    """A process that trains. Forked before torch has started any thread, so that it starts at once."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            train(folder)
            status = 0
        finally:
            os._exit(status)
    return pid


def main(folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    killed = 0
    for _ in range(kills):
        pid = child(folder)
        # loading takes about 0.1 s, a step 0.02 s, a checkpoint 0.02 s
        time.sleep(rng.uniform(0.1, 0.5))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
    _, status = os.waitpid(child(folder), 0)
    if status:
        raise SystemExit("the last child failed")
    print(killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
