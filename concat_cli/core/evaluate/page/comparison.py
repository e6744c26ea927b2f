"""A comparison as one HTML file: figures, classes, and the images that differ most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from concat_cli.core.evaluate.differences import Difference
from concat_cli.core.evaluate.page.make import Plain, classes_of, filled, image_data
from concat_cli.core.evaluate.report import Report
from concat_cli.core.files import write_text

IMAGES = 6  # of a pair, that are shown

Look = Callable[[str, frozenset[str]], Report]  # a label and names of images -> a report with these


def write_comparison(
    found: Any, path: Path, facts: Sequence[str], look: Look | None = None
) -> None:
    """Writes the page of a `FileComparison` or a `Comparison`.

    facts: what has to be known to read it, a sentence each. look: shows images again, where they
    can be shown; it is asked once for each of the labels.
    """
    labels = [row.label for row in found.rows]
    data: Plain = {
        "title": f"{', '.join(labels[1:]) or labels[0]} against {labels[0]}",
        "facts": list(facts),
        "rows": [asdict(row) for row in found.rows],
        "differences": [asdict(one) for one in found.differences],
    }
    if look is not None and (names := _names(found.differences)):
        data |= _shown({label: look(label, names) for label in labels})
    write_text(path, filled(data))


def _names(differences: Sequence[Difference]) -> frozenset[str]:
    return frozenset(one.image for pair in differences for one in pair.images[:IMAGES])


def _shown(reports: dict[str, Report]) -> Plain:
    """By name of the image: the photo, the truth, and what was found, by label."""
    images: dict[str, Plain] = {}
    vocabulary = None
    for label, report in reports.items():
        assert report.findings is not None, "it was made without `look`"
        vocabulary = report.findings.vocabulary
        for one in report.findings.worst:  # all of them: so many are kept
            plain = image_data(one)
            own = plain.pop("found")
            images.setdefault(one.name, plain | {"found": Plain()})["found"][label] = own
    assert vocabulary is not None
    return classes_of(vocabulary) | {"shown": images}
