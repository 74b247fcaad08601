import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.class_folders import make_class_folders
from vovnet.classify import Classifier
from vovnet.data.classes import load_classes
from vovnet.errors import ConfigError
from vovnet.model_folder import ModelConfig, save_model_folder
from vovnet.models.zoo import create_model
from vovnet.preprocess import Preprocess
from vovnet.training.distill import (
    TEMPERATURE,
    attend,
    feature_loss,
    fit_head,
    load_teacher,
    logit_loss,
)

CPU = torch.device("cpu")
SMALL = {
    "stem_channels": (8, 8, 16),
    "stage_conv_channels": (8, 8, 8, 8),
    "stage_out_channels": (16, 16, 24, 32),
}
FUNCTION = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    model.pretrained_cfg = {"input_size": (3, 24, 24), "crop_pct": 1.0, "mean": (0, 0, 0),
                            "std": (1, 1, 1), "interpolation": "bilinear"}
    return model


def wrong():
    return 7


def headless():
    return nn.Conv2d(3, 3, 1)


number = 7


def needs(argument):
    return make()


def fails():
    raise RuntimeError("out of luck")


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return self.net(x), x


class Apart(Tuple):
    def forward(self, x):
        return x.mean((2, 3))


class Failing(Tuple):
    def forward(self, x):
        return self.net(x[:, :2])


def bare():
    model = make()
    model.pretrained_cfg = None
    return model


def described(**settings):
    model = make()
    model.pretrained_cfg = settings
    return model


no_crop = lambda: described(crop_pct=0)
one_mean = lambda: described(mean=(0.5,))
nearest = lambda: described(interpolation="nearest")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_classes(make_class_folders(tmp_path_factory.mktemp("data")), "train")


@pytest.fixture
def function_file(tmp_path):
    path = tmp_path / "teachers.py"
    path.write_text(FUNCTION)
    return path


def make_folder(path, class_names):
    torch.manual_seed(0)
    model = create_model("ese_vovnet19b_slim", num_classes=len(class_names), overrides=SMALL)
    preprocess = Preprocess(short_side=36, crop_size=32, max_long_side=None)
    config = ModelConfig(
        architecture="ese_vovnet19b_slim",
        model_args={"num_classes": len(class_names), "overrides": SMALL},
        task="classify",
        class_names=list(class_names),
        category_ids=list(range(len(class_names))),
        preprocess=preprocess.to_dict(),
        licence="none",
    )
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    save_model_folder(path, config, tensors, card="")
    return path


def test_a_teacher_of_the_same_classes_gives_its_logits(data, tmp_path):
    folder = make_folder(tmp_path / "teacher", data.class_names)
    teacher = load_teacher(str(folder), device=CPU)
    lesson = attend(teacher, data, "auto", where="it")
    assert lesson.is_logits
    expected = Classifier.load(folder).logits([data.read(4)])
    assert lesson.values.shape == (len(data), 3)
    assert np.allclose(lesson.values[4], expected[0], atol=1e-5)


def test_a_teacher_of_other_classes_gives_its_features(data, tmp_path):
    folder = make_folder(tmp_path / "teacher", ("cat", "dog"))
    teacher = load_teacher(str(folder), device=CPU)
    lesson = attend(teacher, data, "auto", where="it")
    assert not lesson.is_logits
    expected = Classifier.load(folder).embeddings([data.read(4)])
    assert lesson.values.shape == (len(data), 32)
    assert np.allclose(lesson.values[4], expected[0], atol=1e-5)
    with pytest.raises(ConfigError, match=r"expected features or head, since it has other classes"):
        attend(teacher, data, "logits", where="it")


def test_a_head_is_fitted_to_the_labels(data, function_file):
    teacher = load_teacher(f"{function_file}:make", device=CPU)
    lesson = attend(teacher, data, "head", where="it")
    assert lesson.is_logits
    assert (lesson.values.argmax(1) == data.labels).all()


def test_a_fitted_head_is_the_minimum_of_its_loss():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(60, 4)).astype(np.float32)
    labels = (features[:, 0] + 0.5 * draw.normal(size=60) > 0).astype(np.int64)
    logits = torch.from_numpy(fit_head(features, labels, 2))
    x = torch.from_numpy(features)
    x = torch.cat([(x - x.mean(0)) / x.std(0), torch.ones(60, 1)], 1)
    solution = torch.linalg.lstsq(x, logits).solution.requires_grad_()
    decay = 1e-3 * solution[:-1].square().sum()
    (F.cross_entropy(x @ solution, torch.from_numpy(labels)) + decay).backward()
    assert solution.grad is not None
    assert float(solution.grad.abs().max()) < 1e-3


def test_any_module_of_a_function_can_teach(data, function_file):
    teacher = load_teacher(f"{function_file}:make", device=CPU)
    assert teacher.preprocess.crop_size == 24
    features = attend(teacher, data, "auto", where="it").values
    means = [teacher.preprocess.resize(data.read(i)).mean((0, 1)) / 255 for i in range(len(data))]
    assert np.allclose(features, means, atol=1e-4)


def test_timms_and_torchvisions_architectures_with_a_file(data, tmp_path):
    torchvision = pytest.importorskip("torchvision.models")
    timm = pytest.importorskip("timm")
    nets = {
        "torchvision:squeezenet1_1": None,
        "torchvision:shufflenet_v2_x0_5": torchvision.shufflenet_v2_x0_5(),
        "timm:lcnet_050": timm.create_model("lcnet_050"),
    }
    for name, net in nets.items():
        if net is None:
            continue
        file = tmp_path / f"{name.partition(':')[2]}.safetensors"
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, file)
        lesson = attend(load_teacher(f"{name}@{file}", device=CPU), data, "auto", where="it")
        net.eval()
        last = [part for part in net.modules() if isinstance(part, torch.nn.Linear)][-1]
        assert lesson.values.shape == (len(data), last.in_features)
        assert np.isfinite(lesson.values).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}:wrong", r"expected wrong\(\) to return a torch module, got int"),
        ("{}:none", "expected a function 'none'"),
        ("{}:headless", "expected a classifier with a linear layer, found none"),
        ("{}:number", "teacher .*: expected a function 'number'"),
        ("{}:needs", r"teacher .*: expected needs\(\) to return .*missing 1 required"),
        ("{}:fails", "teacher .*: expected .*RuntimeError: out of luck"),
        ("{}:no_crop", "teacher .*: expected a pretrained_cfg .*ZeroDivisionError"),
        ("{}:one_mean", "teacher .*: expected a pretrained_cfg .*not enough values"),
        ("{}:nearest", "teacher .*: expected a pretrained_cfg .*'nearest'"),
        ("torchvision:ssd300_vgg16", "expected a known model that classifies, .*'ssd300_vgg16'"),
        ("timm:nonet@no.pth", "a file or a model folder, found neither at no.pth"),
        ("no.py:make", "expected a Python file, found none at no.py"),
        ("torchvision:nonet", "torchvision:nonet: expected a known model"),
        ("torchvision:resnet18@no.pth", "a file or a model folder, found neither at no.pth"),
    ],
)
def test_wrong_teachers_are_named(function_file, spec, message):
    with pytest.raises(ConfigError, match=message):
        load_teacher(spec.format(function_file), device=CPU)


def test_a_file_that_is_no_python_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("def make(:")
    with pytest.raises(ConfigError, match=r"teacher .*broken.py to be imported, got SyntaxError"):
        load_teacher(f"{tmp_path / 'broken.py'}:make", device=CPU)


def test_a_function_without_a_description_of_its_pictures_has_imagenets(function_file):
    teacher = load_teacher(f"{function_file}:bare", device=CPU)
    assert (teacher.preprocess.crop_size, teacher.preprocess.short_side) == (224, 256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Tuple", r"expected logits \(B, C\) .* got tuple"),
        ("Apart", r"expected logits \(B, C\) out of its last linear layer"),
        ("Failing", "expected to run on a batch of images, got RuntimeError"),
    ],
)
def test_a_module_that_is_no_classifier_is_named_when_it_runs(data, function_file, name, message):
    teacher = load_teacher(f"{function_file}:{name}", device=CPU)
    with pytest.raises(ConfigError, match=f"teacher .*{name}: {message}"):
        attend(teacher, data, "auto", where="it")


def test_class_names_are_shown_in_one_line(data, tmp_path):
    teacher = Classifier.load(make_folder(tmp_path / "model", ("a\nb", "c")))
    with pytest.raises(ConfigError, match=r"\('a\\nb', 'c', \.\.\.\)"):
        attend(teacher, data, "logits", where="it")


def test_losses_against_their_definitions():
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=draw)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = ((v / TEMPERATURE).exp() for v in (t, s))
        p, q = p / p.sum(), q / q.sum()
        expected += float((p * (p / q).log()).sum()) * TEMPERATURE**2 / 5
    assert float(logit_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(logit_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    cosines = [float(s @ t / s.norm() / t.norm()) for s, t in zip(student, teacher, strict=True)]
    assert float(feature_loss(student, teacher)) == pytest.approx(1 - np.mean(cosines), rel=1e-5)
