"""This file is the last stage: a run folder or a sweep in, one self-contained page out."""

from pathlib import Path

from mergekit_lit.core.files import read_json, write_text
from mergekit_lit.reports.index import load_entries
from mergekit_lit.reports.page import report_page
from mergekit_lit.reports.runs import read_run
from mergekit_lit.reports.sweep_page import sweep_page
from mergekit_lit.stages.folders import SWEEP_FILE, SWEEP_RECORD


def build_report(
    run: Path,
    *,
    out: Path | None = None,
    title: str | None = None,
    where: str | None = None,
    objective: str | None = None,
) -> Path:
    """Write the report of a run folder, or of a whole sweep, and return its path.

    The page holds its own style, script and drawings, and works offline. That of a sweep tells
    what each setting changes and which configurations did best, also while the sweep runs; it
    keeps an index of the records in `records.sqlite`, which can be deleted at any time.

    Args:
        run: folder with records (`*.record.json`), and with `logs/` where there are curves; or the
            folder of a sweep. With `where` or `objective` any folder is read as a sweep.
        out: the page to write; `report.html` in the run folder if not given.
        title: heading of the page; the run folder's name if not given.
        where: which results of a sweep count, such as 'model.lr>=0.01,task=mnist,letters': all of
            these must hold, values after a comma are alternatives; signs are = != < <= > >=.
        objective: what results of a sweep are compared by, such as val_loss; by default
            val_accuracy of experts, accuracy of merges.

    Raises:
        FileNotFoundError: no such folder, or no record in it.
        KeyError: an unknown name in `where` or `objective`.
        ValueError: a record or a log of a run is damaged, or no result is left.
    """
    run = Path(run)
    path = Path(out) if out is not None else run / "report.html"
    name = run.resolve().name
    if where is None and objective is None and not (run / SWEEP_FILE).is_file():
        page = report_page(read_run(run), title=title or f"Run {name}")
    else:
        page = sweep_page(
            load_entries(run),
            title=title or f"Sweep {name}",
            where=where,
            objective=objective,
            file=_text(run / SWEEP_FILE),
            failed=_failed(run / SWEEP_RECORD),
        )
    write_text(path, page)
    return path


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _failed(path: Path) -> dict[str, str]:
    """Return the error of each run that failed, as the record of a sweep that ended tells them."""
    try:
        return dict(read_json(path)["metrics"]["failed"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}  # it goes on, or its record is damaged, which the page tells
