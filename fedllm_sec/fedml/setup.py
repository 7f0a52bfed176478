"""Everything but attack and defense: data, model, clients, FL method, evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedllm_sec.fedml.notes import Note, Part, differs, ignored, missing, number, same, switched_on

Values = Mapping[str, Any]

SIGMOID = (
    "FedML's puts a sigmoid on the logits before the cross entropy, which bounds them to [0, 1] and slows learning; "
    "ours has none"
)
PHONE_LENET = (
    "FedML 0.9.6 has it for MNN on phones only, with 20 and 50 channels, 500 hidden units and a softmax at the end; "
    "ours is LeNet-5"
)
STEM = "FedML's has a 7x7 stem of stride 2 and max pooling; ours has a 3x3 stem of stride 1"

# FedML's name -> task, our model, how it differs
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "lr": ("classify", {"name": "logistic"}, SIGMOID),
    "lenet": ("classify", {"name": "lenet"}, PHONE_LENET),
    "cnn": ("classify", {"name": "cnn"}, "FedML's has 3x3 kernels and dropout; ours is the FedAvg paper's"),
    "cnn_web": ("classify", {"name": "lenet"}, ""),
    "resnet20": ("classify", {"name": "resnet", "depth": 20, "norm": "batch"}, ""),
    "resnet56": ("classify", {"name": "resnet", "depth": 56, "norm": "batch"}, ""),
    "resnet18_gn": ("classify", {"name": "resnet18", "norm": "batch"}, STEM),
    "rnn": (
        "next_char",
        {"name": "lstm"},
        "FedML's for shakespeare predicts one character after 80; ours each of them",
    ),
    "GAN": ("gan", {"name": "mlp_gan"}, "layers and noise are our own"),
    "darts": ("nas", {"name": "darts"}, "ours is a smaller search space"),
}

FROM_LEAF = "FedML reads LEAF's files, whose writers or speakers are the clients; partition_method does nothing there"

# FedML's name -> our data.name, how it differs
DATA: dict[str, tuple[str, str]] = {
    "mnist": ("mnist", FROM_LEAF),
    "femnist": ("femnist", FROM_LEAF),
    "cifar10": ("cifar10", ""),
    "cifar100": ("cifar100", ""),
    "fed_cifar100": ("cifar100", "FedML takes TensorFlow Federated's split by client"),
}
TEXTS = ("shakespeare", "fed_shakespeare")

CAPPED = "FedML weighs clients by the counts they claim; here a claim counts for at most three times the median claim"

ALGORITHMS = {
    "FedAvg": "fedavg", "FedAvg_seq": "fedavg", "FedSGD": "fedsgd", "FedProx": "fedprox", "FedOpt": "fedopt",
    "FedOpt_seq": "fedopt", "FedNova": "fednova", "SCAFFOLD": "scaffold", "FedDyn": "feddyn", "FedGAN": "fedgan",
    "FedNAS": "fednas", "FedGKT": "fedgkt",
}  # fmt: skip


BY_COUNTS = ("fedavg", "fedprox", "fedopt", "fednova", "fedgan", "fednas")  # of them FedML takes the mean by counts


def learner(flat: Values) -> Part:
    """task, model and data."""
    name, dataset = flat.get("model"), flat.get("dataset")
    task, model, how = MODELS.get(str(name), ("classify", {}, ""))
    notes: list[Note] = []
    if not model:
        # the text tasks cannot do without one
        task = "next_char" if dataset in TEXTS else "classify"
        model = {"name": "lstm" if task == "next_char" else "cnn"}
        said = "is not in the file" if name is None else f"{name!r}"
        notes.append(missing("model", f"{said}: a {model['name']} stands in its place. Known: {', '.join(MODELS)}"))
    else:
        notes.append(
            differs("model", f"model {model['name']}", how) if how else same("model", f"model {model['name']}")
        )
    if task == "next_char":
        data: dict[str, Any] = {"name": "shakespeare.txt", "by_speaker": True}
        notes.append(missing("dataset", f"{dataset!r}: comes from a text file here: put its path into data.name"))
    elif dataset in DATA:
        ours, how = DATA[dataset]
        data = {"name": ours}
        notes.append(differs("dataset", f"data.name {ours}", how) if how else same("dataset", f"data.name {ours}"))
        if dataset == "femnist":
            data |= {"train": "train[:90%]", "test": "train[90%:]", "classes": 62}
    else:
        data = {"name": "digits" if dataset is None else str(dataset)}
        said = "is not in the file: digits stands in its place" if dataset is None else f"{dataset!r}"
        notes.append(missing("dataset", f"{said}: put a hub set or an .npz into data.name"))
    return {"task": task, "model": model, "data": data}, notes


def partition(flat: Values) -> Part:
    method, alpha = flat.get("partition_method"), number(flat, "partition_alpha", 0.5)
    notes: list[Note] = []
    if flat.get("dataset") in TEXTS:
        block: dict[str, Any] = {"name": "by_speaker"}
        for key in ("partition_method", "partition_alpha"):
            if key in flat:
                notes.append(ignored(key, "LEAF's text is split by speaker, whatever this says; so is ours"))
        return block, notes
    if method == "hetero":
        block = {"name": "dirichlet", "alpha": alpha, "min_rows": 10}
        how = "FedML gives a client that has its fair share no rows of later classes"
        notes.append(differs("partition_method", "clients.partition dirichlet, at least 10 rows", how))
        notes += [same("partition_alpha", "dirichlet.alpha")] if "partition_alpha" in flat else []
        return block, notes
    if method in (None, "homo"):
        notes += [same("partition_method", "clients.partition iid")] if method else []
        if "partition_alpha" in flat:
            notes.append(ignored("partition_alpha", "homo does not use it"))
        return {"name": "iid"}, notes
    notes.append(missing("partition_method", f"{method!r}: iid stands in its place. Known: homo, hetero"))
    return {"name": "iid"}, notes + (
        [ignored("partition_alpha", "iid does not use it")] if "partition_alpha" in flat else []
    )


def clients(flat: Values) -> Part:
    """The clients block. FedML clips no gradients, so max_grad_norm is null."""
    block: dict[str, Any] = {}
    notes: list[Note] = []
    for key, ours in (
        ("client_num_in_total", "total"),
        ("client_num_per_round", "per_round"),
        ("epochs", "local_epochs"),
        ("batch_size", "batch_size"),
    ):
        if number(flat, key) is not None:
            block[ours] = number(flat, key)
            notes.append(same(key, f"clients.{ours}"))
    block.setdefault("local_epochs", 1)
    if "total" in block and block.get("per_round", 0) >= block["total"]:
        del block["per_round"]  # FedML takes all of them too
    sgd = flat.get("client_optimizer", "sgd") == "sgd"
    block["optimizer"] = "sgd" if sgd else "adamw"
    if "client_optimizer" in flat:
        how = "FedML takes every name but sgd for Adam with amsgrad and weight decay in the gradient"
        note = same("client_optimizer", "clients.optimizer")
        notes.append(note if sgd else differs("client_optimizer", "clients.optimizer adamw", how))
    if number(flat, "learning_rate") is not None:
        block["lr"] = number(flat, "learning_rate")
        notes.append(same("learning_rate", "clients.lr"))
    if "weight_decay" in flat and sgd:
        why = "FedML's SGD does not read it. Set clients.weight_decay if you want it"
        notes.append(ignored("weight_decay", why))
    elif "weight_decay" in flat:
        block["weight_decay"] = number(flat, "weight_decay")
        notes.append(differs("weight_decay", "clients.weight_decay", "Adam's is part of the gradient, AdamW's is not"))
    block["max_grad_norm"] = None
    split, more = partition(flat)
    return {"clients": {**block, "partition": split}}, notes + more


def algorithm(flat: Values) -> Part:
    name = flat.get("federated_optimizer", "FedAvg")
    ours = ALGORITHMS.get(str(name))
    block: dict[str, Any] = {"name": ours or "fedavg"}
    if ours is None:
        what = f"{name!r}: fedavg stands in its place. Known: {', '.join(ALGORITHMS)}"
        return {"algorithm": block}, [missing("federated_optimizer", what)]
    notes = []
    if "federated_optimizer" in flat:
        key, place = "federated_optimizer", f"algorithm {ours}"
        notes.append(differs(key, place, CAPPED) if ours in BY_COUNTS else same(key, place))
    if ours == "fedopt":
        settings, more = server(flat)
        block |= settings
        notes += more
    for key, method, setting in (("fedprox_mu", "fedprox", "mu"), ("feddyn_alpha", "feddyn", "alpha")):
        if number(flat, key) is not None and ours == method:
            block[setting] = number(flat, key)
            notes.append(same(key, f"{method}.{setting}"))
    for key in ("server_optimizer", "server_lr", "server_momentum", "fedprox_mu", "feddyn_alpha"):
        if flat.get(key) is not None and not any(note.key == key for note in notes):
            notes.append(ignored(key, f"{name} does not use it"))
    return {"algorithm": block}, notes


# FedML's server_optimizer -> how torch.optim's differs from ours
SERVERS = {
    "sgd": "",
    "adam": "FedML runs torch.optim's, with bias correction, beta2 0.999 and eps 1e-8; ours is Reddi et al. 2021",
    "adagrad": "FedML runs torch.optim's, with eps 1e-10; ours is Reddi et al. 2021",
    "yogi": "torch.optim has none, so that FedML ends with an error; ours is Reddi et al. 2021",
}


def server(flat: Values) -> Part:
    """fedopt's settings. torch's SGD has momentum 0 unless it is told otherwise; its Adagrad never has any."""
    kind = str(flat.get("server_optimizer") or "sgd").lower()
    block: dict[str, Any] = {"optimizer": kind if kind in SERVERS else "sgd"}
    notes: list[Note] = []
    if kind not in SERVERS:
        what = f"{kind!r}: sgd stands in its place. Known: {', '.join(SERVERS)}"
        notes.append(missing("server_optimizer", what))
    elif "server_optimizer" in flat:
        how, place = SERVERS[kind], "fedopt.optimizer"
        notes.append(differs("server_optimizer", place, how) if how else same("server_optimizer", place))
    if number(flat, "server_lr") is not None:
        block["server_lr"] = number(flat, "server_lr")
        notes.append(same("server_lr", "fedopt.server_lr"))
    if block["optimizer"] == "sgd":
        block["beta1"] = number(flat, "server_momentum", 0.0)
        how = "FedML reads it in MPI simulation only"
        notes += [differs("server_momentum", "fedopt.beta1", how)] if "server_momentum" in flat else []
    elif "server_momentum" in flat:
        notes.append(ignored("server_momentum", f"torch.optim's {kind} has no momentum: in MPI simulation FedML fails"))
    if block["optimizer"] == "adagrad":
        block["beta1"] = 0.0
    return block, notes


def run(flat: Values) -> Part:
    """seed, rounds, evaluate and tracker."""
    block: dict[str, Any] = {"seed": number(flat, "random_seed", 0), "rounds": number(flat, "comm_round", 10)}
    notes = [same(key, ours) for key, ours in (("random_seed", "seed"), ("comm_round", "rounds")) if key in flat]
    if "frequency_of_the_test" in flat:
        k = number(flat, "frequency_of_the_test", 1)
        block["evaluate"] = {"every": k}
        how = (
            f"FedML counts rounds from 0 and tests in 1, {1 + k}, {1 + 2 * k}, ... and the last; here in {k}, {2 * k}, "
        )
        how += f"{3 * k}, ... and the last"
        place = "evaluate.every"
        notes.append(same("frequency_of_the_test", place) if k == 1 else differs("frequency_of_the_test", place, how))
    if switched_on(flat, "enable_wandb"):
        block["output"] = {"tracker": "wandb"}
    if "enable_wandb" in flat:
        notes.append(same("enable_wandb", "output.tracker"))
    return block, notes
