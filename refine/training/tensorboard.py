"""TensorBoard: scalars, pictures, texts and hparams of a run, with images on the x axis."""

import json
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

SHARES = ("precision", "recall")


class TensorBoard:
    """A `Monitor` that writes the TensorBoard events of one run folder.

    Args:
        path: The run folder.
        resumed_kimg: Where a resumed run goes on: TensorBoard leaves out what an earlier process wrote after it.
    """

    def __init__(self, path: str | Path, resumed_kimg: float | None = None):
        self._path = str(path)
        self._writer = self._opened(resumed_kimg)

    def _opened(self, after_kimg: float | None) -> SummaryWriter:
        purge = None if after_kimg is None else _step(after_kimg) + 1
        suffix = f".{secrets.token_hex(4)}"  # a name that nobody can have put a link at
        return SummaryWriter(self._path, flush_secs=20, purge_step=purge, filename_suffix=suffix)

    def forget_after(self, kimg: float) -> None:
        """The run goes back to `kimg`: TensorBoard leaves out what was written of the time after it."""
        self._writer.close()
        self._writer = self._opened(kimg)

    def begin(self, options: dict[str, Any], leading: Mapping[str, str]) -> None:
        """The layout of the custom scalars, and the options as text and as hparams, in this run itself: `add_hparams`
        would make a second one."""
        self._writer.add_custom_scalars(_layout(leading))
        self._writer.add_text("options", "    " + json.dumps(options, indent=2).replace("\n", "\n    "), 0)
        flat: dict[str, Any] = {}
        for key, value in options.items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{key}.{name}".rstrip("."): _plain(item) for name, item in items if item is not None}
        file_writer = self._writer.file_writer
        assert file_writer is not None, "add_text opened it"
        keys = [*list(leading.values())[:1], *SHARES]
        results = ["Result/hours", *(f"Result/{key}{when}" for key in keys for when in ("", "_before"))]
        for summary in hparams(flat, dict.fromkeys(results)):
            file_writer.add_summary(summary)

    def scalars(self, values: Mapping[str, float], kimg: float) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, _step(kimg))

    def image(self, name: str, image: torch.Tensor, kimg: float) -> None:
        """uint8 (C, H, W)."""
        self._writer.add_image(name, image, _step(kimg))

    def class_histogram(self, counts: list[float], kimg: float) -> None:
        """Share of each class, as one histogram over class numbers and one scalar for the rarest."""
        classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts).mul(1000).round().long())
        self._writer.add_histogram("Classes/histogram", classes, _step(kimg), bins=len(counts))
        self._writer.add_scalar("Classes/rarest_share", min(counts), _step(kimg))

    def outcome(self, numbers: Mapping[str, float]) -> None:
        """As the metrics of the hparams; at step 0, as they are of the run as a whole."""
        for name, value in numbers.items():
            self._writer.add_scalar(f"Result/{name}", value, 0)

    def tick(self, kimg: float) -> None:
        """Everything is written as it comes."""

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _layout(leading: Mapping[str, str]) -> dict[str, dict[str, list[Any]]]:
    """The custom scalars: what people ask of a run, in that order. Tags are regular expressions."""

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", list(tags)]

    metrics = {name: re.escape(f"Metrics/{name}/") for name in leading}
    keys = {name: re.escape(key) for name, key in leading.items()}
    better = {f"{name}: {key}": chart(f"{metrics[name]}{keys[name]}$") for name, key in leading.items()}
    better |= {f"{name}: precision": chart(f"{metric}precision$") for name, metric in metrics.items()}
    cost = {f"{name}: recall": chart(f"{metric}recall$") for name, metric in metrics.items()}
    first = next(iter(leading), None)  # the one that is measured of every average
    averages = (
        {} if first is None else {f"{leading[first]} of each": chart(rf"{metrics[first]}{keys[first]}_([0-9.]+|raw)$")}
    )
    return {
        "Is it better?": better,
        "At what cost?": {
            **cost,
            "spread of the images": chart("Diversity/.*"),
            "hours": chart("Timing/total_hours"),
            "memory in GiB": chart("Resources/.*"),
        },
        "Does the auxiliary network keep up?": {
            "lag": chart("Aux/lag"),
            "its loss": chart("Loss/aux"),
            "distance to the teacher, by noise level": chart("Gap/sigma_.*"),
            "steps left out": chart("Progress/skipped_.*"),
        },
        **({"Which average of the student?": averages} if averages else {}),
    }


def _step(kimg: float) -> int:
    """TensorBoard's steps are images in every run, however short or long: whole numbers that --kimg does not change."""
    return round(kimg * 1000)


def _plain(value: Any) -> bool | str | float | int:
    return value if isinstance(value, bool | str | float | int) else json.dumps(value)
