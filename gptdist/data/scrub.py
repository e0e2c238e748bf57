"""Replaces e-mail addresses, telephone numbers and IP addresses by placeholders.

What is found is what is written the usual way; a name, a street or a number written in words is not. Telephone numbers:
international ones with their + and country code, and ten-digit North American ones with separators, which is how
Laurencon et al., "The BigScience ROOTS Corpus" (2022) and Dolma (Soldaini et al. 2024) look for them too.
"""

import ipaddress
import re
from collections.abc import Callable, Iterable

from gptdist.errors import UserError

# Each begins with characters to look for, not with what must not stand before them: that is what makes a search fast.
_DOMAIN = re.compile(r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])")
_LOCAL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}$")
_PHONE = re.compile(
    r"[+(\d](?<![\w.+/-].)(?:"
    r"(?<=\+)[1-9]\d{0,2}(?:[ .-]?(?:\(\d{1,4}\)|\d{1,4})){2,6}"  # international
    r"|(?<=1)[ .-](?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"  # North American: with 1, with (, with neither
    r"|(?<=\()\d{3}\) ?\d{3}[ .-]\d{4}"
    r"|(?<=\d)\d{2}[ .-]\d{3}[ .-]\d{4}"
    r")(?![\w-]|\.\d)")
_IP4 = re.compile(r"\d(?<![\w.-].)\d{0,2}(?:\.\d{1,3}){3}(?![\w-]|\.\d)")
_IP6 = re.compile(r"[0-9A-Fa-f:](?<![\w:.].)(?:[0-9A-Fa-f]{0,4}:){1,7}[0-9A-Fa-f]{0,4}(?![\w:])")


class Scrub:
    """The filter; it drops nothing. `replaced` counts by kind."""

    names = ("scrub",)

    def __init__(self, kinds: Iterable[str]):
        """kinds: of KINDS. Raises UserError for another."""
        self.replaced = dict.fromkeys(kinds, 0)
        if unknown := set(self.replaced) - set(KINDS):
            raise UserError(f"--scrub has {', '.join(sorted(unknown))}, expected some of {', '.join(KINDS)}")

    def __call__(self, texts: list[str]) -> list[str]:
        return [self._scrubbed(text) for text in texts]

    def _scrubbed(self, text: str) -> str:
        for kind in self.replaced:
            text, n = KINDS[kind](text)
            self.replaced[kind] += n
        return text


def scrub_email(text: str) -> tuple[str, int]:
    """(text with <EMAIL> for each address, how many there were); so do the others."""
    parts, done = [], 0
    for domain in _DOMAIN.finditer(text):
        local = _LOCAL.search(text, max(done, domain.start() - 65), domain.start())
        if local:
            parts += [text[done:local.start()], "<EMAIL>"]
            done = domain.end()
    return "".join([*parts, text[done:]]), len(parts) // 2


def scrub_phone(text: str) -> tuple[str, int]:
    return _replace(_PHONE, text, lambda found: 10 <= sum(map(str.isdigit, found)) <= 15, "<PHONE>")


def scrub_ip(text: str) -> tuple[str, int]:
    text, n4 = _replace(_IP4, text, _is_address, "<IP>") if text.count(".") > 2 else (text, 0)
    text, n6 = _replace(_IP6, text, _is_address, "<IP>") if text.count(":") > 1 else (text, 0)
    return text, n4 + n6


KINDS: dict[str, Callable[[str], tuple[str, int]]] = {"email": scrub_email, "phone": scrub_phone, "ip": scrub_ip}


def _replace(pattern: re.Pattern, text: str, accept: Callable[[str], bool], placeholder: str) -> tuple[str, int]:
    n = 0

    def replacement(match: re.Match) -> str:
        nonlocal n
        if not accept(match[0]):
            return match[0]
        n += 1
        return placeholder

    return pattern.sub(replacement, text), n


def _is_address(found: str) -> bool:
    try:
        ipaddress.ip_address(found)
    except ValueError:
        return False
    return any(map(str.isdigit, found))  # `::` and `a::b` are C++ or Haskell far more often than addresses
