"""One signed byte a value and a scale a block."""

import pytest
import torch

from fedllm_sec.errors import FedError
from fedllm_sec.matrix.quantise import dequantise, quantise


def test_codes_and_scales_of_five_values_in_blocks_of_two_are_worked_by_hand():
    codes, scales = quantise(torch.tensor([1.27, -0.64, 0.0, 0.0, -254.0]), 2)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [127, -64, 0, 0, -127]
    assert scales.dtype == torch.float32
    assert scales.tolist() == pytest.approx([0.01, 0.0, 2.0])
    assert dequantise(codes, scales, 2).tolist() == pytest.approx([1.27, -0.64, 0.0, 0.0, -254.0])


def test_no_value_moves_by_more_than_half_its_blocks_scale():
    flat = torch.randn(1001, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 1001)
    codes, scales = quantise(flat, 64)
    moved = (dequantise(codes, scales, 64).double() - flat.double()).abs()
    assert bool((moved <= scales.double().repeat_interleave(64)[:1001] * 0.5001).all())


def test_one_huge_value_spoils_its_own_block_alone():
    flat = torch.tensor([1e8, 0.5, 0.5, -0.5])
    assert dequantise(*quantise(flat, 2), 2).tolist() == pytest.approx([1e8, 0.0, 0.5, -0.5])


def test_what_was_quantised_once_is_quantised_alike_again():
    codes, scales = quantise(torch.randn(100, generator=torch.Generator().manual_seed(1)), 32)
    again, same = quantise(dequantise(codes, scales, 32), 32)
    assert torch.equal(again, codes)
    assert torch.allclose(same, scales)


def test_an_empty_vector_and_a_block_longer_than_the_vector_are_fine():
    assert dequantise(*quantise(torch.zeros(0), 4), 4).shape == (0,)
    assert dequantise(*quantise(torch.tensor([2.0, 1.0]), 256), 256).tolist() == pytest.approx([2.0, 1.0], rel=0.01)


@pytest.mark.parametrize(
    ("flat", "block"), [(torch.zeros(2, 2), 4), (torch.zeros(4), 0), (torch.tensor([1.0, torch.nan]), 4)]
)
def test_what_cannot_be_quantised_is_refused(flat, block):
    with pytest.raises(FedError, match="quantise: "):
        quantise(flat, block)


def test_scales_that_do_not_go_with_the_codes_are_refused():
    with pytest.raises(FedError, match=r"blocks of 2 do not go with scales of shape \(1,\)"):
        dequantise(torch.zeros(4, dtype=torch.int8), torch.ones(1), 2)
