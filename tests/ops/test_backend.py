from __future__ import annotations

import re
import warnings

import pytest
import torch

import fastmask
from fastmask.ops import OPERATORS, _registry
from fastmask.ops._registry import SIMD_LEVELS
from fastmask.testing import cap_simd_level, simd_level, simd_levels
from tests.helpers.inputs import SHAPES, random_logits, random_targets

OPERATOR = OPERATORS["mask_cost"]


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(_registry, "EXTENSION_ERROR", "libfastmask.so was not built")
    monkeypatch.setattr(_registry, "_warned", set())


def test_auto_takes_the_native_kernel_on_the_cpu():
    assert _registry.choose_backend(OPERATOR, "auto", torch.empty(1)) == "native"


def test_auto_takes_the_reference_for_float64():
    assert _registry.choose_backend(OPERATOR, "auto", torch.empty(1, dtype=torch.float64)) == "reference"


def test_auto_takes_the_reference_on_a_device_without_kernels():
    assert _registry.choose_backend(OPERATOR, "auto", torch.empty(1, device="meta")) == "reference"


@pytest.mark.usefixtures("without_extension")
def test_auto_warns_once_without_the_extension(generator):
    logits = random_logits(SHAPES["usual"], generator)
    targets = random_targets(SHAPES["usual"], generator, "segments")
    with pytest.warns(RuntimeWarning, match="was not built"):
        cost = fastmask.mask_cost(*logits, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(fastmask.mask_cost(*logits, targets), cost)
    assert torch.equal(fastmask.mask_cost(*logits, targets, backend="reference"), cost)


@pytest.mark.usefixtures("without_extension")
def test_a_backend_asked_for_by_name_never_falls_back():
    with pytest.raises(RuntimeError, match=r"backend='native' cannot run mask_cost: .*was not built"):
        _registry.choose_backend(OPERATOR, "native", torch.empty(1))


@pytest.mark.parametrize("operator", [x for x in OPERATORS.values() if x.triton], ids=lambda x: x.name)
def test_compiled_triton_kernels_take_no_cpu_tensors(operator, monkeypatch):
    monkeypatch.setattr(_registry, "triton_interpreted", lambda: False)
    message = f"backend='triton' cannot run {operator.name}: Triton kernels run on CUDA tensors, got a cpu tensor"
    with pytest.raises(RuntimeError, match=message):
        _registry.choose_backend(operator, "triton", torch.empty(1))


@pytest.mark.usefixtures("without_extension")
def test_show_config_says_why_the_extension_is_missing(capsys):
    fastmask.show_config()
    text = capsys.readouterr().out
    assert "was not built" in text
    assert re.search(r"^  mask_cost +reference", text, re.MULTILINE)


def test_show_config_says_what_runs(capsys):
    fastmask.show_config()
    text = capsys.readouterr().out
    assert fastmask.__version__ in text
    assert f"SIMD {simd_levels()[-1]}" in text
    assert 'backend="auto" on cpu' in text
    for name in OPERATORS:
        assert name in text
    assert "CUDA tensors" not in text.split('"auto" on cpu:')[1].split('"auto" on cuda:')[0]


def test_simd_levels_are_lowered_and_restored():
    best = simd_levels()[-1]
    with simd_level("portable") as used:
        assert used == "portable"
    with simd_level(SIMD_LEVELS[-1]) as used:
        assert used == best


def test_no_level_above_the_cap_is_used(capsys):
    best = simd_levels()[-1]
    try:
        cap_simd_level("portable")
        assert simd_levels() == ["portable"]
        with simd_level(best) as used:
            assert used == "portable"
        fastmask.show_config()
        assert "SIMD portable" in capsys.readouterr().out
    finally:
        cap_simd_level(best)
    fastmask.show_config()
    assert f"SIMD {best}" in capsys.readouterr().out
