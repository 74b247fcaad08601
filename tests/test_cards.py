"""Cards, read back by what reads them: YAML, the hub's own library, Markdown and HTML parsers."""

import json
from html.parser import HTMLParser

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from vovnet.cards import MAX_NAMES, architecture_words, classifier_card
from vovnet.model_folder import ModelConfig
from vovnet.models.zoo import create_model
from vovnet.preprocess import Preprocess

FIGURES = {
    "top1": 0.79312,
    "top1_interval": [0.78, 0.81],
    "top5": 0.94722,
    "ece": 0.0123,
    "num_images": 5000,
}
HOSTILE = [
    "-->",
    "--!>",
    "<!--",
    "---",
    "a\n---\nb",
    "a\r---\r",
    "```",
    "\n```\n# title",
    "<script>alert(1)</script>",
    "`x`",
    'quote " and \\ and \\x3e',
    "line\u2028separator\x85",
    "\x00\x07",
    "고양이",
    ": {} [] & * ! | > % @",
]


def config(**changes: object) -> ModelConfig:
    fields: dict[str, object] = {
        "architecture": "ese_vovnet39b",
        "model_args": {"num_classes": 3},
        "task": "classify",
        "class_names": ["cat", "dog", "고양이"],
        "category_ids": [1, 2, 3],
        "preprocess": Preprocess(
            short_side=256, crop_size=224, max_long_side=None, interpolation="bicubic"
        ).to_dict(),
        "licence": "Apache-2.0",
        "training": {
            "data": "imagenette",
            "minutes": 61.5,
            "steps": 900,
            "hardware": "x86_64 CPU",
            "library": "0.1.0",
        },
        "metrics": {"test": FIGURES},
    }
    return ModelConfig.model_validate(fields | changes)


def card_of(model: ModelConfig, layers: list[str] | None = None) -> str:
    return classifier_card(
        model,
        macs=7_074_193_408,
        parameters=24_568_936,
        file_bytes=98_357_720,
        layers=["Convolution", "One-Shot Aggregation"] if layers is None else layers,
    )


class Comments(HTMLParser):
    """The comments of a page, and whatever else is markup or text after the first of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.comments: list[str] = []
        self.behind = ""
        self.feed(page)
        self.close()

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_data(self, data: str) -> None:
        self.behind += data if self.comments else ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.behind += f"<{tag}>" if self.comments else ""


def index_of(card: str) -> dict[str, object]:
    """timm's block, found as an HTML parser finds it behind the last fence of the Markdown."""
    page = Comments(card[card.rindex("\n<!--\n") :])
    assert len(page.comments) == 1
    assert page.behind.strip() == ""
    return yaml.safe_load(page.comments[0])


def test_the_block_says_what_timms_page_says() -> None:
    (model,) = index_of(card_of(config()))["Models"]
    assert model["Name"] == "ese_vovnet39b"
    assert model["Metadata"] == {
        "FLOPs": 14_148_386_816,
        "FLOPs Unit": "operations for one image, 2 for each multiply-accumulate",
        "Multiply-Accumulates": 7_074_193_408,
        "Parameters": 24_568_936,
        "File Size": 98_357_720,
        "File Size Unit": "bytes",
        "Training Data": ["imagenette"],
        "Architecture": ["Convolution", "One-Shot Aggregation"],
        "Tasks": ["Image Classification"],
        "ID": "ese_vovnet39b",
        "Crop Pct": "0.875",
        "Image Size": "224",
        "Interpolation": "bicubic",
    }
    assert model["Results"][0]["Metrics"] == {
        "Top 1 Accuracy": "79.31%",
        "Top 5 Accuracy": "94.72%",
    }


def test_the_head_is_what_the_hub_reads() -> None:
    data = ModelCard(card_of(config())).data
    assert (data.license, data.library_name) == ("apache-2.0", "vovnet")
    assert data.pipeline_tag == "image-classification"
    assert data.datasets == ["imagenette"]
    assert "vovnet" in data.tags
    results = {result.metric_type: result for result in data.eval_results}
    assert results["accuracy"].metric_value == 0.79312
    assert results["top_5_accuracy"].metric_value == 0.94722
    assert results["accuracy"].dataset_name == "imagenette"
    assert results["accuracy"].dataset_split == "test"
    assert results["accuracy"].task_type == "image-classification"
    assert data.model_name == "ese_vovnet39b"


def test_the_text_says_accuracy_with_interval_cost_data_and_use() -> None:
    card = card_of(config())
    for expected in (
        "top-1 accuracy 0.7931 (95 % interval 0.7800 to 0.8100",
        "on 5000 images of the split `test`",
        "7.074 G multiply-accumulates for an image of 224 x 224 pixels (14.148 GFLOPs)",
        "24.569 M parameters, 98.4 MB",
        "trained on `imagenette` for 61.5 minutes (900 steps) on `x86_64 CPU`",
        "the shorter side becomes 256 pixels (bicubic), then 224 x 224",
        "from vovnet import Classifier",
        "vovnet predict --model",
        '"고양이"',
    ):
        assert expected in card


def test_what_is_not_known_is_left_out() -> None:
    sparse = config(training={}, metrics={}, licence="own terms", preprocess=Preprocess().to_dict())
    card = card_of(sparse)
    data = ModelCard(card).data
    assert (data.license, data.license_name) == ("other", "own terms")
    assert data.datasets is None
    assert data.eval_results is None
    (model,) = index_of(card)["Models"]
    assert not {"Training Data", "Image Size"} & set(model["Metadata"])
    assert "Results" not in model
    assert "accuracy: not measured" in card
    assert "what it was trained on is not recorded" in card


def test_a_split_without_figures_of_a_classifier_is_passed_over() -> None:
    card = card_of(config(metrics={"val": {"top1": None}, "test": FIGURES}))
    assert "split `test`" in card


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_breaks_out_of_its_place(text: str) -> None:
    model = config(
        architecture=text,
        class_names=[text, "dog", "cat"],
        licence=text,
        training={"data": text, "hardware": text, "library": text},
        metrics={text: FIGURES},
    )
    card = card_of(model, layers=[text])
    head, rest = card.removeprefix("---\n").split("\n---\n", 1)
    facts = yaml.safe_load(head)
    assert facts["model-index"][0]["name"] == text
    assert ModelCard(card).text.lstrip("\n") == rest.lstrip("\n")
    (entry,) = index_of(card)["Models"]
    assert entry["Name"] == text
    assert entry["Metadata"]["Training Data"] == [text]
    assert entry["Metadata"]["Architecture"] == [text]
    tokens = MarkdownIt().parse(rest)
    headings = [t.markup for t in tokens if t.type == "heading_open"]
    fences = [t for t in tokens if t.type == "fence"]
    assert headings == ["#", "##", "##"]
    assert [fence.info for fence in fences] == ["python", "sh", "json"]
    assert json.loads(fences[2].content)[0] == text
    blocks = [t for t in tokens if t.type == "html_block"]
    assert len(blocks) == 1
    inline = [child for t in tokens if t.type == "inline" for child in t.children or []]
    assert not [child for child in inline if child.type == "html_inline"]
    assert tokens[-1].type == "html_block"


def test_of_very_many_classes_the_first_are_named() -> None:
    many = [f"class {index}" for index in range(MAX_NAMES + 7)]
    card = card_of(config(class_names=many, category_ids=list(range(len(many)))))
    assert f'"class {MAX_NAMES - 1}"' in card
    assert f'"class {MAX_NAMES}"' not in card
    assert "and 7 more, in config.json" in card


def test_the_words_are_those_of_the_networks_own_modules() -> None:
    network = create_model("ese_vovnet19b_slim_dw", num_classes=2)
    words = architecture_words(type(module).__name__ for module in network.modules())
    assert words == [
        "Batch Normalization",
        "Convolution",
        "Dense Connections",
        "Depthwise Separable Convolution",
        "Dropout",
        "Effective Squeeze-and-Excitation",
        "Max Pooling",
        "One-Shot Aggregation",
        "ReLU",
    ]
