"""`vovnet val`."""

from pathlib import Path

from vovnet.classify import is_classifier
from vovnet.cli.val_classes import val_classes
from vovnet.cli.val_detections import DetectorOptions, val_detections
from vovnet.errors import ConfigError


def val(
    model: str,
    data_dir: Path,
    split: str,
    format: str,
    bootstrap: int,
    device: str,
    threads: int | None,
    as_json: bool,
    engine: str,
    precision: str,
    output: Path | None,
    skip_bad: bool,
    detector: tuple[int | None, str | None, str | None, Path | None],
) -> int:
    """Prints the AP of detectors and the accuracy of classifiers.

    detector are the fields of DetectorOptions.
    """
    if is_classifier(model):
        if any(value is not None for value in detector) or format != "auto":
            raise ConfigError(
                f"{model}: expected none of --max-detections, --format, --metric, --tta and "
                "--html, for it is a classifier; its pictures go to --output FOLDER"
            )
        return val_classes(
            model,
            data_dir,
            split,
            bootstrap=bootstrap,
            engine=engine,
            precision=precision,
            device=device,
            threads=threads,
            output=output,
            skip_bad=skip_bad,
            as_json=as_json,
        )
    if output is not None:
        raise ConfigError(
            f"{model}: expected no --output, for it is no classifier; --html PAGE has its pictures"
        )
    return val_detections(
        model,
        data_dir,
        split,
        DetectorOptions(*detector),
        format=format,
        bootstrap=bootstrap,
        engine=engine,
        precision=precision,
        device=device,
        threads=threads,
        skip_bad=skip_bad,
        as_json=as_json,
    )
