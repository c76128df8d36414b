"""What pyproject.toml cannot say: the README as a package index shows it, where no link leads into a checkout."""

import re
import sys
from pathlib import Path

from setuptools import setup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)]+)\)")  # ![text](target), where the target is relative


def for_an_index(text: str, repository: str | None, version: str) -> str:
    """The links of a README lead to the repository at the version's tag; without a public one, their texts remain.

    Args:
        text: Markdown, with links relative to the repository's root.
        repository: Its address, with files at /blob/TAG and /raw/TAG; None = it has none, and pictures are left out.
        version: Of the package; its tag is v and the version.
    """

    def replaced(match: re.Match) -> str:
        picture, label, target = match.groups()
        if repository is None:
            return "" if picture else label
        kind = "raw" if picture else "blob"
        return f"{picture}[{label}]({repository.rstrip('/')}/{kind}/v{version}/{target})"

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(replaced, text))


if __name__ == "__main__":
    here = Path(__file__).parent
    project = tomllib.loads((here / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (here / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=for_an_index(readme, project["urls"].get("Repository"), project["version"]),
        long_description_content_type="text/markdown",
    )
