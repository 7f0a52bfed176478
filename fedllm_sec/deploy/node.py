"""`flower-supernode` with shorter sleeps: `python -m fedllm_sec.deploy.node` takes the same options.

A node looks for a message every 3 s while it is idle, and for its client's reply every 0.5 s; together they are most of
what a short round waits. Here both are FEDLLM_NODE_POLL seconds, 0.2 unless that is set, and of a longer wait a
fortieth of what it has lasted: each look costs both ends processor time, which others on a machine need.
"""

from __future__ import annotations

import os
import sys
import time
import types


def main() -> None:
    from fedllm_sec.deploy.resident import watch

    watch(os.getppid())
    from flwr.supernode import start_client_internal

    from fedllm_sec.deploy.sooner import Idle, look_sooner

    look_sooner(start_client_internal)
    from flwr.supernode.cli import flower_supernode

    most = float(os.environ.get("FEDLLM_NODE_POLL", "0.2"))
    wait, asked = Idle(most), 0.0

    def sleep(seconds: float) -> None:
        nonlocal wait, asked
        if seconds != asked:  # Flower's own pause says what it waits for: a message, or its client's reply
            wait, asked = Idle(most), seconds
        time.sleep(min(seconds, wait.pause()))

    start_client_internal.time = types.SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)
    flower_supernode()


if __name__ == "__main__":
    sys.exit(main())
