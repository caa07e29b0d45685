"""What a parameter of a sweep file means: its distribution, its grid, its place, and what is wrong with it."""

import math
from collections import Counter
from typing import Any

import pytest
from scipy import stats

from e2e_sae.errors import UserError
from e2e_sae.sweeps.parameters import Parameter, read_parameters

QUANTILES = [0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999]


def parameter(**spec: Any) -> Parameter:
    (found,) = read_parameters({"x": spec})
    return found


@pytest.mark.parametrize(
    ("spec", "distribution"),
    [
        ({"value": None}, "constant"),
        ({"values": [1, "a"]}, "categorical"),
        ({"min": 1, "max": 3}, "int_uniform"),
        ({"min": 1, "max": 3.0}, "uniform"),
        ({"min": "1e-3", "max": 1}, "uniform"),  # PyYAML reads 1e-3 as a string
        ({"values": [1, 2], "probabilities": [0.5, 0.5]}, "categorical"),
    ],
)
def test_the_distribution_is_told_by_the_keys(spec: dict[str, Any], distribution: str) -> None:
    assert parameter(**spec).distribution == distribution


@pytest.mark.parametrize(
    ("spec", "cdf"),
    [
        ({"min": 0.5, "max": 2.5}, lambda x: (x - 0.5) / 2),
        ({"distribution": "log_uniform", "min": -3, "max": 2}, lambda x: (math.log(x) + 3) / 5),
        ({"distribution": "log_uniform_values", "min": 0.1, "max": 1000}, lambda x: (math.log10(x) + 1) / 4),
        # log(1/x) is uniform between min and max, or between log(1/max) and log(1/min).
        ({"distribution": "inv_log_uniform", "min": -3, "max": 2}, lambda x: 1 - (math.log(1 / x) + 3) / 5),
        ({"distribution": "inv_log_uniform_values", "min": 0.1, "max": 10}, lambda x: 1 - (math.log10(1 / x) + 1) / 2),
        ({"distribution": "normal"}, lambda x: stats.norm.cdf(x)),
        ({"distribution": "normal", "mu": 3, "sigma": 2}, lambda x: stats.norm.cdf((x - 3) / 2)),
        ({"distribution": "log_normal", "mu": -1, "sigma": 0.5}, lambda x: stats.norm.cdf((math.log(x) + 1) / 0.5)),
        ({"distribution": "beta", "a": 2, "b": 5}, lambda x: stats.beta.cdf(x, 2, 5)),
    ],
    ids=lambda case: case.get("distribution", "uniform") if isinstance(case, dict) else "",
)
def test_a_continuous_parameter_inverts_its_cumulative_distribution(spec: dict[str, Any], cdf: Any) -> None:
    drawn = parameter(**spec)
    assert [cdf(drawn.at(u)) for u in QUANTILES] == pytest.approx(QUANTILES, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("uniform", {"min": 0.5, "max": 7.5}),
        ("log_uniform", {"min": 0, "max": 3}),
        ("log_uniform_values", {"min": 1, "max": 20}),
        ("normal", {"mu": 5, "sigma": 3}),
        ("log_normal", {"mu": 1}),
        ("beta", {"a": 1, "b": 3}),
    ],
)
@pytest.mark.parametrize("q", [1, 0.1])
def test_a_quantised_parameter_is_the_nearest_multiple_of_the_plain_one(kind: str, more: dict[str, Any], q: Any):
    plain, quantised = parameter(distribution=kind, **more), parameter(distribution=f"q_{kind}", q=q, **more)
    for u in QUANTILES:
        x = quantised.at(u)
        assert abs(x - plain.at(u)) <= q / 2 + 1e-9
        assert abs(x / q - round(x / q)) < 1e-9
        assert isinstance(x, type(q))
        assert len(repr(x)) <= 5, "no noise in the last bits"


def test_integers_and_choices_get_equal_shares_or_their_probabilities() -> None:
    draws = [(n + 0.5) / 1000 for n in range(1000)]
    assert Counter(map(parameter(min=3, max=6).at, draws)) == dict.fromkeys((3, 4, 5, 6), 250)
    assert Counter(map(parameter(values=["a", "b"]).at, draws)) == {"a": 500, "b": 500}
    weighted = parameter(values=["a", "b", "c"], probabilities=[0.1, 0.0, 0.9])
    assert Counter(map(weighted.at, draws)) == {"a": 100, "c": 900}


def test_grids_are_the_values_the_integers_and_the_multiples_below_the_end() -> None:
    assert parameter(value=[1, 2]).grid() == [[1, 2]]
    assert parameter(values=[3, 1, 3, "x"]).grid() == [3, 1, "x"]
    assert parameter(min=2, max=5).grid() == [2, 3, 4, 5]
    assert parameter(distribution="q_uniform", min=0.1, max=0.5, q=0.1).grid() == [0.1, 0.2, 0.3, 0.4]


def test_nested_parameters_are_read_in_the_order_of_their_keys() -> None:
    given = {
        "saes": {"parameters": {"ratio": {"value": 5}}},
        "loss": {"parameters": {"sparsity": {"parameters": {"coeff": {"values": [1]}}}, "kl": {"value": None}}},
        "lr": {"value": 1},
    }
    assert [p.name for p in read_parameters(given)] == ["loss.kl", "loss.sparsity.coeff", "lr", "saes.ratio"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "the sweep: `parameters` must map names to parameters"),
        ({"x": 3}, r"parameter 'x' must be a mapping such as \{value: 3\}"),
        ({"a.b": {"value": 3}}, "'a.b' is no name of a setting; settings in settings are nested `parameters`"),
        ({"x": {"valuse": [1]}}, "parameter 'x': unknown config key 'valuse'. Did you mean .*'values'"),
        ({"x": {}}, "parameter 'x' must have `value`, `values`, .* nested `parameters` .given: nothing."),
        ({"x": {"min": 1}}, "given: min"),
        ({"x": {"values": []}}, "`values` is empty"),
        ({"x": {"value": 1, "values": [1]}}, "constant takes no values"),
        ({"x": {"min": 3, "max": 1}}, "min=3 must be less than max=1"),
        ({"x": {"distribution": "int_uniform", "min": 0.5, "max": 1}}, "int_uniform needs integers"),
        ({"x": {"distribution": "log_uniform_values", "min": 0, "max": 1}}, "needs min > 0"),
        ({"x": {"distribution": "log_uniform"}}, "log_uniform needs max and min"),
        ({"x": {"distribution": "normal", "min": 0}}, "normal takes no min"),
        ({"x": {"distribution": "gauss"}}, "unknown distribution 'gauss'"),
        ({"x": {"values": [1, 2], "probabilities": [1]}}, "1 probabilities for 2 values"),
        ({"x": {"values": [1, 2], "probabilities": [0.5, 0.6]}}, "sum to 1.1, not 1"),
        ({"x": {"parameters": {"y": {"value": 1}}, "value": 2}}, "has `parameters` and also value"),
        ({"x": {"parameters": {"y": {"parameters": 3}}}}, "parameter 'x.y': `parameters` must map"),
    ],
)
def test_a_malformed_parameter_is_told_in_one_line(given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_parameters(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", [{"min": 0.1, "max": 1}, {"distribution": "normal"}, {"values": [1, 2], "probabilities": [0.5, 0.5]}]
)
def test_a_grid_of_something_endless_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="parameter 'x': a grid needs `values`, int_uniform or q_uniform"):
        parameter(**spec).grid()
