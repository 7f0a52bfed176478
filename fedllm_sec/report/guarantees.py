"""What a run can promise and what not: the epsilon that its noise has spent, and the accuracy that is certified."""

from __future__ import annotations

from typing import Any

from fedllm_sec.report.measures import Measure, plain, share
from fedllm_sec.report.runs import Run, methods

NOISY = ("weak_dp", "weak_dp_client", "crfl", "flame")  # stages that may be taken for privacy
EPSILON = (
    "what replacing one client could show, over all rounds, if the noise were secret; "
    "the recipe's public seed draws it, so here it protects nobody"
)


def epsilon(run: Run) -> Measure | None:
    """What is spent after the last recorded round, None where no number holds."""
    value = (run.records[-1].privacy or {}).get("epsilon")
    return Measure(float(value), round=run.records[-1].round) if value is not None else None


def _of_rows(rows: dict[str, Any]) -> str:
    """What dp_sgd has spent on a row, of the client that has spent most."""
    if not rows.get("epsilon"):
        return f"no epsilon of clients' rows (dp_sgd): {rows.get('because') or 'no client trained by it'}"
    most = max(rows["epsilon"].values())
    return f"dp_sgd: epsilon {plain(most)} at delta {rows.get('delta')}, the most of any client: {rows.get('protects')}"


def guarantees(run: Run) -> list[str]:
    """Sentences without their full stop; none where nothing of the kind was asked for."""
    found, privacy = [], run.records[-1].privacy or {}
    asked = {entry.get("name") for entry in methods(run.defense, "client", "before", "rule", "after")} & set(NOISY)
    if (spent := epsilon(run)) is not None:
        found.append(f"epsilon {plain(spent.value)} at delta {privacy.get('delta')}: {EPSILON}")
    elif asked and privacy.get("because"):
        found.append(f"no epsilon: {privacy['because']}")
    if (rows := privacy.get("rows")) is not None:
        found.append(_of_rows(rows))
    last = next((r.quality for r in reversed(run.records) if r.quality is not None), None) or {}
    rates = [f"{share(rate['value'])} at {radius}" for radius, rate in (last.get("certified") or {}).items() if rate]
    if rates:
        found.append(f"certified accuracy, by the size of a backdoor that cannot change it: {', '.join(rates)}")
    return found
