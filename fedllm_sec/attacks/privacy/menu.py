"""The names that `attack.privacy` of a recipe can use. A name's kind is what its answer is compared as."""

from __future__ import annotations

from fedllm_sec.attacks.privacy.canary import canary
from fedllm_sec.attacks.privacy.exclusive import exclusive_neurons
from fedllm_sec.attacks.privacy.inversion import invert_gradient
from fedllm_sec.attacks.privacy.linear import linear_layer
from fedllm_sec.attacks.privacy.matching import dlg, idlg
from fedllm_sec.attacks.privacy.membership import Membership
from fedllm_sec.attacks.privacy.reveal import reveal_labels
from fedllm_sec.attacks.privacy.sequences import dager
from fedllm_sec.attacks.privacy.tokens import token_set
from fedllm_sec.recipe.resolve import Entry

# kind: images (the answer is a Reconstruction), labels (LabelCounts), membership (Suspicion),
# canary (Guessed), tokens (Recovered)
PRIVACY_MENU: dict[str, Entry] = {
    "linear_layer": Entry(linear_layer, "Phong et al. 2018", "images"),
    "dlg": Entry(dlg, "Zhu et al. 2019", "images"),
    "idlg": Entry(idlg, "Zhao et al. 2020", "images"),
    "invert_gradient": Entry(invert_gradient, "Geiping et al. 2020", "images"),
    "exclusive_neurons": Entry(exclusive_neurons, "Pan et al. 2022", "images"),
    "reveal_labels": Entry(reveal_labels, "Ma et al. 2023", "labels"),
    "membership": Entry(Membership, "Yeom et al. 2018; Carlini et al. 2022", "membership"),
    "canary": Entry(canary, "Carlini et al. 2019", "canary"),
    "token_set": Entry(token_set, "Petrov et al. 2024", "tokens"),
    "dager": Entry(dager, "Petrov et al. 2024", "tokens"),
}
