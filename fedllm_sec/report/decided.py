"""What a rule made of the clients' rows, round by round: who was malicious, who was kept or weighed how much.

Clients may be malicious in some rounds and honest in others, so everything said here is counted by round.
"""

from __future__ import annotations

from fedllm_sec.records.history import RoundRecord
from fedllm_sec.records.outcomes import judged_rounds
from fedllm_sec.report.measures import defense_name, plain, plural
from fedllm_sec.report.runs import Run


def malicious_of(run: Run) -> set[str]:
    """Who was malicious in some round: whose row comes first. Who attacked is each round's own matter."""
    return {i for record in run.rounds for i in record.malicious}


def redrawn(run: Run) -> bool:
    """Whether a client is malicious in some rounds and honest in others."""
    ever = malicious_of(run)
    return any(ever & set(record.cohort) != set(record.malicious) for record in run.rounds)


def who_first(run: Run) -> str:
    return "malicious in some rounds" if redrawn(run) else "malicious"


def clients_of(run: Run) -> list[str]:
    """All clients that took part: those that were ever malicious first, then in natural order."""
    bad = malicious_of(run)
    seen = {i for record in run.rounds for i in record.cohort}
    return sorted(seen, key=lambda i: (i not in bad, not i.isdigit(), int(i) if i.isdigit() else 0, i))


# ---------------------------------------------------------------- sentences


def kept_says(run: Run) -> str:
    """How many rows of that round's attackers, and of the honest, the rule kept in the rounds under attack."""
    judged = [
        (i in record.malicious, i in record.kept)
        for record in judged_rounds(run.rounds, run.attacked)
        if record.kept is not None
        for i in record.cohort
        if i not in record.quarantined
    ]
    counts = [
        f"{sum(group)} of {plural(len(group), f'{who} row')}"
        for who, inside in (("malicious", True), ("honest", False))
        if (group := [kept for is_bad, kept in judged if is_bad is inside])
    ]
    if not counts:
        return f"{defense_name(run)} judged no row{' under attack' if run.attacked else ''}."
    return f"{defense_name(run)} kept {' and '.join(counts)}{' under attack' if run.attacked else ''}."


def weights_says(run: Run) -> str:
    """The mean weight of a row of that round's attackers, and of an honest one, in units of an equal share."""
    means = []
    for who, inside in (("malicious", True), ("honest", False)):
        under = judged_rounds(run.rounds, run.attacked)
        rows = [(r, i) for r in under for i in r.cohort if (i in r.malicious) is inside]
        group = [v for r, i in rows if (v := share_of(r, i)) is not None]
        if group:
            means.append(f"{who} rows {plain(sum(group) / len(group))}")
    server = defense_name(run) if run.defended else "The plain mean"
    under = " under attack" if run.attacked else ""
    if not means:
        return f"{server} weighed no row{under}."
    return f"{server} weighed {' and '.join(means)} of an equal share on average{under}."


def share_of(record: RoundRecord, i: str) -> float | None:
    """A client's weight in units of an equal share."""
    weights = record.weights or {}
    return weights[i] * len(weights) if i in weights else None


def decisions_say(run: Run) -> str:
    """The sentence of the picture of decisions, whichever it is."""
    return kept_says(run) if any(record.kept is not None for record in run.rounds) else weights_says(run)
