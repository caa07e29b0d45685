"""Which combination comes next."""

import random

from e2e_sae.sweeps.parameters import Parameter, read_parameters
from e2e_sae.sweeps.search import Point, bayes_point, grid_values, random_point


def square() -> list[Parameter]:
    return read_parameters({name: {"min": 0.0, "max": 1.0} for name in ("x", "y")})


def cost(point: Point) -> float:
    """Least at (0.3, 0.7)."""
    return (point[0] - 0.3) ** 2 + (point[1] - 0.7) ** 2


def test_the_last_parameter_of_a_grid_changes_fastest() -> None:
    given = {"b": {"values": ["p", "q"]}, "a": {"parameters": {"x": {"values": [1, 2]}, "y": {"value": 5}}}}
    # As W&B's own `sweeps` package orders them, with the names sorted: a.x, a.y, b.
    assert list(grid_values(read_parameters(given))) == [[1, 5, "p"], [1, 5, "q"], [2, 5, "p"], [2, 5, "q"]]


def test_random_draws_depend_on_their_number_and_name_alone() -> None:
    both, (_, y) = square(), square()
    points = [random_point(both, n) for n in range(200)]
    assert points == [random_point(both, n) for n in range(200)]
    assert [point[1:] for point in points] == [random_point([y], n) for n in range(200)]
    assert len({x for point in points for x in point}) == 400
    # Uniform: the mean of 400 draws is within 4 standard errors (0.0144) of a half.
    assert abs(sum(map(sum, points)) / 400 - 0.5) < 0.058


def test_bayes_gets_closer_to_the_minimum_than_as_many_random_draws() -> None:
    points: list[Point] = []
    for n in range(20):
        points.append(bayes_point(square(), points, [cost(p) for p in points], n))
    best = min(map(cost, points))
    rng = random.Random(0)
    by_chance = sorted(min(cost([rng.random(), rng.random()]) for _ in range(20)) for _ in range(200))
    assert best < by_chance[10], "in the best twentieth of random searches"


def test_bayes_begins_like_random_and_keeps_away_from_what_is_running() -> None:
    assert bayes_point(square(), [], [], 0) == random_point(square(), 0)
    assert bayes_point(square(), [[0.5, 0.5]], [None], 1) == random_point(square(), 1)
    known = [[0.1, 0.1], [0.9, 0.9], [0.9, 0.1], [0.1, 0.9]]
    costs: list[float | None] = [cost(point) for point in known]
    first = bayes_point(square(), known, costs, 4)
    second = bayes_point(square(), [*known, first], [*costs, None], 4)
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 0.05


def test_bayes_with_equal_costs_goes_where_nothing_has_been_tried() -> None:
    x = read_parameters({"x": {"min": 0.0, "max": 1.0}})
    (chosen,) = bayes_point(x, [[0.0], [0.1], [0.2]], [1.0, 1.0, 1.0], 3)
    assert chosen > 0.5
