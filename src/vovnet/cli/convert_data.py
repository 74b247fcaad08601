"""`vovnet convert-data`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vovnet.data.convert import convert_dataset


def convert_data(
    data: Path,
    to: str,
    output: Path,
    splits: Sequence[str],
    format: str,
    link: bool,
    as_json: bool,
) -> int:
    """Prints what was written of each split."""
    converted = convert_dataset(data, output, to=to, splits=splits, format=format, link=link)
    if as_json:
        print(json.dumps({"output": str(output), "splits": [asdict(item) for item in converted]}))
        return 0
    for item in converted:
        kept = f", {item.num_extras} with a part in vovnet-extra" if item.num_extras else ""
        print(f"{item.name}: {item.num_images} images, {item.num_objects} objects{kept}")
    print(f"written to {output}")
    return 0
