"""Philox4x32-7: dropout masks as a pure function of what is dropped, never of a generator's state.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); 7 rounds are the fewest
that pass BigCrush (table 2 there). Every backend must reproduce the layout below bit for bit.

    key word 0      low 32 bits of the mixed key (`dropout_key`)
    key word 1      high 32 bits of the mixed key
    counter word 0  column // 4
    counter word 1  row
    counter word 2  low 32 bits of the global sample id
    counter word 3  site << 16 | head

Output word `column % 4` belongs to the column. The element is kept iff word >= floor(p * 2^32) (unsigned), and a kept
value is multiplied by 1 / (1 - p).

    dropout     row = position in the sequence, column = channel, head = 0
    attention   row = query position, column = key position, head = global query head

`site` (which dropout of the model) and `head` are each below 2^16. torch has no complete uint32 arithmetic, so words
are held in int64 and masked to 32 bits.
"""

import torch

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85  # golden ratio, sqrt(3) - 1
ROUNDS = 7
MASK32 = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF
# Counters evaluated at once. On a CPU a block's int64 temporaries (512 KiB each) stay in the second-level cache.
BLOCK_CPU, BLOCK_OTHER = 1 << 16, 1 << 22


def splitmix64(x: int) -> int:
    """One step of SplitMix64 (Steele, Lea, Flood 2014): a bijective mix of 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def dropout_key(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The key of one step's masks: SplitMix64(SplitMix64(seed) + step) as an int64 scalar on `device`.

    A tensor, not a number, so that a changing step neither recompiles nor breaks a captured CUDA graph.
    """
    mixed = splitmix64((splitmix64(seed & MASK64) + step) & MASK64)
    signed = mixed - (1 << 64) if mixed >> 63 else mixed
    return torch.tensor(signed, dtype=torch.int64, device=device)


def _multiply(a: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32 bit product; the int64 product wraps, its bits are those of the unsigned one."""
    product = a * multiplier
    low = product & MASK32
    return product.bitwise_right_shift_(32).bitwise_and_(MASK32), low


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
    rounds: int = ROUNDS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four output words for each counter. Words are int64 tensors in [0, 2^32) that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, MULTIPLIER_0)
        high1, low1 = _multiply(c2, MULTIPLIER_1)
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
    return c0, c1, c2, c3


def _words(key: torch.Tensor, sample_ids: torch.Tensor, site: int, heads: torch.Tensor, rows: torch.Tensor, quads: int):
    """Output words (N, R, 4 * quads) for N (sample, head) pairs and R rows."""
    c0 = torch.arange(quads, device=key.device)  # (Q,)
    c1 = rows.view(-1, 1)  # (R, 1)
    c2 = (sample_ids & MASK32).view(-1, 1, 1)  # (N, 1, 1)
    c3 = (heads | (site << 16)).view(-1, 1, 1)  # (N, 1, 1)
    words = philox4x32((c0, c1, c2, c3), (key & MASK32, (key >> 32) & MASK32))
    return torch.stack(words, dim=-1).flatten(-2)  # (N, R, Q, 4) -> (N, R, 4Q)


def keep_mask(
    key: torch.Tensor,
    p: float,
    sample_ids: torch.Tensor,
    site: int,
    heads: torch.Tensor,
    rows: torch.Tensor,
    columns: int,
) -> torch.Tensor:
    """Which elements are kept: bool (N, R, columns).

    key: int64 scalar. sample_ids, heads: int64 (N,). rows: int64 (R,). Memory beyond the mask itself is bounded.
    """
    threshold = int(p * 2.0**32)
    quads = (columns + 3) // 4
    mask = torch.empty(len(sample_ids), len(rows), columns, dtype=torch.bool, device=key.device)
    if mask.numel() == 0:
        return mask
    block = BLOCK_CPU if key.device.type == "cpu" else BLOCK_OTHER
    rows_at_once = max(1, min(len(rows), block // quads))
    groups_at_once = max(1, block // (rows_at_once * quads))
    for n in range(0, len(sample_ids), groups_at_once):
        group = slice(n, n + groups_at_once)
        for r in range(0, len(rows), rows_at_once):
            span = slice(r, r + rows_at_once)
            words = _words(key, sample_ids[group], site, heads[group], rows[span], quads)
            torch.ge(words[..., :columns], threshold, out=mask[group, span])
    return mask


def check_randomness(op: str, p: float, key, sample_ids, batch: int, site: int) -> None:
    """ValueError unless the arguments that a mask is made of are complete and in range."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout probability is {p}, expected 0 <= p < 1")
    if p == 0.0:
        return
    if key is None or sample_ids is None:
        raise ValueError(f"{op}: dropout needs key (see dropout_key) and sample_ids")
    if key.numel() != 1 or key.dtype != torch.int64:
        raise ValueError(f"{op}: key is {key.dtype} of shape {tuple(key.shape)}, expected an int64 scalar")
    if tuple(sample_ids.shape) != (batch,) or sample_ids.dtype != torch.int64:
        raise ValueError(
            f"{op}: sample_ids is {sample_ids.dtype} of shape {tuple(sample_ids.shape)}, expected int64 ({batch},)"
        )
    if not 0 <= site < 1 << 16:
        raise ValueError(f"{op}: site is {site}, expected 0 <= site < 65536")
