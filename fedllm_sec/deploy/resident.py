"""A device's process: it holds its model and rows in memory and serves its SuperNode, message after message.

In Flower's default arrangement each message starts a new Python process, which imports everything and loads the model
anew. Here `flower-supernode --isolation process` waits for a process of ours. It runs the ClientApp that is installed
on the device, not one that the server sends: a server cannot run code on it. The protocol is Flower's own and private:
the range of versions in pyproject.toml is what it was tested on.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback


def serve(address: str, poll: float) -> None:
    """Take messages from the node at `address` until it is gone."""
    from flwr.app import Error, Message
    from flwr.common.constant import SubStatus
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.supernode.runtime import run_clientapp
    from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

    from fedllm_sec.deploy.client import app
    from fedllm_sec.deploy.sooner import Idle, look_sooner

    look_sooner(run_clientapp)

    def connected(name: str, *more: object) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=address,
            insecure=True,  # it is this machine's own loopback
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name=name), *more],
            retry_invoker=make_simple_http_retry_invoker(),
        )

    training = threading.Lock()  # there is one model

    def work(token: str) -> None:
        client = connected("flwr-clientapp", RuntimeTokenHttpInterceptor(token))
        beats = HeartbeatSender(make_task_heartbeat_fn_http(client))
        beats.start()
        message = context = None
        status, details = SubStatus.COMPLETED, ""
        try:
            looked = time.time()
            message, context, _, _ = pull_task_input(client)
            pulled = time.time()
            try:
                with training:
                    reply = app(message=message, context=context)
            except Exception as error:  # the device lives on, and the server is told
                traceback.print_exc()
                status, details = SubStatus.FAILED, f"{type(error).__name__}: {error}"
                reply = Message(Error(code=2, reason=details), reply_to=message)
            made = time.time()
            push_message(client, reply, context)
            spans = f"received {looked:.3f} {pulled:.3f} sent {made:.3f} {time.time():.3f}"
            print(f"{message.metadata.message_type} {message.metadata.group_id}: {spans}", flush=True)
        except Exception as error:
            traceback.print_exc()
            status, details = SubStatus.FAILED, f"{type(error).__name__}: {error}"
        try:
            push_task_output(client, context, status, details)
        except Exception:  # the task's run may have ended meanwhile
            traceback.print_exc()
        beats.stop()
        client.close()

    tasks, idle = connected("SuperExec"), Idle(poll)
    while True:
        if training.locked():  # its node has one question at a time, and the processor is needed
            time.sleep(poll)
            idle = Idle(poll)
            continue
        task = tasks.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"], agentapp_fab_hashes=[]))
        if task.HasField("task") and task.token:
            # a thread each: a question whose server died while it sent it is waited for by Flower for minutes
            threading.Thread(target=work, args=(task.token,), daemon=True).start()
            idle = Idle(poll)
        else:
            time.sleep(idle.pause())


def watch(parent: int) -> None:
    """End with the process that started this one, however that ended."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def run(address: str, config: str, poll: float = 0.1) -> int:
    """Make the device of a configuration (JSON), say that it is ready, and serve the node at `address`."""
    from fedllm_sec.deploy.client import OWN, device_of
    from fedllm_sec.train import in_words, quiet

    quiet()
    try:
        OWN.append(config)
        device_of({})
    except Exception as error:
        if (said := in_words(error)) is None:
            traceback.print_exc()
            return 1
        print(f"error: {said}", flush=True)
        return 2
    print("ready", flush=True)
    serve(address, poll)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fedllm_sec.deploy.resident")
    parser.add_argument("address", help="HOST:PORT of the node's own API")
    parser.add_argument("config", help="the node's configuration, as JSON")
    parser.add_argument("--poll", type=float, default=0.1, help="seconds between two questions to the node")
    options = parser.parse_args()
    watch(os.getppid())
    return run(options.address, options.config, options.poll)


if __name__ == "__main__":
    sys.exit(main())
