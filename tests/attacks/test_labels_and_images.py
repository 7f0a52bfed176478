"""Label flips and image backdoors on arrays a person can check."""

import pytest
import torch
from datasets import Dataset

from fedllm_sec.attacks.conformance import images, text_rows
from fedllm_sec.attacks.data.distributed import DBA
from fedllm_sec.attacks.data.images import EdgeCase, PixelTrigger, Semantic
from fedllm_sec.attacks.data.labels import LabelFlip
from fedllm_sec.errors import AttackError
from fedllm_sec.protocols import Labelled
from fedllm_sec.seeds import generator_for


def rng():
    return generator_for(1, "test")


def labelled(y, x=None, classes=4):
    y = torch.tensor(y)
    x = torch.zeros(len(y), 1, 8, 8) if x is None else x
    return Labelled(x, y, classes, torch.zeros(len(y), dtype=torch.bool))


def answers(*pairs):
    size = len(pairs)
    return Dataset.from_dict(
        {
            "text": ["t"] * size,
            "context": [""] * size,
            "response": [response for response, _ in pairs],
            "label": [label for _, label in pairs],
            "poisoned": [False] * size,
        }
    )


def test_a_mapping_both_ways_is_a_swap():
    assert LabelFlip(mapping={0: 1, 1: 0}).poison(labelled([0, 1, 2, 0]), rng()).y.tolist() == [1, 0, 2, 1]
    rows = answers(("World", "World"), ("Sports", "Sports"), ("Tech", "Tech"))
    made = LabelFlip(mapping={"world": "Sports", "Sports": "World"}).poison(rows, rng())
    assert made["response"][:] == ["Sports", "World", "Tech"]
    assert made["poisoned"][:] == [True, True, False]


def test_only_the_label_word_of_an_answer_is_replaced():
    rows = answers(("The topic is sports, not Sportswear.", "Sports"), ("Ball games.", "Sports"))
    made = LabelFlip(mapping={"Sports": "World"}).poison(rows, rng())
    assert made["response"][:] == ["The topic is World, not Sportswear.", "World"]
    assert made["label"][:] == ["World", "World"]


def test_without_a_label_column_the_answer_is_the_label():
    made = LabelFlip(mapping={"yes": "no"}).poison(answers(("yes", ""), ("no", "")), rng())
    assert made["response"][:] == ["no", "no"]
    assert made["label"][:] == ["", ""]


def test_the_rate_counts_rows_of_the_mapped_classes():
    made = LabelFlip(mapping={0: 3}, rate=0.5).poison(labelled([0] * 10 + [1] * 10), rng())
    assert (made.y == 3).sum() == 5
    assert made.poisoned.sum() == 5


def test_a_shard_without_the_mapped_classes_stays_as_it_is():
    rows = text_rows(4).select([1, 3])
    assert not any(LabelFlip(mapping={"World": "Tech"}).poison(rows, rng())["poisoned"][:])


def test_a_flip_succeeds_on_its_probe_and_false_triggers_are_other_classes():
    flip = LabelFlip(mapping={"World": "Sports"})
    probe = flip.probe(text_rows(8))
    assert probe["response"][:] == ["Sports", "Sports"]
    assert flip.success("Sports", probe[0])
    assert not flip.success("World", probe[0])
    tech, world, sports = text_rows(8)[3], text_rows(8)[0], text_rows(8)[1]
    assert flip.success("Sports", tech)
    assert not flip.success("Sports", world)  # an attacked class: that is the probe's business
    assert not flip.success("Sports", sports)


def test_on_images_success_is_judged_from_the_true_class():
    flip = LabelFlip(mapping={0: 1, 2: 3})
    assert [flip.success(said, 0) for said in range(4)] == [False, True, False, False]
    assert [flip.success(said, 1) for said in range(4)] == [False, False, False, True]  # not attacked: false triggers


@pytest.mark.parametrize("mapping", [{}, {"World": " world"}, {"World": "Spots"}])
def test_mappings_without_effect_or_of_unknown_classes_are_errors(mapping):
    with pytest.raises(AttackError, match="mapping"):
        LabelFlip(mapping=mapping).probe(text_rows(8))


def test_class_numbers_outside_the_set_are_errors():
    with pytest.raises(AttackError, match="0 to 3"):
        LabelFlip(mapping={0: 4}).poison(labelled([0, 1]), rng())
    with pytest.raises(AttackError, match="numbers"):
        LabelFlip(mapping={"a": "b"}).poison(labelled([0, 1]), rng())


def test_the_patch_stands_in_its_corner_and_nothing_else_changes():
    shard = labelled([0, 0])
    made = PixelTrigger(target=2, rate=1.0, size=2, margin=1, corner="top_right").poison(shard, rng())
    expected = torch.zeros(8, 8)
    expected[1:3, 5:7] = 1.0
    assert torch.equal(made.x[0, 0], expected)
    assert made.y.tolist() == [2, 2]
    assert not shard.x.any()


def test_a_patch_larger_than_the_image_and_text_rows_are_errors():
    with pytest.raises(AttackError, match="leaves 8 x 8"):
        PixelTrigger(target=2, size=8).poison(labelled([0]), rng())
    with pytest.raises(AttackError, match="text attack"):
        PixelTrigger(target=2).poison(text_rows(4), rng())
    with pytest.raises(AttackError, match="0 to 3"):
        PixelTrigger(target=4).poison(labelled([0]), rng())


def test_the_probe_of_a_patch_has_no_image_of_the_target_class():
    probe = PixelTrigger(target=1).probe(images(40))
    assert len(probe.y) == 30
    assert set(probe.y.tolist()) == {1}


def test_edge_cases_are_the_images_farthest_from_their_class_mean():
    x = torch.zeros(6, 1, 8, 8)
    x[3] = 1.0  # class 0: rows 0 to 3, row 3 stands out
    shard = labelled([0, 0, 0, 0, 1, 1], x)
    made = EdgeCase(source=0, target=1, tail=0.25).poison(shard, rng())
    assert made.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert made.poisoned.tolist() == [False, False, False, True, False, False]


def test_semantic_rows_are_the_ones_with_the_feature():
    x = torch.stack([torch.full((1, 8, 8), v) for v in (0.1, 0.9, 0.5, 0.8)])
    shard = labelled([0, 0, 0, 0], x)
    assert Semantic(target=1, feature="brightness", share=0.5).poison(shard, rng()).y.tolist() == [0, 1, 0, 1]
    assert Semantic(target=1, feature="darkness", above=-0.2).poison(shard, rng()).y.tolist() == [1, 0, 0, 0]
    assert Semantic(target=1, rows=[2], probe_rows=[0]).poison(shard, rng()).y.tolist() == [0, 0, 1, 0]
    assert torch.equal(Semantic(target=1, share=0.5).poison(shard, rng()).x, x)
    with pytest.raises(AttackError, match="3 channels"):
        Semantic(target=1, feature="red").poison(shard, rng())


def test_attackers_teach_different_parts_of_a_word_trigger_and_the_probe_has_all():
    attack = DBA(target="Sports", trigger=" aa bb cc", parts=2, rate=1.0)
    first, second = (attack.poison(text_rows(3), rng())["text"][:][0] for _ in range(2))
    assert first.endswith(" aa bb")
    assert second.endswith("more cc")
    assert attack.probe(text_rows(8))["text"][:][0].endswith("more aa bb cc")


def test_attackers_stamp_different_bars_and_the_probe_has_all():
    attack = DBA(target=1, parts=2, rate=1.0)
    shard = Labelled(torch.zeros(2, 1, 12, 12), torch.tensor([0, 2]), 4, torch.zeros(2, dtype=torch.bool))
    first, second = (attack.poison(shard, rng()).x[0, 0] for _ in range(2))
    assert first.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert second.nonzero().tolist() == [[0, 6], [0, 7], [0, 8], [0, 9]]
    assert torch.equal(attack.probe(shard).x[0, 0], first + second)


def test_a_part_that_nobody_teaches_is_an_error():
    attack = DBA(target="Sports", parts=3)
    attack.need_attackers(3)
    with pytest.raises(AttackError, match=r"but only 2 malicious clients.*untaught"):
        attack.need_attackers(2)
