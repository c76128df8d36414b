"""TensorBoard: scalars, pictures, texts and hparams of a run, with kimg on the x axis."""

import json
import math
import secrets
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


class Monitor:
    """Writes the TensorBoard events of one run folder.

    Args:
        path: The run folder.
        total_kimg: Length of the run. TensorBoard counts in whole steps: they are kimg, or single images in runs of
            less than 50 kimg, which would be a handful of points otherwise.
        resumed_kimg: Where a resumed run goes on: TensorBoard leaves out what an earlier process wrote after it.
        writes: False: nothing at all, in every process of a run but one.
    """

    def __init__(
        self,
        path: str | Path,
        total_kimg: float = math.inf,
        resumed_kimg: float | None = None,
        writes: bool = True,
    ):
        self._images_per_step = 1000 if total_kimg >= 50 else 1
        purge = None if resumed_kimg is None else self._step(resumed_kimg) + 1
        suffix = f".{secrets.token_hex(4)}"  # a name that nobody can have put a link at
        self._writer = (
            SummaryWriter(str(path), flush_secs=20, purge_step=purge, filename_suffix=suffix) if writes else None
        )

    def options(self, options: dict[str, Any]) -> None:
        """The options as text and as hparams, in this run itself: `add_hparams` would make a second one."""
        if self._writer is None:
            return
        self._writer.add_text("options", "    " + json.dumps(options, indent=2).replace("\n", "\n    "), 0)
        flat: dict[str, Any] = {}
        for key, value in options.items():
            items = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{key}.{name}".rstrip("."): _plain(item) for name, item in items if item is not None}
        file_writer = self._writer.file_writer
        assert file_writer is not None, "add_text opened it"
        for summary in hparams(flat, {"Loss/aux": None}):
            file_writer.add_summary(summary)

    def scalars(self, values: dict[str, float], kimg: float) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, self._step(kimg))

    def image(self, name: str, image: torch.Tensor, kimg: float) -> None:
        """uint8 (C, H, W)."""
        if self._writer is not None:
            self._writer.add_image(name, image, self._step(kimg))

    def class_histogram(self, counts: list[float], kimg: float) -> None:
        """Share of each class, as one histogram over class numbers and one scalar for the rarest."""
        if self._writer is None:
            return
        classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts).mul(1000).round().long())
        self._writer.add_histogram("Classes/histogram", classes, self._step(kimg), bins=len(counts))
        self._writer.add_scalar("Classes/rarest_share", min(counts), self._step(kimg))

    def _step(self, kimg: float) -> int:
        return round(kimg * 1000 / self._images_per_step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _plain(value: Any) -> bool | str | float | int:
    return value if isinstance(value, bool | str | float | int) else json.dumps(value)
