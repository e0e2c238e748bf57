"""The checkpoints of a run, saved while it goes on: `Saver`.

In the background: the caller waits while the rank's share is copied to the host, then a thread plans, writes,
publishes and removes old checkpoints. One save at most is in flight. The ranks' threads talk over a process group of
their own, since collectives of two threads in one group would mix.
"""

import sys
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gptdist.checkpoint import layout, store
from gptdist.checkpoint.ranks import Ranks
from gptdist.checkpoint.share import HostBuffers, SharePlanner
from gptdist.errors import ActionableError, UserError


class Saver:
    """Saves step after step into one directory; every rank makes one and calls it alike.

    A save in the background that fails is told of by `failed`, at another moment on each rank, and printed by `settle`
    and the next `save`, which is then done in the foreground and has to succeed. Without one the error is raised, the
    same on every rank, by `wait` or at the end of the `with` block, which also waits for the save under way.
    """

    def __init__(self, root: Path, *, keep_last: int, keep_best: bool, timeout_s: float | None = None,
                 note: Callable[[str], None] = lambda phase: None):
        """note: called with the phase of a save that begins or goes on, from its thread; "" when it is over."""
        self.root, self.keep_last, self.keep_best, self._note = root, keep_last, keep_best, note
        group = None
        if dist.is_available() and dist.is_initialized():
            timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
            group = dist.new_group(backend="gloo", timeout=timeout)
        self._ranks = Ranks(group)
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # of a save in the background, not yet told
        self._unsaved: BaseException | None = None  # the same, told: the next save has to succeed

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()
        except Exception as own:
            if error is None:
                raise
            print(f"the checkpoint that was being saved failed too: {own}", file=sys.stderr, flush=True)

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], files: Mapping[str, bytes], *,
             background: bool) -> None:
        """Save `tensors` and `files` as `store.save` does, then remove the checkpoints that are not kept.

        Waits for the save before. In the background, `tensors` may change as soon as this returns.
        """
        self.settle()
        must_succeed, self._unsaved = self._unsaved is not None, None
        planner = SharePlanner(tensors, self._ranks.rank, self._ranks.world)
        if must_succeed or not background:
            self._write(step, planner, files)
            return
        planner.stage(self._buffers)
        # A daemon: the process may end without it once `wait` is over or was interrupted.
        self._thread = threading.Thread(target=self._run, args=(step, planner, files), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed since the last `settle`, as far as this rank knows."""
        return self._error is not None

    def settle(self) -> None:
        """Wait until no save is in flight; if one failed, say so."""
        self._join()
        if self._error is not None:
            self._unsaved, self._error = self._error, None
            why = str(self._unsaved) if isinstance(self._unsaved, ActionableError) else repr(self._unsaved)
            if self._ranks.rank == 0:
                print(f"a checkpoint could not be saved: {why}; training goes on, but the next save has to succeed",
                      file=sys.stderr, flush=True)

    def wait(self) -> None:
        """Wait until no save is in flight; raises the error of the last one."""
        self._join()
        error = self._error or self._unsaved
        self._error = self._unsaved = None
        if error is not None:
            raise error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, step: int, planner: SharePlanner, files: Mapping[str, bytes]) -> None:
        try:
            self._write(step, planner, files)
        except BaseException as e:  # told by `settle` or raised by `wait`
            self._error = e

    def _write(self, step: int, planner: SharePlanner, files: Mapping[str, bytes]) -> None:
        try:
            store.write(self.root, step, planner, files, self._ranks, self._note)
            self._note("prune")
            self._ranks.on_coordinator(self._prune)
        finally:
            self._note("")

    def _prune(self) -> None:
        """The new checkpoint is there, whether the old ones go or not."""
        try:
            layout.prune(self.root, self.keep_last, self.keep_best)
        except UserError as error:
            print(f"an old checkpoint is still there: {error}", file=sys.stderr, flush=True)
