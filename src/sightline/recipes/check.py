"""The pre-flight of a dataset as one function: what `sightline check` does."""

import os
import time
from dataclasses import replace
from pathlib import Path

from sightline.datasets.check import Checked, Progress
from sightline.datasets.check import check as look
from sightline.datasets.findings import ordered
from sightline.errors import UserError
from sightline.schema import require


def check(
    data: str | Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    quick: bool = False,
    model: str | Path | None = None,
    html: str | Path | None = None,
    device: str = "auto",
    progress: Progress = lambda what, done, total: None,
) -> Checked:
    """Looks at every file of a dataset and says what is wrong with it; the data is never changed.

    `data` is what `train` takes. `workers` processes read images (default: one per core); with `quick` only names and
    headers are looked at. With `model`, which is what `load` takes, labels that its features contradict are named, the
    most suspicious first. `html` is the file of a page with pictures of what was found. Raises UserError where there is
    no dataset.
    """
    require(workers is None or workers >= 0, f"workers must not be negative, and is {workers}")
    require(not (quick and model), "suspicious labels are sought in whole images: leave out --quick or --model")
    if html is not None and Path(html).is_dir():
        raise UserError(f"{html} is a folder; --html takes the name of a file")
    began = time.monotonic()
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    checked = look(data, seed=seed, workers=count if workers is None else workers, quick=quick, progress=progress)
    if model is not None:  # imported only here: a check without a model needs no framework
        from sightline.recipes.suspicious import suspicious

        found = suspicious(checked, str(model), device, progress)
        checked = replace(checked, findings=ordered([*checked.findings, *found]))
    checked = replace(checked, seconds=round(time.monotonic() - began, 2))
    if html is not None:
        from sightline.reports.findings import write_page

        write_page(checked, Path(html))
    return checked
