"""State dicts of StyleGAN-XL and StyleSAN-XL generators, as `torch.save(G.state_dict())` writes them.

A network is a stem, whose layers are those of a StyleGAN3, or stages of super-resolution upon one. Each stage took away
the critically sampled layers of what it was put upon, goes on from the signal of the last layer that was left, and
comes to those of its own resolution. After the stem one number is left out of the layers' names, but neither names nor
shapes tell where a later stage begins and what resolution it was made for: that is looked for, and found where the
filters of the usual schedule are the stored ones.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from refine.checkpoints import registry
from refine.checkpoints.foreign import stylegan3_names as names
from refine.checkpoints.foreign.container import FileNetwork, Members, merged
from refine.checkpoints.foreign.flat import Flat, generators, shape_of
from refine.checkpoints.foreign.stylegan3 import LAYER_OPTIONS, layer_table
from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.pickles.tensors import TensorRef

FAMILY = "a state dict of a StyleGAN-XL"
_TOLD_APART = ("is_torgb", "is_critically_sampled", "use_fp16")  # options of a layer that follow from its place
_MAX_TRIES = 500  # the published network of most layers takes 119


def members(flat: Flat, given: Mapping[str, Any] | None) -> Members | None:
    """The generators of a file's tensors; None = there are none of these names."""
    found: Members = {}
    for name, at in generators(flat, names.ANCHOR).items():
        tensors = flat.under(at)
        if "mapping.embed.weight" in tensors and "mapping.embed.bias" not in tensors:  # a plain table of vectors
            found[name] = ("generator", functools.partial(describe_generator, tensors, given))
    return found or None


def describe_generator(tensors: Mapping[str, TensorRef], given: Mapping[str, Any] | None = None) -> FileNetwork:
    """Arguments, inferred from names, shapes and filters, and tensors of a generator.

    Args:
        tensors: By their names in the generator.
        given: Arguments of the class that are laid over the inferred ones; or, unless the layers are among them, some
            of `stylegan3.schedule` and of `SynthesisLayer`, for all layers.

    Raises:
        Refused: its layers are none that the arguments make, or the arguments are others.
    """
    from refine.networks import stylegan_xl

    given = dict(given or {})
    registry.check_init_kwargs(given)
    tensors = {name: ref for name, ref in tensors.items() if "." in name}  # without counters
    own = inspect.signature(stylegan_xl.Generator).parameters
    of_layers = {name: value for name, value in given.items() if name not in own}
    known = () if "layers" in given else {*names.OF_SCHEDULE, "num_fp16_res", *LAYER_OPTIONS} - {*_TOLD_APART}
    if strange := [name for name in of_layers if name not in known]:
        beside = " whose layers are given" if "layers" in given else ""
        raise Refused(f"a StyleGAN-XL{beside} takes no argument {shown(strange[0])}")
    layers = names.layers_of(tensors)
    kwargs = merged(_sizes(tensors, layers), {name: value for name, value in given.items() if name in own})
    notes: list[str] = []
    names.assume(kwargs, {"conv_clamp": None, **given} if "layers" in given else given, notes)
    conv_clamp = kwargs.pop("conv_clamp", None)
    if "layers" not in given:
        kwargs["layers"] = _layers(layers, {"conv_clamp": conv_clamp, **of_layers}, tensors, given)
    return names.described("stylegan_xl.Generator", kwargs, tensors, notes, given)


def _sizes(tensors: Mapping[str, TensorRef], layers: Sequence[names.Layer]) -> dict[str, Any]:
    w_dim = shape_of(tensors, "synthesis.input.affine.weight", 2)[1]
    z_dim, c_dim = shape_of(tensors, "mapping.fc0.weight", 2)[1], 0
    if "mapping.embed_proj.weight" in tensors:
        z_dim = shape_of(tensors, "mapping.embed_proj.weight", 2)[0]
        c_dim = shape_of(tensors, "mapping.w_avg", 2)[0]  # a mean of w for each class
    mapping: dict[str, Any] = {"embedding": list(shape_of(tensors, "mapping.embed.weight", 2))}
    mapping["num_layers"] = sum(re.fullmatch(r"mapping\.fc\d{1,2}\.weight", name) is not None for name in tensors)
    kwargs = {"z_dim": z_dim, "c_dim": c_dim, "w_dim": w_dim, "mapping_kwargs": mapping}
    kwargs |= {"img_resolution": layers[-1].size, "img_channels": layers[-1].channels}
    return kwargs | {"input_channels": shape_of(tensors, names.ANCHOR, 2)[0]}


def _layers(
    named: Sequence[names.Layer], options: Mapping[str, Any], tensors: Mapping[str, TensorRef], given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The layers as `stylegan_xl.Generator` takes them, one stage after the other.

    Args:
        named: What their names tell.
        options: Arguments of `stylegan3.schedule`, also those of `SynthesisLayer`, that are the same for all stages.
        tensors: Of the file.
        given: What a refusal says that they were made with.
    """
    count, stem = len(named), next((i for i, layer in enumerate(named) if layer.number != i), len(named))
    if [layer.number for layer in named[stem:]] != list(range(stem + 1, count + 1)):
        raise Refused("its layers are not numbered from 0 on, one number left out after those of the stem")
    if stem < count and not names.has_filters(tensors):
        raise Refused("it lacks the filters of its layers, which tell where its stages of super-resolution begin")
    found: list[tuple[str, Any, dict[str, Any]]] = []
    tries = itertools.count(1)
    while len(found) < count:
        for end, resolution in _ends(named, len(found), stem, tensors):
            if next(tries) > _MAX_TRIES:
                raise Refused("its layers could be stages of super-resolution in too many ways")
            part = _stage(named[len(found) : end], end == count, resolution, found[-1:], options, tensors)
            if part is not None:
                found += part
                break
        else:
            raise Refused(names.other_layers(named[min(len(found) + 1, count - 1)].name, given))
    return [layer_table(*layer) for layer in found]


def _ends(
    named: Sequence[names.Layer], start: int, stem: int, tensors: Mapping[str, TensorRef]
) -> Iterator[tuple[int, int]]:
    """Where the stage that begins at a layer may end, the last one first, and what its resolution may be.

    A part of a stage fits wherever the stage does, but no more than the stage: the layer after its last is equal to it.
    A stage of which only one layer is left fits at any resolution; nothing but that layer's `use_fp16` depends on it.
    """
    count, image = len(named), named[-1].size
    if start or stem == count:
        yield count, image
    lower = [size for size in range(4, image // 2 + 1) if image % size == 0]
    for end in range(count - 1, start, -1) if start else [stem]:
        if end < count and (end == stem or _may_repeat(named[end - 1], named[end], tensors)):
            yield from ((end, size) for size in lower)


def _may_repeat(one: names.Layer, two: names.Layer, tensors: Mapping[str, TensorRef]) -> bool:
    """Whether two layers may make the same signal; a circular filter and a separable one cannot be compared."""
    first, second = (tensors.get(f"synthesis.{layer.name}.down_filter") for layer in (one, two))
    if first is None or second is None or first.shape != second.shape or first.span > names.MOST_NUMBERS:
        return one[2:] == two[2:]
    return one[2:] == two[2:] and names.is_filter(second, first.read())


def _stage(
    named: Sequence[names.Layer],
    last: bool,
    resolution: int,
    below: Sequence[tuple[str, Any, Any]],
    options: Mapping[str, Any],
    tensors: Mapping[str, TensorRef],
) -> list[tuple[str, Any, dict[str, Any]]] | None:
    """The layers of a stage, as far as they are left, or None where the file's are others.

    Args:
        named: What their names tell.
        last: Whether all of its layers are left.
        resolution: Of the images that it was made for.
        below: The layer before the first, none before those of the stem.
        options, tensors: As for `_layers`.
    """
    from refine.networks import stylegan3

    made_of = {**names.convolution(tensors, named[0].name), **options}
    for _, signal, _ in below:
        made_of |= {"first_cutoff": signal.cutoff, "first_stopband": signal.cutoff + signal.half_width}
        made_of["first_rate"] = signal.rate
    try:
        made_of["num_layers"] = len(named) - 1 if last else len(named) + made_of.get("num_critical", 2)
        scheduled = stylegan3.schedule(resolution, named[-1].channels, **made_of)[: len(named)]
        layers = [
            (layer.name, signal._replace(channels=layer.channels), made)
            for layer, (_, signal, made) in zip(named, scheduled, strict=True)
        ]
        same = all(signal.size == layer.size for layer, (_, signal, _) in zip(named, layers, strict=True))
        return layers if same and names.fits(layers, (below or layers)[0][1], tensors) else None
    except (TypeError, ValueError, ArithmeticError):
        return None
