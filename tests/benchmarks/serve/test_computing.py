"""The model of computing, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nixl_async.benchmarks.kv.models import Model, find_model
from nixl_async.benchmarks.serve.computing import Compute
from nixl_async.errors import ConfigurationError

ONE = Compute(layers=2, hidden=10, parameters=1000.0, weight_nbytes=4000.0, token_nbytes=80, flops=1e6, bandwidth=1e5)
RATES = {"tflops": 400.0, "gb_per_second": 2000.0, "speed": 1.0}


def test_prefill_by_hand() -> None:
    # 3 tokens: 2 * 1000 * 3 = 6000; attention 4 * 2 * 10 * (1 + 2 + 3) = 480.
    assert ONE.prefill_seconds(3, 0) == pytest.approx(6480 / 1e6)
    # Behind 5 cached: each of 3 sees 5 more, 4 * 2 * 10 * (6 + 15) = 1680.
    assert ONE.prefill_seconds(3, 5) == pytest.approx(7680 / 1e6)
    assert ONE.prefill_seconds(0, 5) == 0
    # What is cached and what is not add up to the whole.
    assert ONE.prefill_seconds(5, 0) + ONE.prefill_seconds(3, 5) == pytest.approx(ONE.prefill_seconds(8, 0))


def test_a_step_by_hand() -> None:
    # Weights 4000 bytes and 10 tokens of 80: 4800 / 1e5. Computing 2 * 1000 * 2 / 1e6 is less.
    assert ONE.step_seconds(2, 10) == pytest.approx(0.048)
    # 100 requests: 2 * 1000 * 100 / 1e6 = 0.2, more than (4000 + 800) / 1e5.
    assert ONE.step_seconds(100, 10) == pytest.approx(0.2)


def test_speed_divides_both() -> None:
    fast = replace(ONE, speed=4.0)
    assert fast.prefill_seconds(3, 5) == pytest.approx(ONE.prefill_seconds(3, 5) / 4)
    assert fast.step_seconds(2, 10) == pytest.approx(ONE.step_seconds(2, 10) / 4)


def test_parameters_are_estimated_or_given() -> None:
    model = find_model("llama-3.1-8b")
    found = Compute.of(model, 131072, parameters=0.0, **RATES)
    assert found.parameters == 12 * 32 * 4096**2
    assert found.weight_nbytes == 2 * found.parameters
    assert (found.flops, found.bandwidth) == (4e14, 2e12)
    given = Compute.of(model, 131072, parameters=8.03, **RATES)
    assert given.parameters == pytest.approx(8.03e9)
    assert given.prefill_seconds(1000, 0) == pytest.approx((2 * 8.03e12 + 4 * 32 * 4096 * 500500) / 4e14)


def test_a_model_without_a_hidden_size_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="x.json: there is no 'hidden_size'"):
        Compute.of(Model("x", "x.json", 1, 1, 8, 2), 16, parameters=1.0, **RATES)
