"""`vovnet check`."""

import json
from pathlib import Path

from vovnet.data.check import check_dataset
from vovnet.data.coco import find_split


def check(data: Path, split: str, as_json: bool) -> int:
    """Prints every problem of a split; 3 if there is one."""
    report = check_dataset(*find_split(data, split))
    print(json.dumps(report.to_json()) if as_json else report.summary(max_lines=1000))
    return 0 if report.is_good else 3
