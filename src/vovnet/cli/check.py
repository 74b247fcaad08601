"""`vovnet check`."""

import json
from collections.abc import Sequence
from pathlib import Path

from vovnet.data.formats import check_split


def check(data: Path, splits: Sequence[str], format: str, as_json: bool) -> int:
    """Prints every problem of the splits; 3 if there is one."""
    reports = {split: check_split(data, split, format=format) for split in splits}
    if as_json:
        print(json.dumps({split: report.to_json() for split, report in reports.items()}))
    else:
        print("\n".join(report.summary(max_lines=1000) for report in reports.values()))
    return 0 if all(report.is_good for report in reports.values()) else 3
