"""What contradicts itself in the attack block of a recipe: who is malicious, when they act, what an observer sees."""

from __future__ import annotations

from fedllm_sec.recipe.sections import Attack, Recipe


def attack_problems(recipe: Recipe, attack: Attack) -> list[str]:
    """What the types alone cannot say of an attack that is switched on."""
    found, clients = list[str](), recipe.clients
    who = attack.malicious
    given = [name for name in ("count", "share", "ids") if getattr(who, name) is not None]
    if len(given) != 1 and not ((attack.curious or attack.spread is not None) and not given):
        found.append(f"attack.malicious: give exactly one of count, share, ids; got {given or 'none'}.")
    m = who.count or (len(set(who.ids)) if who.ids is not None else round((who.share or 0.0) * clients.total))
    if len(given) == 1 and not 1 <= m < clients.total:
        found.append(
            f"attack.malicious: {m} of {clients.total} clients; needs at least 1 attacker and 1 honest client. "
            "Change it or set enable_attack: false."
        )
    for number in who.ids or []:
        if not 0 <= number < clients.total:
            found.append(f"attack.malicious.ids: {number} is not one of the clients 0 to {clients.total - 1}.")
    if who.redraw and who.ids is not None:
        found.append("attack.malicious: ids names the attackers, redraw draws them. Give count or share, or no redraw.")
    if who.present is not None:
        most = min(m, clients.per_round or 0)
        if clients.per_round is None:
            found.append(
                f"attack.malicious.present: {who.present}: all clients take part in every round. Remove it, or set "
                "clients.per_round."
            )
        elif who.present > most:
            found.append(
                f"attack.malicious.present: {who.present} of {m} attackers in rounds of {clients.per_round} clients. "
                f"Lower it to {most} or less."
            )
    if not (attack.data or attack.local or attack.update or attack.privacy):
        found.append("attack: names no method under data, local, update or privacy, so it could not act. Add one.")
    if attack.curious and given:
        found.append(
            "attack.malicious: an observer is no client, and no method for malicious clients is named. Remove it, "
            "or add one under data, local or update."
        )
    if attack.spread is not None:
        found += spread_problems(attack, given)
    found += observer_problems(recipe, attack)
    if attack.start > recipe.rounds:
        found.append(f"attack.start: {attack.start} is after the last round {recipe.rounds}. Lower it.")
    if attack.stop is not None and attack.stop < attack.start:
        found.append(f"attack.stop: {attack.stop} is before attack.start={attack.start}. Raise it.")
    return found


def spread_problems(attack: Attack, given: list[str]) -> list[str]:
    """What cannot act where rows of honest clients are poisoned and nobody is malicious."""
    usual = Attack()
    idle = [key for key in ("start", "stop", "every", "probability", "collude", "knowledge")
            if getattr(attack, key) != getattr(usual, key)]  # fmt: skip
    idle += [key for key in ("local", "update") if getattr(attack, key)] + ["malicious"] * bool(given)
    found = [
        f"attack.{key}: beside attack.spread nobody is malicious: clients are honest and hold poisoned rows, in all "
        "rounds. Remove one of them."
        for key in idle
    ]
    if not attack.data:
        found.append("attack.spread: no method under attack.data says how rows are poisoned. Add one.")
    return found


def observer_problems(recipe: Recipe, attack: Attack) -> list[str]:
    """Contradictions of attack.privacy and attack.observe with each other and with the rest of the recipe."""
    seen, clients = attack.observe, recipe.clients
    if seen is None:
        what = "attack.privacy: names what an observer does, and nothing says what is seen. Add attack.observe."
        return [what] if attack.privacy else []
    if recipe.task == "classify_text":
        return ["attack.privacy: there is none yet against classifiers of texts. Remove it and attack.observe."]
    found = []
    if not attack.privacy:
        found.append("attack.observe: nobody learns from what is seen. Add a method under attack.privacy.")
    for place, listed in (("rounds", seen.rounds), ("clients", seen.clients)):
        if not listed or len(set(listed)) < len(listed):
            found.append(f"attack.observe.{place}: {listed}: needs one or more, each once.")
    found += [
        f"attack.observe.rounds: {r} is after the last round {recipe.rounds}." for r in seen.rounds if r > recipe.rounds
    ]
    found += [
        f"attack.observe.clients: {number} is not one of the clients 0 to {clients.total - 1}."
        for number in seen.clients
        if not 0 <= number < clients.total
    ]
    canaries = getattr(recipe.data, "canaries", None)
    if any(method.get("name") == "canary" for method in attack.privacy):
        if canaries is None:
            found.append("attack.privacy: canary: no secrets are planted. Add data.canaries.")
        elif canaries.client not in seen.clients:
            found.append(
                f"attack.observe.clients: {seen.clients}: the secrets are client {canaries.client}'s "
                "(data.canaries.client). Add it."
            )
    changes = [key for key in ("flip", "crop") if getattr(recipe.data, key, None)]
    found += [
        f"data.{key}: with attack.observe, the images that are seen would not be those of the shard, and nothing could "
        "be compared. Remove one of them."
        for key in changes
    ]
    return found
