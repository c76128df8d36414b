"""network-snapshot-best.*: copies of the best snapshot's files."""

import filecmp
import shutil
from pathlib import Path

from refine.dnnlib import replaced_atomically
from refine.training.run_dir import RunDir


def copy_best(folder: Path, snapshot: str) -> None:
    """Makes the snapshot of that name the best one."""
    for path in folder.glob(f"{Path(snapshot).stem}.*"):
        with replaced_atomically(path.with_stem("network-snapshot-best")) as temporary:
            shutil.copyfile(path, temporary)


def mend_best(run_dir: RunDir, snapshot: str) -> None:
    """Tells, and makes again, what is no longer a copy of that snapshot: a file that is empty, cut off, or gone."""
    if not run_dir.writes:
        return
    source = run_dir.path / Path(snapshot).name
    copy = run_dir.path / "network-snapshot-best.safetensors"
    if copy.is_file() and source.is_file() and filecmp.cmp(source, copy, shallow=False):
        return
    if source.is_file():
        copy_best(run_dir.path, source.name)
        run_dir.log(f"damaged     {copy.name} was no copy of {source.name}; it is one again")
    elif not copy.is_file() or copy.stat().st_size == 0:
        run_dir.log(f"damaged     {copy.name} is gone or empty, and so is {source.name}: the best snapshot is lost")
