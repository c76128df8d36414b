"""Legacy TensorFlow pickles of StyleGAN2 and StyleGAN2-ADA, read without TensorFlow: tuples (G, D, Gs).

The variables become our tensors by transposing and reversing views of the file's arrays; only the biases of the
modulation (stored without their 1) need arithmetic. Where NVIDIA's own converter is known to be wrong, the numbers here
are those of TensorFlow: `resample_kernel=None` is a box filter, labels are embedded to the size of z, and the original
StyleGAN2 takes the minibatch standard deviation over groups of 4.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from refine.checkpoints.foreign.container import FileNetwork, Members, plain
from refine.checkpoints.pickles.inert import Buildable, Refused, Stub, shown
from refine.checkpoints.pickles.machine import COMMON_RULES
from refine.checkpoints.pickles.tensors import NUMPY_RULES, Array, TensorRef

ORIGINAL, ADA = 4, 5  # versions of their networks

_MAX_COMPONENTS, _MAX_VARIABLES = 8, 5000

# Their keyword arguments: name -> (ours, default). Where a default is None, ours decides by other means.
_GENERATOR = {
    "latent_size": ("z_dim", 512),
    "label_size": ("c_dim", 0),
    "dlatent_size": ("w_dim", 512),
    "resolution": ("img_resolution", 1024),
    "num_channels": ("img_channels", 3),
    "mapping_layers": ("mapping.num_layers", 8),
    "label_fmaps": ("mapping.embed_features", None),
    "mapping_fmaps": ("mapping.layer_features", None),
    "mapping_nonlinearity": ("mapping.activation", "lrelu"),
    "mapping_lrmul": ("mapping.lr_multiplier", 0.01),
    "w_avg_beta": ("mapping.w_avg_beta", 0.995),
    "fmap_base": ("synthesis.channel_base", 16384),
    "fmap_max": ("synthesis.channel_max", 512),
    "num_fp16_res": ("synthesis.num_fp16_res", 0),
    "conv_clamp": ("synthesis.conv_clamp", None),
    "architecture": ("synthesis.architecture", "skip"),
    "resample_kernel": ("synthesis.resample_filter", [1, 3, 3, 1]),
    "use_noise": ("synthesis.use_noise", True),
    "nonlinearity": ("synthesis.activation", "lrelu"),
}
_DISCRIMINATOR = {
    "label_size": ("c_dim", 0),
    "resolution": ("img_resolution", 1024),
    "num_channels": ("img_channels", 3),
    "architecture": ("architecture", "resnet"),
    "fmap_base": ("channel_base", 16384),
    "fmap_max": ("channel_max", 512),
    "num_fp16_res": ("num_fp16_res", 0),
    "conv_clamp": ("conv_clamp", None),
    "mapping_fmaps": ("cmap_dim", None),
    "nonlinearity": ("block.activation", "lrelu"),
    "resample_kernel": ("block.resample_filter", [1, 3, 3, 1]),
    "freeze_layers": ("block.freeze_layers", 0),
    "mapping_layers": ("mapping.num_layers", 0),
    "mapping_lrmul": ("mapping.lr_multiplier", 0.1),
    "mbstd_group_size": ("epilogue.mbstd_group_size", None),
    "mbstd_num_features": ("epilogue.mbstd_num_channels", 1),
}
# Of no consequence for the weights, or for what they mean.
_IGNORED = {"truncation_psi", "truncation_cutoff", "truncation_psi_val", "truncation_cutoff_val", "style_mixing_prob"}
_IGNORED |= {"structure", "conditioning", "fused_modconv", "randomize_noise", "is_training", "is_validation"}
_IGNORED |= {"impl", "res_log2"}  # of forks: how ops are computed, and a number that shapes check
# Harmless at these values only; NVIDIA's converter refuses files that state them.
_NEUTRAL = {"fmap_decay": 1.0, "fmap_min": 1, "fmap_const": None, "dtype": "float32", "normalize_latents": True}
_NEUTRAL |= {"min_h": 4, "min_w": 4}  # skyflynil's fork, whose images need not be square
_FUNCTIONS = {
    "synthesis_func": {"G_synthesis_stylegan2", "G_synthesis"},
    "mapping_func": {"G_mapping"},
}


class Network(Buildable):
    """`dnnlib.tflib.Network` as it is stored: arguments, variables, sub-networks. Its source text is not looked at."""

    __slots__ = ("function", "kwargs", "parts", "variables", "version")

    def __init__(self) -> None:
        self.version: int | None = None
        self.function = ""
        self.kwargs: dict[str, Any] = {}
        self.variables: dict[str, Any] = {}
        self.parts: dict[str, Any] = {}

    def build(self, state: Any) -> None:
        if not isinstance(state, dict) or self.version is not None:
            raise Refused("it gives a TensorFlow network an unusual state")
        version, function = state.get("version"), state.get("build_func_name")
        if type(version) is not int or not isinstance(function, str):
            raise Refused("it holds a TensorFlow network without version or build_func_name")
        self.version, self.function = version, str(function)
        self.kwargs = plain(state.get("static_kwargs", {}), "static_kwargs")
        self.parts = state.get("components", {})
        if not isinstance(self.parts, dict) or len(self.parts) > _MAX_COMPONENTS or not isinstance(self.kwargs, dict):
            raise Refused("it holds a TensorFlow network with unusual components or static_kwargs")
        self.variables = _variables(state.get("variables"))


def _variables(listed: Any) -> dict[str, TensorRef]:
    if not isinstance(listed, list) or len(listed) > _MAX_VARIABLES:
        raise Refused("it holds a TensorFlow network without a list of variables")
    table = {}
    for entry in listed:
        if not isinstance(entry, tuple | list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise Refused("it holds a TensorFlow network with an unusual variable")
        name, value = entry
        value = value.ref if isinstance(value, Array) else value
        if not isinstance(value, TensorRef) or name in table:
            raise Refused(f"its variable {shown(name)} is not an array, or occurs twice")
        table[str(name)] = value
    return table


RULES = {
    **COMMON_RULES,
    **NUMPY_RULES,
    "dnnlib.tflib.network.Network": Stub("dnnlib.tflib.network.Network", new=Network),
    "tfutil.Network": Stub("tfutil.Network", new=Network),  # Progressive GAN: only to say so
}


def members(value: Any) -> tuple[str, Members] | None:
    """What a tuple of TensorFlow networks, a table of them or a single one holds: (family, members); None = neither."""
    found = _named(value)
    last = found.get("G_ema") or found.get("G")
    if last is None or _other_family(last) or not _is_generator(last):
        return None
    result: Members = {}
    for name, network in found.items():
        if name == "D":
            result[name] = ("discriminator", functools.partial(describe_discriminator, network))
        else:
            result[name] = ("generator", functools.partial(describe_generator, network))
    return f"a legacy TensorFlow pickle of {'StyleGAN2-ADA' if last.version == ADA else 'StyleGAN2'}", result


def _named(value: Any) -> dict[str, Network]:
    """G_ema, G and D of a file: of (G, D, Gs), the tail of it, a table, or the generator alone."""
    if isinstance(value, Network):
        value = [value]
    if isinstance(value, list | tuple) and 0 < len(value) <= 4:  # some forks append a fourth, which is none of these
        names = ("G", "D", "Gs")[3 - min(len(value), 3) :]
        value = dict(zip(names, value, strict=False))
    ours = {"Gs": "G_ema", "G_ema": "G_ema", "G": "G", "D": "D"}
    table = value.items() if isinstance(value, dict) else ()
    found = {ours[key]: item for key, item in table if key in ours and isinstance(item, Network)}
    return {name: found[name] for name in ("G_ema", "G", "D") if name in found}


def _is_generator(network: Network) -> bool:
    return any(name.startswith("synthesis/") for name in _flat(network))


def family(value: Any) -> str | None:
    """What a pickle of TensorFlow networks is that cannot be read; None = no such pickle."""
    networks = [item for item in value if isinstance(item, Network)] if isinstance(value, tuple) else []
    if isinstance(value, Network):
        return f"a single TensorFlow network ({shown(value.function)})"
    return _other_family(networks[-1]) or "a legacy TensorFlow pickle that is not (G, D, Gs)" if networks else None


def _other_family(network: Network) -> str | None:
    names = _flat(network)
    if "synthesis_stylegan_revised" in str(network.kwargs.get("synthesis_func", "")) or any(
        part.function == "G_synthesis_stylegan_revised" for part in _parts(network)
    ):
        return "a legacy TensorFlow pickle of StyleGAN2's configurations A–D (StyleGAN1 generators)"
    if network.function == "G_style" or any("StyleMod" in name for name in names):
        return "a StyleGAN1 pickle"
    if any("ToRGB_lod" in name for name in names):
        return "a legacy TensorFlow pickle of a progressively grown generator (StyleGAN1 or Progressive GAN)"
    if network.version not in (ORIGINAL, ADA):
        return f"a legacy TensorFlow pickle of network version {network.version} (StyleGAN1 or older)"
    return None


def _parts(network: Network) -> list[Network]:
    return [part for part in network.parts.values() if isinstance(part, Network)]


def _flat(network: Network) -> dict[str, TensorRef]:
    """Variables of a network and of its components, as 'component/name'."""
    table = dict(network.variables)
    for key, part in network.parts.items():
        if not isinstance(key, str) or not isinstance(part, Network):
            raise Refused("it holds a TensorFlow network with a component that is none")
        table.update({f"{key}/{name}": ref for name, ref in part.variables.items()})
    return table


def _is_filter(name: str) -> bool:
    return name.endswith("resample_filter")


# Generator.


def describe_generator(network: Network) -> FileNetwork:
    """Arguments and tensors of a generator."""
    variables = _flat(network)
    if "mapping/LabelConcat/weight" in variables:
        raise Refused(
            "it is a class-conditional generator of the original StyleGAN2, whose labels enter in another way; "
            "expected an unconditional one, or one of StyleGAN2-ADA"
        )
    kwargs = _arguments(network, _GENERATOR)
    # TensorFlow embeds labels to the size of z; ours to that of w, unless told.
    if kwargs["c_dim"]:
        kwargs["mapping"]["embed_features"] = kwargs["mapping"]["embed_features"] or kwargs["z_dim"]
    if kwargs["mapping"]["w_avg_beta"] is None:
        kwargs["mapping"]["w_avg_beta"] = 1.0
    init_kwargs = {key: kwargs[key] for key in ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")}
    init_kwargs |= {"mapping_kwargs": kwargs["mapping"], "synthesis_kwargs": kwargs["synthesis"]}
    variables.pop("lod", None)
    tensors = dict(_translated(name, ref, _GENERATOR_NAMES) for name, ref in variables.items())
    return FileNetwork("stylegan2.Generator", init_kwargs, tensors, computed=_is_filter)


def _layer(kind: str) -> Callable[[re.Match], str]:
    return lambda m: f"synthesis.b{m[1]}.{kind}.{_LEAVES[m[2]]}"


_LEAVES = {
    "weight": "weight",
    "bias": "bias",
    "mod_weight": "affine.weight",
    "mod_bias": "affine.bias",
    "noise_strength": "noise_strength",
}
_LEAF = r"/(weight|bias|mod_weight|mod_bias|noise_strength)"


def _noise(m: re.Match) -> str:
    k = int(m[1])
    level = (k + 5) // 2  # log2 of the resolution
    return f"synthesis.b{2 ** min(level, 40)}.conv{1 if k == 0 or k % 2 == 0 else 0}.noise_const"


_GENERATOR_NAMES: list[tuple[str, Callable[[re.Match], str]]] = [
    (r"dlatent_avg", lambda m: "mapping.w_avg"),
    (r"mapping/LabelEmbed/(weight|bias)", lambda m: f"mapping.embed.{m[1]}"),
    (r"mapping/Dense(\d+)/(weight|bias)", lambda m: f"mapping.fc{m[1]}.{m[2]}"),
    (r"synthesis/4x4/Const/const", lambda m: "synthesis.b4.const"),
    (r"synthesis/(4)x4/Conv" + _LEAF, _layer("conv1")),
    (r"synthesis/(\d+)x\1/Conv0_up" + _LEAF, _layer("conv0")),
    (r"synthesis/(\d+)x\1/Conv1" + _LEAF, _layer("conv1")),
    (r"synthesis/(\d+)x\1/ToRGB" + _LEAF, _layer("torgb")),
    (r"synthesis/(\d+)x\1/Skip/weight", lambda m: f"synthesis.b{m[1]}.skip.weight"),
    (r"synthesis/noise(\d+)", _noise),
]


# Discriminator.


def describe_discriminator(network: Network) -> FileNetwork:
    """Arguments and tensors of a discriminator."""
    kwargs = _arguments(network, _DISCRIMINATOR)
    if network.function == "D_stylegan2" and "mbstd_group_size" not in network.kwargs:
        kwargs["epilogue"]["mbstd_group_size"] = 4  # the default of the original, which NVIDIA's converter forgets
    activation, mapping = kwargs["block"]["activation"], kwargs["mapping"]
    mapping |= {"embed_features": kwargs["cmap_dim"], "layer_features": kwargs["cmap_dim"], "activation": activation}
    kwargs["epilogue"]["activation"] = activation
    init_kwargs = {key: value for key, value in kwargs.items() if not isinstance(value, dict)}
    init_kwargs |= {f"{key}_kwargs": kwargs[key] for key in ("block", "mapping", "epilogue")}
    tensors = dict(_translated(name, ref, _DISCRIMINATOR_NAMES) for name, ref in _flat(network).items())
    return FileNetwork("stylegan2.Discriminator", init_kwargs, tensors, computed=_is_filter)


_WB = r"/(weight|bias)"
_DISCRIMINATOR_NAMES: list[tuple[str, Callable[[re.Match], str]]] = [
    (r"LabelEmbed" + _WB, lambda m: f"mapping.embed.{m[1]}"),
    (r"Mapping(\d+)" + _WB, lambda m: f"mapping.fc{m[1]}.{m[2]}"),
    (r"4x4/Conv" + _WB, lambda m: f"b4.conv.{m[1]}"),
    (r"4x4/Dense0" + _WB, lambda m: f"b4.fc.{m[1]}"),
    (r"Output" + _WB, lambda m: f"b4.out.{m[1]}"),
    (r"(\d+)x\1/FromRGB" + _WB, lambda m: f"b{m[1]}.fromrgb.{m[2]}"),
    (r"(\d+)x\1/Conv0" + _WB, lambda m: f"b{m[1]}.conv0.{m[2]}"),
    (r"(\d+)x\1/Conv1_down" + _WB, lambda m: f"b{m[1]}.conv1.{m[2]}"),
    (r"(\d+)x\1/Skip/weight", lambda m: f"b{m[1]}.skip.weight"),
]


# Both.


def _arguments(network: Network, table: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """Our constructor arguments from their static_kwargs; those of sub-networks in tables of their own."""
    given = dict(network.kwargs)
    if "dlatent_avg_beta" in given:  # the name in the original StyleGAN2
        given["w_avg_beta"] = given.pop("dlatent_avg_beta")
    result: dict[str, Any] = {"mapping": {}, "synthesis": {}, "block": {}, "epilogue": {}}
    for theirs, (ours, default) in table.items():
        value = given.pop(theirs, default)
        if theirs == "fmap_base":
            if type(value) is not int:
                raise Refused("its fmap_base is not a whole number")
            value *= 2  # the channels of theirs count from the next finer resolution
        if theirs == "resample_kernel" and value is None:
            value = [1, 1]  # a box filter, not the identity
        if theirs == "architecture" and value not in ("orig", "skip", "resnet"):
            raise Refused(f"it has the architecture {shown(str(value))}; expected orig, skip or resnet")
        part, dot, name = ours.rpartition(".")
        (result[part] if dot else result)[name] = value
    sides = [given.pop(name, result["img_resolution"]) for name in ("resolution_w", "resolution_h")]
    if sides != [result["img_resolution"]] * 2:
        raise Refused(f"its images are {shown('×'.join(map(str, sides)))}; expected square ones")
    for name, value in given.items():
        known = name in _IGNORED or (name in _NEUTRAL and value == _NEUTRAL[name]) or value in _FUNCTIONS.get(name, ())
        switched_off = name not in _NEUTRAL and (value is None or value is False)  # an extra of a fork
        if not known and not switched_off:
            raise Refused(f"its argument {shown(name)}={shown(str(value))} cannot be expressed in our network")
    return result


def _translated(name: str, ref: TensorRef, table: list[tuple[str, Callable[[re.Match], str]]]) -> tuple[str, TensorRef]:
    """Our name and view of one of their variables."""
    for pattern, ours in table:
        match = re.fullmatch(pattern, name)
        if match:
            return ours(match), _viewed(name, ref)
    raise Refused(f"it has the variable {shown(name)}, which is not one of StyleGAN2's")


def _viewed(name: str, ref: TensorRef) -> TensorRef:
    leaf = name.rpartition("/")[2]
    if leaf.startswith("noise") and leaf != "noise_strength":
        return ref.without_leading(2)
    if leaf == "const":
        return ref.without_leading(1)
    if leaf == "mod_bias":
        return ref.affine(shift=1.0)
    if leaf == "weight" and len(ref.shape) == 4:
        ref = ref.permute(3, 2, 0, 1)  # HWIO -> OIHW
        # A layer that enlarges convolves where the others correlate: theirs is stored for a transposed convolution.
        return ref.flipped(2, 3) if "/Conv0_up/" in name else ref
    if leaf in ("weight", "mod_weight"):
        return ref.permute(1, 0)
    return ref
