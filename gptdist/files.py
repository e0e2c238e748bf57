"""Small files that others may read at any time."""

import os
import secrets
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file that readers see whole, the old one or the new. Raises OSError, and leaves nothing else behind."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
