"""Support and query batches of a wrong kind, structure, shape, dtype or device are refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from adaptrt.errors import DeviceMismatch, InvalidBatch, InvalidType
from tests.bad_input import CE, Case, Forward, attempt, check_refused, data, fresh, mse_net, normal, squares, zeros

HERE = re.escape(__file__)


def transposed(module: Forward, h: Tensor) -> Tensor:
    raise KeyError("the model's own trouble")  # the line to be named: own


CASES: list[Case] = [
    *[
        Case(
            f"support: {name}",
            lambda support=support: attempt(support=support),
            InvalidType,
            rf"support must be a tuple \(inputs, target\).*got {got}",
        )
        for name, support, got in (
            ("a tensor", torch.ones(6, 4), "Tensor"),
            ("a dict", {"x": torch.ones(6, 4)}, "dict"),
            ("three entries", (torch.ones(6, 4),) * 3, "tuple of 3"),
            ("nothing", (), "tuple of 0"),
            ("a number", 3, "int"),
        )
    ],
    Case("support: None", lambda: fresh(lambda unroll: unroll.adapt(None)), InvalidType, r"support must be a tuple.*got NoneType"),
    Case(
        "support: lists of numbers",
        lambda: attempt(support=([[0.0] * 4] * 6, [0] * 6)),
        InvalidType,
        r"support inputs must be a tensor.*got list",
    ),
    Case(
        "support: NumPy inputs",
        lambda: attempt(support=(torch.ones(6, 4).numpy(), zeros(6))),
        InvalidType,
        r"support (inputs|target) is a numpy\.ndarray; pass a tensor",
    ),
    Case(
        "support: NumPy target",
        lambda: attempt(support=(torch.ones(6, 4), zeros(6).numpy())),
        InvalidType,
        r"support (inputs|target) is a numpy\.ndarray; pass a tensor",
    ),
    Case(
        "support: a NumPy array among tensors",
        lambda: attempt(support=((torch.ones(6, 4), torch.ones(6, 4).numpy()), zeros(6))),
        InvalidType,
        r"support .*tensor.*ndarray",
    ),
    Case(
        "support: a sparse tensor",
        lambda: attempt(support=(torch.eye(6, 4).to_sparse(), zeros(6))),
        InvalidType,
        r"support input 0.*(sparse|dense)",
    ),
    Case(
        "query: a tensor",
        lambda: attempt(query=torch.ones(6, 4), call="meta"),
        InvalidType,
        r"query must be a tuple \(inputs, target\).*got Tensor",
    ),
    Case("query: None", lambda: attempt(query=None, call="meta"), InvalidType, r"query must be a tuple \(inputs, target\).*got NoneType"),
    Case(
        "support: wrong rank",
        lambda: attempt(support=data(6, 2, 2, 4)),
        InvalidBatch,
        r"support batch.*float32\[6, 2, 2, 4\].*Check shapes",
    ),
    Case(
        "support: wrong features",
        lambda: attempt(support=data(6, 5)),
        InvalidBatch,
        r"support batch.*6.* 5.*4.* 8.*float32\[6, 5\].*Check shapes",
    ),
    Case(
        "query: wrong rank",
        lambda: attempt(query=data(6, 2, 2, 4), call="meta"),
        InvalidBatch,
        r"query batch.*float32\[6, 2, 2, 4\].*Check shapes",
    ),
    Case(
        "support: float64 for float32",
        lambda: attempt(support=(normal(6, 4).double(), zeros(6))),
        InvalidBatch,
        r"support batch.*float64\[6, 4\].*dtypes",
    ),
    Case(
        "support: integers for floats",
        lambda: attempt(support=(torch.ones(6, 4, dtype=torch.long), zeros(6))),
        InvalidBatch,
        r"support batch.*int64\[6, 4\].*dtypes",
    ),
    Case(
        "support: float labels",
        lambda: attempt(support=(normal(6, 4), torch.zeros(6)), loss=CE),
        InvalidBatch,
        r"support batch.*target: float32\[6\]",
    ),
    Case(
        "query: float64 for float32",
        lambda: attempt(query=(normal(6, 4).double(), zeros(6)), call="meta"),
        InvalidBatch,
        r"query batch.*float64\[6, 4\].*dtypes",
    ),
    Case("support: too few arguments", lambda: attempt(nn.Bilinear(4, 4, 3)), InvalidBatch, r"support batch: TypeError.*input2"),
    Case(
        "support: unknown keyword",
        lambda: attempt(support=({"pixels": torch.ones(6, 4)}, zeros(6))),
        InvalidBatch,
        r"support batch: TypeError.*pixels",
    ),
    Case(
        "support: the model raises",
        lambda: attempt(Forward(transposed)),
        InvalidBatch,
        rf"support batch: KeyError at {HERE}:\d+: raise KeyError.*own trouble",
    ),
    Case(
        "support inputs: another device",
        lambda: attempt(support=(torch.ones(6, 4, device="meta"), zeros(6))),
        DeviceMismatch,
        r"support input 0 is on meta, the model on cpu; call \.to\('cpu'\)",
    ),
    Case(
        "support target: another device",
        lambda: attempt(support=(torch.ones(6, 4), torch.zeros(6, dtype=torch.long, device="meta"))),
        DeviceMismatch,
        r"support target 0 is on meta, the model on cpu",
    ),
    Case(
        "query inputs: another device",
        lambda: attempt(query=(torch.ones(6, 4, device="meta"), zeros(6)), call="meta"),
        DeviceMismatch,
        r"query input 0 is on meta",
    ),
    Case(
        "support: empty",
        lambda: attempt(support=data(0, 4)),
        InvalidBatch,
        r"support input 0 is empty \(float32\[0, 4\]\).*at least one example",
    ),
    Case(
        "support: empty target",
        lambda: attempt(support=(torch.ones(6, 4), zeros(0))),
        InvalidBatch,
        r"support target 0 is empty \(int64\[0\]\)",
    ),
    Case("query: empty", lambda: attempt(query=data(0, 4), call="meta"), InvalidBatch, r"query input 0 is empty \(float32\[0, 4\]\)"),
    Case(
        "support: cross-entropy, fewer targets",
        lambda: attempt(support=(normal(6, 4), zeros(5))),
        InvalidBatch,
        r"support target 0 has 5 rows.*inputs.*6.*one target for each example",
    ),
    Case(
        "support: mean squared error, fewer targets",
        lambda: attempt(mse_net(), support=(normal(6, 4), normal(5, 1))),
        InvalidBatch,
        r"support target 0 has 5 rows.*6",
    ),
    Case(
        "support: mean squared error, other shape",
        lambda: attempt(mse_net(), support=(normal(6, 4), normal(6))),
        InvalidBatch,
        r"output float32\[6, 1\] against target float32\[6\]: the shapes must be equal",
    ),
    Case(
        "support: broadcasting loss, one target",
        lambda: attempt(mse_net(), loss=squares, support=(normal(6, 4), normal(1, 1))),
        InvalidBatch,
        r"support target 0 has 1 rows.*6",
    ),
    Case(
        "support: broadcasting loss, as many targets as features",
        lambda: attempt(mse_net(), loss=squares, support=(normal(6, 4), normal(4))),
        InvalidBatch,
        r"support target 0 has 4 rows.*6",
    ),
    Case(
        "query: broadcasting loss, more targets",
        lambda: attempt(mse_net(), loss=squares, support=(normal(6, 4), normal(6, 1)), query=(normal(6, 4), normal(9)), call="meta"),
        InvalidBatch,
        r"query target 0 has 9 rows.*6",
    ),
    Case(
        "support: two inputs of different length",
        lambda: attempt(nn.Bilinear(4, 4, 3), support=((normal(6, 4), normal(5, 4)), zeros(6))),
        InvalidBatch,
        r"support batch.*float32\[6, 4\], float32\[5, 4\]",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)
