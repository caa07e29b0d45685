"""One setting that a sweep varies: its values in a grid, and its value at each quantile of its distribution.

Keys, distributions and defaults are those of W&B: https://docs.wandb.ai/guides/sweeps/sweep-config-keys
"""

import bisect
import itertools
import json
import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, NamedTuple

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from e2e_sae.base_config import KIND_KEY, BaseConfig
from e2e_sae.errors import UserError, did_you_mean
from e2e_sae.group import flat_settings

# `int` stands first: `min: 1` stays an integer, which is what tells int_uniform from uniform.
Number = int | float

_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "constant": ({"value"}, set()),
    "categorical": ({"values"}, {"probabilities"}),
    "categorical_w_probabilities": ({"values", "probabilities"}, set()),
    "int_uniform": ({"min", "max"}, set()),
    "uniform": ({"min", "max"}, set()),
    "q_uniform": ({"min", "max"}, {"q"}),
    "log_uniform": ({"min", "max"}, set()),
    "log_uniform_values": ({"min", "max"}, set()),
    "q_log_uniform": ({"min", "max"}, {"q"}),
    "q_log_uniform_values": ({"min", "max"}, {"q"}),
    "inv_log_uniform": ({"min", "max"}, set()),
    "inv_log_uniform_values": ({"min", "max"}, set()),
    "normal": (set(), {"mu", "sigma"}),
    "q_normal": (set(), {"mu", "sigma", "q"}),
    "log_normal": (set(), {"mu", "sigma"}),
    "q_log_normal": (set(), {"mu", "sigma", "q"}),
    "beta": (set(), {"a", "b"}),
    "q_beta": (set(), {"a", "b", "q"}),
}
"""Keys that each distribution needs, and those that it also takes."""


class ParameterConfig(BaseConfig):
    """A parameter as it is written in a sweep file."""

    distribution: str | None = None
    """Null: told by the other keys."""
    value: Any = None
    """The one value."""
    values: list[Any] | None = None
    """The values to choose from."""
    probabilities: list[NonNegativeFloat] | None = None
    """Of each of `values`; null: all alike."""
    min: Number | None = None
    """Lower end; of the exponent for the distributions whose name does not end in `values`."""
    max: Number | None = None
    """Upper end."""
    mu: Number = 0.0
    """Mean of the normal, or of the logarithm."""
    sigma: NonNegativeFloat = 1.0
    """Its standard deviation."""
    a: PositiveFloat = 1.0
    """First shape of the beta distribution."""
    b: PositiveFloat = 1.0
    """Second shape."""
    q: PositiveInt | PositiveFloat = 1.0
    """Values are rounded to multiples of it."""


class Parameter(NamedTuple):
    """A setting that a sweep has a say in."""

    path: tuple[str, ...]
    """Keys that lead to it."""
    config: ParameterConfig
    """What was written, checked, with its distribution."""

    @property
    def name(self) -> str:
        """Dotted."""
        return ".".join(self.path)

    @property
    def distribution(self) -> str:
        """Its name."""
        assert self.config.distribution is not None, "filled in by `read_parameters`"
        return self.config.distribution

    @property
    def is_constant(self) -> bool:
        """Whether it does not vary."""
        return self.distribution == "constant"

    def grid(self) -> list[Any]:
        """Returns its values in a grid, each once.

        Raises:
            UserError: it has no finite list of values.
        """
        c = self.config
        if self.distribution == "constant":
            return [c.value]
        if self.distribution == "categorical" and c.probabilities is None:
            assert c.values is not None
            return list({json.dumps(v, sort_keys=True, default=str): v for v in c.values}.values())
        if self.distribution == "int_uniform":
            return list(range(int(_given(c.min)), int(_given(c.max)) + 1))
        if self.distribution == "q_uniform":
            # As W&B counts: the upper end is left out.
            n = math.ceil((_given(c.max) - _given(c.min)) / c.q - 1e-9)
            return [_plain(_given(c.min) + i * c.q) for i in range(n)]
        raise UserError(
            f"parameter '{self.name}': a grid needs `values`, int_uniform or q_uniform, not {self.distribution}"
            + (" with probabilities" if c.probabilities is not None else "")
        )

    def telling(self, value: Any) -> Any:
        """Returns what tells one of its values from the others: of a mapping, by dotted name, its architecture (if it
        is not that of all) and the entries that not all of that architecture have."""
        if not isinstance(value, Mapping):
            return value
        own = flat_settings(value)
        others = [flat_settings(other) if isinstance(other, Mapping) else {} for other in self.config.values or []]
        alike = [other for other in others if other.get(KIND_KEY) == own.get(KIND_KEY)]

        def is_everywhere(key: str) -> bool:
            return all(key in other and other[key] == own[key] for other in (others if key == KIND_KEY else alike))

        return {key: entry for key, entry in own.items() if not is_everywhere(key)}

    def at(self, u: float) -> Any:
        """Returns its value at quantile u, 0 < u < 1: for uniform u, a draw from its distribution."""
        c, kind = self.config, self.distribution
        if kind == "constant":
            return c.value
        if kind.startswith("categorical"):
            assert c.values is not None
            if c.probabilities is None:
                return c.values[min(int(u * len(c.values)), len(c.values) - 1)]
            steps = list(itertools.accumulate(c.probabilities))
            return c.values[min(bisect.bisect_right(steps, u * steps[-1]), len(c.values) - 1)]
        if kind == "int_uniform":
            low, high = int(_given(c.min)), int(_given(c.max))
            return min(low + int(u * (high - low + 1)), high)
        x = self._continuous(kind.removeprefix("q_"), u)
        if not kind.startswith("q_"):
            return x
        multiple = round(x / c.q)
        return multiple * c.q if isinstance(c.q, int) else _plain(multiple * c.q)

    def _continuous(self, kind: str, u: float) -> float:
        c = self.config
        if kind in ("normal", "log_normal"):
            x = NormalDist(c.mu, c.sigma).inv_cdf(u) if c.sigma > 0 else float(c.mu)
            return math.exp(x) if kind == "log_normal" else x
        if kind == "beta":
            from scipy.special import betaincinv

            return float(betaincinv(c.a, c.b, u))
        low, high = _given(c.min), _given(c.max)
        if kind == "uniform":
            return low + u * (high - low)
        if kind == "log_uniform":
            return math.exp(low + u * (high - low))
        if kind == "inv_log_uniform":  # log(1/x) is uniform from min to max
            return math.exp(-(high - u * (high - low)))
        # log_uniform_values; inv_log_uniform_values, log(1/x) from log(1/max) to log(1/min), is the same
        return low * (high / low) ** u


def read_parameters(given: Any, parents: tuple[str, ...] = ()) -> list[Parameter]:
    """Returns the parameters in nested `parameters`, in W&B's order: by key at each level.

    Raises:
        UserError: one is malformed.
    """
    where = f"parameter '{'.'.join(parents)}'" if parents else "the sweep"
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{where}: `parameters` must map names to parameters (given: {given!r})")
    found: list[Parameter] = []
    for key in sorted(given, key=str):
        if not isinstance(key, str) or not key or "." in key:
            raise UserError(f"{where}: '{key}' is no name of a setting; settings in settings are nested `parameters`")
        path, spec = (*parents, key), given[key]
        if not isinstance(spec, Mapping):
            raise UserError(
                f"parameter '{'.'.join(path)}' must be a mapping such as {{value: {spec!r}}} (given: {spec!r})"
            )
        if "parameters" in spec:
            if len(spec) > 1:
                others = ", ".join(sorted(str(k) for k in spec if k != "parameters"))
                raise UserError(f"parameter '{'.'.join(path)}' has `parameters` and also {others}: drop one of them")
            found += read_parameters(spec["parameters"], path)
        else:
            found.append(Parameter(path, _checked(".".join(path), spec)))
    return found


def _checked(name: str, spec: Mapping[Any, Any]) -> ParameterConfig:
    """Returns one parameter's config with its distribution filled in."""
    try:
        config = ParameterConfig.from_dict({str(key): value for key, value in spec.items()})
    except UserError as error:
        raise UserError(f"parameter '{name}': {str(error).splitlines()[0]}") from None
    given = config.model_fields_set - {"distribution"}
    kind = config.distribution or _told_by_keys(name, config)
    if kind not in _KEYS:
        raise UserError(
            f"parameter '{name}': unknown distribution '{kind}'.{did_you_mean(kind, _KEYS)} Known: {', '.join(_KEYS)}."
        )
    needed, taken = _KEYS[kind]
    if missing := sorted(needed - given):
        raise UserError(f"parameter '{name}': {kind} needs {' and '.join(missing)}")
    if surplus := sorted(given - needed - taken):
        raise UserError(f"parameter '{name}': {kind} takes no {' and no '.join(surplus)}")
    if problem := _problem(kind, config):
        raise UserError(f"parameter '{name}': {problem}")
    return config.model_copy(update={"distribution": kind})


def _told_by_keys(name: str, config: ParameterConfig) -> str:
    given = config.model_fields_set
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical"
    if {"min", "max"} <= given:
        return "int_uniform" if isinstance(config.min, int) and isinstance(config.max, int) else "uniform"
    raise UserError(
        f"parameter '{name}' must have `value`, `values`, `min` and `max`, `distribution` or nested `parameters` "
        f"(given: {', '.join(sorted(given)) or 'nothing'})"
    )


def _problem(kind: str, c: ParameterConfig) -> str | None:
    if "values" in c.model_fields_set and not c.values:
        return "`values` is empty"
    if c.probabilities is not None and c.values is not None:
        if len(c.probabilities) != len(c.values):
            return f"{len(c.probabilities)} probabilities for {len(c.values)} values"
        if abs(sum(c.probabilities) - 1) > 1e-6:
            return f"probabilities sum to {sum(c.probabilities):g}, not 1"
    if c.min is not None and c.max is not None:
        if c.min >= c.max:
            return f"min={c.min} must be less than max={c.max}"
        if kind == "int_uniform" and not (isinstance(c.min, int) and isinstance(c.max, int)):
            return f"int_uniform needs integers (given: min={c.min}, max={c.max})"
        if kind.endswith("_values") and c.min <= 0:
            return f"{kind} needs min > 0 (given: {c.min})"
    return None


def _given(number: Number | None) -> Number:
    assert number is not None, "checked when it was read"
    return number


def _plain(x: float) -> float:
    """Returns 0.3 for 0.1 * 3: multiples without the last bits' noise."""
    return float(f"{x:.12g}")
