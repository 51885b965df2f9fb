"""What repeated draws per image say of a method's uncertainty: coverage, spread, and maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmi_lightning.paths import safe_name
from cmi_lightning.report.charts import label
from cmi_lightning.report.pictures import read_picture
from cmi_lightning.report.verdicts import Results, cell_label, mean_text, number, short

MAPS = 4  # images of an uncertainty map per row


def posterior(known: Results, folder: Path) -> dict[str, Any] | None:
    """Return coverage and uncertainty maps of repeated draws, or None without any."""
    rows: list[dict[str, Any]] = []
    levels: list[str] = []
    for raw in known.raw.get("posterior") or ():
        coverage, expected = raw.get("coverage") or {}, raw.get("expected") or {}
        errors = raw.get("errors") or {}
        levels += [level for level in coverage if level not in levels]
        plain = {"method": str(raw["method"]), "variant": raw.get("variant", "base")}
        cell = known.cell(str(raw["task"]), plain["method"], plain["variant"]) or plain
        rows.append(
            {
                "task": known.task_label(str(raw["task"])),
                "label": cell_label(cell),
                "images": short(raw.get("images")),
                "draws": short(raw.get("draws")),
                "coverage": {n: _percent(v, errors.get(n)) for n, v in coverage.items()},
                "expected": {n: _percent(v) for n, v in expected.items()},
                "spread_skill": _with_error(raw.get("spread_skill"), errors.get("spread_skill")),
                "residual": _with_error(raw.get("residual"), errors.get("residual")),
                "maps": _maps(known, folder, raw.get("folder"), str(raw["task"])),
            }
        )
    if not rows:
        return None
    from cmi_lightning.callbacks.images import WHITE_STD

    expected = {n: t for row in reversed(rows) for n, t in row["expected"].items()}
    return {"rows": rows, "levels": levels, "expected": expected, "white": label(WHITE_STD)}


def _maps(known: Results, folder: Path, draws: Any, task: str) -> list[dict[str, Any]]:
    """Return mean and standard deviation of a few images: the examples', else the first."""
    if not isinstance(draws, str):
        return []
    examples = (known.raw.get("examples") or {}).get(task) or ()
    truths = {str(e.get("id")): e.get("truth") for e in examples}
    root = folder / draws / "std"
    stems = [p.relative_to(root) for p in sorted(root.rglob("*.png"))]
    ids = {i: Path(f"{safe_name(i, '.png')}.png") for i in truths}
    paths = {p: i for i, p in ids.items() if p in stems} | {
        p: p.with_suffix("").as_posix() for p in stems if p not in ids.values()
    }
    maps = []
    for path, name in list(paths.items())[:MAPS]:
        if spread := read_picture(folder, f"{draws}/std/{path.as_posix()}"):
            mean = read_picture(folder, f"{draws}/restored/{path.as_posix()}")
            own = f"{draws}/truth/{path.as_posix()}"
            truth = read_picture(folder, truths.get(name)) or read_picture(folder, own)
            maps.append({"id": name, "truth": truth, "mean": mean, "std": spread})
    return maps


def _percent(value: Any, error: Any = None) -> str:
    """Return "41 %" or "41.2 ± 1.3 %"."""
    finite, se = number(value), number(error)
    if finite is None:
        return "–"
    return f"{100 * finite:.0f} %" if se is None else f"{100 * finite:.1f} ± {100 * se:.1f} %"


def _with_error(value: Any, error: Any) -> str:
    """Return "0.80", or "0.803 ± 0.021" where there is an error."""
    return mean_text({"mean": value, "se": error}, 2 if number(error) is None else 3)
