"""The table, CSV and page that are made of a profile."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tests.profiling.made_up import layer, model, profile, result
from vovnet.errors import ConfigError
from vovnet.profiling import plots
from vovnet.profiling.compare import Ratio
from vovnet.profiling.html import to_html
from vovnet.profiling.plots import profile_plots
from vovnet.profiling.records import Accuracy, Profile
from vovnet.profiling.report import figure, plain_console, print_profile, to_csv


def printed(value: Profile) -> str:
    stream = io.StringIO()
    print_profile(value, plain_console(stream))
    return stream.getvalue()


def two_models() -> Profile:
    ratio = Ratio("b", "a", 1.5, 1.4, 1.6, 40, False)
    failed = replace(result(), timings=None, error="out of memory")
    return profile(
        model("a", result(20.0, joules=0.25), failed),
        model("b", result(30.0, joules=None), accuracy=None),
        ratios=(ratio,),
    )


def test_the_table_holds_every_figure() -> None:
    lines = printed(two_models()).splitlines()
    row = next(line for line in lines if line.startswith("a ") and "torch" in line)
    for text in ("mask AP 0.500", "20.0 (19.6-20.4)", "22.0", "24.0", " 40 ", " 50 ", "0.25"):
        assert text in row, text
    assert "100" in row  # 2 GFLOP of an image x 50 images/s
    text = "\n".join(lines)
    assert "b / a: 1.500 (1.400 to 1.600, n = 40; the interval stayed wider" in text
    assert "a, batch 1, 224 x 224, fp32 nhwc: out of memory" in text
    assert "energy unavailable: no meter here" in text
    assert "Test CPU (cpu)" in text
    assert "2026-11-22T00:00:00+00:00" in text
    assert "torch 2.15.0" in text


def test_without_a_terminal_it_is_plain_text_of_one_line_for_a_row() -> None:
    text = printed(two_models())
    assert not re.search(r"[\x1b\u2500-\u257f]", text)
    assert len([line for line in text.splitlines() if line.startswith("b ")]) >= 1


def test_columns_without_a_figure_are_left_out() -> None:
    bare = replace(result(), timings=None, energy=None, error="not timed")
    text = printed(profile(replace(model("a", bare), stages={}, layers=(), cold_start=None)))
    assert "GMACs" in text
    assert "J/image" not in text
    assert "images/s" not in text


def test_csv_has_units_and_one_line_for_a_point() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(two_models()))))
    assert [row["model"] for row in rows] == ["a", "a", "b"]
    assert float(rows[0]["median_ms"]) == 20.0
    assert float(rows[0]["achieved_flops_per_s"]) == pytest.approx(2e9 * 50)
    assert float(rows[0]["energy_per_image_j"]) == 0.25
    assert rows[1]["error"] == "out of memory"
    assert rows[2]["energy_per_image_j"] == ""
    assert {row["hardware"] for row in rows} == {"Test CPU"}


def test_json_is_standard_and_holds_derived_figures() -> None:
    content = json.loads(json.dumps(two_models().to_dict(), allow_nan=False))
    first = content["models"][0]["results"][0]
    assert first["counts"]["flops"] == 2_000_000_000
    assert first["images_per_s"] == 50
    assert content["models"][0]["layers"][0]["of_ceiling"] == pytest.approx(1e9 / 0.015 / 100e9)
    assert content["machine"]["device_name"] == "Test CPU"


class Links(HTMLParser):
    """Everything a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "iframe", "img", "object", "embed", "base"):
            self.found.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith("#"):
                self.found.append(f"{name}={value}")
            if name.startswith("on"):
                self.found.append(name)


def test_the_page_stands_alone() -> None:
    value = two_models()
    page = to_html(value, profile_plots(value))
    links = Links()
    links.feed(page)
    assert links.found == []
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_the_page_holds_plots_figures_and_their_footing() -> None:
    value = two_models()
    drawn = profile_plots(value)
    page = to_html(value, drawn)
    assert [plot.title for plot in drawn if not plot.svg] == []
    for svg in (plot.svg for plot in drawn):
        ElementTree.fromstring(svg)
    assert page.count("<figure><svg") == len(drawn) == 8
    for plot in drawn:
        assert "batch 1, 224 x 224, fp32 nhwc, n = 40" in plot.basis
        assert f"Test CPU, 1 threads; {plot.basis}; 2026-11-22" in page
    assert drawn[-1].basis.endswith("layers: median of 10 passes")
    assert "3 energy windows" in drawn[1].basis
    for text in ("stem.conv", "20.0 (19.6-20.4)", "nuclei test", "100 GFLOP/s fp32", "10.0 GB/s"):
        assert text in page, text


def test_models_differ_in_a_plot_and_an_interval_may_lie_beside_its_figure() -> None:
    value = two_models()
    accuracy = Accuracy(value=0.5, metric="box AP", data="cells", low=0.52, high=0.56)
    models = [replace(value.models[0], name=f"m{n}", accuracy=accuracy) for n in range(40)]
    svg = profile_plots(replace(value, models=tuple(models)))[0].svg
    drawn = re.findall(r'<use xlink:href="#(\w+)"[^>]* style="fill: (#\w+)', svg)
    assert len(set(drawn)) == 40
    assert "<h1>What an image costs: 40 models</h1>" in to_html(
        replace(value, models=tuple(models)), []
    )


def test_a_rate_of_a_thousand_is_written_out() -> None:
    assert [figure(x) for x in (999.9, 1234.0, 0.01234, None)] == ["1000", "1234", "0.0123", "-"]


def test_ids_of_plots_do_not_meet() -> None:
    drawn = profile_plots(two_models())
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', plot.svg)) for plot in drawn]
    assert sum(map(len, clips)) == len(set().union(*clips))


def test_a_plot_without_figures_says_why() -> None:
    value = profile(model("a", result(joules=None), accuracy=None))
    reasons = [plot.reason for plot in profile_plots(value) if not plot.svg]
    assert reasons == ["no model has both a recorded accuracy and this figure"] * 2
    assert "Not drawn: no model has both" in to_html(value, profile_plots(value))


def test_names_cannot_write_into_the_page() -> None:
    value = profile(model("<script>alert(1)</script>"))
    assert "<script" not in to_html(value, profile_plots(value))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(plots.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="install the extra `profile`"):
        profile_plots(two_models())


def test_a_terminal_gets_a_frame() -> None:
    stream = io.StringIO()
    print_profile(two_models(), Console(file=stream, force_terminal=True, width=200))
    assert "─" in stream.getvalue()


HOSTILE = "[red]:smile:$x_{$\x1b[31m[/]"


def hostile() -> Profile:
    failed = replace(result(), timings=None, error="[/bold] $")
    ratio = Ratio(HOSTILE, "[/]", 1.5, 1.4, 1.6, 40, True)
    return profile(model(HOSTILE, result(), failed), model("[/]"), ratios=(ratio,))


def test_names_and_errors_are_printed_as_they_are() -> None:
    text = printed(hostile())
    shown = "[red]:smile:$x_{$\\x1b[31m[/]"
    assert f"ratio  {shown} / [/]: 1.500" in text
    assert any(line.startswith(f"{shown} ") for line in text.splitlines())
    assert f"{shown}: slowest 2 of 2 layers" in text
    assert f"{shown}: mask AP 0.500" in text
    assert "[/bold] $" in text
    assert "\x1b" not in text


def test_a_name_is_no_formula_of_a_plot() -> None:
    value = hostile()
    named = replace(value.models[0], layers=(layer("$x_{$", 1.0),), name="$\\frac$")
    drawn = profile_plots(replace(value, models=(named,)))
    assert any("$\\frac$" in plot.svg for plot in drawn)
    assert any("$x_{$" in plot.svg for plot in drawn)


@pytest.mark.parametrize("first", "=+-@")
def test_a_name_is_no_formula_of_a_spreadsheet(first: str) -> None:
    (row,) = csv.DictReader(io.StringIO(to_csv(profile(model(f"{first}1+1")))))
    assert row["model"] == f"'{first}1+1"
    assert row["layout"] == "nhwc"
