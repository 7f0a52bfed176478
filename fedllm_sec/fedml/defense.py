"""defense_args: FedML's defense types and their settings. docs/defenses.md says what FedML's rules compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fedllm_sec.fedml.notes import Note, Part, differs, ignored, missing, number, same, switch, switched_on
from fedllm_sec.fedml.setup import CAPPED
from fedllm_sec.fedml.threat import NONE

Values = Mapping[str, Any]

ONE_LAYER = (
    "FedML compares one tensor of the models, the last but one, by place in the round's list; here "
    "all of the updates, by client id"
)
ALIKE = "FedML weighs the rows that are left by claimed counts, without a cap; here they weigh the same"


def defense(flat: Values) -> Part:
    """enable_defense and the defense block; one that is switched off is translated if it can be."""
    kind = flat.get("defense_type")
    kind = kind.strip() if isinstance(kind, str) else kind
    if kind is None or str(kind).lower() in NONE:
        notes = switch(flat, "enable_defense", False, "defense_type names none, which FedML refuses")
        return {"enable_defense": False}, [
            *notes,
            *([same("defense_type", "no defense block")] if "defense_type" in flat else []),
        ]
    if kind in DEFENSES:
        make, how = DEFENSES[kind]
        block, more = make(flat)
        if block:
            more = [differs("defense_type", "defense", how) if how else same("defense_type", "defense"), *more]
    else:
        block, more = {}, [missing("defense_type", f"{kind!r}: {WITHOUT.get(kind, f'known: {KNOWN}')}")]
    notes = switch(flat, "enable_defense", bool(block), "the recipe does not have the defense that it switches on")
    if not block:
        return {"enable_defense": False}, [*notes, *more]
    return {"enable_defense": switched_on(flat, "enable_defense"), "defense": block}, [*notes, *more]


def _attackers(flat: Values) -> tuple[int | None, list[Note]]:
    """f, which FedML's rules read from the same name that says how many attackers there really are."""
    if flat.get("byzantine_client_num") is None:
        return None, [missing("defense_type", "needs byzantine_client_num, which is not in the file")]
    text = "is f, what the rule assumes. In FedML the defense reads the true number of attackers; f can differ from it"
    return number(flat, "byzantine_client_num"), [Note("translated", "byzantine_client_num", text)]


def krum(flat: Values) -> Part:
    f, notes = _attackers(flat)
    m = number(flat, "krum_param_m", 1)
    if f is None:
        return {}, notes
    if m == 1:
        return {"rule": {"name": "krum", "f": f}}, notes + (
            [same("krum_param_m", "krum")] if "krum_param_m" in flat else []
        )
    notes.append(differs("krum_param_m", "multi_krum.m", "FedML weighs the m rows by claimed example counts"))
    return {"rule": {"name": "multi_krum", "f": f, "m": m}}, notes


def bulyan(flat: Values) -> Part:
    f, notes = _attackers(flat)
    return ({} if f is None else {"rule": {"name": "bulyan", "f": f}}), notes


def norm_clipping(flat: Values) -> Part:
    if number(flat, "norm_bound") is None:
        return {}, [missing("defense_type", "needs norm_bound, which is not in the file")]
    block = {"before": [{"name": "norm_clipping", "radius": number(flat, "norm_bound")}], "rule": {"name": "mean"}}
    return block, [same("norm_bound", "norm_clipping.radius")]


def trimmed_mean(flat: Values) -> Part:
    if number(flat, "beta") is None:
        return {}, [missing("defense_type", "needs beta, which is not in the file")]
    return {"rule": {"name": "trimmed_mean", "beta": number(flat, "beta")}}, [
        same("beta", "trimmed_mean.beta, of each end")
    ]


def wise_median(flat: Values) -> Part:
    return {"rule": {"name": "median"}}, []


def geo_median(flat: Values) -> Part:
    rule: dict[str, Any] = {"name": "geometric_median", "weights": "counts"}
    notes = []
    f, batches = number(flat, "byzantine_client_num"), number(flat, "batch_num")
    if batches is not None and batches >= 1:
        n = number(flat, "client_num_per_round", batches)
        size = math.ceil(n / batches)  # FedML cuts the round's list into groups of so many
        rule["buckets"] = 1 if f == 0 else math.ceil(n / size)
        how = f"FedML groups clients in their order, {size} each; here by lot"
        notes.append(differs("batch_num", "geometric_median.buckets", how))
    if f is not None:
        notes.append(Note("ignored", "byzantine_client_num", "because geo_median only looks whether it is 0"))
    return {"rule": rule}, notes


def rfa(flat: Values) -> Part:
    return {"rule": {"name": "rfa"}}, []


def cclip(flat: Values) -> Part:
    tau = number(flat, "tau", 10)
    rule = {"name": "centered_clipping", "tau": tau if tau > 0 else 10, "bucket_size": number(flat, "bucket_size")}
    notes = [same("tau", "centered_clipping.tau")] if "tau" in flat else []
    if "tau" not in flat:
        notes.append(Note("differs", "defense_type", "tau is not set: FedML's 10 is taken; `median` follows the data"))
    if "bucket_size" in flat:
        how = "FedML groups clients in their order, here by lot"
        notes.append(differs("bucket_size", "centered_clipping.bucket_size", how))
    return {"rule": {key: value for key, value in rule.items() if value is not None}}, notes


def foolsgold(flat: Values) -> Part:
    why = "FedML 0.9.6 never reads it: its FoolsGold remembers in any case, as ours does"
    return {"rule": {"name": "foolsgold"}}, [ignored("use_memory", why)] if "use_memory" in flat else []


def slsgd(flat: Values) -> Part:
    rule: dict[str, Any] = {"name": "slsgd", "option": number(flat, "option_type"), "alpha": number(flat, "alpha")}
    absent = [key for key in ("trim_param_b", "option_type", "alpha") if number(flat, key) is None]
    if absent:
        return {}, [missing("defense_type", f"needs {', '.join(absent)}, which is not in the file")]
    notes = [same("option_type", "slsgd.option"), same("alpha", "slsgd.alpha")]
    if rule["option"] == 2:
        rule["f"] = number(flat, "trim_param_b")
        notes.append(differs("trim_param_b", "slsgd.f", TRIMS))
    else:
        notes.append(ignored("trim_param_b", "option 1 does not trim"))
    return {"rule": rule}, notes


def robust_learning_rate(flat: Values) -> Part:
    theta = number(flat, "robust_threshold")
    if theta is None:
        return {}, [missing("defense_type", "needs robust_threshold, which is not in the file")]
    rule = {"name": "mean"} if theta == 0 else {"name": "robust_learning_rate", "theta": theta}
    place = "the mean, which a threshold of 0 is in FedML" if theta == 0 else "robust_learning_rate.theta"
    return {"rule": rule}, [same("robust_threshold", place)]


def weak_dp(flat: Values) -> Part:
    if number(flat, "stddev") is None:
        return {}, [missing("defense_type", "needs stddev, which is not in the file")]
    n = number(flat, "client_num_per_round") or number(flat, "client_num_in_total") or 1
    sigma = number(flat, "stddev") / math.sqrt(n)
    how = f"FedML adds noise to each client's weights, whose mean is noise of stddev / sqrt({n}) on the model"
    after = [{"name": "weak_dp", "sigma": sigma, "absolute": True}]
    return {"rule": {"name": "mean", "weights": "uniform"}, "after": after}, [differs("stddev", "weak_dp.sigma", how)]


# FedML clips to a length that grows with the round for these data sets: rho_t = rho + growth t.
CRFL_SCHEDULES = {"mnist": (2.0, 0.1), "emnist": (4.0, 0.25), "lending_club_loan": (2.0, 0.025)}


def crfl(flat: Values) -> Part:
    rho, growth = CRFL_SCHEDULES.get(str(flat.get("dataset")), (None, 0.0))
    bound, rounds = number(flat, "clip_threshold"), number(flat, "comm_round", 1)
    sigma = flat.get("sigma") if isinstance(flat.get("sigma"), float) else 0.01
    notes = [same("sigma", "crfl.sigma")] if isinstance(flat.get("sigma"), float) else []
    if "sigma" in flat and not notes:
        notes.append(differs("sigma", "crfl.sigma 0.01", "FedML takes only a number with a decimal point"))
    if rho is None and bound is None:
        return {}, [*notes, missing("defense_type", "needs clip_threshold for this data set, as in FedML")]
    if bound is not None:
        if rho is None or bound <= rho + growth:
            rho, growth = bound, 0.0
            notes.append(same("clip_threshold", "crfl.rho"))
        elif bound >= rho + growth * rounds:
            notes.append(
                Note("ignored", "clip_threshold", "because FedML's own bound for this data set stays below it")
            )
        else:
            what = "cuts FedML's growing bound off in mid-run, which rho and growth cannot say; left out"
            notes.append(missing("clip_threshold", what))
    after = {"name": "crfl", "rho": rho, "growth": growth, "sigma": sigma}
    return {"rule": {"name": "mean"}, "after": [after]}, notes


def three_sigma(flat: Values) -> Part:
    rule = {"name": "three_sigma", "k": 0.5, "reference": "running_mean", "estimate": "moments"}
    return {"rule": rule}, [missing(key, "FedML 0.9.6 fixes k at 0.5") for key in ("bound_param",) if key in flat]


def _pretrained(score: dict[str, Any]) -> Callable[[Values], Part]:
    def made(flat: Values) -> Part:
        notes = [
            missing(key, what)
            for key, what in (
                ("pretraining_round_num", "here mu and sigma are taken anew in each round"),
                ("to_keep_higher_scores", "here rows with high scores are dropped, whatever the score"),
                ("bucketing_batch_size", "use defense.before bucketing, which acts before the rule"),
            )
            if key in flat
        ]
        return {"rule": {"name": "three_sigma", "estimate": "moments", **score}}, notes

    return made


def cross_round(flat: Values) -> Part:
    bound = number(flat, "cosine_similarity_bound")
    if bound is None:
        return {}, [missing("defense_type", "needs cosine_similarity_bound, which is not in the file")]
    rule = {"name": "cross_round", "threshold": bound, "compare": "models", "longer": None, "k": 0.5}
    how = "of models, whose cosines are near 1: few are ever below it. `compare: updates` looks at more"
    return {"rule": rule | {"estimate": "moments"}}, [
        Note("translated", "cosine_similarity_bound", f"is cross_round.threshold, {how}")
    ]


def residual_reweighting(flat: Values) -> Part:
    names = {"lambda_param": "tuning", "thresh": "threshold"}
    rule = {"name": "residual_reweighting"} | {ours: number(flat, key) for key, ours in names.items() if key in flat}
    notes = [same(key, f"residual_reweighting.{ours}") for key, ours in names.items() if key in flat]
    if "mode" in flat:
        notes.append(missing("mode", f"{flat['mode']!r}: here the line is fitted by repeated medians, as in the paper"))
    return {"rule": rule}, notes


def _of_clients(name: str) -> Callable[[Values], Part]:
    return lambda flat: ({"client": [{"name": name}], "rule": {"name": "mean"}}, [])


TRIMS = (
    "FedML drops whole clients, those with the fewest and the most claimed examples, and weighs the others by these "
    "counts; here each coordinate is trimmed and the rest weigh the same"
)
MEDIAN = "FedML computes it tensor by tensor, with weights that it keeps in a set; here it is joint"
ONLY_MPI = (
    "FedML 0.9.6 never applies it in cross-silo; in MPI simulation it votes on models, weighs them by claimed counts "
    "and turns the sign of the model's own coordinates. Here it turns that of updates, which weigh the same"
)
NOT_RUN = "FedML 0.9.6 takes the name, never applies it in cross-silo, and fails in MPI simulation; here it acts"
KEPT_LAST = "to the mean of the models it kept the last time"
NO_NAME = "FedML 0.9.6 has the code and refuses the name; here it acts"

# FedML's name -> what makes our block, and how its rule differs ("" where it does not)
DEFENSES: dict[str, tuple[Callable[[Values], Part], str]] = {
    "norm_diff_clipping": (norm_clipping, CAPPED),
    "diff_clipping": (norm_clipping, f"FedML 0.9.6 refuses this older name of norm_diff_clipping; {CAPPED}"),
    "krum": (krum, ""),
    "multikrum": (krum, "m is krum_param_m, which FedML takes for 1, plain Krum, where it is not set"),
    "trimmed_mean": (trimmed_mean, TRIMS),
    "wise_median": (
        wise_median,
        "of an even number of values FedML takes the lower middle one; here it is their midpoint",
    ),
    "geo_median": (geo_median, MEDIAN),
    "geometric_median": (geo_median, MEDIAN),
    "rfa": (rfa, f"{MEDIAN}, in three smoothed steps as in the paper"),
    "cclip": (
        cclip,
        f"FedML clips around the row of one random client; here around last round's result, as in the paper. {ALIKE}",
    ),
    "foolsgold": (foolsgold, f"{ONE_LAYER}; FedML multiplies its weights by claimed counts, here nothing does"),
    "slsgd": (slsgd, ALIKE),
    "robust_learning_rate": (robust_learning_rate, ONLY_MPI),
    "weak_dp": (weak_dp, f"{NOT_RUN}. {ALIKE}"),
    "crfl": (crfl, CAPPED),
    "3sigma": (
        three_sigma,
        f"{ONE_LAYER}; FedML measures {KEPT_LAST}, at first to Krum's choice; here to the mean of all updates so far, "
        f"at first to the geometric median. {ALIKE}",
    ),
    "3sigma_geo": (
        _pretrained({"k": 1.0}),
        f"{ONE_LAYER}; FedML keeps the bound and the median of its first round. {ALIKE}",
    ),
    "3sigma_foolsgold": (
        _pretrained({"k": 2.0, "score": "foolsgold"}),
        f"{ONE_LAYER}; FedML keeps the bound of its first round, and drops low scores of its own scale. {ALIKE}",
    ),
    "anomaly_detection": (cross_round, f"{ONE_LAYER}; in the second step FedML measures {KEPT_LAST}. {ALIKE}"),
    "cross_round": (cross_round, NO_NAME),
    "bulyan": (bulyan, NO_NAME),
    "residual_based_reweighting": (residual_reweighting, NO_NAME),
    "wbc": (_of_clients("wbc"), NO_NAME),
    "soteria": (_of_clients("soteria"), NO_NAME),
}

KNOWN = ", ".join(DEFENSES)

WITHOUT: dict[str, str] = {"dp": "FedML 0.9.6 refuses this name. See docs/defenses.md for weak_dp and weak_dp_client"}
