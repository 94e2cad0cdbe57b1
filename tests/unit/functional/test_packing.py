import pytest
import torch

from martlet.functional.quantize.packing import pack, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_codes_come_back_from_as_few_bytes_as_hold_them(bits, columns):
    codes = torch.randint(2**bits, (5, columns)).to(torch.uint8)
    packed = pack(codes, bits)
    assert (packed.shape, packed.dtype) == ((5, -(-columns * bits // 8)), torch.uint8)
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_low_bits_come_first():
    assert pack(torch.tensor([[0x1, 0x2, 0xF]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    # 3 bits: 1, 2, 7 -> 001, 010, 111 from the right: 1 11 010 001 and one more bit
    assert pack(torch.tensor([[1, 2, 7]], dtype=torch.uint8), 3).tolist() == [[0b11010001, 0b1]]
