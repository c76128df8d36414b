"""The command line that is made from the fields of RefineConfig."""

import click
import pytest

from refine.cli.config_command import show_preset
from refine.cli.refine_cmd import make_config, refine
from refine.config import OPTIONS, PRESETS, RefineConfig
from refine.config.option import GROUPS, flag


def texts(*args: str) -> dict[str, str | None]:
    return refine.make_context("refine.py", list(args)).params


def test_every_field_is_an_option_under_its_heading():
    page = refine.get_help(click.Context(refine, info_name="refine.py"))
    sections = [page.index(f"\n{group}:\n") for group in GROUPS]
    assert sections == sorted(sections)
    for name, known in OPTIONS.items():
        place = page.index(f"\n  {flag(name)} ")
        assert [group for group, start in zip(GROUPS, sections, strict=True) if start < place][-1] == known.group
    assert "\n  --sigma-range " in page and "\n  --aux-sigma-range " in page and "\n  --resume " in page
    assert "lognormal:-1.2,1.2" in page  # the law of a preset is shown as it is written


@pytest.mark.parametrize(
    ("args", "value"),
    [((), None), (("--compile",), "true"), (("--no-compile",), "false"), (("--compile=true", "--seed=1"), "true"),
     (("--compile", "--seed=1"), "true")],
)  # fmt: skip
def test_booleans(args, value):
    assert texts(*args)["compile"] == value


@pytest.mark.parametrize(
    ("arg", "meant"),
    [
        ("--learning-rate=1", "--lr"),
        ("--cfg=2", "--guidance"),
        ("--batch-size=2", "--batch"),
        ("--aux-lrr=2", "--aux-lr"),
        *((f"--{alias}=1", flag(name)) for name, known in OPTIONS.items() for alias in known.aliases),
    ],
)
def test_near_names_are_suggested(arg, meant):
    with pytest.raises(click.NoSuchOption) as caught:
        texts(arg)
    assert f"'{meant}'" in caught.value.format_message()


@pytest.mark.parametrize(
    ("arg", "why"), [("--gpus=4", "torchrun"), ("--gamma=1", "--adversarial"), ("--mirror=1", "data")]
)
def test_options_that_exist_elsewhere_only_are_answered(arg, why):
    with pytest.raises(click.NoSuchOption) as caught:
        texts(arg)
    assert why in caught.value.format_message()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_as_it_is_shown_is_that_preset(preset):
    lines = [line.partition("  (default: ")[0] for line in show_preset(preset).splitlines()]
    shown = make_config({**texts("--gan=g", "--teacher=t", *lines), "preset": None, "resume": None})
    assert shown == RefineConfig("g", "t", **PRESETS[preset])
    marked = {line.partition("=")[0] for line in show_preset(preset).splitlines() if "(default: " in line}
    assert marked <= {*map(flag, PRESETS[preset]), "--sigma-range"} and bool(marked) == (preset != "default")
