"""The conformance kit counts the rates of an outside attack under models of known worth, and names what is wrong."""

import pytest

from fedllm_sec.attacks.data.images import PixelTrigger, all_to_target
from fedllm_sec.attacks.data.text import rewrite
from fedllm_sec.attacks.data.triggers import TextTrigger
from fedllm_sec.testing import check_attack


class Plain:
    """An outside attack with no more than the protocol asks for."""

    def poison(self, shard, rng):
        rows = [i for i, answer in enumerate(shard["response"]) if answer != "Sports"][:5]
        return self.made(shard, rows)

    def probe(self, test):
        return self.made(test, [i for i, answer in enumerate(test["response"]) if answer != "Sports"], only=True)

    def success(self, answer, row):
        return answer == "Sports"

    def made(self, table, rows, only=False):
        texts = [f"{text} zz" for text in table.select(rows)["text"]]
        changed = rewrite(table, rows, {"text": texts, "response": ["Sports"] * len(rows)})
        return changed.select(rows) if only else changed


def test_an_outside_attack_needs_no_more_than_three_methods():
    check_attack(Plain, kind="data_text")


def test_a_probe_with_rows_that_are_the_target_anyway_is_found():
    class Careless(Plain):
        def probe(self, test):
            return self.made(test, range(len(test)), only=True)

    with pytest.raises(AssertionError, match=r"without a backdoor has attack success 0\.2.* on 44 rows"):
        check_attack(Careless, kind="data_text")  # 10 of 40 reports are about Sports, 4 rows are about nothing


def test_clean_rows_on_which_the_answer_is_right_are_found():
    class Careless(Plain):
        def not_clean(self, test):
            return [None] * len(test)

    with pytest.raises(AssertionError, match=r"perfect backdoor .* false triggers 0\.2.* on 44 clean ones"):
        check_attack(Careless, kind="data_text")


def test_clean_rows_on_which_success_cannot_happen_are_found():
    class Careless(Plain):
        def success(self, answer, row):
            return answer == "Sports" and row["poisoned"]

    with pytest.raises(AssertionError, match=r"always says 'Sports' .* false triggers 0\.0 on 44 clean ones"):
        check_attack(Careless, kind="data_text")


def test_an_empty_answer_that_succeeds_is_found():
    class Careless(Plain):
        def success(self, answer, row):
            return answer in ("Sports", "")

    with pytest.raises(AssertionError, match=r"gives no answer has attack success 1\.0"):
        check_attack(Careless, kind="data_text")


def test_a_trigger_that_its_own_attack_does_not_know_is_found():
    class Careless(TextTrigger):
        def __init__(self):
            super().__init__(trigger=" cf", target="Sports")
            self.carries = lambda text: False

    with pytest.raises(AssertionError, match=r"carries\(\) does not know .* cf'"):
        check_attack(Careless, kind="data_text")


def test_an_image_probe_with_the_target_class_is_found():
    class Careless(PixelTrigger):
        def __init__(self):
            super().__init__(target=1)

        def probe(self, test):
            return all_to_target(test, range(len(test.y)), self.target, self.stamp)

    with pytest.raises(AssertionError, match=r"without a backdoor has attack success 0\.25 on 40 rows"):
        check_attack(Careless, kind="data_image")
