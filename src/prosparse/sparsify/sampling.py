"""Many texts at once from a causal model: all rows at one position, a static cache, CUDA graphs on a GPU.

B rows, H query heads, K heads of keys and values, G = H / K, D dimensions a head, T positions of context,
L of them in sight.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prosparse.sparsify.hf_model import Trunk

BUCKET = 128  # attention reads this many positions or a multiple; each multiple is a graph of its own
_LEAST = 2.0**-24  # the smallest noise: what the GPU's generator gives, where the CPU's may give 0


class LayerCache(NamedTuple):
    """Of one layer: `keys`, `values` [B, K, T, D]; `position` int64 [1], where the next ones go."""

    keys: Tensor
    values: Tensor
    position: Tensor


def _remember(module: Any, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Puts this position's `key` and `value` [B, K, 1, D] into the layer's cache; its first `length`."""
    cache: LayerCache = module.sampling_cache
    cache.keys.index_copy_(2, cache.position, key)
    cache.values.index_copy_(2, cache.position, value)
    return cache.keys[:, :, :length], cache.values[:, :, :length]


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """[B, H, 1, D] as [B, K, G, D]: the heads that share keys become positions, so keys are read once."""
    return query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])


def sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """Attention of one position over the cache, by PyTorch's fused kernel: [B, 1, H, D].

    `attention_mask` [1, 1, 1, L] is added to the scores. The form is that of AttentionInterface.
    """
    keys, values = _remember(module, key, value, attention_mask.shape[-1])
    out = F.scaled_dot_product_attention(
        _grouped(query, key), keys, values, attn_mask=attention_mask, scale=options["scaling"]
    )
    return out.reshape(query.shape[0], 1, query.shape[1], -1), None


def matmul(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    """As `sdpa`, by two products and a float32 softmax."""
    keys, values = _remember(module, key, value, attention_mask.shape[-1])
    scores = torch.matmul(_grouped(query, key) * options["scaling"], keys.transpose(2, 3))
    weights = torch.softmax(scores + attention_mask, -1, dtype=torch.float32).to(values.dtype)
    return torch.matmul(weights, values).reshape(query.shape[0], 1, query.shape[1], -1), None


ATTENTION: dict[str, Callable[..., tuple[Tensor, None]]] = {"sdpa": sdpa, "matmul": matmul}


class Sampler:
    """Samples batches of `rows` texts of `context` tokens; buffers and graphs serve all batches.

    `temperature` 0 takes the likeliest token. Of the head's rows only the first `vocab` are sampled. `graphs`
    None: CUDA graphs wherever they work. The cache takes 2 · layers · B · K · T · D numbers of the model's
    type. ValueError for what the model cannot do; the model is left as it was.
    """

    def __init__(
        self,
        trunk: Trunk,
        rows: int,
        context: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        vocab: int | None = None,
        attention: str = "sdpa",
        graphs: bool | None = None,
    ) -> None:
        if rows < 1 or context < 2:
            raise ValueError(f"{rows} rows of {context} tokens: at least 1 row of 2 tokens is needed")
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature {temperature} and top-p {top_p}: the first must be at least 0 (greedy), "
                "the second above 0 and at most 1"
            )
        if attention not in ATTENTION:
            raise ValueError(f"unknown attention {attention!r}: {', '.join(ATTENTION)} are known")
        _check_positions(trunk, context)
        self.rows, self.context, self._trunk, self._attention = rows, context, trunk, attention
        self._temperature, self._top_p = temperature, top_p
        head, device = trunk.head, trunk.head.device
        self._vocab = min(vocab or head.shape[0], head.shape[0])
        if graphs is None:
            graphs = device.type == "cuda" and not _rope_synchronises(trunk)
        self._graphs: dict[int, torch.cuda.CUDAGraph] | None = {} if graphs else None
        self._generator = torch.Generator(device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._places = torch.arange(self._length(context - 1), device=device)
        self._tokens = torch.zeros(rows, context, dtype=torch.int64, device=device)
        self._bad = torch.zeros((), dtype=torch.bool, device=device)
        self._noise: Tensor | None = None
        if temperature:
            self._noise = torch.ones(rows, head.shape[0], dtype=torch.float32, device=device)
        self._caches = [self._new_cache(module) for module in _attention_modules(trunk)]

    @torch.no_grad()
    def sample(self, starts: Sequence[Sequence[int]], seed: int) -> np.ndarray:
        """int64 [len(starts), T]: each row goes on from its start until it is full, up to `rows` rows.

        The rows are a function of starts, their order and `seed`. ValueError for starts that do not fit, and
        for logits that are not finite.
        """
        given = self._given(starts)
        with self._attached():
            if self._graphs == {}:
                self._capture()
            self._tokens.copy_(given)
            self._position.zero_()
            self._bad.zero_()
            self._generator.manual_seed(seed)
            for position in range(self.context - 1):
                # outside of the graph, which would otherwise have to be told of the generator
                if self._noise is not None:
                    self._noise.exponential_(generator=self._generator)
                length = self._length(position)
                if self._graphs is not None:
                    self._graphs[length].replay()
                else:
                    self._step(length)
        if self._bad.item():
            raise ValueError(
                "the model's logits are not finite: its weights are damaged, or too large for their type"
            )
        return self._tokens[: len(starts)].to("cpu", copy=True).numpy()

    def _given(self, starts: Sequence[Sequence[int]]) -> Tensor:
        """[B, T]: the starts, -1 where tokens are to be sampled; missing rows repeat the given ones."""
        if not 0 < len(starts) <= self.rows:
            raise ValueError(f"{len(starts)} starts for {self.rows} rows")
        given = np.full((self.rows, self.context), -1, np.int64)
        for i in range(self.rows):
            start = starts[i % len(starts)]
            if not 0 < len(start) < self.context:
                raise ValueError(
                    f"a start of {len(start)} tokens in a context of {self.context}: "
                    "at least one token must be given and one must be left to sample"
                )
            if not 0 <= min(start) <= max(start) < self._trunk.head.shape[0]:
                raise ValueError(f"a start holds tokens outside the {self._trunk.head.shape[0]} of the model")
            given[i, : len(start)] = start
        return torch.from_numpy(given)

    def _length(self, position: int) -> int:
        """Positions attention reads when `position` is the last it must see."""
        return -(-(position + 1) // BUCKET) * BUCKET

    def _step(self, length: int) -> None:
        """The token after the current position, in every row. All that changes from step to step is on the
        device, and nothing waits for it."""
        head, here = self._trunk.head, self._position
        mask = torch.zeros(length, dtype=head.dtype, device=head.device)
        mask.masked_fill_(self._places[:length] > here, -torch.inf)
        hidden = self._trunk.model(
            input_ids=self._tokens.index_select(1, here),
            position_ids=here[None],
            attention_mask=mask[None, None, None],
            use_cache=False,
        ).logits
        chosen = self._choose(F.linear(hidden[:, 0], head).float())
        here.add_(1)
        given = self._tokens.index_select(1, here)
        self._tokens.index_copy_(1, here, torch.where(given < 0, chosen[:, None], given))

    def _choose(self, logits: Tensor) -> Tensor:
        """int64 [B]. The greatest of logit - log(noise), noise ~ Exp(1), is a sample of the softmax."""
        logits[:, self._vocab :] = -torch.inf
        if self._noise is not None:
            if self._temperature != 1:
                logits /= self._temperature
            if self._top_p < 1:
                logits = _nucleus(logits, self._top_p)
            logits -= self._noise.clamp_(min=_LEAST).log_()
        best, chosen = logits.max(-1)
        self._bad.logical_or_(~best.isfinite().all())  # NaN is the greatest there is
        return chosen

    def _capture(self) -> None:
        """A graph for each length, the longest first: the others fit into its memory."""
        graphs, pool = {}, torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        for length in range(self._length(self.context - 1), 0, -BUCKET):
            # whatever a first call sets up must not be captured
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._position.zero_()
                    self._step(length)
            torch.cuda.current_stream().wait_stream(side)
            self._position.zero_()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(length)
            graphs[length] = graph
        self._graphs = graphs

    def _new_cache(self, module: Any) -> LayerCache:
        head, heads = self._trunk.head, module.k_proj.out_features // module.head_dim
        shape = (self.rows, heads, self._length(self.context - 1), module.head_dim)
        # zeros: what attention does not see yet is multiplied by 0, which NaN would survive
        keys, values = (torch.zeros(shape, dtype=head.dtype, device=head.device) for _ in range(2))
        return LayerCache(keys, values, self._position)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """The model in evaluation mode, with our attention and caches in place of its own."""
        from transformers import AttentionInterface

        model, modules = self._trunk.model, _attention_modules(self._trunk)
        before, training = model.config._attn_implementation, model.training
        name = f"prosparse_sampling_{self._attention}"
        AttentionInterface.register(name, ATTENTION[self._attention])
        try:
            model.eval()
            model.set_attn_implementation(name)
            for module, cache in zip(modules, self._caches, strict=True):
                module.sampling_cache = cache
            yield
        finally:
            for module in modules:
                module.__dict__.pop("sampling_cache", None)
            model.set_attn_implementation(before)
            model.train(training)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens, up to the one with which their probabilities reach `top_p`; -inf for the rest."""
    ordered, order = logits.sort(-1, descending=True)
    p = ordered.softmax(-1)
    ordered.masked_fill_(p.cumsum(-1) - p >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _attention_modules(trunk: Trunk) -> list[Any]:
    layers: list[Any] = trunk.layers
    return [layer.self_attn for layer in layers]


def _check_positions(trunk: Trunk, context: int) -> None:
    """That every position of the context exists and sees all before it, which is what the cache holds."""
    known = trunk.model.config.max_position_embeddings
    if context > known:
        raise ValueError(f"a context of {context} tokens: the model knows {known} positions, give no more")
    # Mistral has one window, in its configuration; the Qwens one a layer
    windows = [getattr(module, "sliding_window", None) for module in _attention_modules(trunk)]
    if trunk.model.config.model_type == "mistral":
        windows.append(trunk.model.config.sliding_window)
    shortest = min((window for window in windows if window is not None), default=context)
    if shortest < context:
        raise ValueError(
            f"the model's tokens see {shortest} tokens (sliding window); "
            f"sample with a context of at most {shortest}, not {context}"
        )


def _rope_synchronises(trunk: Trunk) -> bool:
    """Whether rotary frequencies may depend on the position, which some versions look up on the CPU."""
    kinds = {getattr(module, "rope_type", None) for module in trunk.model.modules()}
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)
