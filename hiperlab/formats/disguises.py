"""What a file is when it is not what its name says: the first bytes tell, and the message names the true cause."""

from __future__ import annotations

from pathlib import Path

FIRST = {  # first bytes -> what to say; the rest of the sentence names the remedy
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"\x89PNG": "is a PNG picture",
    b"\xff\xd8\xff": "is a JPEG picture",
    b"<!DOCTYPE": "is a web page: the download went wrong",
    b"<html": "is a web page: the download went wrong",
}


def disguise(path: Path, safetensors: bool) -> str | None:
    """What an existing file really is, as the end of a sentence, or None where it is what it seems.

    Args:
        path: the file.
        safetensors: whether its name says safetensors, and not a pickle.
    """
    with path.open("rb") as file:
        head = file.read(24)
    if not head:
        return "is empty (0 bytes)"
    for first, what in FIRST.items():
        if head.startswith(first):
            return what
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size
    if is_safetensors and not safetensors:
        return f"holds safetensors: rename it to {path.stem}.safetensors"
    if safetensors and (head.startswith(b"PK\x03\x04") or head[:2] in (b"\x80\x02", b"\x80\x04")):
        return f"is a pickle of torch: rename it to {path.stem}.pt"
    return None
