"""A client's local steps against a bare peft loop and against TRL's SFTTrainer: the same rows in the same batches.

    python scripts/bench_llm.py recipes/llm/smollm2_alpaca_chat.yaml --steps 50
    python scripts/bench_llm.py recipes/llm/alpaca_backdoor.yaml model.name=../shared/models/minillama-1m \\
        data.name=../shared/data/alpaca

The bare loop is what one would write without this project: a fresh peft model, rows padded on the right, the model's
own loss of `labels`, AdamW over the adapter, gradients cut to the same length. SFTTrainer (pip install trl; left out
where it is not installed) gets the same token ids with the prompt masked, in the same order, without checkpointing of
gradients, in the same precision; its set-up is not counted. Each loop has its own model from the same seed. They run
one after another, `--repeats` times, the order turned each time; the table gives processor and wall seconds of the best
repeat and their ratio to the bare loop. Loops whose losses differ did not do the same: that is an error.

A second table has the scoring of held-out rows and their greedy answers, with the tokens that the prompts of a batch
begin with taken through the model once, as runs do, and with every prompt whole. `--steps 0` leaves the loops out.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fedllm_sec.build.federation import build
from fedllm_sec.build.language_model import load_task
from fedllm_sec.protocols import Client
from fedllm_sec.rounds.client import endless, make_optimizer, train_locally
from fedllm_sec.rounds.compute import Machine
from fedllm_sec.seeds import generator_for
from fedllm_sec.tasks import beginning
from fedllm_sec.train import load, quiet

ROUND = 1


class Loops:
    """The three loops, on the first client of a recipe; each gives the mean loss of its steps."""

    def __init__(self, recipe: Any, steps: int) -> None:
        self.recipe, self.machine = recipe, Machine(Accelerator(), recipe.compute.placement)
        made = build(recipe, self.machine)
        self.training = made.training.__class__(**{**made.training.__dict__, "steps": steps, "epochs": None})
        client = next(iter(made.clients))
        self.shard = client.shard
        if any(self.shard.earlier) or recipe.data.loss_on == "all":
            raise SystemExit("this benchmark scores one answer a row: set data.loss_on=last_response.")
        # counted from one anew, so that all loops see the rows in this order
        order = endless(
            made.task, self.shard, self.training.batch_size, generator_for(recipe.seed, ROUND, client.id, "batches")
        )
        self.batches: list[list[int]] = [next(order) for _ in range(steps)]
        self.client, self.task, self.evaluation = Client(client.id, client.shard), made.task, made.evaluation
        self.start, self.optimizer = made.vector, make_optimizer(made.task, self.training)
        self.bare_model = self.fresh()
        self.sft_model = self.fresh()

    def fresh(self) -> Any:
        """A peft model of its own, in training mode, whose parameters are apart from each other as peft makes them."""
        model = load_task(self.recipe, self.machine).model
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data, parameter.grad = parameter.data.clone(), None
        return model.train()

    def rows(self, batch: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        return [(self.shard.prompts[i], self.shard.answers[i]) for i in batch]

    def federated(self) -> float:
        result = train_locally(
            self.task, self.client, self.start, optimizer=self.optimizer, stepper=self.machine, training=self.training,
            round=ROUND, rounds=99, seed=self.recipe.seed,
        )  # fmt: skip
        return result.loss

    def bare(self) -> float:
        parameters = _restarted(self.bare_model, self.start, self.task.layout)
        optimizer = torch.optim.AdamW(
            parameters, lr=self.training.lr, betas=self.training.betas, weight_decay=self.training.weight_decay
        )
        pad, losses, weights = self.task.tokenizer.pad_token_id, [], []
        for batch in self.batches:
            rows = self.rows(batch)
            width = max(len(prompt) + len(answer) for prompt, answer in rows)
            ids = torch.tensor([[*p, *a, *[pad] * (width - len(p) - len(a))] for p, a in rows])
            mask = torch.tensor([[1] * (len(p) + len(a)) + [0] * (width - len(p) - len(a)) for p, a in rows])
            labels = torch.tensor([[-100] * len(p) + a + [-100] * (width - len(p) - len(a)) for p, a in rows])
            optimizer.zero_grad()
            with self.machine.autocast():
                loss = self.bare_model(
                    input_ids=ids.to(self.machine.device), attention_mask=mask.to(self.machine.device),
                    labels=labels.to(self.machine.device), use_cache=False,
                ).loss  # fmt: skip
            loss.backward()
            if self.training.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.training.max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
            weights.append(sum(len(answer) for _, answer in rows))
        found = torch.stack(losses).double().cpu()
        self.mean_of_steps = float(found.mean())  # as SFTTrainer tells it
        return float(found @ torch.tensor(weights).double()) / sum(weights)

    def sft(self) -> float:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        _restarted(self.sft_model, self.start, self.task.layout)
        rows = [pair for batch in self.batches for pair in self.rows(batch)]
        table = Dataset.from_dict(
            {
                "input_ids": [p + a for p, a in rows],
                "completion_mask": [[0] * len(p) + [1] * len(a) for p, a in rows],
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder, max_steps=len(self.batches), per_device_train_batch_size=self.training.batch_size,
                train_sampling_strategy="sequential", gradient_checkpointing=False, max_length=None, report_to=[],
                bf16=self.recipe.compute.mixed_precision == "bf16", fp16=self.recipe.compute.mixed_precision == "fp16",
                learning_rate=self.training.lr, lr_scheduler_type="constant", weight_decay=self.training.weight_decay,
                adam_beta1=self.training.betas[0], adam_beta2=self.training.betas[1], disable_tqdm=True,
                max_grad_norm=self.training.max_grad_norm or 0.0, save_strategy="no", logging_strategy="no",
                use_cpu=self.machine.device.type == "cpu", completion_only_loss=True,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=self.sft_model, args=config, train_dataset=table, processing_class=self.task.tokenizer
            )
            begun = time.perf_counter(), time.process_time()
            loss = trainer.train().training_loss
            self.sft_seconds = tuple(
                now - then for now, then in zip((time.perf_counter(), time.process_time()), begun, strict=True)
            )
        return float(loss)


def _restarted(model: Any, start: torch.Tensor, layout: Any) -> list[torch.nn.Parameter]:
    """The trainable parameters of a model, put back to where the client starts."""
    parts = layout.split(start)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(parts[name])
            parameter.grad = None
    return list(named.values())


def timed(work: Callable[[], float]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds of all threads, and the loss."""
    begun = time.perf_counter(), time.process_time()
    loss = work()
    return time.perf_counter() - begun[0], time.process_time() - begun[1], loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_intermixed_args()
    quiet()
    recipe = next(iter(load(options.recipe, [*options.overrides, "enable_attack=false"]).values())).recipe
    loops = Loops(recipe, max(options.steps, 1))
    if options.steps:
        compare_loops(loops, options)
    compare_evaluation(loops, options.repeats)


def compare_evaluation(loops: Loops, repeats: int) -> None:
    """Held-out rows scored and answered, with and without a shared beginning."""
    task, test, measured = loops.task, loops.evaluation.test, loops.evaluation
    size, tokens = measured.batch_size, measured.max_new_tokens
    batches = [range(i, min(i + size, len(test))) for i in range(0, len(test), size)]
    works = {
        "score": lambda: sum(float(task.score(test, rows)[:, 0].sum()) for rows in batches),
        f"answer, {tokens} tokens": lambda: sum(map(len, (a for r in batches for a in task.generate(test, r, tokens)))),
    }
    least, none = beginning.LEAST, 10**9
    lengths = [beginning.common([test.prompts[i] for i in rows]) for rows in batches]
    mean = sum(map(len, test.prompts)) / len(test)
    print(
        f"\n{len(test)} held-out rows; prompts of {mean:.0f} tokens, the first {min(lengths)} to {max(lengths)} alike\n"
    )
    print("| evaluation | whole prompts, processor s | beginning once, processor s | ratio |\n|---|---|---|---|")
    task.model.eval()
    for name, work in works.items():
        best: dict[int, float] = {}
        found = {}
        for repeat in range(repeats):
            for beginning.LEAST in sorted((least, none), reverse=bool(repeat % 2)):
                _, seconds, found[beginning.LEAST] = timed(work)
                best[beginning.LEAST] = min(seconds, best.get(beginning.LEAST, seconds))
        if abs(found[least] - found[none]) > 1e-3 * abs(found[none]):
            raise SystemExit(f"{name}: {found[least]} with a shared beginning, {found[none]} without: not the same.")
        print(f"| {name} | {best[none]:.1f} | {best[least]:.1f} | {best[least] / best[none]:.2f} |")
    beginning.LEAST = least


def compare_loops(loops: Loops, options: argparse.Namespace) -> None:
    recipe = loops.recipe
    works: dict[str, Callable[[], float]] = {"bare peft loop": loops.bare, "fedllm_sec": loops.federated}
    if importlib.util.find_spec("trl") is not None:
        works["TRL SFTTrainer"] = loops.sft
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in works}
    for repeat in range(options.repeats):
        for name in sorted(works, reverse=bool(repeat % 2)):
            wall, processor, loss = timed(works[name])
            found[name].append((*(loops.sft_seconds if name == "TRL SFTTrainer" else (wall, processor)), loss))
    best = {name: [min(column) for column in zip(*times, strict=True)] for name, times in found.items()}
    base = best["bare peft loop"]
    exact = recipe.model.dtype == "float32" and loops.machine.accelerator.mixed_precision == "no"
    for name, wanted in (("fedllm_sec", base[2]), ("TRL SFTTrainer", loops.mean_of_steps)):
        if name in best and abs(best[name][2] - wanted) > (0.01 if exact else 0.05) * wanted:
            raise SystemExit(
                f"{name} has a loss of {best[name][2]:.4f}, the bare loop {wanted:.4f}: not the same steps."
            )
    print(f"{options.steps} steps of {loops.training.batch_size} rows, {recipe.model.name}, {recipe.model.dtype}\n")
    print("| loop | processor s | ratio | wall s | ratio |\n|---|---|---|---|---|")
    for name, (wall, processor, _) in best.items():
        print(f"| {name} | {processor:.1f} | {processor / base[1]:.2f} | {wall:.1f} | {wall / base[0]:.2f} |")


if __name__ == "__main__":
    main()
