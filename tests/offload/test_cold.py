"""Stand-ins: what tells about them costs nothing, everything else brings the weight, and nothing writes to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penstock.errors import UsageError
from penstock.offload.cold import ColdTensor

CPU = torch.device("cpu")


class Store:
    """Makes stand-ins and counts how often they fetch."""

    def __init__(self) -> None:
        self.fetched = 0

    def cold(self, weight: torch.Tensor, unit: object = None) -> ColdTensor:
        """A stand-in for a weight."""

        def fetch() -> torch.Tensor:
            self.fetched += 1
            return weight

        return ColdTensor.of(weight, CPU, weight.dtype, fetch, unit)


@pytest.fixture
def store() -> Store:
    return Store()


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.arange(12.0).reshape(3, 4), requires_grad=False)


@pytest.mark.parametrize(
    ("describe", "expected"),
    [
        (lambda w: tuple(w.shape), (3, 4)),
        (lambda w: (w.dtype, w.device, w.layout), (torch.float32, CPU, torch.strided)),
        (lambda w: (w.numel(), w.nelement(), w.dim(), w.ndim, len(w)), (12, 12, 2, 2, 3)),
        (lambda w: (w.size(0), w.size(-1), w.element_size(), w.itemsize, w.nbytes), (3, 4, 4, 4, 48)),
        (lambda w: (w.is_floating_point(), w.is_complex(), w.is_quantized), (True, False, False)),
        (lambda w: (w.is_cuda, w.is_cpu, w.is_meta, w.is_sparse, w.is_nested), (False, True, False, False, False)),
        (lambda w: (w.requires_grad, w.grad, w.grad_fn, w.is_leaf), (False, None, None, True)),
        (lambda w: isinstance(w, nn.Parameter), True),
        (lambda w: hash(w) == id(w), True),
        (lambda w: repr(w), "ColdTensor(shape=(3, 4), dtype=torch.float32, device='cpu')"),
        (lambda w: w.requires_grad_(False) is w and not w.requires_grad, True),
        (lambda w: type(w.detach()) is type(w.data) is ColdTensor, True),
    ],
)
def test_describing_fetches_nothing(store: Store, describe: Callable[[Any], Any], expected: Any) -> None:
    assert describe(store.cold(matrix())) == expected
    assert store.fetched == 0


def test_a_buffer_is_no_parameter_and_integers_have_no_nan(store: Store) -> None:
    cold = store.cold(torch.arange(3))
    assert not isinstance(cold, nn.Parameter) and cold.dtype is torch.int64
    assert store.fetched == 0


def test_what_gets_past_the_stand_in_is_nan(store: Store) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.isnan(store.cold(matrix())).all()


@pytest.mark.parametrize(
    "use",
    [
        lambda w: F.linear(torch.ones(2, 4), w),
        lambda w: torch.cat([torch.zeros(1, 4), w]),
        lambda w: torch.ones(2, 4) @ w.t(),
        lambda w: torch.einsum("ij,kj->ik", torch.ones(2, 4), w),
        lambda w: w[1:, ::2],
        lambda w: w.to(torch.float64),
        lambda w: w + 1,
        lambda w: 1 - w,
        lambda w: w == 3,
        lambda w: torch.tensor(w.tolist()),
        lambda w: torch.tensor(w.numpy()),
        lambda w: w.clone(),
        lambda w: torch.tensor([row.sum().item() for row in w]),
        lambda w: torch.zeros(3, 4).copy_(w),
        lambda w: torch.add(torch.zeros(3, 4), other=w),
        lambda w: w.untyped_storage().nbytes(),
    ],
)
def test_every_other_operation_fetches(store: Store, use: Callable[[Any], Any]) -> None:
    expected, found = use(matrix()), use(store.cold(matrix()))
    assert store.fetched > 0
    assert torch.equal(torch.as_tensor(expected), torch.as_tensor(found))
    assert not isinstance(found, ColdTensor)


def _data(w: Any) -> None:
    w.data = torch.zeros(3, 4)


def _item(w: Any) -> None:
    w[0] = 1


def _plus(w: Any) -> None:
    w += 1


@pytest.mark.parametrize(
    "write",
    [
        _data,
        _item,
        _plus,
        lambda w: w.copy_(torch.zeros(3, 4)),
        lambda w: w.add_(1),
        lambda w: w.zero_(),
        lambda w: torch.relu_(w),
        lambda w: nn.init.normal_(w),
        lambda w: nn.init.xavier_uniform_(w),
    ],
)
def test_writing_is_refused(store: Store, write: Callable[[Any], Any]) -> None:
    weight = matrix()
    with pytest.raises(UsageError, match="remove()"):
        write(store.cold(weight))
    assert torch.equal(weight, matrix())


def test_adapters_may_freeze_what_lies_beside_them(store: Store) -> None:
    cold = store.cold(matrix())
    cold.requires_grad = False
    cold.grad = None
    assert store.fetched == 0 and not cold.requires_grad


@pytest.mark.parametrize("weight", [matrix(), torch.arange(4)], ids=["parameter", "buffer"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda w: pickle.loads(pickle.dumps(w))], ids=["deepcopy", "copy", "pickle"]
)
def test_a_copy_is_the_weight(store: Store, weight: torch.Tensor, duplicate: Callable[[Any], Any]) -> None:
    copied = duplicate(store.cold(weight))
    assert type(copied) is type(weight)
    assert torch.equal(copied, weight) and copied.data_ptr() != weight.data_ptr()


def test_inference_mode_makes_and_uses_stand_ins() -> None:
    store, weight = Store(), matrix()
    with torch.inference_mode():
        made_inside = store.cold(weight)
        assert torch.equal(made_inside * 2, matrix() * 2)
    with torch._C.DisableTorchFunctionSubclass():
        assert not made_inside.is_inference()
    assert torch.equal(made_inside * 2, matrix() * 2)


def test_weights_of_two_units_in_one_operation_are_not_mixed_up() -> None:
    place = torch.zeros(4)  # both units have the same place, so that the second fetch ends the first one's stay
    colds = [
        ColdTensor.of(place, CPU, place.dtype, lambda value=value: place.fill_(value), unit=value)
        for value in (1.0, 2.0)
    ]
    assert torch.cat(colds).tolist() == [1.0] * 4 + [2.0] * 4


MODULES = [
    (nn.Linear(4, 3), torch.ones(2, 4)),
    (nn.LayerNorm(4), torch.arange(8.0).reshape(2, 4)),
    (nn.GroupNorm(2, 4), torch.arange(16.0).reshape(1, 4, 4)),
    (nn.Conv2d(2, 3, 3, padding=1), torch.ones(1, 2, 5, 5)),
    (nn.Conv3d(1, 2, 2), torch.ones(1, 1, 3, 3, 3)),
    (nn.Embedding(7, 4), torch.tensor([[1, 6]])),
    (nn.MultiheadAttention(4, 2, batch_first=True), torch.ones(1, 3, 4)),
    (nn.LSTM(4, 3), torch.ones(2, 1, 4)),
    (nn.BatchNorm1d(4).eval(), torch.ones(2, 4)),
]


@pytest.mark.parametrize(("module", "value"), MODULES, ids=[type(module).__name__ for module, _ in MODULES])
def test_modules_with_cold_weights_give_the_same(store: Store, module: nn.Module, value: torch.Tensor) -> None:
    cold = copy.deepcopy(module)
    for inner in cold.modules():
        for table in (inner._parameters, inner._buffers):
            table.update({key: store.cold(weight) for key, weight in table.items() if weight is not None})
    arguments = (value,) * (3 if isinstance(module, nn.MultiheadAttention) else 1)
    with torch.no_grad():
        expected, found = module(*arguments), cold(*arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert store.fetched > 0
