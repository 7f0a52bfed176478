"""RobustStrategy inside an app of the kind that `flwr new` makes, by `flwr run` on a real SuperLink and SuperNodes."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("flwr", reason="needs flwr, the extra `edge`")

from fedllm_sec.deploy.processes import BIN, Processes, free_port
from fedllm_sec.records.history import read_history

APP = {
    "pyproject.toml": """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "quickstart"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = ["flwr"]

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "quickstart.server_app:app"
clientapp = "quickstart.client_app:app"

[tool.flwr.app.config]
num-server-rounds = 2
""",
    "quickstart/__init__.py": "",
    "quickstart/client_app.py": """
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    torch.manual_seed(int(context.node_config["partition-id"]))
    model = torch.nn.Linear(2, 1)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        x = torch.randn(32, 2)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True) + 3).backward()
        optimizer.step()
    state = model.state_dict()
    if context.node_config.get("hostile"):
        state = {name: value * 1e6 for name, value in state.items()}
    content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 640})}
    return Message(RecordDict(content), reply_to=message)
""",
    "quickstart/server_app.py": """
import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from fedllm_sec.deploy.flower import RobustStrategy

app = ServerApp()


@app.main()
def main(grid, context):
    inner = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    strategy = RobustStrategy(inner, rule="median", log="robust")
    arrays = ArrayRecord(torch.nn.Linear(2, 1).state_dict())
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=context.run_config["num-server-rounds"])
    torch.save(result.arrays.to_torch_state_dict(), "final_model.pt")
""",
}


@pytest.mark.slow
def test_one_changed_line_in_an_app_keeps_a_hostile_node_from_its_model(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)  # where the server app saves and logs
    for name, content in APP.items():
        (path := tmp_path / "app" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (home := tmp_path / "home").mkdir()
    address = f"127.0.0.1:{(port := free_port())}"
    (home / "config.toml").write_text(f'[superlink.here]\naddress = "{address}"\ninsecure = true\n')
    with Processes(tmp_path / "logs", home) as processes:
        shared = ["--insecure", "--disable-runtime-dependency-installation", "--host", "127.0.0.1", "--port", str(port)]
        processes.start("link", str(BIN / "flower-superlink"), *shared)
        processes.wait(lambda: bool(processes.flwr("ls", "here").get("success")), "the SuperLink", 120, "link")
        for i in range(3):
            config = f"partition-id={i}" + (" hostile=true" if i == 2 else "")
            own = ["--superlink", address, "--port", str(free_port()), "--max-wait-time", "60", "--node-config", config]
            processes.start(f"node{i}", str(BIN / "flower-supernode"), "--insecure", *own)
        begun = processes.flwr("run", str(tmp_path / "app"), "here")
        assert begun.get("success"), begun
        end, status = time.monotonic() + 500, ""
        while time.monotonic() < end and not status.startswith("finished"):
            time.sleep(3)
            status = processes.flwr("ls", "here")["runs"][0]["status"]
    assert status == "finished:completed", (tmp_path / "logs" / "link.log").read_text()[-2000:]
    state = torch.load("final_model.pt", weights_only=True)
    torch.testing.assert_close(state["bias"], torch.tensor([3.0]), atol=0.3, rtol=0)
    torch.testing.assert_close(state["weight"], torch.ones(1, 2), atol=0.3, rtol=0)
    records = read_history(tmp_path / "robust")
    assert [record.round for record in records] == [1, 2]
    assert all(len(record.cohort) == 3 and record.skipped is None for record in records)
