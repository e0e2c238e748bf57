"""gpu_check's report: gpu_check.md for people, gpu_check.json with every result."""

import json
from pathlib import Path

from benchmarks.kernels import Row, table_row
from benchmarks.kernels import markdown as times_markdown
from benchmarks.timing import Time


def write(folder: Path, environment: dict, outcomes: list) -> None:
    (folder / "gpu_check.md").write_text(markdown(environment, outcomes))
    data = environment | {"sections": [vars(outcome) for outcome in outcomes]}
    (folder / "gpu_check.json").write_text(json.dumps(data, indent=1) + "\n")


def markdown(environment: dict, outcomes: list) -> str:
    """Failures first, then section by section."""
    checks = [check for outcome in outcomes for check in outcome.of("check")]
    failures = [check for check in checks if not check["ok"]]
    lines = [*head(environment), "", f"## {len(checks) - len(failures)} of {len(checks)} checks passed", ""]
    lines += [failure(check) for check in failures]
    lines += [f"- {outcome.title}: {outcome.note}" for outcome in outcomes if outcome.note]
    for outcome in outcomes:
        body = section(outcome)
        if body:
            lines += ["", f"## {outcome.title} ({outcome.seconds:.0f} s)", "", *body]
    return "\n".join(lines).rstrip() + "\n"


def head(found: dict) -> list[str]:
    gpu = found["gpu"]
    return [
        "# CUDA kernels on a GPU",
        "",
        f"{found['date']}, `{found['command']}`",
        "",
        f"GPU: {gpu.get('name', 'none')}, compute capability {gpu.get('capability', '-')}, driver for CUDA "
        f"{gpu.get('driver_cuda', '-')}. Library: CUDA {gpu.get('library_cuda', '-')}. torch {found['torch']}, CUDA "
        f"{found['torch_cuda']}. {found['platform']}.",
    ]


def failure(check: dict) -> str:
    where = " ".join(part for part in (check["name"], check["dtype"], check["shape"]) if part)
    return f"- FAILED {where}: {check['error']:.3g}, allowed {check['limit']:.3g} {check['detail']}".rstrip()


def section(outcome) -> list[str]:
    lines = []
    if outcome.of("check"):
        lines += checks_table(outcome.of("check"))
    for limits in outcome.of("limits"):
        peaks = ", ".join(f"{dtype} {flops / 1e12:.3g}" for dtype, flops in limits["matmul"].items())
        copy = f"A copy reaches {limits['copy'] / 1e9:.0f} GB/s, read and written"
        lines.append(f"{copy}; a matrix product {peaks} TFLOP/s.")
    if outcome.of("time"):
        lines += ["", times_markdown([as_row(fields) for fields in outcome.of("time")])]
    if outcome.of("training"):
        lines += training_table(outcome.of("training"))
    return lines + [f"- {fields['tool']}: {fields['summary']}" for fields in outcome.of("sanitizer")]


def as_row(fields: dict) -> Row:
    return Row(**fields | {"times": {name: Time(**values) for name, values in fields["times"].items()}})


def checks_table(checks: list[dict]) -> list[str]:
    """The worst of each name and dtype."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for check in checks:
        groups.setdefault((check["name"], check["dtype"]), []).append(check)
    lines = ["| check | dtype | cases | worst | allowed |", "|---|---|---|---|---|"]
    for (name, dtype), group in groups.items():
        worst = max(group, key=lambda check: (check["error"] != check["error"], check["error"] / (check["limit"] or 1)))
        lines.append(f"| {name} | {dtype} | {len(group)} | {worst['error']:.2g} | {worst['limit']:.2g} |")
    return lines


def training_table(speeds: list[dict]) -> list[str]:
    lines = ["| model | ops | tokens a step | ms | tokens/s | MFU | loss |", "|---|---|---|---|---|---|---|"]
    for speed in speeds:
        cells = [speed["model"], speed["variant"], f"{speed['tokens_per_step']}"]
        if speed["step_ms"] is None:
            cells += [speed["note"], "", "", ""]
        else:
            mfu = "-" if speed["mfu"] is None else f"{speed['mfu']:.1%}"
            cells += [f"{speed['step_ms']:.1f}", f"{speed['tokens_per_s']:,.0f}", mfu, f"{speed['loss']:.3f}"]
        lines.append(table_row(cells))
    return lines
