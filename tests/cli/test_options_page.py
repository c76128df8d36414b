"""docs/options.md is what the options are."""

from refine.cli.main import _COMMANDS
from refine.cli.options_page import page
from refine.config import OPTIONS
from refine.config.option import flag


def test_the_document_is_made_from_the_options(root):
    made = "python -m refine.cli.options_page > docs/options.md"
    assert (root / "docs/options.md").read_text(encoding="utf-8") == page(), made


def test_every_option_and_every_command_is_there():
    text = page()
    assert all(f"\n| `{flag(name)}`" in text for name in OPTIONS)
    assert all(f"`python -m refine {name}" in text for name in _COMMANDS)
    assert "`--sigma-range`" in text and "| `--resume` |" in text and "| a whole number ≥ 2 | `2000` |" in text
    assert "*Needs --average=ema.*" in text and r"fd5k-\<detector>" in text
