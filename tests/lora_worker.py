"""A job of two processes (conftest.Workers): adapters and preference optimisation, strategy by strategy."""

from pathlib import Path

from tests.training import run_tiny

STEPS = 5
# 11 sequences (5 pairs) a step: no even shares, several micro-batches, clipping.
COMMON = [f"--train.steps={STEPS}", "--schedule.warmup_steps=0", "--lora.alpha=8"]
LORA = [*COMMON, "--optim.lr=1e-2", "--lora.rank=4", "--lora.split_qkv=true", "--eval.every=0"]
DPO = [*COMMON, "--optim.lr=1e-3", "--task.name=dpo", "--train.batch=5", "--train.micro_batch=2",
       "--task.val_fraction=0.25", "--instruct.template={prompt}={answer}", "--eval.every=4"]
DROPOUT = ["--model.dropout=0.1", "--lora.dropout=0.2"]
# Single-process reference -> its overrides; case -> (reference, further overrides).
REFERENCES = {
    "lora": [*LORA, *DROPOUT],
    "plain": LORA,
    "dpo": DPO,
    "dpo-lora": [*DPO, "--lora.rank=4", "--lora.dropout=0.2"],
}
ADAPTERS = ["--lora.save=adapters"]
CASES = {
    "ddp": ("lora", []), "fsdp": ("lora", ADAPTERS), "zero2": ("lora", ADAPTERS), "zero3": ("lora", []),
    "fsdp-tensor": ("plain", ["--parallel.tensor=2"]),
    "zero2-dpo": ("dpo", []), "fsdp-tensor-dpo": ("dpo", ["--parallel.tensor=2"]),
    "zero1-dpo-lora": ("dpo-lora", []), "fsdp-dpo-lora": ("dpo-lora", []), "zero3-dpo-lora": ("dpo-lora", ADAPTERS),
}
# One run that goes on under other strategies: (step it stops at, strategy), begun and ended by a single process.
CHAIN = [(3, "fsdp"), (4, "zero3")]


def overrides_of(reference: str, base: Path, pairs: Path) -> list[str]:
    data = [f"--task.train_data={pairs}"] if "dpo" in reference else []
    return [*REFERENCES[reference], *data, f"--checkpoint.init_from={base}"]


def main(data: Path, base: Path, pairs: Path, out: Path) -> None:
    for name, (reference, further) in CASES.items():
        run_tiny(data, out / name, *overrides_of(reference, base, pairs), f"--parallel.strategy={name.split('-')[0]}",
                 *further)
    for kind in ("lora", "dpo"):
        for stop, strategy in CHAIN:
            further = ADAPTERS if kind == "lora" else []
            run_tiny(data, out / f"chain-{kind}", *overrides_of(kind, base, pairs), *further,
                     f"--parallel.strategy={strategy}", f"--train.stop_at={stop}")
    # Adapters alone, saved by another strategy and merged into sharded weights.
    for strategy in ("fsdp", "zero3", "zero2"):
        run_tiny(data, out / f"merged-{strategy}", f"--checkpoint.init_from={out / 'fsdp'}", "--train.steps=1",
                 "--schedule.warmup_steps=0", "--eval.every=0", f"--parallel.strategy={strategy}")
