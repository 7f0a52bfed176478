"""`fedllm-sec deploy init | up | server | client`: a recipe on real clients."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm_sec.deploy.problems import need_flower
from fedllm_sec.errors import FedError, Parser, RecipeError, quietly
from fedllm_sec.recipe.resolve import did_you_mean
from fedllm_sec.recipe.sections import Recipe
from fedllm_sec.records.environment import typed
from fedllm_sec.records.files import in_a_line
from fedllm_sec.train import Terminated, heed_ctrl_c, in_words, load, terminate

if TYPE_CHECKING:
    from fedllm_sec.deploy.folder import Deployment


@quietly
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in KINDS:
        asked = words[:1] in (["-h"], ["--help"])
        if words and not asked:
            print(f'error: there is no command "deploy {words[0]}".{did_you_mean(words[0], KINDS)}\n', file=sys.stderr)
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    options = KINDS[words[0]]().parse_intermixed_args(words[1:])
    heed_ctrl_c()
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        need_flower()
        options.act(options, typed("deploy", words))
        return 0
    except BrokenPipeError:
        raise
    except Exception as error:
        if (said := in_words(error)) is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print("stopped; the same command goes on from the last whole round.", file=sys.stderr)
        return 143 if isinstance(stopped, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser(kind: str, what: str, act: Callable[[argparse.Namespace, str], None]) -> argparse.ArgumentParser:
    made = Parser(prog=f"fedllm-sec deploy {kind}", description=what)
    made.set_defaults(act=act)
    return made


def _overrides(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    made.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the recipe's")
    return made


def init_parser() -> argparse.ArgumentParser:
    made = _parser("init", "Write a folder that is a Flower app.", _init)
    made.add_argument("folder", type=Path, help="where to")
    made.add_argument("--recipe", type=Path, required=True, help="the YAML recipe, or the name of a shipped one")
    return _overrides(made)


def up_parser() -> argparse.ArgumentParser:
    made = _parser("up", "Run it here: SuperLink and SuperNodes on this machine, over TLS.", _up)
    made.add_argument("what", type=Path, help="a recipe, the name of a shipped one, or a folder made by init")
    made.add_argument("--clients", type=int, metavar="N", help="clients of the federation; as clients.total=N")
    return _overrides(made)


def server_parser() -> argparse.ArgumentParser:
    made = _parser("server", "Run the server, for clients on machines of their own.", _server)
    made.add_argument("folder", type=Path, help="a folder made by init")
    made.add_argument("--host", default="0.0.0.0", help="the address it listens on")
    made.add_argument("--port", type=int, default=8000, help="the port it listens on")
    made.add_argument(
        "--name", action="append", default=[], help="a host name or address that clients know it by; may be repeated"
    )
    return made


def client_parser() -> argparse.ArgumentParser:
    made = _parser("client", "Run one client, on its own machine.", _client)
    made.add_argument("folder", type=Path, help="the folder made by init, or a copy of it")
    made.add_argument("--client", required=True, metavar="ID", help="which client this is: c00, c01, ...")
    made.add_argument("--superlink", required=True, metavar="HOST:PORT", help="where the server is")
    made.add_argument("--data", metavar="PATH", help="its own rows, a file or folder; else its share of the recipe's")
    made.add_argument("--attack", action="store_true", help="be malicious, as this device's own recipe says")
    return made


KINDS = {"init": init_parser, "up": up_parser, "server": server_parser, "client": client_parser}
USAGE = """usage: fedllm-sec deploy init | up | server | client ...

  init    write a folder that is a Flower app
  up      run it here: SuperLink and SuperNodes on this machine, over TLS
  server  run the server, for clients on machines of their own
  client  run one client, on its own machine

Each has its own --help. Example: fedllm-sec deploy up recipes/edge/quickstart.yaml"""


# ---------------------------------------------------------------- the four


def one_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """The only run that a recipe asks for."""
    plans = load(path, overrides)
    if len(plans) > 1:
        raise RecipeError(
            f"{path}: asks for {len(plans)} runs (variants), and a deployment is one. Add variants=null, or give a "
            "recipe of one run."
        )
    return next(iter(plans.values())).recipe


def _init(options: argparse.Namespace, command: str) -> None:
    from fedllm_sec.deploy.folder import Deployment, held
    from fedllm_sec.deploy.keys import make_certificates, make_key

    recipe = one_recipe(options.recipe, options.overrides)
    with held(options.folder):
        made = Deployment.init(options.folder, recipe, command)
        make_certificates(made.folder / "tls")
        for client in made.clients():
            make_key(made.folder / "keys", client)
    print((made.folder / "README.md").read_text(encoding="utf-8"), end="")


def _up(options: argparse.Namespace, command: str) -> None:
    from fedllm_sec.deploy.folder import Deployment, held

    if (options.what / "deployment.json").is_file():
        if options.overrides or options.clients is not None:
            raise RecipeError(
                f"{options.what}: its recipe is written down. Change recipe.yaml there, or make another folder."
            )
        with held(options.what):
            bring_up(Deployment.at(options.what))
    else:
        more = [f"clients.total={options.clients}"] if options.clients is not None else []
        recipe = one_recipe(options.what, [*options.overrides, *more])
        with held(recipe.output.folder):
            bring_up(Deployment.init(recipe.output.folder, recipe, command))


def bring_up(made: Deployment) -> None:
    """SuperLink, nodes and run on this machine, to the report; the clients that the recipe calls malicious attack."""
    from fedllm_sec.attacks.threat import Threat
    from fedllm_sec.build.threat import make_threat
    from fedllm_sec.deploy import local
    from fedllm_sec.deploy.processes import Processes, free_port

    recipe, clients = made.recipe(), made.clients()
    threat: Threat | None = make_threat(recipe)
    malicious = threat.malicious if threat is not None else frozenset()
    made.enter()
    with Processes(made.logs, made.home) as processes:
        for client in clients:
            (made.logs / f"client-{client}.log").unlink(missing_ok=True)
            (made.logs / f"node-{client}.log").unlink(missing_ok=True)
        port, nodes = free_port(), [local.Node(made, client, client in malicious) for client in clients]
        adopt = local.start_residents(processes, nodes)
        local.start_link(processes, made, "127.0.0.1", port)
        print(f"SuperLink at 127.0.0.1:{port} over TLS; {len(clients)} clients with a key each", flush=True)
        local.register(processes, made, clients)
        for node in nodes:
            node.start(processes, f"127.0.0.1:{port}")
        adopt()
        tend = local.Tending(processes, nodes, f"127.0.0.1:{port}", _say)
        local.run_to_the_end(processes, made, _say, tend, lambda: local.wait_for_nodes(processes, clients))
    _report(made)


def _say(line: str) -> None:
    print(line, flush=True)


def _server(options: argparse.Namespace, command: str) -> None:
    from fedllm_sec.deploy import local
    from fedllm_sec.deploy.folder import Deployment, held
    from fedllm_sec.deploy.processes import Processes

    made = Deployment.at(options.folder)
    clients = made.clients()
    made.enter()
    with held(made.folder), Processes(made.logs, made.home) as processes:
        local.start_link(processes, made, options.host, options.port, options.name)
        local.register(processes, made, clients)
        print(
            f"SuperLink at {options.host}:{options.port} over TLS. On each device, with {made.folder}'s recipe.yaml, "
            f"deployment.json, tls/ca.pem and keys/ID.key copied to it:\n  fedllm-sec deploy client FOLDER --client ID "
            f"--superlink HOST:{options.port}\nwith ID one of {clients[0]} to {clients[-1]}. Registering a node and "
            "starting a run need no key: let only /v1/fleet/ through to other hosts (docs/edge.md).",
            flush=True,
        )
        local.run_to_the_end(processes, made, _say)
    _report(made)


def _client(options: argparse.Namespace, command: str) -> None:
    import time

    from fedllm_sec.deploy import local
    from fedllm_sec.deploy.folder import Deployment, held
    from fedllm_sec.deploy.keys import certificate
    from fedllm_sec.deploy.processes import Processes

    host, _, port = options.superlink.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise FedError(f"--superlink {in_a_line(options.superlink)}: must be HOST:PORT, such as server.local:8000.")
    made = Deployment.at(options.folder)
    if options.client not in made.clients():
        raise RecipeError(
            f"--client: {options.client!r} is none of the recipe's clients {', '.join(made.clients()[:5])} ..."
        )
    for name in ("tls/ca.pem", f"keys/{options.client}.key"):
        if not (made.folder / name).is_file():
            raise FedError(f"{made.folder / name}: is not on this device. Copy it from the server's folder.")
    certificate(made.folder / "tls" / "ca.pem")  # a node would try for minutes with what is none
    data = str(Path(options.data).expanduser().resolve()) if options.data else None
    with held(made.folder, options.client), Processes(made.logs, made.home) as processes:
        for name in (f"client-{options.client}", f"node-{options.client}"):
            (made.logs / f"{name}.log").unlink(missing_ok=True)  # of an earlier start
        node = local.Node(made, options.client, options.attack, data)
        node.start_resident(processes)
        node.start(processes, options.superlink, wait=600.0)
        local.wait_for_nodes(processes, [node.client], 600.0)  # a small machine imports and loads for minutes
        print(f"client {node.client} is connected to {options.superlink}", flush=True)
        tend = local.Tending(processes, [node], options.superlink, _say)
        where, log = 0, made.logs / f"client-{node.client}.log"
        while tend.left:
            tend()
            where = local.follow(log, where, lambda line: _say(line) if line.startswith("error:") else None)
            time.sleep(1)
        raise FedError(str(processes.ended() or "its processes ended too often") + " Start it again.")


def _report(made: Deployment) -> None:
    from fedllm_sec.report.page import terminal_summary, write_report

    print("\n" + terminal_summary(made.run))
    print(f"\nreport: {write_report(made.run)}")


if __name__ == "__main__":
    sys.exit(main())
