"""Whether memory will do for a model, asked before it is loaded."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

from inferpool.engine.gguf import Gguf
from inferpool.errors import ModelLoadError

__all__ = ["available_memory", "mapped_bytes", "require_memory"]


def require_memory(gguf: Gguf, *, n_bytes: int, n_ctx: int) -> None:
    """Refuse a model that can't fit.

    The need is a lower bound, so that nothing is refused that would do: the files, and the tokens
    in memory (`Gguf.bytes_per_token`). llama.cpp allocates more for a batch, such as a row of
    logits for each of its tokens, but hardly touches it.

    Args:
        gguf: the model.
        n_bytes: size of its files, see `mapped_bytes`.
        n_ctx: tokens in memory at most, over all sequences.

    Raises:
        ModelLoadError: with the numbers.
    """
    context = n_ctx * gguf.bytes_per_token
    need = n_bytes + context
    found = available_memory()
    if found is not None and need > found[0]:
        available, where = found
        raise ModelLoadError(
            f"{gguf.path.name} needs at least {_mib(need)} of memory ({_mib(n_bytes)} for the "
            f"weights, {_mib(context)} for a context of {n_ctx} tokens), and {where} leaves "
            f"{_mib(available)}"
        )


def mapped_bytes(files: Sequence[Path]) -> int:
    """Bytes of memory that files take when they are mapped; none if they lie in it (tmpfs)."""
    mounts = _read(Path("/proc/self/mountinfo"))
    # 36 35 98:0 /root /mount/point rw,noatime master:1 - ext4 /dev/root rw
    in_memory = re.findall(r"^\d+ \d+ (\d+:\d+) .* - (?:tmpfs|ramfs) ", mounts, re.MULTILINE)
    found = [path.stat() for path in files]
    return sum(
        each.st_size
        for each in found
        if f"{os.major(each.st_dev)}:{os.minor(each.st_dev)}" not in in_memory
    )


def available_memory() -> tuple[int, str] | None:
    """Bytes that this process can still have, and what sets that bound; None if nothing says."""
    return min([*_of_machine(), *_of_groups(), *_of_process()], default=None)


def _of_machine() -> Iterator[tuple[int, str]]:
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE)
    if found:
        yield int(found[1]) << 10, "the machine"


def _of_groups() -> Iterator[tuple[int, str]]:
    """Limits of the control groups around this process, version 2 or 1."""
    root = Path("/sys/fs/cgroup")
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, most, used = root, "memory.max", "memory.current"
            cache, shared = "file", "shmem"
        elif "memory" in controllers.split(","):
            base, most = root / "memory", "memory.limit_in_bytes"
            used, cache, shared = "memory.usage_in_bytes", "total_cache", "total_shmem"
        else:
            continue
        group = base / name.lstrip("/")
        for folder in (group, *group.parents):
            limit, current = _read(folder / most).strip(), _read(folder / used).strip()
            if limit.isdigit() and current.isdigit():
                # What only caches files gives way, as it does in MemAvailable; what is shared, and
                # files that are nowhere else (tmpfs), are part of it and don't.
                stat = _read(folder / "memory.stat")
                free = int(limit) - int(current) + _entry(stat, cache) - _entry(stat, shared)
                yield min(free, int(limit)), "the control group"
            if folder == base:
                break


def _entry(stat: str, name: str) -> int:
    found = re.search(rf"^{name} (\d+)$", stat, re.MULTILINE)
    return int(found[1]) if found else 0


def _of_process() -> Iterator[tuple[int, str]]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        yield limit - pages * os.sysconf("SC_PAGE_SIZE"), "RLIMIT_AS"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.0f} MiB"
