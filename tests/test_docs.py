"""README and docs name only what exists: files, headings and options; and they stay short enough to be read."""

import re
from pathlib import Path

import click
import pytest
from PIL import Image

from refine.cli.demo import demo
from refine.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md", *sorted(ROOT.glob("docs/*.md"))]
FOLDERS = ("refine", "torch_utils", "dnnlib", "tests", "docs", "benchmarks", "pretrained")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")

# What is not ours: options of programs that the documents call, of every program, and the name of one in other tools.
FOREIGN = {
    "tensorboard": "--logdir",
    "torchrun": "--standalone --nproc-per-node --nnodes --rdzv-backend --rdzv-id --rdzv-endpoint",
    "sbatch": "--nodes --ntasks-per-node --gpus-per-node --cpus-per-task --time --signal --requeue --open-mode",
    "pip": "--index-url",
    "every": "--x --no-x --help --version",
    "others": "--learning-rate --cfg --gpus",
}

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def files_of_the_repository() -> list[str]:
    """Paths below the root, of the folders that are ours; a checkout may hold others, such as environments."""
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return ["/" + path.relative_to(ROOT).as_posix() for path in [*below, *ROOT.glob("*.*")]]


def options_of(command: click.Command) -> set[str]:
    found = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    if isinstance(command, click.Group):
        with click.Context(command) as context:
            for name in command.list_commands(context):
                found |= options_of(command.get_command(context, name))
    return found


def known_options() -> set[str]:
    scripts = [
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("pretrained/recipes/**/*.py"),
        ROOT / "docs/example_generator.py",
    ]
    known = options_of(cli) | options_of(demo) | set(" ".join(FOREIGN.values()).split())
    for script in scripts:
        known |= set(re.findall(r'["/](--[\w-]+)', script.read_text(encoding="utf-8")))
    return known


def told_of_ours(document: Path) -> str:
    """The text without what is told of other programs, which have files and options of their own."""
    text = document.read_text(encoding="utf-8")
    return re.sub(r"^\|[^|]*(?=\|)", "", text, flags=re.MULTILINE) if document.name == "compared.md" else text


def headings(document: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@documents
def test_links_lead_somewhere(document):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path = (document.parent / target) if target else document
        assert path.exists(), f"{target} does not exist"
        assert not anchor or anchor in headings(path), f"{target} has no heading #{anchor}"


@documents
def test_files_that_are_named_exist(document):
    """Sources may be named by their last part; whatever begins with a folder of ours is a path from the root."""
    text = re.sub(r"\]\([^)]*\)", "]", told_of_ours(document))  # links have a test of their own
    files = files_of_the_repository()
    sources = re.findall(r"(?<![\w./*-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|h|cpp|cu)\b(?!:)", text)
    folders = re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*", text)
    for name in {*sources, *(folder.rstrip("./") for folder in folders)}:
        if name.startswith("my_") or "NAME" in name:  # the reader's own, or any
            continue
        assert any(path.endswith("/" + name) for path in files) or name in FOLDERS, f"{name} does not exist"


@documents
def test_options_that_are_named_exist(document):
    if document.name == "contributing.md":
        pytest.skip("its walks add options that do not exist yet")
    unknown = set(OPTION.findall(told_of_ours(document))) - known_options()
    assert not unknown, f"no command has {', '.join(sorted(unknown))}"


def test_sources_name_documents_that_exist():
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"\bdocs/[\w-]+\.\w+", path.read_text(encoding="utf-8")):
                assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


def test_the_index_lists_every_document():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in index for path in ROOT.glob("docs/*.md") if path.name != "README.md")


def test_the_readme_is_short_and_begins_with_whom_it_is_for():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1000
    assert text.index("It is for you") < text.index("It is not for you") < text.index("|---")


def test_the_film_of_the_readme_moves_for_ever_and_is_small():
    path = ROOT / "docs/demo-film.webp"
    with Image.open(path) as film:
        assert film.n_frames > 10 and film.info["loop"] == 0
    assert path.stat().st_size < 2**20 and f"({path.relative_to(ROOT)})" in (ROOT / "README.md").read_text("utf-8")
