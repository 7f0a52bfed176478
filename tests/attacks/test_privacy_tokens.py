"""What gradients give of the text itself: a tiny random Llama of 40 tokens, whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedllm_sec.attacks import PRIVACY_MENU
from fedllm_sec.attacks.privacy.adam import undone
from fedllm_sec.attacks.privacy.seen import Observation, Row
from fedllm_sec.attacks.privacy.tokens import inputs_of_tokens, nearest, undecayed
from fedllm_sec.build.recovered import Read, Written, summed
from fedllm_sec.errors import AttackError
from fedllm_sec.evaluation.overlap import partners, rouge
from fedllm_sec.matrix import Layout
from fedllm_sec.protocols import LocalTraining

SEVEN = (3, 17, 5, 3, 29, 8, 11, 2)  # fed without the last: 7 prefixes, 6 distinct tokens
token_set, dager = PRIVACY_MENU["token_set"].make, PRIVACY_MENU["dager"].make


def llama(r: int | None, tied: bool = True, targets: Sequence[str] = ("v_proj",), heads: int = 4) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=heads, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    if r is None:
        return base
    return get_peft_model(base, LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(targets))).eval()


def observed(model: Any, rows: Sequence[Sequence[int]]) -> Observation:
    """The gradient of the mean loss of all tokens but the first, row by row, by transformers' own loss."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scored = sum(len(row) - 1 for row in rows)
    loss = sum(
        model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) / scored for row in rows
    )
    gradient = torch.autograd.grad(loss, [p for _, p in named])
    layout = Layout.of([(name, p.detach()) for name, p in named])
    start = layout.join({name: p.detach() for name, p in named})
    sent = layout.join({name: g for (name, _), g in zip(named, gradient, strict=True)})
    return Observation(sent, "gradient", start, layout, model, rows=len(rows))


def by_lstsq(seen: Observation) -> list[int]:
    """The token check in plain lines: A norm(e) as a combination of the rows of dB, for each token alone."""
    name = next(n for n in seen.layout.names if "layers.0" in n and "lora_B" in n)
    base = seen.model.get_base_model()  # type: ignore[operator]
    a = seen.model.get_parameter(name.replace("lora_B", "lora_A")).detach().double()
    spanning = seen.parts(torch.float64)[name].T  # (r, out)
    found = []
    for token in range(40):
        embedded = base.model.embed_tokens.weight[token].detach()
        wanted = a @ base.model.layers[0].input_layernorm(embedded).detach().double()
        made = spanning @ torch.linalg.lstsq(spanning, wanted.unsqueeze(1), rcond=1e-6, driver="gelsd").solution
        if float((made[:, 0] - wanted).norm() / wanted.norm()) < 1e-3:
            found.append(token)
    return found


def with_positions(seen: Observation) -> Observation:
    """A model that adds a vector of the position to each embedding."""
    model = llama(8)
    places = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    model.get_input_embeddings().register_forward_hook(lambda _, given, made: made + places[: made.shape[1]])
    return replace(seen, model=model)


def stepped(seen: Observation, lr: float, decay: float, steps: Tensor) -> Observation:
    """The delta of one step of this optimizer's direction."""
    training = LocalTraining(1, 1, optimizer="sgd", lr=lr, max_grad_norm=None, weight_decay=decay)
    after = seen.start - lr * (steps + decay * seen.start)
    return replace(seen, sent=after - seen.start, what="delta", training=training)


def test_the_span_of_the_first_layers_values_holds_the_tokens_that_were_fed_and_no_others():
    seen = observed(llama(8), [SEVEN])
    assert list(token_set(seen).tokens) == [3, 5, 8, 11, 17, 29] == by_lstsq(seen)
    assert token_set(seen) == token_set(seen)
    assert list(token_set(observed(llama(16), [SEVEN, (20, 21, 22, 2)])).tokens) == [3, 5, 8, 11, 17, 20, 21, 22, 29]
    assert list(token_set(observed(llama(None), [SEVEN])).tokens) == [3, 5, 8, 11, 17, 29]  # a tied head moves all rows


def test_a_span_that_the_tokens_fill_tells_nothing():
    sent = observed(llama(8), [SEVEN])
    for seen in (
        observed(llama(6), [SEVEN]),  # 6 distinct tokens fill r = 6
        observed(llama(16, heads=1), [range(10, 20)]),  # 9 tokens fill the 8 outputs of a single head
        replace(sent, sent=sent.sent.sign()),  # as Adam's first step
    ):
        with pytest.raises(AttackError, match=r"layers.0.self_attn.v_proj fills all \d+ dimensions"):
            token_set(seen)


def test_deltas_of_one_step_of_sgd_give_the_tokens_too_without_the_decay():
    for model in (llama(8), llama(None), llama(None, tied=False)):
        seen = observed(model, [SEVEN])
        assert list(token_set(stepped(seen, 0.1, 0.01, seen.sent)).tokens) == [3, 5, 8, 11, 17, 29]


def test_embeddings_that_move_are_the_tokens_even_after_steps_of_adam_and_never_where_noise_moves_all():
    seen = observed(llama(None, tied=False), [range(10, 40)])  # 29 tokens
    assert list(token_set(seen).tokens) == list(range(10, 39))
    assert list(token_set(stepped(seen, 1e-3, 0.01, seen.sent.sign())).tokens) == list(range(10, 39))
    noise = 1e-3 * torch.randn(len(seen.sent), generator=torch.Generator().manual_seed(0))
    with pytest.raises(AttackError, match="fills all 32 dimensions"):
        token_set(replace(seen, sent=seen.sent + noise))


def test_behind_the_first_step_of_adam_the_gradient_is_still_there_and_gives_the_tokens():
    """Where clipping has made it small enough; signs alone and noise give nothing."""
    attention = ("q_proj", "k_proj", "v_proj")
    model = llama(16, targets=attention)
    seen = observed(model, [SEVEN])
    gradient = seen.sent / seen.sent.norm()
    vector = torch.nn.Parameter(seen.start.clone())
    vector.grad = gradient.clone()
    torch.optim.AdamW([vector], lr=1e-3, weight_decay=0.01).step()
    training = LocalTraining(1, 1, lr=1e-3, weight_decay=0.01)
    stepped = replace(seen, sent=vector.detach() - seen.start, what="delta", training=training)

    back, wrong = undone(undecayed(stepped))
    at_zero = (seen.start == 0) & (gradient != 0)  # LoRA's B
    assert float((back - gradient).abs()[at_zero].div(wrong[at_zero]).quantile(0.99)) < 8
    assert float((wrong / back.abs())[at_zero].median()) < 0.05
    assert list(token_set(stepped).tokens) == [3, 5, 8, 11, 17, 29]
    for sent, words in (
        (stepped.sent + 1e-3, "longer than a step of AdamW"),
        (1e-3 * stepped.sent.sign(), "rounding hides what"),
    ):
        with pytest.raises(AttackError, match=words):
            token_set(replace(stepped, sent=sent))
    with pytest.raises(AttackError, match=r"layers.1.self_attn.v_proj fills all"):  # orders are not told so
        dager(stepped)


def by_steps(seen: Observation) -> set[tuple[int, ...]]:
    """Rows in plain lines: every prefix of every length by the second layer's rows of dB, one after the other."""
    base = seen.model.get_base_model()  # type: ignore[operator]
    name = next(n for n in seen.layout.names if "layers.1" in n and "lora_B" in n)
    a = seen.model.get_parameter(name.replace("lora_B", "lora_A")).detach().double()
    spanning = torch.linalg.svd(seen.parts(torch.float64)[name])  # dB = U S V
    span = spanning.Vh[: int((1e-6 * spanning.S[0] < spanning.S).sum())]

    def inside(prefix: tuple[int, ...]) -> bool:
        out = base.model(input_ids=torch.tensor([prefix]), output_hidden_states=True)
        x = a @ base.model.layers[1].input_layernorm(out.hidden_states[1][0, -1]).detach().double()
        return float((x - span.T @ (span @ x)).norm() / x.norm()) < 1e-4

    found, grown = set(), [(token,) for token in by_lstsq(seen) if inside((token,))]
    while grown:
        longer = [(*p, t) for p in grown for t in by_lstsq(seen) if p != (t,) and inside((*p, t))]
        found |= {p for p in grown if not any(q[:-1] == p for q in longer)}
        grown = longer
    return found


def test_whole_rows_are_read_while_there_are_fewer_distinct_prefixes_than_dimensions():
    seen = observed(llama(9), [SEVEN])  # 7 prefixes in 9 dimensions
    made = dager(seen)
    assert made.rows == [SEVEN[:-1]]
    assert set(made.rows) == by_steps(seen)
    assert dager(seen) == made
    rows = [SEVEN, (3, 17, 22, 9, 2), (7, 30, 7, 7, 1, 2)]  # 7 + 2 + 5 prefixes, the first two share one of 2
    for model in (llama(20), llama(None)):
        assert dager(observed(model, rows)).rows == sorted(row[:-1] for row in rows)
    assert dager(stepped(seen, 0.1, 0.01, seen.sent)).rows == [SEVEN[:-1]]


def test_prefixes_that_fill_the_span_give_no_row_though_the_tokens_are_told():
    seen = observed(llama(7), [SEVEN])  # 6 distinct tokens and 7 prefixes in 7 dimensions
    assert list(token_set(seen).tokens) == [3, 5, 8, 11, 17, 29]
    with pytest.raises(AttackError, match=r"dager: what was sent of .*layers.1.self_attn.v_proj fills all 7"):
        dager(seen)


def test_what_no_span_tells_is_not_said():
    """A row with which another begins, the second of two equal rows, and a token doubled at the start."""
    seen = observed(llama(20), [SEVEN, SEVEN[:4], SEVEN])  # (3, 17, 5) is fed of the second
    assert dager(seen).rows == [SEVEN[:-1]]
    assert (4, 4, 9) not in dager(observed(llama(20), [(4, 4, 9, 2)])).rows  # type: ignore[operator]


def test_what_cannot_be_read_says_why():
    row = observed(llama(8), [SEVEN])
    for given, words in (
        (replace(row, sent=row.sent * torch.nan), "not finite"),
        (replace(row, sent=row.sent * 0), "nothing that was sent"),
        (observed(llama(8, targets=["q_proj"]), [SEVEN]), "nothing that was sent of base_model.model.model.layers.0"),
        (replace(row, model=torch.nn.Linear(2, 2)), "a language model"),
    ):
        with pytest.raises(AttackError, match=words):
            token_set(given)
    with pytest.raises(AttackError, match="fed positions with the tokens"):
        inputs_of_tokens(with_positions(row), "base_model.model.model.layers.0.self_attn.v_proj")


def test_as_many_are_taken_as_there_are_directions_the_closest_first():
    shares = torch.tensor([1e-9, 0.5, 1e-8, 1e-12, 1e-7])
    assert nearest(shares, 1e-6, 3) == [0, 2, 3]
    assert nearest(shares, 1e-8, 5) == [0, 3]


def test_recall_and_precision_are_those_of_distinct_tokens_that_were_fed():
    from fedllm_sec.attacks.privacy import Recovered

    read = Written([Row((1, 2, 2, 3, 9), 2), Row((1, 4, 9), 1)]).judged(Recovered([1, 2, 3, 7]))
    assert read == Read(0.75, 0.75, None, 4, 2)
    rows = [Row((1, 2, 2, 3, 9), 2), Row((1, 4, 9), 1)]
    # of (1, 2, 2, 3) three tokens in seven and two pairs in five, twice; (1, 4) is whole
    told = Written(rows).judged(Recovered([1, 4], [(1, 4), (1, 2, 2)]))
    assert told == Read(0.5, 1.0, 0.5, 4, 2, (6 / 7 + 1) / 2, (4 / 5 + 1) / 2)
    texts = Written(rows, lambda ids: "".join(map(str, ids))).judged(Recovered([1], [(1, 2, 7, 3), (1, 4)])).texts
    assert [(text["which"], text["true"]) for text in texts] == [("best", "14"), ("median", "1223"), ("worst", "1223")]
    assert texts[2]["said"] == [["12", True], ["7", False], ["3", True]]
    assert Written([Row((1, 2), 1)]).judged(Recovered([])) == Read(0.0, None, None, 1, 1)
    assert summed([])["scores"] == dict.fromkeys(("recall", "precision", "exact", "rouge_1", "rouge_2"))
    assert summed([(1, read), (2, Read(0.25, None, None, 4, 1))])["scores"]["recall"]["value"] == 0.5


def test_rouge_counts_the_runs_of_tokens_that_both_rows_hold():
    assert rouge((1, 2, 3, 4), (1, 2, 3, 4), 2) == 1.0
    assert rouge((1, 2, 1), (1, 1, 1, 5), 1) == 4 / 7  # two 1 of both; 3 and 4 tokens
    assert rouge((4, 3, 2, 1), (1, 2, 3, 4), 2) == 0.0
    assert rouge((1,), (1,), 2) == rouge((), (1, 2), 1) == 0.0
    assert partners([(9, 9), (1, 2)], [(1, 2, 3), (9,), (7,)]) == [(1, 2), (9, 9), ()]
