"""Pickles of NVIDIA's PyTorch programs: StyleGAN2-ADA (also as trained by the StyleGAN3 code), EDM and EDM2.

Each of their objects is a call of one function with a table: class name, attributes, and the source text of its class,
which their own loader executes. Here only the first two are looked at. From the tree of attributes come constructor
arguments and tensors of our own classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Container, Sequence
from typing import Any

from refine.checkpoints.foreign.container import FileNetwork, Members, plain
from refine.checkpoints.foreign.flat import by_role, without_strangers
from refine.checkpoints.foreign.rosinality import MEAN_OF, estimate_w_avg
from refine.checkpoints.pickles.inert import Buildable, Refused, Stub, Unknown, shown
from refine.checkpoints.pickles.machine import COMMON_RULES
from refine.checkpoints.pickles.tensors import NUMPY_RULES, TENSOR_RULES, VALUE_RULES, TensorRef
from refine.networks import edm, edm2, edm_unets, stylegan2, stylegan2_layers

PERSISTENCE_VERSION = 6  # of every public file
_MAX_DEPTH, _MAX_TENSORS = 12, 20_000
_MAX_LIST = 8  # entries of a list in which networks are looked for

GENERATOR_ARGS = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "mapping_kwargs", "synthesis_kwargs")
_PRECONDS = {"EDMPrecond": edm.EDMPrecond, "VPPrecond": edm.VPPrecond, "VEPrecond": edm.VEPrecond}
_PRECONDS["iDDPMPrecond"] = edm.iDDPMPrecond


class Persistent:
    """An object of one of NVIDIA's classes: its name and its attributes."""

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str, state: dict):
        self.class_name, self.state = class_name, state


class ModuleDict(Buildable):
    """`torch.nn.ModuleDict`, the one module that EDM files name directly."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: dict = {}

    def build(self, state: Any) -> None:
        if not isinstance(state, dict) or self.state:
            raise Refused("it gives a ModuleDict an unusual state")
        self.state = state


def rules(seen: list[str]) -> dict[str, Stub]:
    """The allowed globals of these files; names of classes met are appended to `seen`."""

    def reconstruct(meta: Any) -> Persistent:
        if not isinstance(meta, dict) or meta.get("type") != "class":
            raise Refused("it reconstructs an object without saying that it is one of a class")
        if type(meta.get("version")) is not int or meta["version"] != PERSISTENCE_VERSION:
            raise Refused(f"its objects are not of version {PERSISTENCE_VERSION} of NVIDIA's persistence")
        if not isinstance(meta.get("class_name"), str) or not isinstance(meta.get("state"), dict):
            raise Refused("it reconstructs an object without class name or state")
        seen.append(str(meta["class_name"]))
        return Persistent(str(meta["class_name"]), meta["state"])

    stubs = (
        Stub("torch_utils.persistence._reconstruct_persistent_obj", call=reconstruct),
        Stub("dnnlib.util.EasyDict", new=dict),
        Stub("torch.nn.modules.container.ModuleDict", new=ModuleDict),
    )
    return {**COMMON_RULES, **TENSOR_RULES, **NUMPY_RULES, **VALUE_RULES, **{stub.name: stub for stub in stubs}}


def members(value: Any) -> tuple[str, Members] | None:
    """What a snapshot holds, in a table, a tuple or by itself: (family, members); None = no network of these."""
    found = named(value, _is_stylegan2)
    ema = found.get("ema")
    notes = [_NO_AVERAGE] if "ema" not in value_table(value) and "optimizer_state" in value_table(value) else []
    if ema is not None and _precond_of(ema) is not None:
        return "an EDM pickle", {"ema": ("teacher", _later(describe_teacher, ema, notes))}
    encoder = found.get("encoder")
    if ema is not None and _is_edm2(ema) and (encoder is None or encoder.class_name == _PIXELS):
        return "an EDM2 pickle", {"ema": ("teacher", _later(describe_teacher, ema, notes))}
    generators = {name: found[name] for name in ("G_ema", "G") if name in found}
    if not generators or not all(_is_stylegan2(item) for item in generators.values()):
        return None
    result: Members = {}
    for name, item in generators.items():
        result[name] = ("generator", _later(describe_generator, item))
    if "D" in found:
        result["D"] = ("discriminator", _later(describe_discriminator, found["D"]))
    return "a StyleGAN2 pickle", result


_OTHER_NAMES = {"g_ema": "G_ema", "gs": "G_ema", "generator": "G_ema", "g": "G", "d": "D", "discriminator": "D"}


_NO_AVERAGE = "it is a training state: this is the network that was trained, and not its average"


def value_table(value: Any) -> dict:
    """A file's value where it is a table, or an empty one."""
    return value if isinstance(value, dict) else {}


def named(value: Any, is_generator: Callable[[Persistent], bool]) -> dict[str, Persistent]:
    """The objects of a file by the names that NVIDIA's programs give them, wherever they are.

    Raises:
        Refused: there are several generators, and their names do not tell which is the average.
    """
    found = _at_the_top(value)
    if any(is_generator(found[name]) for name in ("G_ema", "G") if name in found):
        return found
    if "ema" in found and _is_teacher(found["ema"]):
        return found
    deeper = _anywhere(value)
    roles = by_role(where for where, item in deeper.items() if is_generator(item))
    teachers = [item for item in deeper.values() if _is_teacher(item)]
    if roles:
        return {**found, **{role: deeper[where] for role, where in roles.items()}}
    return {**found, "ema": teachers[0]} if len(teachers) == 1 else found


def _anywhere(value: Any) -> dict[str, Persistent]:
    """Every object in tables and short lists, by the names around it: 'model.G_ema.'; each once."""
    found: dict[str, Persistent] = {}
    known: set[int] = set()
    todo: list[tuple[str, Any, int]] = [("", value, 0)]
    while todo and len(known) < _MAX_TENSORS:
        where, item, depth = todo.pop()
        item = _unwrapped(item)
        if id(item) in known or depth > _MAX_DEPTH:
            continue
        if isinstance(item, Persistent):
            known.add(id(item))
            found[where] = item
        elif isinstance(item, dict) or (isinstance(item, list | tuple) and len(item) <= _MAX_LIST):
            known.add(id(item))
            parts = item.items() if isinstance(item, dict) else enumerate(item)
            todo += [(f"{where}{name}.", part, depth + 1) for name, part in parts]
    return found


def _at_the_top(value: Any) -> dict[str, Persistent]:
    value = _unwrapped(value)
    if isinstance(value, Persistent):
        value = {"ema" if _is_teacher(value) else "G_ema": value}
    if isinstance(value, list | tuple) and len(value) == 3:
        value = dict(zip(("G", "D", "G_ema"), value, strict=True))
    found: dict[str, Persistent] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        item = _unwrapped(item)
        if isinstance(item, Persistent):
            name = _OTHER_NAMES.get(str(key).lower(), str(key))
            found.setdefault(name, item)
    if "ema" not in found:
        teachers = [
            found[name] for name in ("G_ema", "G", "net", "model") if name in found and _is_teacher(found[name])
        ]
        found |= dict(zip(("ema",), teachers, strict=False))
    return found


def _unwrapped(item: Any) -> Any:
    """An object without the module around it that DataParallel is."""
    for _ in range(_MAX_DEPTH):  # a file can make a module its own child
        if not (isinstance(item, Unknown) and item.state is not None and list(_modules(item)) == ["module"]):
            break
        item = _modules(item)["module"]
    return item


def _is_teacher(item: Persistent) -> bool:
    return _precond_of(item) is not None or _is_edm2(item)


def _later(describe: Callable[..., FileNetwork], item: Persistent, *further: Any) -> Callable[[], FileNetwork]:
    return lambda: describe(item, *further)


def family(value: Any, seen: list[str]) -> str | None:
    """What a file of NVIDIA's is that cannot be read, as far as the classes it names tell."""
    names = set(seen)
    table = value if isinstance(value, dict) else {}
    if "SynthesisInput" in names and value is not None:
        return "a StyleGAN3 or StyleGAN-XL pickle without a generator that is known here"
    if {"ProjectedDiscriminator", "FastganSynthesis"} & names:
        return "a Projected GAN or StyleGAN-XL checkpoint"
    if {"MPConv", "MPFourier", "EDM2Loss"} & names or ("Precond" in names and not names & set(_PRECONDS)):
        latent = bool(names & {"StabilityVAEEncoder"})
        return f"an EDM2 diffusion model{' of latents, not of pixels' if latent else ''}"
    if names & set(_PRECONDS):
        if isinstance(table.get("ema"), list | tuple | dict):
            return "an EDM file with several networks under 'ema'"
        return "an EDM file without 'ema', perhaps a training state"
    if {"TriPlaneGenerator", "OSGDecoder"} & names:
        return "an EG3D generator"
    if isinstance(value, Persistent):
        return f"a pickled object of the class {shown(value.class_name)}"
    if any(isinstance(item, Persistent) for item in table.values()):
        objects = {shown(str(key)): item for key, item in table.items() if isinstance(item, Persistent)}
        held = ", ".join(f"{key} ({shown(item.class_name)})" for key, item in objects.items())
        return f"a pickle of NVIDIA's programs that holds {held[:160]}"
    if {"raw_mean", "raw_cov"} <= set(table):
        return "a file of cached statistics of StyleGAN's metrics"
    return None


_PIXELS = "StandardRGBEncoder"  # of EDM2's networks whose images are images


# StyleGAN2.


def _is_stylegan2(item: Persistent) -> bool:
    return _child(item, "synthesis", "b4") is not None and _child(item, "mapping") is not None


def describe_generator(item: Persistent) -> FileNetwork:
    """Arguments and tensors of a generator, in any of the three styles in which its arguments were written."""
    kwargs = _init_kwargs(item, GENERATOR_ARGS)
    mapping, synthesis = _table(kwargs.pop("mapping_kwargs", None)), kwargs.pop("synthesis_kwargs", None)
    options = {key: kwargs.pop(key) for key in list(kwargs) if key not in GENERATOR_ARGS}
    # The StyleGAN3 code writes options of the synthesis network among the others, and has defaults of its own.
    last = f"b{kwargs.get('img_resolution')}"
    flattened = synthesis is None and bool(options or _attribute(item, ("synthesis", last), "use_fp16"))
    options.pop("fused_modconv_default", None)
    notes = [] if item.class_name == "Generator" else [f"its class is called {shown(item.class_name)}, not Generator"]
    mapping = _known_only(mapping, _arguments_of(stylegan2.MappingNetwork), "its mapping network", notes)
    known = _arguments_of(stylegan2.SynthesisNetwork, stylegan2.SynthesisBlock, stylegan2_layers.SynthesisLayer)
    synthesis = _known_only({**_table(synthesis), **options}, known, "it", notes)
    if flattened:
        synthesis = {"num_fp16_res": 4, "conv_clamp": 256, **synthesis}
    for path, name, table in (
        (("synthesis", "b4", "conv1"), "conv_clamp", synthesis),
        (("mapping",), "w_avg_beta", mapping),
    ):
        live = _attribute(item, path, name, missing=_MISSING)
        if live is not _MISSING and (name in table or live != _DEFAULTS[name]):
            table[name] = live
    kwargs.update(mapping_kwargs=mapping, synthesis_kwargs=synthesis)
    return _with_what_is_there(FileNetwork("stylegan2.Generator", kwargs, collect(item), notes=notes))


def _with_what_is_there(network: FileNetwork) -> FileNetwork:
    """A generator without tensors of others, and with a substitute for the buffers that a fork left out."""
    network.tensors = without_strangers(network.tensors, network.notes)
    if (
        "mapping.w_avg" not in network.tensors
        and network.init_kwargs["mapping_kwargs"].get("w_avg_beta", 1) is not None
    ):
        network.finish = estimate_w_avg
        network.notes.append(f"no mean of w is stored: it is estimated from {MEAN_OF:,} draws")
    noise = any(name.endswith(".noise_const") for name in network.tensors)
    if not noise and any(name.endswith(".noise_strength") for name in network.tensors):
        network.notes.append("no constant noise is stored: it is drawn with a fixed seed")
    network.computed = lambda name: (
        (name == "mapping.w_avg" and network.finish is not None) or (name.endswith(".noise_const") and not noise)
    )
    return network


# Arguments of forks that shapes check (an image that is not square has other tensors), or that are for calls.
_OF_FORKS = {"class_name", "square", "force_fp32", "init_res"}


def _known_only(given: dict[str, Any], known: Container[str], whose: str, notes: list[str]) -> dict[str, Any]:
    """Arguments without those that our classes do not have and that are switched off."""
    for name in [name for name in given if name not in known]:
        value = given[name]
        if name not in _OF_FORKS and value is not None and value is not False:
            what = f"{shown(name)}={shown(str(value))}"
            raise Refused(
                f"{whose} was made with the argument {what}, which changes it in a way that is not known here"
            )
        notes.append(f"the argument {shown(name)}={shown(str(value))} of a fork is left out")
    return {name: value for name, value in given.items() if name in known}


def _arguments_of(*classes: type) -> set[str]:
    """Names that the constructors take from a file, in any of these classes."""
    parameters = [p for cls in classes for p in inspect.signature(cls).parameters.values()]
    return {p.name for p in parameters if p.default is not p.empty}


_MISSING = object()
_DEFAULTS = {"conv_clamp": None, "w_avg_beta": 0.995}  # of our own classes, and of StyleGAN2-ADA's


def describe_discriminator(item: Persistent) -> FileNetwork:
    """Arguments and tensors of a discriminator."""
    if item.class_name != "Discriminator" or _child(item, "b4") is None:
        raise Refused(f"it is a {shown(item.class_name)}, not a discriminator of StyleGAN2")
    kwargs = _init_kwargs(item, tuple(inspect.signature(stylegan2.Discriminator).parameters))
    blocks = [block for name in _modules(item) if name != "b4" and (block := _child(item, name, "conv1")) is not None]
    if blocks and "conv_clamp" not in kwargs and _attribute(blocks[0], (), "conv_clamp") is not None:
        # Another default than StyleGAN2-ADA's: the StyleGAN3 code.
        kwargs["conv_clamp"] = _attribute(blocks[0], (), "conv_clamp")
        kwargs.setdefault("num_fp16_res", 4)
    return FileNetwork("stylegan2.Discriminator", kwargs, collect(item))


# EDM and EDM2.

# Arguments that are used only later, so that the constructor would take anything for them.
_NUMBERS = {"dropout", "label_dropout", "sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "epsilon_t"}
_NUMBERS |= {"label_balance", "concat_balance", "res_balance", "attn_balance", "clip_act"}


def _precond_of(item: Persistent) -> type | None:
    """The preconditioning that an object is, also under a name that a fork gave it, as far as its attributes tell."""
    if item.class_name in _PRECONDS:
        return _PRECONDS[item.class_name]
    fits = item.state.keys() >= {"sigma_min", "sigma_max", "sigma_data"} and _child(item, "model", "enc") is not None
    return edm.EDMPrecond if fits else None


def _is_edm2(item: Persistent) -> bool:
    return item.class_name == "Precond" and _child(item, "unet", "enc") is not None


def describe_teacher(item: Persistent, notes: Sequence[str] = ()) -> FileNetwork:
    """Arguments and tensors of a preconditioned denoiser; attributes win over the arguments that once set them.

    Args:
        item: It.
        notes: What is known of the file.
    """
    notes = list(notes)
    cls: Any = edm2.Precond if _is_edm2(item) else _precond_of(item)
    names = [name for name, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD]
    kwargs = _init_kwargs(item, tuple(names))
    if cls is not edm2.Precond:
        if item.class_name not in _PRECONDS:
            notes.append(
                f"its class is called {shown(item.class_name)}; it is read as {cls.__name__}, whose form it has"
            )
        kwargs = _known_only(kwargs, {*names, *_arguments_of(*edm_unets.UNETS.values())}, "it", notes)
    for name in names:
        live = item.state.get(name)
        if name != "model_type" and isinstance(live, bool | int | float | TensorRef):
            value = plain(live, name)
            if name in kwargs or value != inspect.signature(cls).parameters[name].default:
                kwargs[name] = value
    for name in _NUMBERS & kwargs.keys():
        value = 0 if name == "clip_act" and kwargs[name] is None else kwargs[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Refused(f"its {name} is not a number")
    attributes = {}
    for name in ("sigma_min", "sigma_max"):
        if name not in names and name in item.state:
            value = plain(item.state[name], name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise Refused(f"its {name} is not a positive number")
            attributes[name] = float(value)
    class_name = "edm2.Precond" if cls is edm2.Precond else f"edm.{cls.__name__}"
    return FileNetwork(class_name, kwargs, collect(item), attributes=attributes, notes=notes)


# The tree of modules.


def collect(item: Any) -> dict[str, TensorRef]:
    """All parameters and buffers of a module and of those below it, named as in its state_dict.

    Raises:
        Refused: the tree is not a tree of modules, or too deep or too large.
    """
    tensors: dict[str, TensorRef] = {}
    visited = 0

    def walk(module: Any, prefix: str, depth: int) -> None:
        nonlocal visited
        visited += 1
        if depth > _MAX_DEPTH or visited > _MAX_TENSORS:
            raise Refused("its modules are nested too deeply, or too many")
        transient = module.state.get("_non_persistent_buffers_set", ())
        for kind in ("_parameters", "_buffers"):
            for name, value in _entries(module, kind):
                if value is None or (kind == "_buffers" and isinstance(transient, set) and name in transient):
                    continue
                if not isinstance(value, TensorRef) or prefix + name in tensors or len(tensors) >= _MAX_TENSORS:
                    raise Refused(f"{shown(prefix + name)} is not a tensor{_named_by(value)}, or there are too many")
                tensors[prefix + name] = value
        for name, child in _entries(module, "_modules"):
            if child is not None:
                if not _is_module(child):
                    raise Refused(f"{shown(prefix + name)} is not a module{_named_by(child)}")
                walk(child, f"{prefix}{name}.", depth + 1)

    walk(item, "", 0)
    return tensors


def _is_module(item: Any) -> bool:
    return isinstance(item, Persistent | ModuleDict) or (isinstance(item, Unknown) and item.state is not None)


def _named_by(item: Any) -> str:
    return f" but an object of {shown(item.name)}" if isinstance(item, Unknown) else ""


def _entries(module: Any, kind: str) -> list[tuple[str, Any]]:
    table = module.state.get(kind, {})
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise Refused(f"a module's {kind} is not a table")
    return [(str(name), value) for name, value in table.items()]


def _modules(item: Any) -> dict[str, Any]:
    return dict(_entries(item, "_modules"))


def _child(item: Any, *path: str) -> Any | None:
    for name in path:
        child = _modules(item).get(name)
        if not _is_module(child):
            return None
        item = child
    return item


def _attribute(item: Any, path: tuple[str, ...], name: str, missing: Any = None) -> Any:
    """A plain attribute of a module below, or `missing`."""
    child = _child(item, *path)
    return plain(child.state[name], name) if child is not None and name in child.state else missing


def _table(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise Refused("its init kwargs hold something else where a table is expected")
    return dict(value or {})


def _init_kwargs(item: Persistent, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments that the object was constructed with, positional ones by name."""
    kwargs, args = item.state.get("_init_kwargs", {}), item.state.get("_init_args", ())
    if not isinstance(kwargs, dict) or not isinstance(args, tuple) or len(args) > len(names):
        raise Refused("its objects do not tell the arguments that they were made with")
    given = plain(dict(zip(names, args, strict=False))) | plain(kwargs)
    if len(given) < len(args) + len(kwargs):
        raise Refused("its objects tell an argument twice")
    return given
