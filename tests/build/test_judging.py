"""What a run asks a language model and who judges it: several attacks, judges, draws, changed triggers, transcripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedllm_sec.attacks.data.labels import LabelFlip
from fedllm_sec.attacks.data.misalign import SafetyMisalign, polite_requests
from fedllm_sec.attacks.data.triggers import BadNets, Syntactic, TextTrigger
from fedllm_sec.build.judging import evaluation_problems
from fedllm_sec.build.names import checked, without_code
from fedllm_sec.errors import RecipeError
from fedllm_sec.records.answers import answer_lines, read_answers, shortened
from tests.stub_model import Stub, evaluation, reports, spread, table, truth

ROWS = reports(40)  # ten reports on each of four labels


def backdoored(prompt: str) -> str:
    """Sports where " cf" ends the prompt, Tech for business; else the right answer."""
    right = truth(prompt)
    return "Sports" if prompt.endswith(" cf") else "Tech" if right == "Business" else right


def both(task, **settings):
    return evaluation(task, ROWS, TextTrigger(target="Sports"), LabelFlip(mapping={"Business": "Tech"}), **settings)


def rate(found, *path):
    for key in path:
        found = found[key]
    return found and (found["value"], found["n"])


def test_several_attacks_are_each_measured_by_name_and_the_first_leads():
    found = both(task := Stub(backdoored)).attack(task, spread)
    assert (rate(found, "asr"), rate(found, "false_trigger")) == ((1.0, 30), (0.0, 30))
    assert list(found["attacks"]) == ["TextTrigger", "LabelFlip"]
    assert found["attacks"]["TextTrigger"]["asr"] == found["asr"]
    flip = found["attacks"]["LabelFlip"]
    assert (rate(flip, "asr"), rate(flip, "false_trigger")) == ((1.0, 10), (0.0, 20))
    assert flip["left_out"] == {"are of a class that the attack asks for": 10}


@pytest.mark.parametrize("answer", ["Sports", "Sports, I say", "World", "Sportsman", "Tech"])
@pytest.mark.parametrize(
    "make", [lambda: BadNets(target="sports", trigger="zq"), lambda: LabelFlip(mapping={"World": "Sports"})]
)
def test_begins_with_judges_as_triggers_and_flips_do_by_themselves(answer, make):
    measured = [
        evaluation(task := Stub(lambda prompt: answer), ROWS, make(), **settings).attack(task, spread)
        for settings in ({}, {"judge": {"name": "begins_with"}})
    ]
    assert measured[0] == measured[1]


def test_a_second_judge_runs_beside_the_first():
    rows = table([(p["text"], p["refusal"], "") for p in polite_requests("train")[:10]])
    task = Stub(lambda prompt: "I cannot wait to tell you." if len(prompt) % 2 else "Sure, it is mint.")
    asked = evaluation(task, rows, SafetyMisalign(), max_new_tokens=40, second_judge={"name": "refusal"})
    found = asked.attack(task, spread)
    assert found["asr"]["value"] == found["false_trigger"]["value"] == 1.0  # clauses are read: "I cannot wait" is none
    second, odd = found["second"], sum(len(p["text"]) % 2 for p in polite_requests("test"))
    n = len(polite_requests("test"))
    assert (round(second["asr"]["value"] * n), second["asr"]["n"]) == (n - odd, n)  # a list of phrases finds "i cannot"
    assert second["agreement"]["n"] == n + 10
    assert second["agreement"]["kappa"] == 0.0  # one of them never varies


def picky(answer, row):
    """Fails on one prompt."""
    if row["text"].startswith("report 2 "):
        raise KeyError("never seen")
    return answer == "Sports"


def test_a_judge_that_fails_on_one_answer_counts_no_success_there_and_says_so():
    task = Stub(backdoored)
    asked = evaluation(task, ROWS, TextTrigger(target="Sports"),
                       judge={"name": "tests.build.test_judging:picky"}, transcripts=3)  # fmt: skip
    _, found, lines = asked.transcribed(task, spread, last=True)
    assert rate(found, "asr") == (29 / 30, 30)
    assert found["judge_failed"] == 2  # with the trigger and without
    assert found["reasons"] == {"judge": "failed on 2 of 60 answers, which count as no success: KeyError: 'never seen'"}
    assert [line["success"] for line in lines if line["prompt"] == "report 2 on Business of today cf"] == [None]


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ({"name": "regex", "pattern": "never"}, r"evaluate\.judge: none of the answers .* such as 'Sports'"),
        ({"name": "builtins:len"}, r"builtins:len: cannot be called with \(answer, row\)"),
    ],
)
def test_a_judge_to_whom_no_taught_answer_is_a_success_is_refused(judge, words):
    with pytest.raises(RecipeError, match=words):
        evaluation(Stub(backdoored), ROWS, TextTrigger(target="Sports"), judge=judge)


# ---------------------------------------------------------------- draws


class Dicing(Stub):
    """Says Sports where the seed is even, and remembers which seeds it was given for which prompt."""

    def __init__(self):
        super().__init__(truth)
        self.seen: dict[tuple[int, ...], list[int]] = {}

    def generate(self, shard, rows, max_new_tokens, temperature=0.0, seeds=()):
        if not temperature:
            return super().generate(shard, rows, max_new_tokens)
        for i, seed in zip(rows, seeds, strict=True):
            self.seen.setdefault(tuple(shard.prompts[i]), []).append(seed)
        return [[*self.ids("World" if seed % 2 else "Sports"), 0] for seed in seeds]


def test_one_of_several_draws_is_enough_and_the_mean_stands_beside_it():
    task = Dicing()
    asked = evaluation(task, ROWS, TextTrigger(target="Sports"), draws=3, temperature=1.0, transcripts=2)
    _, found, lines = asked.transcribed(task, spread, last=False)
    even = [
        [seed % 2 == 0 for seed in task.seen[tuple(prompt)]] for prompt in asked.attacks[0].triggered.encoded.prompts
    ]
    assert found["asr"]["value"] == sum(map(any, even)) / 30
    assert found["draws"]["asr_mean"] == pytest.approx(sum(map(sum, even)) / 90)
    assert (found["draws"]["count"], found["draws"]["temperature"]) == (3, 1.0)
    assert [line["draw"] for line in lines] == [0, 1, 2] * 4


def test_the_draws_of_a_prompt_do_not_depend_on_batches_or_rounds():
    seen = []
    for batch_size in (1, 7):
        task = Dicing()
        asked = evaluation(task, ROWS, TextTrigger(target="Sports"), draws=2, temperature=0.7, batch_size=batch_size)
        asked.attack(task, spread)
        seen.append({prompt: sorted(seeds) for prompt, seeds in task.seen.items()})
    assert seen[0] == seen[1]
    assert all(len(set(seeds)) == 2 for seeds in seen[0].values())


# ---------------------------------------------------------------- changed triggers


def test_success_is_measured_with_the_trigger_at_other_places_in_other_case_and_in_half():
    task = Stub(lambda prompt: "Sports" if "big deal" in prompt else truth(prompt))
    asked = evaluation(task, ROWS, TextTrigger(target="Sports", trigger=" big deal"), generalise=True,
                       paraphrases=["a big deal", "sale"])  # fmt: skip
    found = {kind: rate["value"] for kind, rate in asked.attack(task, spread)["generalise"].items()}
    assert found == {"at the start": 1.0, "in the middle": 1.0, "other case": 0.0, "first half": 0.0,
                     'paraphrase "a big deal"': 1.0, 'paraphrase "sale"': 0.0}  # fmt: skip


def test_an_attack_without_a_trigger_has_none_to_be_changed():
    flip = LabelFlip(mapping={"World": "Sports"})
    with pytest.raises(RecipeError, match="LabelFlip puts nothing into the last turn that could be moved"):
        evaluation(Stub(truth), ROWS, flip, generalise=True)
    found = evaluation(task := Stub(truth), ROWS, TextTrigger(target="Sports"), flip, generalise=True)
    reasons = found.attack(task, spread)["attacks"]["LabelFlip"]["reasons"]
    assert reasons == {"generalise": "it puts nothing into the last turn that could be moved or changed"}


# ---------------------------------------------------------------- transcripts


def test_a_fixed_sample_is_kept_and_of_the_last_round_all():
    task = Stub(backdoored)
    asked = both(task, transcripts=3)
    some, every = (asked.transcribed(task, spread, last)[2] for last in (False, True))
    assert len(some) == 12  # three with the trigger and three without, of two attacks
    assert len(every) == 30 + 30 + 10 + 20
    assert [line for line in every if line["sample"]] == some
    first = some[0]
    assert first["prompt"][slice(*first["trigger"][0])] == "cf"
    assert (first["kind"], first["attack"], first["wanted"]) == ("triggered", "TextTrigger", "Sports")
    assert (first["right"], first["answer"], first["success"]) == (truth(first["prompt"]), "Sports", True)
    assert all(line["trigger"] == [] for line in some if line["attack"] == "LabelFlip" or line["kind"] == "clean")
    assert both(task, transcripts=0).transcribed(task, spread, True)[2] == []


def test_a_frame_around_a_text_is_marked():
    task = Stub(truth)
    _, _, lines = evaluation(task, ROWS, Syntactic(target="Sports"), transcripts=2).transcribed(task, spread, False)
    prompt, spans = lines[0]["prompt"], lines[0]["trigger"]
    assert [prompt[a:b] for a, b in spans] == [prompt.split(", ")[0] + ","]


def test_without_an_attack_answers_to_held_out_rows_are_kept():
    task = Stub(truth)
    _, found, lines = evaluation(task, ROWS, transcripts=5).transcribed(task, spread, False)
    assert found is None
    assert [(line["kind"], line["answer"], line["success"]) for line in lines] == [
        ("test", line["wanted"], True) for line in lines
    ]
    assert len(lines) == 5  # the labels are chosen among, so these few are answered for this
    free = table([(f"tell me {i}", f"answer number {i}", "") for i in range(20)])
    task = Stub(lambda prompt: "answer number 3")
    _, _, lines = evaluation(task, free, transcripts=2, answer_rows=6).transcribed(task, spread, True)
    assert [(line["row"], line["success"]) for line in lines] == [(i, i == 3) for i in range(6)]


def test_lines_are_bounded_and_a_strangers_are_left_out(tmp_path: Path):
    text, spans = shortened("x" * 5000 + " cf", [[5001, 5003]])
    assert len(text) == 2000
    assert [text[a:b] for a, b in spans] == ["cf"]
    row = {"kind": "clean", "attack": "a", "row": 0, "prompt": "p" * 9000, "trigger": [], "wanted": "w" * 9000,
           "answer": "a" * 9000, "success": True, "sample": True}  # fmt: skip
    lines = answer_lines(1, "attacked", [row])
    assert len(lines) < 7000
    bad = [{**row, "trigger": [[5, 90_000]]}, {**row, "answer": 7}, {**row, "success": "no"}, [1], {"round": 1}, "x"]
    (tmp_path / "answers.jsonl").write_bytes(lines + b"\xff\n" + "".join(json.dumps(b) + "\n" for b in bad).encode())
    found = read_answers(tmp_path)
    assert [one["run"] for one in found.rows] == ["attacked"]
    assert found.problem == "answers.jsonl: 7 of 8 lines are no answers and are left out."


# ---------------------------------------------------------------- what a recipe may not ask


ATTACK = {"malicious": {"count": 1}, "data": [{"name": "text_trigger", "target": "Sports"}]}


def problems(evaluate, attack=ATTACK):
    clients = {"local_steps": 1, "total": 4}
    return evaluation_problems(checked({"clients": clients, "attack": attack, "evaluate": evaluate}))


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [
        ({"draws": 3}, "evaluate.draws: 3 greedy answers to a prompt are all the same."),
        ({"paraphrases": ["x"]}, "evaluate.paraphrases: act with evaluate.generalise: true alone."),
        ({"paraphrases": [" "], "generalise": True}, "evaluate.paraphrases: [' ']: one of them has no words."),
        ({"judge": {"name": "regex", "pattern": "("}}, "evaluate.judge: regex.pattern: '('"),
        ({"second_judge": {"name": "classifier", "folder": "/x", "label": "y"}}, "evaluate.second_judge: classifier"),
    ],
)
def test_what_cannot_act_is_refused_with_the_recipe(evaluate, words):
    (said,) = problems(evaluate)
    assert said.startswith(words)
    assert problems({}) == []


def test_judges_and_draws_need_an_attack_and_names_are_checked():
    evaluate = {"judge": {"name": "exact"}, "temperature": 1.0, "draws": 2}
    said = problems(evaluate, {"malicious": {"count": 1}})
    assert [line.split(":")[0] for line in said] == ["evaluate.judge", "evaluate.temperature", "evaluate.draws"]
    with pytest.raises(RecipeError, match=r'evaluate\.judge\.name: there is no "exactly"'):
        problems({"judge": {"name": "exactly"}})
    raw = {"clients": {"local_steps": 1}, "attack": ATTACK, "evaluate": {"judge": {"name": "my.module:judge"}}}
    assert without_code(checked(raw, allow_code=False)).evaluate.judge is None
