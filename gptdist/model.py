"""The GPT: token and position embeddings, pre-LN transformer blocks, a final norm.

`GPT.forward` returns hidden states; `LanguageModel` adds the next-token head and loss. The model knows nothing of
sharding: parallel/ wraps `GPT.blocks` and fills the parameters from `initial_values`, shard by shard.

Shapes: B sequences, T positions, C = width, H = query heads, Hkv = key/value heads, G = H / Hkv, D = C / H.
Sources: Radford et al. 2019 (GPT-2); Ainslie et al. 2023 (grouped queries); Su et al. 2021 (rotary positions).
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptdist import ops
from gptdist.config import Config, ModelConfig
from gptdist.errors import UserError

IGNORE = -100  # target id that has no loss

# Initialisation, as GPT-2: every weight N(0, 0.02); the two projections into the residual stream of each block are
# scaled by 1/sqrt(2 * n_layers), so that the stream's variance does not grow with depth; norms 1, biases 0.
INIT_STD = 0.02
INIT_CHUNK = 1 << 16  # values drawn per generator seed: what makes any slice of any parameter cheap to reproduce


@dataclass(frozen=True)
class Dropout:
    """Everything a dropout mask depends on besides its place in the network (see ops.dropout)."""

    p: float
    key: Tensor  # () int64: mixes the run's seed and the step
    sample_ids: Tensor  # (B,) int64: global sample numbers

    def __call__(self, x: Tensor, site: int, *, first_position: int = 0) -> Tensor:
        return ops.dropout(x, self.p, key=self.key, sample_ids=self.sample_ids, site=site, row_offset=first_position)


class _Shadow(torch.autograd.Function):
    """A weight as if it were cast to its shadow's dtype here, but the cast is there already."""

    @staticmethod
    def forward(ctx, weight: Tensor, shadow: Tensor) -> Tensor:
        return shadow.view_as(shadow)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def shadowed(weight: Tensor, shadow: Tensor | None, x: Tensor) -> Tensor:
    """weight, or in its place the shadow, where a product with x has the shadow's dtype."""
    if shadow is None or not (x.dtype == shadow.dtype or torch.is_autocast_enabled(x.device.type)):
        return weight
    return _Shadow.apply(weight, shadow)


class Linear(nn.Linear):
    """The matrix product of a block: lora.py puts one with an adapter in its place, which has a dropout of its own."""

    shadow: Tensor | None = None  # the weight in the dtype of the products, where a strategy keeps such a copy

    def factor(self, x: Tensor) -> Tensor:
        """The weight for a product with x, which autocast casts unless the shadow saves that."""
        return shadowed(self.weight, self.shadow, x)

    def product(self, x: Tensor, dropout: Dropout | None) -> Tensor:
        """x (B, T, in), all positions -> (B, T, out), without the bias."""
        return ops.linear(x, self.factor(x))

    def forward(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        return ops.linear(x, self.factor(x), self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing on the meta device, where torch's imports all of torch.compile first: a second or more."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Whole:
    """One process computes everything. parallel/tensor.py divides the work over processes behind the same methods.

    Each then has a share of the heads, hidden units and vocabulary, and between the matrix products a share of the
    positions: x is (B, T, C) below where all positions are wanted, (B, T_own, C) where this process's own are.
    """

    rank = 0  # of the processes that share heads and positions, this one's number

    def embed(self, wte: nn.Embedding, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T_own, C)."""
        return wte(tokens)

    def embed_tied(self, wte: nn.Embedding, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """embed(), and the weight for the head."""
        return ops.tied_embedding(tokens, wte.weight)

    def own(self, positions: Tensor) -> Tensor:
        """(..., T) -> (..., T_own)."""
        return positions

    def enter(self, x: Tensor) -> Tensor:
        """(B, T_own, C) -> (B, T, C), for a product with this process's rows of a weight."""
        return x

    def leave(self, x: Tensor, proj: Linear, dropout: Dropout | None) -> Tensor:
        """x (B, T, this process's columns of `proj`) -> proj(x) (B, T_own, C), summed over the processes."""
        return proj(x, dropout)

    def computed_by_all(self, x: Tensor) -> Tensor:
        """x, which every process computed from what enter() gave it: the gradients of all of them count once."""
        return x

    def linear_cross_entropy(self, hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int,
                             ignore_index: int, shadow: Tensor | None = None) -> Tensor:
        """As ops.linear_cross_entropy, for this process's rows of `weight`."""
        return ops.linear_cross_entropy(hidden, weight, targets, vocab_size=vocab_size, ignore_index=ignore_index,
                                        shadow=shadow)


class Cache(Protocol):
    """What the model needs of a key/value cache; generate.PagedCache is the one implementation."""

    lengths: Tensor  # (B,) int64: tokens in the cache before this call
    block_table: Tensor

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Context:
    """What every block gets besides the hidden states."""

    parallel: Whole
    rope: tuple[Tensor, Tensor] | None = None  # cos, sin
    dropout: Dropout | None = None
    doc_start: Tensor | None = None  # (B, T) int32
    cache: Cache | None = None

    def drop(self, x: Tensor, site: int) -> Tensor:
        """Dropout on the residual stream's x (B, T_own, C); x itself where there is none."""
        if self.dropout is None:
            return x
        return self.dropout(x, site, first_position=self.parallel.rank * x.shape[1])


class LayerNorm(nn.Module):
    def __init__(self, width: int, *, bias: bool, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """norm(x), of the dtype of the matrix product that it feeds: custom ops are not autocast."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return ops.layer_norm(x, self.weight, self.bias, self.eps, dtype=dtype)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual) in one pass over memory."""
        return ops.residual_layer_norm(x, residual, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped queries.

    `qkv.weight` is grouped per key/value head as [its G queries, k, v] x D, so its rows shard by heads.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.slots = config.n_heads // config.kv_heads + 2  # G queries, k, v
        self.qkv = Linear(config.width, config.kv_heads * self.slots * self.head_dim, bias=config.has_qkv_bias)
        self.proj = Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, context: Context, site: int) -> Tensor:
        parallel = context.parallel
        x = parallel.enter(x)
        B, T, _ = x.shape
        qkv = self.qkv(x, context.dropout)
        qkv = qkv.unflatten(-1, (-1, self.slots, self.head_dim))  # (B, T, Hkv, G+2, D), this process's heads
        if context.rope is not None:
            qkv = ops.rope(qkv, *context.rope)
        if context.cache is not None:
            out = self._attend_cache(qkv, context.cache)
        else:
            drop = context.dropout
            masked = {} if drop is None else dict(
                dropout_p=drop.p, key=drop.key, sample_ids=drop.sample_ids, site=site,
                head_offset=parallel.rank * qkv.shape[2] * (self.slots - 2))
            out = ops.attention(qkv, doc_start=context.doc_start, **masked)
        return parallel.leave(out.reshape(B, T, -1), self.proj, context.dropout)  # (B, T, Hkv, G, D) -> (B, T, C)

    def _attend_cache(self, qkv: Tensor, cache: Cache) -> Tensor:
        q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        k_pages, v_pages = cache.write(self.layer, k, v)
        return ops.decode_attention(q, k_pages, v_pages, cache.block_table, cache.lengths)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc = Linear(config.width, config.hidden, bias=config.bias)
        self.proj = Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        parallel, dropout = context.parallel, context.dropout
        hidden = self.fc.product(parallel.enter(x), dropout)  # the bias joins the GELU: one pass over memory less
        return parallel.leave(ops.bias_gelu(hidden, self.fc.bias), self.proj, dropout)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Dropout sites 3i+1 (weights), 3i+2 and 3i+3 (branches)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        norm = dict(bias=config.bias, eps=config.norm_eps)
        self.layer = layer
        self.recompute = False  # activation checkpointing, set by GPT.checkpoint_blocks
        self.ln_1 = LayerNorm(config.width, **norm)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.width, **norm)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # Dropout masks are a function of position, so no generator state needs to be restored.
            return checkpoint(self._body, x, context, use_reentrant=False, preserve_rng_state=False)
        return self._body(x, context)

    def _body(self, x: Tensor, context: Context) -> Tensor:
        site = 3 * self.layer
        branch = self.attn(self.ln_1(x), context, site + 1)
        normed, x = self.ln_2.add(context.drop(branch, site + 2), x)
        branch = self.mlp(normed, context)
        return x + context.drop(branch, site + 3)


class GPT(nn.Module):
    """Tokens in, hidden states out; tasks own heads and losses."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.parallel = Whole()
        self.wte = Embedding(config.padded_vocab, config.width)
        self.wpe = Embedding(config.context, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_f = LayerNorm(config.width, bias=config.bias, eps=config.norm_eps)

    def checkpoint_blocks(self, every: int) -> None:
        """Recompute the activations of every n-th block in backward; 0: none."""
        for i, block in enumerate(self.blocks):
            block.recompute = every > 0 and i % every == 0

    def hidden(self, tokens: Tensor, *, dropout: Dropout | None = None, doc_start: Tensor | None = None,
               restart_positions: bool = False, cache: Cache | None = None, embedded: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 -> hidden states (B, T, C) after the final norm, of all positions.

        doc_start (B, T) int32: first position each position may attend to. restart_positions: positions count from
        there, so that a document is what it would be in a row of its own. With a cache the tokens continue its rows.
        embedded: what parallel.embed makes of the tokens, where that is known.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        if restart_positions:
            positions = positions - doc_start  # (B, T)
        if cache is not None:
            positions = cache.lengths[:, None] + positions  # (B, T)
        x = self.parallel.embed(self.wte, tokens) if embedded is None else embedded
        rope = None
        if self.wpe is not None:
            x = x + self.wpe(self.parallel.own(positions))
        else:
            rope = ops.rope_tables(positions, self.config.head_dim, self.config.rope_theta)
        context = Context(self.parallel, rope=rope, dropout=dropout, doc_start=doc_start, cache=cache)
        x = context.drop(x, 0)
        for block in self.blocks:
            x = block(x, context)
        return self.parallel.enter(self.ln_f(x))

    forward = hidden


class LanguageModel(GPT):
    """GPT with a next-token head, tied to the token embedding or of its own."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.head = None if config.tied else nn.Linear(config.width, config.padded_vocab, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.wte.weight if self.head is None else self.head.weight

    head_shadow: Tensor | None = None  # see Linear.shadow

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, dropout: Dropout | None = None,
                doc_start: Tensor | None = None, restart_positions: bool = False, cache: Cache | None = None,
                at: Tensor | None = None) -> Tensor:
        """Next-token loss in nats for every position: (B, T) fp32, 0 where the target is IGNORE.

        Of `at` (B, K), with targets (B, K): the losses after these positions of each row alone, (B, K).
        Without targets: the logits (B, vocab_size) fp32 after position at[b] of each row, to generate from; of `at`
        (B, K) those after K positions of each row, (B, K, vocab_size).
        """
        options = dict(dropout=dropout, doc_start=doc_start, restart_positions=restart_positions, cache=cache)
        if targets is None:
            return self.logits(_positions(self.hidden(tokens, **options), at))
        embedded, weight, shadow = None, self.head_weight, self.head_shadow
        if self.head is None:
            embedded, weight = self.parallel.embed_tied(self.wte, tokens)
        hidden = self.hidden(tokens, embedded=embedded, **options)
        if at is not None:
            hidden = _positions(hidden, at)
        losses = self.parallel.linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets.flatten(),
            vocab_size=self.config.vocab_size, ignore_index=IGNORE,
            shadow=shadow if shadow is not None and shadow.dtype == hidden.dtype else None)
        return losses.view_as(targets).clone()  # FSDP's hooks want an output that is not a view

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., vocab_size) fp32."""
        weight = shadowed(self.head_weight, self.head_shadow, hidden)
        return ops.linear(hidden, weight)[..., :self.config.vocab_size].float()


def _positions(hidden: Tensor, at: Tensor) -> Tensor:
    """hidden (B, T, C) at positions `at` (B,) or (B, K) of its rows: (B, C) or (B, K, C)."""
    rows = torch.arange(len(at), device=at.device)
    return hidden[rows if at.dim() == 1 else rows[:, None], at]


class Classifier(GPT):
    """GPT with one of `n_labels` labels for each row, from one hidden state of it. Padding never reaches that state."""

    def __init__(self, config: ModelConfig, n_labels: int, pool: str):
        super().__init__(config)
        self.pool = pool  # classify.pool
        self.score = Linear(config.width, n_labels)

    def forward(self, tokens: Tensor, lengths: Tensor, *, dropout: Dropout | None = None) -> Tensor:
        """Logits (B, n_labels) fp32 of the rows tokens (B, T), of which the first lengths[b] >= 1 tokens are real."""
        hidden = self.hidden(tokens, dropout=dropout)
        if self.pool == "mean":
            real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (B, T)
            pooled = ((hidden.float() * real[..., None]).sum(1) / lengths[:, None]).to(hidden.dtype)
        else:
            at = lengths - 1 if self.pool == "last" else torch.zeros_like(lengths)
            pooled = hidden[torch.arange(len(at), device=at.device), at]
        logits = self.score(pooled[:, None], dropout).squeeze(1).float()  # (B, C) -> (B, n_labels)
        return self.parallel.computed_by_all(logits).clone()  # FSDP's hooks want an output that is not a view


def build(config: Config) -> GPT:
    """The model of a run on the meta device: with the head of its task, frozen parts marked, adapters in place."""
    if config.task.name == "classify":
        with torch.device("meta"):
            model = Classifier(config.model, len(config.classify.labels), config.classify.pool)
    else:
        model = build_meta(config.model)
    if config.lora.rank > 0:
        from gptdist import lora

        lora.apply(model, config.lora, also_train=("score.weight", "score.bias"))  # a new head has learned nothing yet
    elif config.task.trained_blocks is not None:
        freeze(model, config.task.trained_blocks)
    return model


def freeze(model: GPT, trained_blocks: int) -> None:
    """Train the head alone, or with it the last blocks and the final norm (Raschka 2024, chapter 6)."""
    if trained_blocks > len(model.blocks):
        raise UserError(f"task.freeze=last:{trained_blocks}, but the model has {len(model.blocks)} blocks")
    model.requires_grad_(False)
    head = model.score if isinstance(model, Classifier) else model.head or model.wte  # a tied head is the embedding
    for part in (head, *([*model.blocks[-trained_blocks:], model.ln_f] if trained_blocks else [])):
        part.requires_grad_(True)


def build_meta(config: ModelConfig, model_class: type[GPT] = LanguageModel) -> GPT:
    """The model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return model_class(config)


def parameter_count(config: ModelConfig) -> int:
    return sum(p.numel() for p in build_meta(config).parameters())


def initial_values(name: str, shape: tuple[int, ...], start: int, count: int, *, n_layers: int, seed: int) -> Tensor:
    """Initial values [start, start + count) of a parameter in row-major order: (count,) fp32 on the CPU.

    A pure function of (seed, name, flat index), so every rank can draw just its shard and all world sizes agree.
    """
    if len(shape) == 1 or name.endswith("lora_B"):
        return torch.full((count,), 1.0 if name.endswith("weight") else 0.0)
    if name.endswith("lora_A"):
        bound = 1 / math.sqrt(shape[1])  # Kaiming's uniform with a = sqrt(5), as Hu et al.
        return _drawn(name, start, count, seed, torch.rand) * (2 * bound) - bound
    std = INIT_STD / math.sqrt(2 * n_layers) if name.endswith("proj.weight") else INIT_STD
    return _drawn(name, start, count, seed, torch.randn) * std


def _drawn(name: str, start: int, count: int, seed: int, draw: Callable[..., Tensor]) -> Tensor:
    first, last = start // INIT_CHUNK, (start + count - 1) // INIT_CHUNK
    chunks = [_chunk(name, index, seed, draw) for index in range(first, last + 1)] if count else []
    values = torch.cat(chunks) if chunks else torch.empty(0)
    offset = start - first * INIT_CHUNK
    return values[offset:offset + count]


def _chunk(name: str, index: int, seed: int, draw: Callable[..., Tensor]) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return draw(INIT_CHUNK, generator=generator)
