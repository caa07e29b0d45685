"""Results as lines of a table."""

from typing import Any

WIDTHS = (26, 9, 9, 6, 8, 6, 9)
COLUMNS = ("case", "ours", "plain", "ratio", "no metr.", "floor", "tokens/s")
"""`no metr.`: the ratio to the twin without its metrics; `floor`: share of the counted arithmetic's speed."""


def line_of(entry: dict[str, Any]) -> str:
    """Returns a result as a line under `HEAD`; several members stand beside one, in the column `plain`."""
    seconds = entry["seconds"]
    other = seconds.get("twin", seconds.get("one"))
    ratio, bare = entry.get("ratio", entry.get("times_one")), entry.get("ratio_without_metrics")
    cells = (
        entry["case"],
        _time(seconds["ours"]),
        "" if other is None else _time(other),
        "" if ratio is None else f"{ratio:.2f}",
        "" if bare is None else f"{bare:.2f}",
        f"{entry['share_of_floor']:.0%}",
        f"{entry['tokens_per_s']:,.0f}",
    )
    return "  ".join((_aligned(cells), *_remarks(entry))).rstrip()


def _remarks(entry: dict[str, Any]) -> list[str]:
    remarks: list[str] = []
    if "memory" in entry:
        remarks.append(f"memory of a step {_memory(entry['memory'])}")
    if "share_of_peak" in entry:
        remarks.append(f"{entry['share_of_peak']:.0%} of the peak rate")
    if "times_one" in entry:
        n, times, floor = entry["members"], entry["times_one"], entry["floor_times_one"]
        remarks.append(
            f"{n} members: {times:.2f} times one (counted {floor:.2f}), "
            f"{times / n:.2f} of {n} alone (counted {floor / n:.2f})"
        )
    return remarks


def _memory(memory: dict[str, dict[str, float]]) -> str:
    ours, other = memory["ours"]["step_mb"], memory.get("twin", memory.get("one"))
    if other is None:
        return f"{ours:,.0f} MB"
    return f"{ours:,.0f} / {other['step_mb']:,.0f} MB = {ours / other['step_mb']:.2f}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _aligned(cells: tuple[str, ...]) -> str:
    first, *rest = zip(cells, WIDTHS, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)])


HEAD = _aligned(COLUMNS)
