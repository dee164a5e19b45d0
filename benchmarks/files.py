"""Files that appear complete or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Put `text` into the file `path`; raises `OSError` where that cannot be."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)
