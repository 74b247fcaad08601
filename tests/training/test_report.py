"""The picture of a training's curves."""

from itertools import combinations

import pytest
from matplotlib.figure import Figure

from vovnet.training.report import curves_of, draw_curves


def records(metrics: dict, *, losses: tuple[str, ...] = ("loss_class", "loss_box")) -> list[dict]:
    """Two steps and an evaluation after each."""
    found = []
    for step in (50_000, 100_000):
        values = dict.fromkeys(losses, 1e-4 * step)
        found.append({"kind": "train", "step": step, "losses": values, "learning_rate": 1.25e-5})
        found.append({"kind": "eval", "step": step, "metrics": metrics})
    return found


def test_every_figure_has_its_curve() -> None:
    metrics = {"box": {"ap": 0.2, "ap50": 0.5}, "mask": {"ap": None}, "num_images": 7}
    assert curves_of(records(metrics)) == {
        "losses": {name: [(50_000, 5.0), (100_000, 10.0)] for name in ("loss_class", "loss_box")},
        "learning rate": {"learning rate": [(50_000, 1.25e-5), (100_000, 1.25e-5)]},
        "validation": {
            "box AP": [(50_000, 0.2), (100_000, 0.2)],
            "box AP50": [(50_000, 0.5), (100_000, 0.5)],
        },
    }


def test_a_pretraining_shows_whether_it_collapses() -> None:
    found = curves_of(records({"feature_std": 0.3, "feature_rank": 12.0, "matched": 0.9}))
    assert list(found) == [
        "losses",
        "learning rate",
        "validation",
        "spread of the features",
        "directions of the features",
    ]
    assert found["spread of the features"] == {"feature_std": [(50_000, 0.3), (100_000, 0.3)]}
    assert found["directions of the features"] == {
        "feature_rank": [(50_000, 12.0), (100_000, 12.0)]
    }
    assert found["validation"] == {"matched": [(50_000, 0.9), (100_000, 0.9)]}


@pytest.mark.parametrize(
    "drawn", [[], records({"feature_std": 1e-6, "feature_rank": 1.0}), records({"top1": 0.1})]
)
def test_nothing_in_the_picture_overlaps(drawn, monkeypatch, tmp_path) -> None:
    figures = []
    save = Figure.savefig

    def note(self, *arguments, **options):
        figures.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    draw_curves(tmp_path / "curves.png", drawn)
    (figure,) = figures
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert len(boxes) >= 3
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
