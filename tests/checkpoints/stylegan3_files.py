"""Pickles of StyleGAN3 and StyleGAN-XL, built from our own networks: as NVIDIA's code and as dill write them."""

import io
import math

import numpy as np
import torch

from refine.checkpoints.pickles.inert import Blob
from refine.checkpoints.pickles.tensors import Storage, TensorRef
from refine.networks import stylegan3, stylegan_xl
from refine.networks.stylegan3_layers import SynthesisInput, SynthesisLayer
from tests.checkpoints.builders import DATA_SET, Call, Format, Global, New


def t_generator(**changes):
    """A small StyleGAN3-t."""
    kwargs = {"z_dim": 8, "c_dim": 3, "w_dim": 8, "img_resolution": 8, "img_channels": 1}
    kwargs |= {"channel_base": 64, "channel_max": 6, "num_layers": 4}
    return stylegan3.Generator(**{**kwargs, **changes}).eval()


def xl_generator(c_dim=3):
    """A small StyleGAN-XL: a stem of which two layers are left, and a head whose first index is skipped."""
    stem, head = {"magnitude_ema_beta": 0.9, "use_fp16": True}, {"use_fp16": True}
    rows = [
        ("L0_36_6", 6, 36, 16, 2, 6.0, stem),
        ("L1_36_6", 6, 36, 16, 2.8, 5.2, stem),
        ("L3_36_6", 6, 36, 16, 2.8, 5.2, head),
        ("L4_16_5", 5, 16, 16, 8, 1.8, {**head, "is_critically_sampled": True}),
        ("L5_16_1", 1, 16, 16, 8, 1.8, {**head, "is_critically_sampled": True, "is_torgb": True}),
    ]
    names = ("name", "channels", "size", "rate", "cutoff", "half_width")
    layers = [dict(zip(names, row[:6], strict=True)) | row[6] for row in rows]
    sizes = {"z_dim": 8, "c_dim": c_dim, "w_dim": 8, "img_resolution": 16, "img_channels": 1}
    return stylegan_xl.Generator(**sizes, layers=layers, input_channels=6, mapping_kwargs={"embedding": [5, 4]}).eval()


def xl_chain(*stages, c_dim=3, schedule=(), options=(), **changes):
    """A small StyleGAN-XL as its stages make it: (resolution, layers, further options of its layers) of each.

    Args:
        stages: The stem, and what is put upon it one after the other.
        c_dim: Classes.
        schedule: Where the cutoffs of the stem lie, if not where they usually do.
        options: Of all layers.
        changes: Further arguments of the class.
    """
    told = {"first_cutoff": 2, "first_stopband": 2**2.1, "last_stopband_rel": 2**0.3, "margin_size": 10, "critical": 2}
    told, layers = told | dict(schedule), []
    for resolution, count, *own in stages:
        layers = [layer for layer in layers if not layer["is_critically_sampled"]]
        below, first = layers[-1:], len(layers) + bool(layers)
        begins = [(layer["cutoff"], layer["cutoff"] + layer["half_width"]) for layer in below]
        begin, stop_begin = begins[0] if below else (told["first_cutoff"], told["first_stopband"])
        end, stop_end = resolution / 2, resolution / 2 * told["last_stopband_rel"]
        for j in range(count + 1):
            share = min(j / (count - told["critical"]), 1)
            cutoff, stop = begin * (end / begin) ** share, stop_begin * (stop_end / stop_begin) ** share
            rate = 2 ** math.ceil(math.log2(min(2 * stop, resolution)))
            rate = below[0]["rate"] if below and j == 0 else rate
            size = resolution if j > count - 2 else rate + 2 * told["margin_size"]
            channels = 1 if j == count else below[0]["channels"] if below and j == 0 else 2 + (first + j) % 2
            layer = {"name": f"L{first + j}_{size}_{channels}", "channels": channels, "size": size, "rate": rate}
            layer |= {"cutoff": cutoff, "half_width": max(stop, rate / 2) - cutoff, "use_fp16": rate * 16 > resolution}
            layer |= {"is_torgb": j == count, "is_critically_sampled": j >= count - told["critical"]}
            layers.append(layer | dict(options) | (own[0] if own else {}))
    sizes = {"z_dim": 8, "w_dim": 8, "img_resolution": stages[-1][0], "img_channels": 1, "input_channels": 4}
    more = {"mapping_kwargs": {"embedding": [5, 4]}, **sizes, **changes}
    torch.manual_seed(0)
    G = stylegan_xl.Generator(c_dim=c_dim, layers=layers, **more).eval().requires_grad_(False)
    for name, value in G.state_dict().items():
        if name.endswith(("bias", "w_avg", "magnitude_ema")):
            value.add_(torch.rand_like(value))
    return G


def refs_of(state):
    """Tensors as a file has them; those on 'meta' have no numbers."""
    refs = {}
    for name, value in state.items():
        data = b"" if value.is_meta else value.numpy().tobytes()
        storage = Storage(value.dtype, value.numel(), Blob(io.BytesIO(data), 0, len(data)), 0)
        refs[name] = TensorRef(storage, 0, tuple(value.shape), value.stride())
    return refs


class Form(Format):
    """A `Format` that knows these networks.

    Args:
        dill: 0 = NVIDIA's pickler, 1 = dill's arrays by old names, 2 = by new ones.
    """

    def __init__(self, dill=0, **options):
        super().__init__(**options)
        self.dill = dill

    def numpy_function(self, name):
        if self.dill == 1:
            module = Call(self.name("dill._dill", "_import_module"), f"{self.core}._multiarray_umath")
            return self.globals.setdefault(name, Call(self.name("dill._dill", "_get_attr"), module, name))
        return self.name(f"{self.core}.multiarray", name)

    def number(self, value):
        """numpy's scalars: floats, and the flags of fp16."""
        code, order = ("b1", "|") if isinstance(value, bool) else ("f8", "<")
        data = np.array(value, dtype=code).tobytes()
        dtype = Call(self.name("numpy", "dtype"), code, False, True, state=(3, order, None, None, None, -1, -1, 0))
        return Call(self.numpy_function("scalar"), dtype, data)

    def scalar(self, value):
        return self.number(float(value))

    def pair(self, value):
        """A size [width, height]."""
        dtype = Call(self.name("numpy", "dtype"), "i8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
        state = (1, (2,), dtype, False, np.full(2, value, dtype="i8").tobytes())
        args = (self.name("numpy", "ndarray"), (0,), b"b")
        if self.dill:
            return Call(self.name("dill._dill", "_create_array"), self.numpy_function("_reconstruct"), args, state)
        return Call(self.numpy_function("_reconstruct"), *args, state=state)

    def module(self, module, init_kwargs=None, init_args=(), attributes=None):
        if isinstance(module, torch.nn.Embedding):
            state = {"training": False, "_parameters": {"weight": self.parameter(module.weight)}, "_buffers": {}}
            state |= {"_modules": {}, "num_embeddings": module.num_embeddings, "embedding_dim": module.embedding_dim}
            return New(self.name("torch.nn.modules.sparse", "Embedding"), state)
        if isinstance(module, SynthesisInput):
            signal = module.signal
            attributes = {"channels": signal.channels, "size": self.pair(signal.size)}
            attributes |= {"sampling_rate": self.scalar(signal.rate), "bandwidth": self.scalar(signal.cutoff)}
        elif isinstance(module, SynthesisLayer):
            init_kwargs, attributes = self.layer(module)
        elif isinstance(module, stylegan3.SynthesisNetwork):
            attributes = {"layer_names": list(module.layer_names)}
        return super().module(module, init_kwargs, init_args, attributes)

    def layer(self, layer):
        kwargs = {"w_dim": layer.affine.weight.shape[1], "is_torgb": layer.is_torgb}
        kwargs["is_critically_sampled"] = layer.target.cutoff * 2 == layer.target.rate
        kwargs["use_fp16"] = self.number(bool(layer.use_fp16))
        for side, signal in (("in", layer.source), ("out", layer.target)):
            kwargs |= {f"{side}_channels": signal.channels, f"{side}_size": self.pair(signal.size)}
            kwargs |= {f"{side}_sampling_rate": signal.rate, f"{side}_cutoff": self.scalar(signal.cutoff)}
            kwargs[f"{side}_half_width"] = self.scalar(signal.half_width)
        kwargs |= {"conv_clamp": layer.conv_clamp, "magnitude_ema_beta": layer.magnitude_ema_beta}
        attributes = {"up_factor": layer.up, "down_factor": layer.down, "padding": list(layer.padding)}
        return kwargs, attributes


def stylegan3_file(form, G_ema, G=None, D=None, changes=None, **extra):
    """A snapshot; `changes` are of G_ema's init kwargs."""
    table = {} if G is None else {"G": form.module(G, init_kwargs(form, G))}
    if D is not None:
        table["D"] = D if isinstance(D, New | Call) else form.module(D, D.init_kwargs)
    table["G_ema"] = form.module(G_ema, init_kwargs(form, G_ema) | (changes or {}))
    return form.dumps({**table, "augment_pipe": None, "training_set_kwargs": dict(DATA_SET), **extra})


def init_kwargs(form, G):
    if isinstance(G, stylegan_xl.Generator):  # as a stage of super-resolution: another file, and what it adds
        sizes = {name: G.init_kwargs[name] for name in ("c_dim", "img_resolution", "img_channels")}
        return {"path_stem": "/home/x/best_model.pkl", "head_layers": 2, "up_factor": 2, **sizes}
    kwargs = dict(G.init_kwargs)
    return {**kwargs, "mapping_kwargs": form.easy(kwargs["mapping_kwargs"])}


def projected_discriminator(form, *parts):
    """What stands where StyleGAN-XL's discriminator does: modules of other programs, hooks that are functions."""
    code = Call(form.name("dill._dill", "_create_code"), 1, 0, b"d\x00S\x00", (None,), "hook", "vit.py")
    cell = Call(form.name("dill._dill", "_create_cell"), {"x": 1})
    scope = Global("feature_networks.vit", "__dict__")
    hook = Call(form.name("dill._dill", "_create_function"), code, scope, "hook", None, (cell,), {})
    method = Call(Call(form.name("dill._dill", "_load_type"), "MethodType"), hook, None)
    block = {"_parameters": {}, "_buffers": {}, "_modules": {}, "_forward_hooks": {0: hook}, "forward": method}
    inner = New(form.name("timm.models.vision_transformer", "VisionTransformer"), block)
    part = Call(form.name("functools", "partial"), hook)
    state = {"_parameters": {}, "_buffers": {}, "_modules": {"vit": inner}, "norm": part, "others": list(parts)}
    return New(form.name("pg_modules.discriminator", "ProjectedDiscriminator"), state)
