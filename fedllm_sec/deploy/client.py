"""The ClientApp: says who it is, trains, replies. The device behind it is made once for each process."""

from __future__ import annotations

import functools
import json
import resource
import time
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedllm_sec.deploy.device import Device
from fedllm_sec.deploy.folder import Deployment
from fedllm_sec.deploy.records import read_ask, reply_records
from fedllm_sec.errors import printable

app = ClientApp()
MEND = {  # what to do where this device has another than the server
    "recipe": "Copy recipe.yaml and deployment.json from the server's folder, and start it again.",
    "layout": "Its model has other parameters: give it the server's model files, and its transformers and peft.",
    "version": "Install the server's version of fedllm_sec.",
}
OWN: list[str] = []  # the device of a resident process, as JSON


@functools.cache
def _device(config: str) -> Device:
    given = json.loads(config)
    made = Deployment.at(str(given["deployment"]))
    made.enter()
    return Device(made.recipe(), str(given["client"]), attack=bool(given.get("attack")), data=given.get("data") or None)


def device_of(config: Any) -> Device:
    """The device that is described: its folder, its client id, its own data, whether it attacks.

    Under a resident process that is what it was started with; else it is the node's configuration.
    """
    return _device(OWN[0] if OWN else json.dumps(dict(config), sort_keys=True))


@app.query()
def introduce(message: Message, context: Context) -> Message:
    """Who this is, and by what the server knows that both have one recipe, layout and version."""
    answer = device_of(context.node_config).introduction()
    for key, theirs in message.content.config_records["hello"].items():
        if answer.get(key) != theirs:
            has, way_out = f"{answer.get(key)}, the server {printable(str(theirs))[:80]}", MEND.get(key, "")
            print(f"error: {key}: this device has {has}. It is turned away. {way_out}", flush=True)
    return Message(RecordDict({"hello": ConfigRecord(dict(answer))}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round on this device's rows."""
    device = device_of(context.node_config)
    vectors, of = read_ask(message.content, device.federation.task.layout.size)
    began = time.time()
    result = device.train(vectors, int(of["round"]), int(of["rounds"]))
    print(f"round {of['round']}: trained from {began:.3f} to {time.time():.3f}", flush=True)
    print(f"peak memory so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB", flush=True)
    before = device.lost_before(int(of["round"]))
    content, after = reply_records(result, of, before)
    device.lost = (int(of["round"]), before, after)
    return Message(content, reply_to=message)
