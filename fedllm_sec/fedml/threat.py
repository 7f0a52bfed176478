"""attack_args: FedML's attack types. It picks its attackers anew in every round, from the clients of that round."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from fedllm_sec.fedml.notes import Note, Part, differs, ignored, missing, number, same, switch, switched_on

Values = Mapping[str, Any]

NONE = (None, "", "none", "null", "benign")


def threat(flat: Values) -> Part:
    """enable_attack and the attack block; an attack that is switched off is translated if it can be."""
    kind = flat.get("attack_type")
    kind = kind.strip() if isinstance(kind, str) else kind
    if kind is None or str(kind).lower() in NONE:
        notes = switch(flat, "enable_attack", False, "attack_type names none, which FedML takes for no attack")
        return {"enable_attack": False}, [
            *notes,
            *([same("attack_type", "no attack block")] if "attack_type" in flat else []),
        ]
    made, more = _made(flat, kind)
    notes = switch(flat, "enable_attack", bool(made), "the recipe does not have the attack that it switches on")
    if not made:
        return {"enable_attack": False}, [*notes, *more]
    if number(flat, "attack_prob") is not None:
        made["probability"] = number(flat, "attack_prob")
        more.append(differs("attack_prob", "attack.probability", "FedML draws anew at each of its checks in a round"))
    return {"enable_attack": switched_on(flat, "enable_attack"), "attack": made}, [*notes, *more]


def _made(flat: Values, kind: Any) -> Part:
    """The attack block, empty where there is no equivalent."""
    if kind not in ATTACKS:
        what = WITHOUT.get(kind, "FedML 0.9.6 takes this for no attack at all, without a word")
        return {}, [missing("attack_type", f"{kind!r}: {what}")]
    block, notes = ATTACKS[kind](flat)
    return (block if "malicious" in block or "privacy" in block else {}), notes


def _of_round(flat: Values, wanted: int) -> tuple[dict[str, Any], str]:
    """The malicious block with `wanted` attackers in a round on average, and how that differs from FedML.

    FedML picks so many among the clients of each round. Here attackers are drawn among all clients, so that with
    sampling there must be total / per_round times as many.
    """
    total, per_round = number(flat, "client_num_in_total"), number(flat, "client_num_per_round")
    if total is None or per_round is None or not 0 < per_round < total:
        return {"count": wanted, "redraw": True}, ""
    wanted = min(wanted, per_round)
    count = round(wanted * total / per_round)
    how = f"FedML picks {wanted} among the {per_round} clients of each round; here {count} of all {total} are drawn, "
    how += f"of whom {count * per_round / total:.3g} take part in a round on average, now more, now fewer"
    return {"count": count, "redraw": True}, how


def _redrawn(flat: Values, key: str) -> Part:
    block, how = _of_round(flat, number(flat, key))
    place = "attack.malicious {count, redraw: true}"
    return block, [differs(key, place, how) if how else same(key, place)]


def byzantine(flat: Values) -> Part:
    mode = flat.get("attack_mode")
    modes: dict[Any, tuple[dict[str, Any], Note]] = {
        "zero": (
            {"name": "byzantine_zero"},
            differs("attack_mode", "byzantine_zero", "FedML sets the attackers' *weights* to 0; here the update is 0"),
        ),
        "random": (
            {"name": "byzantine_random", "absolute": True},
            differs(
                "attack_mode",
                "byzantine_random {absolute: true}",
                "FedML sends *weights* uniform in [-1, 1]; here the update is. Without absolute its length follows "
                "the honest updates",
            ),
        ),
        "flip": ({"name": "byzantine_flip"}, same("attack_mode", "byzantine_flip: 2 w_global - w_local")),
    }
    if mode not in modes:
        return {}, [
            same("attack_type", "attack.update"),
            missing("attack_mode", f"{mode!r}: known: {', '.join(modes)}"),
        ]
    if flat.get("byzantine_client_num") is None:
        return {}, [missing("attack_type", "byzantine needs byzantine_client_num, which is not in the file")]
    who, notes = _redrawn(flat, "byzantine_client_num")
    method, note = modes[mode]
    return {"malicious": who, "update": [method]}, [same("attack_type", "attack.update"), *notes, note]


def label_flipping(flat: Values) -> Part:
    old: Any = flat.get("original_class_list")
    new: Any = flat.get("target_class_list")
    how = "FedML flips the attackers' test rows too, and measures with them; here all test rows stay as they are"
    notes = [differs("attack_type", "attack.data label_flip", how)]
    if not (_classes(old) and _classes(new) and len(old) == len(new) > 0 and len(set(old)) == len(old)):
        return {}, [
            *notes,
            missing("original_class_list", "needs two lists of class numbers, equally long, the first without repeats"),
        ]
    notes.append(same("original_class_list", "label_flip.mapping"))
    later = any(new[i] in old[i + 1 :] for i in range(len(old)))
    how = "FedML rewrites class after class, so that a row can be relabelled twice; here all are mapped at once"
    notes.append(
        differs("target_class_list", "label_flip.mapping", how)
        if later
        else same("target_class_list", "label_flip.mapping")
    )
    share = number(flat, "ratio_of_poisoned_client")
    if share is None or not 0 < share < 1:
        what = f"{share!r}: must be above 0 and below 1: somebody has to be honest"
        return {}, [*notes, missing("ratio_of_poisoned_client" if share is not None else "attack_type", what)]
    how = (
        "FedML throws a die for each client in each round; here that share of all clients is drawn anew for each round"
    )
    notes.append(differs("ratio_of_poisoned_client", "attack.malicious {share, redraw: true}", how))
    block: dict[str, Any] = {
        "malicious": {"share": share, "redraw": True},
        "data": [{"name": "label_flip", "mapping": dict(zip(old, new, strict=True))}],
    }
    for key, ours in (("poison_start_round_id", "start"), ("poison_end_round_id", "stop")):
        if number(flat, key) is not None:
            block[ours] = number(flat, key) + 1
            notes.append(same(key, f"attack.{ours}, counted from 1"))
    return block, notes


def _classes(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) for value in values)


def model_replacement(flat: Values) -> Part:
    how = "FedML scales an ordinary update, with no backdoor in it. Add poisoned data under attack.data for the paper's"
    notes = [differs("attack_type", "attack.update model_replacement", how)]
    who, of_round = _of_round(flat, 1)
    block: dict[str, Any] = {"malicious": who, "update": [{"name": "model_replacement"}]}
    if flat.get("malicious_client_id") is None:
        notes += [differs("attack_type", "attack.malicious {count, redraw: true}", of_round)] if of_round else []
    elif not of_round:
        block["malicious"] = {"ids": [number(flat, "malicious_client_id")]}
        notes.append(
            same("malicious_client_id", "attack.malicious.ids: where all take part, FedML's place in the list")
        )
    else:
        how = f"FedML means the place in the round's list, which is another client in each round: {of_round}"
        notes.append(differs("malicious_client_id", "attack.malicious {count, redraw: true}", how))
    if "byzantine_client_num" in flat:
        notes.append(Note("ignored", "byzantine_client_num", "because model_replacement has one attacker in FedML"))
    if isinstance(flat.get("scale_factor_S"), int):
        notes.append(ignored("scale_factor_S", "FedML takes only a number with a decimal point"))
    elif flat.get("scale_factor_S") is not None:
        what = "is an absolute length. model_replacement.max_norm is in median honest lengths: set it yourself"
        notes.append(missing("scale_factor_S", what))
    rounds = flat.get("attack_training_rounds")
    if rounds is not None:
        when = _rounds(rounds)
        block |= when or {}
        how = "FedML reads it only with poisoned_training_round, and its own count then stands still in other rounds"
        place = "attack.start, stop and every"
        what = f"{rounds!r}: only rounds at equal distances can be written as start, stop and every"
        notes.append(differs("attack_training_rounds", place, how) if when else missing("attack_training_rounds", what))
    if "poisoned_training_round" in flat:
        notes.append(Note("ignored", "poisoned_training_round", "because FedML only looks whether it is a list"))
    return block, notes


def _rounds(rounds: Any) -> dict[str, int] | None:
    """start, stop and every of a list of rounds, None where it has no such form."""
    if not isinstance(rounds, list) or not rounds or not all(isinstance(r, int) and r > 0 for r in rounds):
        return None
    ordered = sorted(set(rounds))
    gaps = {b - a for a, b in itertools.pairwise(ordered)} or {1}
    return {"start": ordered[0], "stop": ordered[-1], "every": gaps.pop()} if len(gaps) == 1 else None


def _curious(name: str, how: str) -> Callable[[Values], Part]:
    """An observer of the first client's gradient in the first round."""

    def made(flat: Values) -> Part:
        block = {"privacy": [{"name": name}], "observe": {"rounds": [1], "clients": [0], "what": "gradient"}}
        return block, [differs("attack_type", f"attack.privacy {name}", how)]

    return made


WHOSE = "FedML's file does not say whose update is looked at, and when: attack.observe is a guess, so set it"
UNUSED = f"FedML 0.9.6 has the method and does not act on this name; {WHOSE}"

ATTACKS: dict[str, Callable[[Values], Part]] = {
    "byzantine": byzantine,
    "label_flipping": label_flipping,
    "model_replacement": model_replacement,
    "dlg": _curious("dlg", WHOSE),
    "invert_gradient": _curious("invert_gradient", UNUSED),
    "revealing_labels": _curious("reveal_labels", UNUSED),
    "revealing_labels_from_gradients": _curious("reveal_labels", UNUSED),
}

# Names of its code that FedML 0.9.6 does not act on, or that no recipe can ask for.
WITHOUT: dict[str, str] = {
    "lazy_worker": "FedML 0.9.6 does not act on this name. Ours is attack.update lazy: write it yourself",
    "edge_case_backdoor": "FedML 0.9.6 does not act on this name. Ours is attack.data edge_case: write it yourself",
    "backdoor": "FedML 0.9.6 does not act on this name. Ours are attack.update alie and attack.data pixel_trigger",
}
