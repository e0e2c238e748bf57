"""How a step's sequences are dealt out to ranks and micro-batches. Needs no torch: the planner counts by it too."""

from gptdist.errors import UserError


def micro_batches_per_step(sequences: int, world: int, micro_batch: int) -> tuple[int, int]:
    """Return (how many micro-batches every rank runs, rows of each): enough for the largest share, ceil(G / W).

    At most `micro_batch` rows, and no more than that takes: a row of padding costs as much as any other.
    """
    largest_share = -(-sequences // world)
    count = -(-largest_share // micro_batch)
    return count, -(-largest_share // count)


def check_world(sequences_per_step: int, world: int) -> None:
    """Raise UserError if some of `world` processes would have no sequence of a step."""
    if world > sequences_per_step:
        raise UserError(
            f"world size {world} is larger than the {sequences_per_step} sequences of a step (train.tokens_per_step / "
            "model.context), so some ranks would have nothing to do; use fewer processes or a larger "
            "train.tokens_per_step"
        )
