"""A progress bar for `prepare`."""

from collections.abc import Iterator
from contextlib import contextmanager

from gptdist.data.prepare import Progress, ProgressCallback


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """Show bytes read of the total, documents and tokens per second on stderr while the block runs."""
    from rich import progress as bar
    from rich.console import Console

    columns = [
        bar.TextColumn("prepare"),
        bar.BarColumn(),
        bar.DownloadColumn(),
        bar.TextColumn("{task.fields[documents]:,} documents  {task.fields[tokens_per_s]:,.0f} tokens/s"),
        bar.TimeRemainingColumn(),
    ]
    console = Console(stderr=True)
    with bar.Progress(*columns, console=console, disable=not console.is_terminal) as display:
        task = display.add_task("prepare", total=None, documents=0, tokens_per_s=0.0)

        def update(state: Progress) -> None:
            elapsed_s = display.tasks[0].elapsed or 1e-9
            display.update(
                task,
                total=state.bytes_total or None,  # the embedded corpus has no files, so no known total
                completed=state.bytes_read,
                documents=state.documents,
                tokens_per_s=state.tokens / elapsed_s,
            )

        yield update
