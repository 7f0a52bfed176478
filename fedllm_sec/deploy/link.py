"""`flower-superlink` that ends with who started it: `python -m fedllm_sec.deploy.link` takes the same options.

A SuperLink whose command was killed would hold the port, and the command could not be started again.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    from fedllm_sec.deploy.resident import watch

    watch(os.getppid())
    from flwr.superlink.cli import flower_superlink

    flower_superlink()


if __name__ == "__main__":
    sys.exit(main())
