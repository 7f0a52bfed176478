"""Numbers as bytes and back; what is anything else is refused before a tensor is made of it."""

from __future__ import annotations

import dataclasses
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedllm_sec.deploy.replies import Expected, read_reply
from fedllm_sec.deploy.wire import KIND, Packed, Refused, decode, encode
from fedllm_sec.matrix.quantise import bytes_of, dequantise, quantise
from tests.deploy.never import no_unpickling

X = torch.tensor([1.0, -2.5, 0.0, 3e-5, 1e20])
WIRES = ("float32", "bfloat16", "int8")


def test_float32_comes_back_bit_for_bit_and_bfloat16_rounds():
    assert torch.equal(decode(encode(X, "float32")[0], "float32", 5), X)
    assert torch.equal(decode(encode(X, "bfloat16")[0], "bfloat16", 5), X.bfloat16().float())
    assert encode(torch.tensor([1.0, -2.0]), "float32")[0]["flat"].data == bytes.fromhex("0000803f000000c0")


def test_int8_is_off_by_at_most_half_a_step_of_its_block_and_zero_stays_zero():
    codes, scales = quantise(torch.tensor([127.0, -63.5, 0.0, 1.27, 0.5]), 3)
    assert codes.tolist() == [127, -64, 0, 127, 50]
    torch.testing.assert_close(scales, torch.tensor([1.0, 0.01]))
    torch.testing.assert_close(dequantise(codes, scales, 3), torch.tensor([127.0, -64.0, 0.0, 1.27, 0.5]))
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=rng)
    sent, lost = encode(x, "int8")
    back = decode(sent, "int8", 5000)
    assert float((back - x).abs().max()) <= float(x.abs().max()) / 127 / 2 * 1.001
    torch.testing.assert_close(back + lost, x)


def test_what_int8_lost_is_sent_with_the_next_delta_so_that_errors_do_not_add_up():
    x = torch.full((4,), 0.3) * torch.tensor([1.0, 0.01, 0.02, 0.013])
    with_feedback = without = torch.zeros(4)
    residual = None
    for _ in range(50):
        sent, residual = encode(x, "int8", residual)
        with_feedback = with_feedback + decode(sent, "int8", 4)
        without = without + decode(encode(x, "int8")[0], "int8", 4)
    assert float((with_feedback - 50 * x).abs().max()) < 0.3 / 127
    assert float((without - 50 * x).abs().max()) > 5 * 0.3 / 127


def test_bytes_of_a_wire():
    assert [bytes_of(wire, 2048) for wire in WIRES] == [8192, 4096, 2048 + 8]
    for wire in WIRES:
        assert sum(len(a.data) for a in encode(torch.ones(2048), wire)[0].values()) == bytes_of(wire, 2048)


def test_a_diverged_delta_arrives_as_not_finite_and_is_left_to_the_screen_or_refused():
    bad = torch.tensor([1.0, float("nan"), 2.0])
    assert decode(encode(bad, "float32")[0], "float32", 3).isnan().tolist() == [False, True, False]
    with pytest.raises(Refused, match="not finite"):
        decode(encode(bad, "int8")[0], "int8", 3)
    assert encode(bad, "int8")[1] is None  # nothing of it stays for the next round


GOOD = Packed("float32", (5,), X.numpy().tobytes())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": "float64"}, "type 'float64'"),
        ({"dtype": "object"}, "type 'object'"),
        ({"shape": (6,)}, r"shape \(6,\)"),
        ({"shape": (5, 1)}, "shape"),
        ({"shape": (10**15,)}, "shape"),  # 373 GiB announced: nothing is allocated
        ({"data": GOOD.data[:-1]}, "19 bytes, must be 20"),
        ({"data": b""}, "0 bytes"),
        ({"data": GOOD.data * 1000}, "20000 bytes"),
        ({"data": pickle.dumps([1.0] * 5)}, "bytes"),
        ({"kind": "numpy.ndarray"}, "of kind"),
        ({"kind": "cloudpickle"}, "of kind"),
    ],
)
def test_an_array_that_is_not_what_it_must_be_is_refused_in_words(change, why):
    with pytest.raises(Refused, match=why):
        decode({"flat": dataclasses.replace(GOOD, **change)}, "float32", 5)


@pytest.mark.parametrize("names", [[], ["flat", "more"], ["other"], ["flat", *map(str, range(2000))]])
def test_other_names_or_numbers_of_arrays_are_refused(names):
    with pytest.raises(Refused, match="must be"):
        decode(dict.fromkeys(names, GOOD), "float32", 5)


def reply(**changes):
    """The content of a good reply, or with other records."""
    arrays = {"flat": SimpleNamespace(dtype="float32", shape=(5,), stype=KIND, data=X.numpy().tobytes())}
    parts = {
        "arrays": {"delta": arrays},
        "metrics": {"claims": {"num-examples": 10.0, "steps": 3, "loss": 0.5}},
        "configs": {"of": {"client": "c01", "round": 2, "nonce": "n"}},
    }
    parts |= changes
    return SimpleNamespace(
        array_records=parts["arrays"], metric_records=parts["metrics"], config_records=parts["configs"]
    )


def claims(**changes):
    return {"claims": {"num-examples": 10.0, "steps": 3, "loss": 0.5} | changes}


def of(**changes):
    return {"of": {"client": "c01", "round": 2, "nonce": "n"} | changes}


EXPECTED = Expected("c01", 2, "n", 5, 0, "float32")


def test_a_good_reply_is_a_result():
    found = read_reply(reply(), EXPECTED)
    assert (found.id, found.count, found.steps, found.loss) == ("c01", 10.0, 3, 0.5)
    assert torch.equal(found.delta, X)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"metrics": claims(**{"num-examples": 1e308})}, "not between"),
        ({"metrics": claims(**{"num-examples": 2**62})}, "not between"),
        ({"metrics": claims(**{"num-examples": float("nan")})}, "not finite"),
        ({"metrics": claims(**{"num-examples": float("inf")})}, "not finite"),
        ({"metrics": claims(**{"num-examples": -5.0})}, "not between"),
        ({"metrics": claims(**{"num-examples": 0.0})}, "claims 0 examples"),
        ({"metrics": claims(**{"num-examples": [1.0, 2.0]})}, "is a list"),
        ({"metrics": claims(**{"num-examples": True})}, "is a bool"),
        ({"metrics": claims(steps=0)}, "not between"),
        ({"metrics": claims(steps=1.5)}, "1.5 steps"),
        ({"metrics": claims(loss=float("nan"))}, "not finite"),
        ({"metrics": claims(more=1.0)}, "must be"),
        ({"metrics": {"claims": {"steps": 3, "loss": 0.5}}}, "must be"),
        ({"metrics": {}}, "metric records"),
        ({"metrics": {"claims": 3}}, "is a int"),
        ({"configs": of(nonce="old")}, "answers another question"),  # a replay
        ({"configs": of(round=1)}, "must be 2"),
        ({"configs": of(round=True)}, "must be 2"),
        ({"configs": of(client="c00")}, "must be 'c01'"),
        ({"configs": {}}, "config records"),
        ({"arrays": {}}, "array records"),
        ({"arrays": {"delta": {}, "more": {}}}, "array records"),
        ({"arrays": {"delta": {}}}, "arrays"),
    ],
)
def test_a_hostile_reply_is_refused_in_words(change, why):
    with pytest.raises(Refused, match=why):
        read_reply(reply(**change), EXPECTED)


def mutated(rng: random.Random):
    """A good reply with one to four things changed at random, of random types and sizes."""

    def junk():
        return rng.choice(
            [None, True, -1, 2**70, 1e308, float("nan"), float("-inf"), "", "x" * 300, b"", b"\x80\x04N.", [],
             [1.0] * 9, {}, {"flat": 3}, (), (5,), (-5,), object(), np.zeros(3), np.array([None]), KIND, "int8",
             rng.randbytes(rng.randrange(64))]
        )  # fmt: skip

    made = reply()
    for _ in range(rng.randrange(1, 5)):
        records = rng.choice([made.array_records, made.metric_records, made.config_records])
        level = rng.randrange(4)
        inner = records[next(iter(records))] if records else records
        if level == 0 or not isinstance(inner, dict):
            records[rng.choice([*records, "other"])] = junk()
        elif level == 1 and inner:
            del inner[rng.choice(list(inner))]
        elif level == 2:
            inner[rng.choice([*inner, "other", "scales"])] = junk()
        else:
            held = inner.get("flat")
            if isinstance(held, SimpleNamespace):
                setattr(held, rng.choice(["dtype", "shape", "stype", "data"]), junk())
    return made


def fuzzed(count: int, seed: int) -> tuple[int, int]:
    """How many of so many mutated replies are taken and refused; anything but a Refused or a result fails the test."""
    rng, taken, refused = random.Random(seed), 0, 0
    for _ in range(count):
        expected = dataclasses.replace(EXPECTED, wire=rng.choice(WIRES), buffers=rng.choice([0, 0, 2]))
        content = mutated(rng)
        try:
            found = read_reply(content, expected)
        except Refused:
            refused += 1
        else:
            taken += 1
            assert found.delta.shape == (5,)
            assert found.delta.dtype == torch.float32
            assert 0 < found.count <= 1e9
            assert type(found.steps) is int
    return taken, refused


def test_400_mutated_replies_are_results_or_refusals_and_nothing_is_unpickled(monkeypatch):
    no_unpickling(monkeypatch)
    taken, refused = fuzzed(400, 0)
    assert refused > 300
    assert taken + refused == 400


@pytest.mark.slow
def test_10000_mutated_replies_are_results_or_refusals_and_nothing_is_unpickled(monkeypatch):
    no_unpickling(monkeypatch)
    assert sum(fuzzed(10_000, 1)) == 10_000
