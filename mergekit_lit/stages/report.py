"""This file is the last stage: a run folder in, one self-contained page out."""

from pathlib import Path

from mergekit_lit.core.files import write_text
from mergekit_lit.reports.page import report_page
from mergekit_lit.reports.runs import read_run


def build_report(run: Path, *, out: Path | None = None, title: str | None = None) -> Path:
    """Write the report of a run folder and return its path.

    The page holds its own style, script and drawings, and works offline.

    Args:
        run: folder with records (`*.record.json`), and with `logs/` where there are curves.
        out: the page to write; `report.html` in the run folder if not given.
        title: heading of the page; the run folder's name if not given.

    Raises:
        FileNotFoundError: no such folder, or no record in it.
        ValueError: a record or a log is damaged.
    """
    run = Path(run)
    found = read_run(run)
    path = Path(out) if out is not None else run / "report.html"
    write_text(path, report_page(found, title=title or f"Run {run.resolve().name}"))
    return path
