"""`flower-supernode` with shorter sleeps: `python -m fedllm_sec.deploy.node` takes the same options.

A node looks for a message every 3 s while it is idle, and for its client's reply every 0.5 s; together they are most of
what a short round waits. Here both are at most FEDLLM_NODE_POLL seconds, 0.2 unless that is set.
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

    from fedllm_sec.deploy.sooner import look_sooner

    look_sooner(start_client_internal)
    from flwr.supernode.cli import flower_supernode

    most = float(os.environ.get("FEDLLM_NODE_POLL", "0.2"))

    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, most))

    start_client_internal.time = types.SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)
    flower_supernode()


if __name__ == "__main__":
    sys.exit(main())
