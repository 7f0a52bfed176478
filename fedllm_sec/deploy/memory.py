"""A memory limit for the server's process, so that a reply that swells when it is read ends its sender's thread."""

from __future__ import annotations

from pathlib import Path

REPLIES = 6  # times that the bytes of a reply may be held while it is read: chunks, joined, record, tensor and room
THREADS = 3  # that read one reply: ours, and two of Flower's that pull its objects
ROOM_MB = 1024  # for evaluation, the defense's blocks and the libraries


def limited(n: int, d: int, reply: int) -> str:
    """Set the limit for n replies of so many bytes and d parameters; a sentence that says what it is.

    Anonymous memory alone counts (RLIMIT_DATA), so that a model mapped from a file does not. Where the system has no
    such limit the sentence says that.
    """
    try:
        import resource

        used = next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmData:")
        )
    except (ImportError, OSError, StopIteration):
        return "no memory limit: this system has none for a process's own memory"
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]  # what a thread's takes of the limit, used or not
    threads = n * THREADS * (stack if 0 < stack < 2**30 else 8 * 2**20)
    most = used + threads + n * (REPLIES * reply + 12 * d) + 40 * d + ROOM_MB * 2**20
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard < 0 else min(most, hard), hard))
    return (
        f"memory limit of the server: {most / 2**20:,.0f} MiB ({used / 2**20:,.0f} in use, {n} replies of "
        f"{reply / 2**20:.2f} MiB)"
    )
