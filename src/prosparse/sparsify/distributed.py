"""One process or many: under `torchrun` they share the steps of a run.

Each has the whole model, and gradients are averaged; or the model and its optimizer state are spread over
them (FSDP2), where one has no room for it.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from prosparse.sparsify.hf_model import Trunk

# one process may tokenise for hours while the others wait
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run. Every method must be called by all of them."""

    rank: int = 0
    size: int = 1
    sharded: bool = False  # models are spread over the processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """`values` averaged over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """[size, ...]: the `values` of every process, which are of one shape."""
        if self.size == 1:
            return values[None]
        whole = values.new_empty(self.size, *values.shape)
        dist.all_gather(list(whole), values.contiguous())
        return whole

    def mean_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Gradients averaged over the processes, in place, by one message; those of a spread model are."""
        if self.size > 1 and not self.sharded:
            gradients = [p.grad for p in parameters if p.grad is not None]
            whole = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
            parts = whole.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(
                gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
            )


def join(device: str | None = None, shard: bool = False) -> tuple[World, torch.device]:
    """The world that `torchrun` started this process in, or one process alone; and this process's device.

    `device`: a torch device, or None for a GPU if there is one. `shard`: the model is to be spread.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "LOCAL_RANK" not in os.environ:
        return World(), kind
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo", timeout=_PATIENCE)
    return World(dist.get_rank(), dist.get_world_size(), sharded=shard), kind


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """Ends this process at once. In one run of ten or so gloo's threads abort an interpreter that shuts down
    (torch 2.13), after everything is done, and torchrun takes that for a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def shard(trunk: "Trunk", bfloat16: bool) -> None:
    """Spreads a model over all processes, layer by layer; products are in bfloat16, sums of gradients in
    float32. Parameters become DTensors; the trunk must then be called, not its parts. One that is spread
    already stays as it is: an original teaches the control too."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if isinstance(trunk, FSDPModule):
        return
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None, reduce_dtype=torch.float32
    )
    for layer in trunk.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(trunk, mp_policy=policy)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over processes."""
    whole: Any = getattr(tensor, "full_tensor", None)
    return whole() if whole else tensor
