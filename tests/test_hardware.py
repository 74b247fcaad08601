"""What the machine says of itself."""

from pathlib import Path

import numpy as np

from vovnet.hardware import package_version, processor_name


def test_the_processors_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags : a\n")
    assert processor_name(cpuinfo) == "Some CPU @ 2 GHz"
    assert processor_name(tmp_path / "none") != ""


def test_the_version_of_a_package() -> None:
    assert package_version("numpy") == np.__version__
    assert package_version("no-such-package") is None
