"""The pages of one key/value cache as a pool: rows join and leave, and rows that begin alike share pages.

A page belongs to one row, to several that begin with the same tokens, or to none: then it is free, or idle, which
means that a later row which begins with its tokens finds them there. Idle pages are given away, the longest unused
first, when no free one is left. Source: Kwon et al. 2023 (paged cache), section 4.4 (shared prefixes).
"""

import hashlib
from array import array
from collections.abc import Sequence

import torch

from gptdist.config import ModelConfig
from gptdist.generate import PAGE, PagePool, pages_for


class SharedPool(PagePool):
    """A pool that remembers what its pages hold."""

    def __init__(self, config: ModelConfig, n_pages: int, *, device: torch.device, dtype: torch.dtype):
        super().__init__(config, n_pages, device=device, dtype=dtype)
        self._users = [0] * (n_pages + 1)
        self._page_of: dict[bytes, int] = {}  # digest of a prefix that fills its pages -> the last of these
        self._digest_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # pages in _digest_of without users, the longest unused first

    @property
    def available(self) -> int:
        """Pages that a new row could have."""
        return len(self._free) + len(self._idle)

    def join(self, prompt: Sequence[int], n_tokens: int) -> tuple[list[int], int] | None:
        """(pages for a row of n_tokens that begins with the prompt, tokens that are in them already).

        The last token of the prompt is never among the latter: its forward says what comes next. None where the pool
        has not enough pages now.
        """
        shared = self._find(prompt[:-1])
        n_new = pages_for(n_tokens) - len(shared)
        if n_new > self.available - sum(page in self._idle for page in shared):
            return None
        for page in shared:
            self._idle.pop(page, None)
            self._users[page] += 1
        return shared + [self._take() for _ in range(n_new)], len(shared) * PAGE

    def remember(self, tokens: Sequence[int], pages: list[int]) -> None:
        """Let later rows find `tokens`, which are written in `pages`; what does not fill a page is left out."""
        for page, digest in zip(pages, _digests(tokens), strict=False):
            if digest not in self._page_of and page not in self._digest_of:
                self._page_of[digest], self._digest_of[page] = page, digest

    def leave(self, pages: list[int]) -> None:
        """Give back a row's pages."""
        for page in reversed(pages):  # the end of a prefix is forgotten before its beginning
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._digest_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def _find(self, tokens: Sequence[int]) -> list[int]:
        found = []
        for digest in _digests(tokens):
            if digest not in self._page_of:
                break
            found.append(self._page_of[digest])
        return found

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._idle))
            del self._idle[page], self._page_of[self._digest_of.pop(page)]
        self._users[page] = 1
        return page


def _digests(tokens: Sequence[int]):
    """For every full page of tokens a digest of them and of all before."""
    digest = b""
    for end in range(PAGE, len(tokens) + 1, PAGE):
        digest = hashlib.sha256(digest + array("q", tokens[end - PAGE:end]).tobytes()).digest()
        yield digest
