"""All clients of one machine from one process: it imports what each needs once, and makes each of itself by a fork.

`python -m fedllm_sec.deploy.residents PIDS SPECS`: SPECS is a JSON list of [address, config, log], as for `resident`;
the processes' ids go to the file PIDS, in that order. It computes nothing before it forks, so that no thread is lost
and no device is opened by then, and waits afterwards: clients end with it, and it with who started it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path

from fedllm_sec.deploy.resident import run, watch
from fedllm_sec.records.files import write_atomic


def main() -> None:
    started_by = os.getppid()
    specs = json.loads(sys.argv[2])
    import_all(json.loads(specs[0][1])["deployment"])
    mine, made = os.getpid(), []
    for address, config, log in specs:
        if (pid := os.fork()) == 0:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            watch(mine)
            code = run(address, config)
            sys.stdout.flush()
            os._exit(code)
        made.append(pid)
    write_atomic(Path(sys.argv[1]), json.dumps(made).encode())
    watch(started_by)
    while True:
        signal.pause()  # an ended client is left as it is, so that no other process gets its number


def import_all(folder: str) -> None:
    """What a device of this deployment imports; peft alone takes as long as all else of ours."""
    importlib.import_module("fedllm_sec.deploy.client")
    from fedllm_sec.deploy.folder import Deployment
    from fedllm_sec.train import quiet

    quiet()
    if getattr(Deployment.at(folder).recipe().model, "lora", None) is not None:
        importlib.import_module("peft")


if __name__ == "__main__":
    main()
