"""Writes size and SHA-256 of every shipped file into pretrained/index.toml.

    python pretrained/recipes/update_index.py

Comments and everything else in the index stay as they are. With `--check` nothing is written; the exit code says
whether the index is right.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[2]))

from refine import dnnlib


def updated(text: str, folder: Path) -> tuple[str, list[Path]]:
    """The index with the sizes and checksums of the files in `folder`, and the files that are missing there.

    Raises:
        ValueError: an entry lacks its line for file, bytes or sha256.
    """
    first, *tables = re.split(r"(?m)^(?=\[)", text)
    missing = []
    for i, table in enumerate(tables):
        title = table.splitlines()[0]
        match = re.search(r'(?m)^file = "([^"/]+)"$', table)
        if match is None:
            raise ValueError(f"{title} has no line for file")
        path = folder / match[1]
        if not path.is_file():
            missing.append(path)
            continue
        table, sizes = re.subn(r"(?m)^bytes = .*$", f"bytes = {path.stat().st_size}", table)
        table, sums = re.subn(r"(?m)^sha256 = .*$", f'sha256 = "{dnnlib.sha256_of_file(path)}"', table)
        if (sizes, sums) != (1, 1):
            raise ValueError(f"{title} needs one line each for bytes and sha256")
        tables[i] = table
    return first + "".join(tables), missing


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 where the index is out of date.")
@click.option("--folder", default=str(Path(__file__).parents[1]), help="Where index.toml and the files are.")
def main(check: bool, folder: str) -> None:
    index = Path(folder) / "index.toml"
    old = index.read_text(encoding="utf-8")
    try:
        new, missing = updated(old, Path(folder))
    except ValueError as error:
        raise click.ClickException(f"{index}: {error}") from None
    if check and new != old:
        raise click.ClickException(f"{index} is out of date; python pretrained/recipes/update_index.py corrects it")
    if new != old:
        with dnnlib.replaced_atomically(index) as temporary:
            temporary.write_text(new, encoding="utf-8")
    click.echo(f"{index}: {'up to date' if new == old else 'written'}")
    if missing:
        raise click.ClickException(f"missing: {', '.join(map(str, missing))}")


if __name__ == "__main__":
    main()
