"""Products of tiles of bfloat16 against exact ones, and what follows from gradients: their norm, and clipping."""

from __future__ import annotations

import copy
import ctypes

import pytest
import torch
from native_marks import needs_tiles
from torch import Tensor, nn

from mmrec.model.ops import dispatch
from mmrec.model.ops.native import gradients, products
from mmrec.model.without_autograd.buffers import Gradients
from mmrec.training.optim import clip_to_norm

SHAPES = [(1, 1, 1), (5, 3, 7), (33, 65, 20), (100, 424, 128), (127, 80, 33), (64, 64, 64), (300, 48, 600)]


def close(found: Tensor, exact: Tensor) -> None:
    """Assert that ``found`` is ``exact``, rounded to bfloat16 once."""
    assert found.isfinite().all()
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-12 * scale)


@needs_tiles
@pytest.mark.parametrize(("places", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("beside", [0, 3], ids=["alone", "part of longer rows"])
def test_tiles_are_multiplied_as_exactly_as_bfloat16_can(places: int, outputs: int, inputs: int, beside: int) -> None:
    def rows(size: int) -> Tensor:
        return torch.randn(places, size + 2 * beside).bfloat16()[:, beside : beside + size]

    weight, x, to_y = torch.randn(outputs, inputs), rows(inputs), rows(outputs)
    y, to_x, to_weight = rows(outputs), rows(inputs), torch.randn(outputs, inputs)
    packed = products.PackedWeight(torch.zeros(outputs, inputs).copy_(weight))
    packed.product(x, y)()
    packed.product_backwards(to_y, to_x)()
    products.weight_gradient(to_y, x, ctypes.c_void_p(to_weight.data_ptr()))()
    rounded = weight.bfloat16().double()
    close(y, x.double() @ rounded.T)
    close(to_x, to_y.double() @ rounded)
    close(to_weight, to_y.double().T @ x.double())


@needs_tiles
def test_products_write_nothing_beside_their_rows_and_follow_the_weight() -> None:
    weight, x = torch.randn(20, 40), torch.randn(70, 40).bfloat16()
    packed, wide = products.PackedWeight(weight), torch.full((72, 24), 7.0).bfloat16()
    product = packed.product(x, wide[:70, 2:22])
    product()
    assert (wide[:, :2] == 7).all()
    assert (wide[:, 22:] == 7).all()
    assert (wide[70:] == 7).all()
    weight.zero_()
    assert wide[:70, 2:22].any()
    packed.pack()
    product()
    assert not wide[:70, 2:22].any()
    with pytest.raises(ValueError, match="rows of 40 numbers in bfloat16"):
        packed.product(x.float(), wide[:70, 2:22])


@pytest.mark.skipif(not dispatch.choose_native(), reason="no C compiler")
def test_the_norm_of_all_gradients_is_that_of_torch() -> None:
    given = [torch.randn(3, 5000), torch.randn(7), torch.zeros(2, 2), 1e-3 * torch.randn(100, 100)]
    assert gradients.takes(given)
    expected = torch.nn.utils.get_total_norm([each.double() for each in given])
    torch.testing.assert_close(dispatch.total_norm(given).double(), expected, rtol=1e-6, atol=0)
    for wrong in (float("nan"), float("inf")):
        given[1][3] = wrong
        assert not dispatch.total_norm(given).isfinite()
    assert not gradients.takes([torch.randn(3, 4).t(), torch.zeros(2)])
    assert not gradients.takes([torch.zeros(2, dtype=torch.float64)])


@pytest.mark.parametrize("limit", [0.5, 5.0, 500.0])
def test_clipping_by_a_known_norm_is_that_of_torch(limit: float) -> None:
    net = nn.Linear(6, 4)
    net(torch.randn(8, 6)).square().sum().backward()
    other = copy.deepcopy(net)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), limit)
    assert clip_to_norm(torch.optim.SGD(net.parameters(), lr=1.0), norm, limit, None)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    assert not clip_to_norm(optimizer, norm, limit, "value")
    assert not clip_to_norm(optimizer, norm, None, "norm")


def test_gradients_that_were_taken_stay_and_are_float32() -> None:
    shapes = [torch.Size(shape) for shape in [(2, 3), (4,), (0, 5), (3, 1)]]
    memory = Gradients(shapes, [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16])
    parts, addresses = list(memory.parts), list(memory.addresses)
    taken = []
    for number in range(3):
        memory.renew()
        for place, (part, address, shape) in enumerate(zip(parts, addresses, shapes, strict=True)):
            assert part.shape == shape
            assert (address.value or 0) == part.data_ptr()
            part.fill_(10 * number + place)
        taken.append(memory.take())
    for number, found in enumerate(taken):
        for place, (gradient, shape) in enumerate(zip(found, shapes, strict=True)):
            assert gradient.shape == shape
            assert gradient.dtype == torch.float32
            assert (gradient == 10 * number + place).all()
