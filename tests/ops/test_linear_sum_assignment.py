"""SciPy's function and ours, called with the same arguments."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.sparse import csr_matrix

import fastmask
from fastmask import linear_sum_assignment
from tests.helpers.assign_problems import FAMILIES, make

SHAPES = [(1, 1), (6, 4), (4, 6), (30, 30), (64, 100), (100, 64)]
# What both take, or refuse in the same words.
ARGUMENTS = {
    "list": ([[4, 1, 3], [2, 0, 5], [3, 2, 2]],),
    "booleans": ([[True, False], [False, True]],),
    "strings of numbers": ([["1", "2"]],),
    "strings": ([["a", "b"]],),
    "half": (np.eye(2, dtype=np.float16),),
    "int64": (np.array([[3, 1], [1, 2]]),),
    "matrix": (np.matrix(np.eye(2)),),
    "Fortran order": (np.asfortranarray(np.arange(6.0).reshape(2, 3) % 4),),
    "negative strides": (np.arange(12.0).reshape(3, 4)[::-1, ::-2],),
    "unaligned": (np.frombuffer(b"x" + np.eye(3).tobytes(), dtype=np.uint8)[1:].view("<f8").reshape(3, 3),),
    "records": (np.array([[(1.0, 2), (0.0, 3)]], dtype=[("cost", "<f8"), ("other", "<i4")])["cost"],),
    "other byte order": (np.eye(2, dtype=">f8"),),
    "no rows": (np.zeros((0, 3)),),
    "no columns": (np.zeros((3, 0)),),
    "nothing": ([[]],),
    "one dimension": ([1, 2, 3],),
    "three dimensions": (np.zeros((2, 2, 2)),),
    "scalar": (5,),
    "none": (None,),
    "ragged": ([[1, 2], [3]],),
    "complex": (np.zeros((2, 2), complex),),
    "objects": (np.array([[1, 2], [3, 4]], object),),
    "dates": (np.array([["2020-01-01"]], "M8[D]"),),
    "long double": (np.ones((2, 2), np.longdouble),),
    "sparse": (csr_matrix(np.eye(3)),),
    "nan": ([[np.nan, 1], [1, 2]],),
    "minus infinity": ([[-np.inf, 1], [1, 2]],),
    "avoidable infinity": ([[np.inf, 1], [1, np.inf]],),
    "infeasible": ([[np.inf, 1], [np.inf, 2]],),
    "maximize": ([[1, 2], [3, 1]], True),
    "maximize with infinity": ([[np.inf, 1]], True),
    "maximize, infeasible": ([[-np.inf]], True),
    "maximize is truthy": ([[1, 2]], "yes"),
    "maximize has no truth": ([[1, 2]], np.array([1, 2])),
}


def outcome(function, *arguments, **keywords):
    try:
        rows, columns = function(*arguments, **keywords)
    except Exception as error:
        return type(error), str(error)
    return rows.tolist(), columns.tolist(), rows.dtype, columns.dtype


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_same_result_or_error_as_scipy(name):
    arguments = ARGUMENTS[name]
    expected = outcome(scipy.optimize.linear_sum_assignment, *arguments)
    assert outcome(linear_sum_assignment, *arguments) == expected


def test_the_same_signature_as_scipy():
    parameters = inspect.signature(linear_sum_assignment).parameters
    assert list(parameters) == ["cost_matrix", "maximize"]
    assert parameters["maximize"].default is False
    assert linear_sum_assignment(cost_matrix=[[1]], maximize=False)[0].tolist() == [0]
    with pytest.raises(TypeError):
        linear_sum_assignment()
    with pytest.raises(TypeError):
        linear_sum_assignment([[1]], unknown=1)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_arrays_and_tensors_reach_the_optimum(family, maximize):
    for seed, shape in enumerate(SHAPES):
        cost = make(family, *shape, seed, np.float64)
        best = cost[scipy.optimize.linear_sum_assignment(cost, maximize)]
        for matrix in (cost, torch.from_numpy(cost)):
            rows, columns = linear_sum_assignment(matrix, maximize)
            assert isinstance(rows, type(matrix))
            rows, columns = np.asarray(rows), np.asarray(columns)
            assert (np.diff(rows) > 0).all()
            assert len(set(columns.tolist())) == len(columns) == min(shape)
            assert cost[rows, columns].sum() == pytest.approx(best.sum(), rel=0, abs=1e-12 * np.abs(best).sum())


def test_a_tensor_is_checked():
    with pytest.raises(ValueError, match="expected a matrix"):
        linear_sum_assignment(torch.zeros(3))
    with pytest.raises(TypeError, match="must be real"):
        linear_sum_assignment(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="matrix contains invalid numeric entries"):
        linear_sum_assignment(torch.tensor([[torch.nan, 1.0]]))
    with pytest.raises(ValueError, match="invalid"):
        linear_sum_assignment(torch.tensor([[torch.inf, 1.0]]), True)
    with pytest.raises(ValueError, match="infeasible"):
        linear_sum_assignment(torch.tensor([[torch.inf], [torch.inf]]))
    rows, columns = linear_sum_assignment(torch.tensor([[4, 1, 3], [2, 0, 5], [3, 2, 2]]))
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 2], [1, 0, 2])
    for shape in ((0, 3), (3, 0)):
        assert [part.tolist() for part in linear_sum_assignment(torch.zeros(shape))] == [[], []]


def test_an_array_is_not_changed():
    cost = np.random.default_rng(0).random((20, 30))
    copy = cost.copy()
    linear_sum_assignment(cost, True)
    assert (cost == copy).all()


def test_too_large_a_matrix_says_so():
    with pytest.raises(ValueError, match="expected a matrix of at most"):
        linear_sum_assignment(np.broadcast_to(0.0, (70000, 70000)))


def test_arrays_touch_no_torch(monkeypatch):
    monkeypatch.setattr(torch.ops.fastmask, "assign", None)
    monkeypatch.setattr(torch, "from_numpy", None)
    assert linear_sum_assignment(np.eye(3))[1].tolist() != [0, 1, 2]


def test_scipy_stands_in_without_the_extension(monkeypatch):
    module = inspect.getmodule(linear_sum_assignment)
    monkeypatch.setattr(module, "_native", None)
    assert fastmask.linear_sum_assignment([[1, 2], [3, 1]], True)[1].tolist() == [1, 0]
