"""How large a model and its step are: parameters, shares of them, work. Formulas only: nothing is built.

Letters as in model.py: B sequences of T tokens, C channels, H query and Hkv key/value heads of D channels, F hidden
units, V rows of the (padded) vocabulary; t processes divide the layers among them.
"""

from dataclasses import dataclass
from functools import cached_property

from gptdist.config import Config, ModelConfig
from gptdist.data.shares import check_world, micro_batches_per_step
from gptdist.errors import UserError
from gptdist.metrics import flops_per_token


@dataclass(frozen=True)
class Layout:
    """The processes of a run: `tensor` of them for each layer, in `replicas` groups that shard over `shards`."""

    size: int
    tensor: int
    replicas: int
    shards: int
    per_node: int

    @property
    def dp_size(self) -> int:
        return self.size // self.tensor

    @property
    def nodes(self) -> int:
        return -(-self.size // self.per_node)


def strategy_of(config: Config, world_size: int) -> str:
    """As parallel/world.py resolves it."""
    if config.parallel.strategy != "auto":
        return config.parallel.strategy
    return "single" if world_size == 1 else "fsdp"


def lay_out(config: Config, world_size: int, per_node: int) -> Layout:
    """The Layout of a run. Raises UserError for processes that do not divide as the configuration wants."""
    strategy, tensor = strategy_of(config, world_size), config.parallel.tensor
    for option, value in (("world-size", world_size), ("per-node", per_node)):
        if value < 1:
            raise UserError(f"--{option} is {value}, expected at least 1")
    if strategy == "single" and world_size > 1:
        raise UserError(f"parallel.strategy=single runs in one process, but --world-size is {world_size}: use ddp or "
                        f"fsdp")
    if world_size % tensor:
        raise UserError(f"parallel.tensor={tensor} does not divide --world-size {world_size}: change one of them")
    replicas = {"ddp": world_size, "hsdp": config.parallel.replicas or max(1, world_size // per_node)}.get(strategy, 1)
    if world_size % (replicas * tensor):
        times = "" if tensor == 1 else f" x parallel.tensor={tensor}"
        raise UserError(f"parallel.replicas={replicas}{times} does not divide --world-size {world_size}: change one of "
                        f"them")
    check_world(config.sequences_per_step, world_size // tensor)
    return Layout(world_size, tensor, replicas, world_size // replicas // tensor, per_node)


@dataclass(frozen=True)
class Parameters:
    """Parameters of one process of `tensor` that divide each layer; matrices have two dimensions and may be cast."""

    config: ModelConfig
    tensor: int = 1

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of a block's, by name."""
        m, t = self.config, self.tensor
        qkv, hidden = (m.width + 2 * m.kv_heads * m.head_dim) // t, m.hidden // t
        return {"attn.qkv": (qkv, m.width), "attn.proj": (m.width, m.width // t), "mlp.fc": (hidden, m.width),
                "mlp.proj": (m.width, hidden)}

    @cached_property
    def block_matrices(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices.values())

    @cached_property
    def block_vectors(self) -> int:
        m, t = self.config, self.tensor
        norms = 2 * m.width * (2 if m.bias else 1)
        qkv_bias = (m.width + 2 * m.kv_heads * m.head_dim) // t if m.has_qkv_bias else 0
        return norms + qkv_bias + ((m.width + m.hidden // t + m.width) if m.bias else 0)

    @property
    def block(self) -> int:
        return self.block_matrices + self.block_vectors

    @property
    def vocabulary(self) -> int:
        """Of the token embedding, and of the head where it has a weight of its own: each."""
        return self.config.padded_vocab // self.tensor * self.config.width

    @property
    def head_matrices(self) -> int:
        """Of the head, if that is not the embedding."""
        return 0 if self.config.tied else self.vocabulary

    @cached_property
    def outer(self) -> int:
        """Outside the blocks."""
        m = self.config
        positions = m.context * m.width if m.positions == "learned" else 0
        return self.vocabulary + self.head_matrices + positions + m.width * (2 if m.bias else 1)

    @property
    def total(self) -> int:
        return self.outer + self.config.n_layers * self.block

    @property
    def products(self) -> int:
        """Those that are a factor of a matrix product, in the blocks and at the head."""
        return self.config.n_layers * self.block_matrices + self.vocabulary


@dataclass(frozen=True)
class Step:
    """One optimizer step: `count` micro-batches of `rows` sequences on every data-parallel rank."""

    count: int
    rows: int
    context: int
    sequences: int  # over all ranks, without padding

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.context

    @property
    def target_tokens(self) -> int:
        """Of the step over all ranks."""
        return self.sequences * self.context


def step_of(config: Config, layout: Layout) -> Step:
    count, rows = micro_batches_per_step(config.sequences_per_step, layout.dp_size, config.train.micro_batch)
    return Step(count, rows, config.model.context, config.sequences_per_step)


@dataclass(frozen=True)
class Flops:
    """FLOPs per token over all processes of a tensor-parallel group, forward and backward."""

    model: float  # as metrics.flops_per_token: what MFU counts
    products: float  # matrix products, recomputed ones included
    attention: float  # scores of the causal triangle; 7 products of them, the backward computes them again


def flops_of(config: Config) -> Flops:
    model, n = config.model, Parameters(config.model)
    scores = 2 * 2 * model.n_layers * model.width * model.context / 2  # of a forward: q k^T and P v
    every = config.train.checkpoint_every_block
    again = -(-model.n_layers // every) / model.n_layers if every else 0.0
    blocks = 6 * model.n_layers * n.block_matrices
    return Flops(flops_per_token(model, n.total), 6 * n.vocabulary + blocks * (1 + again / 3),
                 scores * (3.5 + again))


OUTSIDE = -1  # the unit of the weights outside the blocks


@dataclass(frozen=True)
class Weight:
    """A parameter of one process, or the vectors or adapters of a block together.

    `trained` as lora and task.freeze leave it; `matrix`: the optimizer decays it; `product`: a matrix product reads it.
    """

    unit: int  # number of the block, or OUTSIDE
    name: str
    size: int
    trained: bool
    matrix: bool = True
    product: bool = False


def weights_of(config: Config, tensor: int = 1) -> list[Weight]:
    """The parameters of one process, in the model's order (model.build)."""
    m, n, last = config.model, Parameters(config.model, tensor), config.task.trained_blocks
    everything = config.lora.rank == 0 and last is None
    classifies = config.task.name == "classify"
    tied = m.tied and not classifies
    outside = [Weight(OUTSIDE, "tied", n.vocabulary, config.lora.rank == 0, product=True) if tied else
               Weight(OUTSIDE, "wte", n.vocabulary, everything)]
    if m.positions == "learned":
        outside.append(Weight(OUTSIDE, "wpe", m.context * m.width, everything))
    blocks = [w for i in range(m.n_layers)
              for w in _block(config, n, i, everything or (last is not None and i >= m.n_layers - last))]
    norm = Weight(OUTSIDE, "ln_f", m.width * (2 if m.bias else 1), everything or bool(last), matrix=False)
    if tied:
        return [*outside, *blocks, norm]
    rows = max(2, len(config.classify.labels)) if classifies else n.vocabulary // m.width
    return [*outside, *blocks, norm, Weight(OUTSIDE, "head", rows * m.width, classifies or config.lora.rank == 0,
                                            product=True)]


def _block(config: Config, n: Parameters, block: int, trained: bool) -> list[Weight]:
    weights = []
    for name, (rows, columns) in n.matrices.items():
        weights.append(Weight(block, name, rows * columns, trained, product=True))
        if adapted(config, name):
            stacked = 3 if config.lora.split_qkv and name == "attn.qkv" else 1
            size = config.lora.rank * (stacked * columns + rows)
            weights.append(Weight(block, f"{name} adapter", size, trained=True))
    return [*weights, Weight(block, "vectors", n.block_vectors, trained, matrix=False)]


def adapted(config: Config, name: str) -> bool:
    """Whether a block's matrix gets an adapter (lora.targets_of)."""
    return config.lora.rank > 0 and config.lora.target_pattern.fullmatch(f"blocks.0.{name}") is not None
