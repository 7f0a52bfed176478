"""What a recipe costs, counted before it runs: parameters, bytes on the wire, local steps. No weight is loaded.

Models are made on torch's meta device, where tensors have a shape and no memory: a language model from its
configuration alone. Data are read where a count depends on them: shard sizes where clients train for epochs, the shape
of images, the number of characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from fedllm_sec.algorithms.gkt import EdgeNet, KnowledgeTransfer
from fedllm_sec.build import arrays as build_arrays
from fedllm_sec.build import characters as build_characters
from fedllm_sec.build import text as build_text
from fedllm_sec.build.parts import deal, make_model
from fedllm_sec.build.plan import Plan
from fedllm_sec.defenses.dp_sgd import DpSgd
from fedllm_sec.errors import FedError
from fedllm_sec.matrix.factors import A_FACTOR, B_FACTOR
from fedllm_sec.models.lora import add_adapter, place, source_of, told
from fedllm_sec.models.text_classifier import lost_pooler, outputs, unweighted
from fedllm_sec.protocols import LocalTraining
from fedllm_sec.recipe.classifier import Classifier
from fedllm_sec.recipe.language_model import Lora
from fedllm_sec.recipe.places import TEXT_TASKS
from fedllm_sec.recipe.sections import Model, Recipe
from fedllm_sec.tasks.buffers import normalises

FLOAT = 4  # bytes of a float32: rows and trained vectors
# NF4 with double quantisation: 4 bits a weight, 8 bits more for 64 weights, 32 bits more for 64 * 256
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
INT8 = 1.0  # and a float32 for each row


@dataclass(frozen=True)
class Weights:
    """Parameters of a model, and the bytes of those that stay frozen."""

    trained: int  # d
    frozen: int = 0
    frozen_bytes: int = 0
    by_rank: Mapping[int, int] = field(default_factory=dict)  # what a client trains whose adapter has this rank
    kept: int = 0  # of the trained ones, those that never leave their client
    normalises: bool = False  # by the batch at hand, which then has two rows at least


@dataclass(frozen=True)
class Rows:
    """The training data as the model sees them: shape and classes of an input (None for text), rows of each client."""

    shape: tuple[int, ...] | None
    classes: int | None
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Cost:
    """None where it cannot be counted here; `reasons` says why. Bytes are for one client and one round.

    Where clients have ranks of their own they are the mean over all clients, each with what its rank needs.
    """

    cohort: int  # n, clients of a round
    weights: Weights | None
    received: float | None
    sent: float | None
    steps: float | None  # local steps of all clients of a round
    exact: bool  # whether every round has so many; else it is the mean over cohorts of unequal shards
    sizes: tuple[int, ...] | None
    deltas: bool = True  # whether clients send deltas, so that there is an update matrix
    reasons: tuple[str, ...] = ()


def size(count: float) -> str:
    """Bytes as people read them: 980 B, 72.5 kB, 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def cost(plan: Plan) -> Cost:
    """The cost of one run."""
    recipe, method = plan.recipe, plan.methods.algorithm
    clients = recipe.clients
    n = clients.per_round or clients.total
    training, reasons = method.prepare(plan.training, None), []
    rows, weights = None, None
    by_rows = any(isinstance(guard, DpSgd) for guard in plan.methods.guards)  # epsilon depends on a client's rows
    if recipe.task != "causal_lm" or training.steps is None or by_rows:
        try:
            rows = rows_of(plan)
        except FedError as error:
            reasons.append(str(error))
    steps, exact = _steps(training, rows, n)
    sizes = rows.sizes if rows is not None else None
    if isinstance(method, KnowledgeTransfer):
        return _transfer_cost(recipe, method, n, rows, steps, exact, tuple(reasons))
    try:
        weights = weights_of(recipe, rows)
    except FedError as error:
        reasons.append(str(error))
    if weights is None:
        return Cost(n, None, None, None, steps, exact, sizes, reasons=tuple(reasons))
    if weights.normalises:
        steps, exact = _steps(replace(training, joins=True), rows, n)
    ranks = clients.ranks or {0: clients.total}
    trained = sum(weights.by_rank.get(rank, weights.trained) * count for rank, count in ranks.items())
    sent = FLOAT * (trained / clients.total - weights.kept)
    received = sent * (2 if method.control is not None else 1)
    return Cost(n, weights, received, sent, steps, exact, sizes, reasons=tuple(reasons))


def _steps(training: LocalTraining, rows: Rows | None, n: int) -> tuple[float | None, bool]:
    """Local steps of n clients in a round, on average, and whether all rounds have as many; None: it is not known."""
    if training.steps is not None:
        return float(training.steps * n), True
    if rows is None:
        return None, True
    each = [training.steps_of(size) for size in rows.sizes]
    return n * sum(each) / len(each), n == len(each) or len(set(each)) == 1


def _transfer_cost(
    recipe: Recipe,
    method: KnowledgeTransfer,
    n: int,
    rows: Rows | None,
    steps: float | None,
    exact: bool,
    reasons: tuple[str, ...],
) -> Cost:
    """FedGKT: features, logits and labels of every row go up, logits come down; the server's net stays where it is."""
    if rows is None or rows.shape is None or rows.classes is None:
        return Cost(n, None, None, None, steps, exact, None, False, reasons)
    with torch.device("meta"):
        edge = EdgeNet(rows.shape, rows.classes, channels=method.channels)
        features = edge.features(torch.zeros(1, *rows.shape))
        server = make_model(recipe, tuple(features.shape[1:]), rows.classes)
    row, mean = features.numel(), sum(rows.sizes) / len(rows.sizes)
    sent = mean * (FLOAT * (row + rows.classes) + 8)  # a label is an int64
    weights = Weights(sum(p.numel() for p in server.parameters()))
    return Cost(n, weights, mean * FLOAT * rows.classes, sent, steps, exact, rows.sizes, False, reasons)


# ---------------------------------------------------------------- counting


def rows_of(plan: Plan) -> Rows:
    """Reads the training data and splits them as the run will."""
    recipe = plan.recipe
    shape: tuple[int, ...] | None = None
    classes: int | None = None
    if recipe.task in TEXT_TASKS:
        labels = build_text.class_numbers(build_text.load_rows(recipe)[0])
        classes = len(set(labels.tolist())) if recipe.task == "classify_text" else None
    elif recipe.task == "next_char":
        text = build_characters.load_text(recipe)
        shape, classes, labels = (recipe.data.length,), len(text.alphabet), text.speakers
    else:
        train, _ = build_arrays.load_rows(recipe)
        shape, classes, labels = tuple(train.x.shape[1:]), train.classes, train.y.numpy()
    shares = deal(recipe, plan.ids, labels)[1]
    return Rows(shape, classes, tuple(len(rows) for rows in shares.values()))


def weights_of(recipe: Recipe, rows: Rows | None) -> Weights | None:
    """The parameters of the recipe's model; None where the data say its size and cannot be read."""
    if recipe.task == "causal_lm":
        return language_model(recipe.model, recipe.clients.ranks)
    if recipe.task == "classify_text":
        if rows is None or rows.classes is None:
            return None
        return text_classifier(recipe.model, rows.classes, recipe.clients.ranks)
    if rows is None or rows.shape is None or rows.classes is None:
        return None
    with torch.device("meta"):
        made = make_model(recipe, rows.shape, rows.classes)
    return Weights(sum(p.numel() for p in made.parameters()), normalises=normalises(made))


def at_rank(adapted: torch.nn.Module, rank: int) -> int:
    """How many parameters a client trains whose factors have no more than this rank: rows of each A, columns of B."""
    count = 0
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            own = p.shape[0] if A_FACTOR.search(name) else p.shape[1] if B_FACTOR.search(name) else 1
            count += p.numel() // own * min(own, rank)
    return count


def text_classifier(model: Classifier, classes: int, ranks: Iterable[int] = ()) -> Weights:
    """The base model, its output layer and its adapter, from the configuration alone."""
    with torch.device("meta"):
        base = unweighted(model, classes)
        output = outputs(base, lost_pooler(model, base))
        behind = {id(p) for name in output for p in base.get_submodule(name).parameters()}
        frozen = [p for p in base.parameters() if id(p) not in behind]
        count, held = sum(p.numel() for p in frozen), sum(p.numel() * p.element_size() for p in frozen)
        lora = model.lora and model.lora.model_copy(update={"init_lora_weights": True})
        adapted = add_adapter(base, model.model_copy(update={"lora": lora}), 0, output)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        by_rank = {rank: at_rank(adapted, rank) for rank in ranks}
    if model.lora is None:
        return Weights(trained)
    return Weights(trained, count, held, by_rank, kept_of(adapted, model.lora))


def kept_of(adapted: torch.nn.Module, lora: Lora) -> int:
    """How many trained numbers are B factors that their client keeps."""
    named = adapted.named_parameters() if lora.average == "share_a" else ()
    return sum(p.numel() for name, p in named if p.requires_grad and B_FACTOR.search(name))


def language_model(model: Model, ranks: Iterable[int] = ()) -> Weights:
    """The base model and its adapter, from the configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = source_of(model.name)
    with told(source), torch.device("meta"):
        where, options = place(model)
        config = AutoConfig.from_pretrained(where, **options)
        base = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code
        )
        head = base.get_output_embeddings()
        linear = {id(m.weight) for m in base.modules() if isinstance(m, torch.nn.Linear) and m is not head}
        frozen = sum(p.numel() for p in base.parameters())

        def held(p: torch.Tensor) -> float:
            if not model.quantized or id(p) not in linear:
                return p.numel() * p.element_size()
            return p.numel() * NF4 if model.load_in_4bit else p.numel() * INT8 + FLOAT * len(p)

        bytes_held = sum(map(held, base.parameters()))
        # neither packing nor a start taken from the weights changes how many there are, and here are none
        lora = model.lora and model.lora.model_copy(update={"init_lora_weights": True})
        plain = dict.fromkeys(("load_in_4bit", "load_in_8bit", "gradient_checkpointing"), False)
        adapted = add_adapter(base, model.model_copy(update={**plain, "lora": lora}), 0)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        by_rank = {rank: at_rank(adapted, rank) for rank in ranks}
    if model.lora is None:
        return Weights(trained)
    return Weights(trained, frozen, round(bytes_held), by_rank, kept_of(adapted, model.lora))
