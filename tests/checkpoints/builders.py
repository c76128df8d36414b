"""Files as other programs write them, built from plain data: no source of theirs is here, nor in the files.

A `Global` is pickled as the bare name of a global, a `Call` as a call of one, a `New` as `cls.__new__(cls)` with a
state. So a test can write any pickle, also hostile ones, without the modules it names.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

SOURCE = "raise RuntimeError('source text of a checkpoint was executed')\n" + "# filling\n" * 200


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state


class New:
    def __init__(self, cls, state=None, items=None):
        self.cls, self.state, self.items = cls, state, items


class PersistentId:
    def __init__(self, value):
        self.value = value


class Pickler(pickle._Pickler):
    """Python's own pickler in Python, with three more things it can write."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def persistent_id(self, obj):
        return obj.value if isinstance(obj, PersistentId) else None

    def save_name(self, obj):
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(b"c" + obj.module.encode() + b"\n" + obj.name.encode() + b"\n")
        self.memoize(obj)

    def save_call(self, obj):
        self.save(obj.function)
        self.save(obj.args)
        self.write(pickle.REDUCE)
        self.memoize(obj)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def save_new(self, obj):
        if self.proto < 2:
            base = Global("__builtin__", "object" if obj.items is None else "dict")
            self.save_call(Call(Global("copy_reg", "_reconstructor"), obj.cls, base, obj.items, state=obj.state))
            return
        self.save(obj.cls)
        self.save(())
        self.write(pickle.NEWOBJ)
        self.memoize(obj)
        if obj.items is not None:
            self._batch_setitems(obj.items.items(), *([obj] if _TAKES_OBJ else []))
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)


_TAKES_OBJ = "obj" in pickle._Pickler._batch_setitems.__code__.co_varnames[:3]
Pickler.dispatch |= {Global: Pickler.save_name, Call: Pickler.save_call, New: Pickler.save_new}


def dumps(value, protocol=4):
    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


def storage_bytes(tensor):
    """One storage as torch.save wrote it before torch 1.6: what tensors inside plain pickles hold."""
    file = io.BytesIO()
    torch.save(tensor.contiguous().flatten().clone()._typed_storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


class Format:
    """How a file is written.

    Args:
        protocol: Of the pickle.
        numpy: 1 or 2, by which numpy's globals are named.
        torch_style: 1 (OrderedDicts everywhere) or 2 (plain dicts, more kinds of hooks).
        channels_last: Store 4-D weights in that memory format.
        dtype: Of the tensors.
        wrap: Changes the bytes of every storage before they are written; for hostile files.
    """

    def __init__(self, protocol=4, numpy=2, torch_style=2, channels_last=False, dtype=torch.float32, wrap=None):
        self.protocol, self.core = protocol, "numpy._core" if numpy == 2 else "numpy.core"
        self.table = OrderedDict if torch_style == 1 else dict
        self.torch_style, self.channels_last, self.dtype, self.wrap = torch_style, channels_last, dtype, wrap
        self.globals = {}
        self.float64 = Call(self.name("numpy", "dtype"), "f8", False, True, state=(3, "<", None, None, None, -1, -1, 0))

    def name(self, module, name):
        """One object per global, so that the pickle names it once."""
        return self.globals.setdefault((module, name), Global(module, name))

    def dumps(self, value):
        return dumps(value, self.protocol)

    def scalar(self, value):
        return Call(self.name(f"{self.core}.multiarray", "scalar"), self.float64, np.float64(value).tobytes())

    def tensor(self, tensor):
        tensor = tensor.detach().to(self.dtype)
        if self.channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        flat = tensor.as_strided((tensor.numel(),), (1,)) if tensor.ndim else tensor.reshape(1)
        data = storage_bytes(flat)
        data = self.wrap(data) if self.wrap else data
        storage = Call(self.name("torch.storage", "_load_from_bytes"), data)
        rebuild = self.name("torch._utils", "_rebuild_tensor_v2")
        return Call(rebuild, storage, 0, tuple(tensor.shape), tuple(tensor.stride()), False, OrderedDict())

    def parameter(self, tensor):
        rebuild = self.name("torch._utils", "_rebuild_parameter")
        return Call(rebuild, self.tensor(tensor), False, OrderedDict())

    def easy(self, table):
        return New(self.name("dnnlib.util", "EasyDict"), items=table)

    def persistent(self, class_name, state, version=6, kind="class"):
        meta = {"type": kind, "version": version, "module_src": SOURCE, "class_name": class_name, "state": state}
        return Call(self.name("torch_utils.persistence", "_reconstruct_persistent_obj"), meta)

    def module(self, module, init_kwargs=None, init_args=(), attributes=None):
        """One of our modules, and those below it, as a persistent object of the same class name."""
        hooks = [
            "_backward_hooks",
            "_forward_hooks",
            "_forward_pre_hooks",
            "_state_dict_hooks",
            "_load_state_dict_pre_hooks",
        ]
        if self.torch_style == 2:
            hooks += ["_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_load_state_dict_post_hooks"]
        state = {"training": False}
        state["_parameters"] = self.table(
            (n, None if p is None else self.parameter(p)) for n, p in module._parameters.items()
        )
        state["_buffers"] = self.table((n, None if b is None else self.tensor(b)) for n, b in module._buffers.items())
        state["_non_persistent_buffers_set"] = set()
        state |= {name: OrderedDict() for name in hooks}
        if self.torch_style == 2:
            state["_is_full_backward_hook"] = None
        state["_modules"] = self.table((n, self.module(m)) for n, m in module._modules.items() if m is not None)
        if isinstance(module, torch.nn.ModuleDict):
            return New(self.name("torch.nn.modules.container", "ModuleDict"), state)
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "init_kwargs" and isinstance(value, bool | int | str | type(None)):
                state[key] = value
            elif not key.startswith("_") and isinstance(value, float):
                state[key] = self.scalar(value) if key.endswith(("_gain", "_scale")) else value
        state |= {"_init_args": tuple(init_args), "_init_kwargs": self.easy(init_kwargs or {}), **(attributes or {})}
        return self.persistent(type(module).__name__, state)


class ZipFormat(Format):
    """torch.save's zip: storages are entries of their own, and the pickle has protocol 2."""

    KINDS: ClassVar = {
        torch.float32: "FloatStorage",
        torch.float16: "HalfStorage",
        torch.float64: "DoubleStorage",
        torch.int64: "LongStorage",
    }

    def __init__(self, numpy=2):
        super().__init__(protocol=2, numpy=numpy)
        self.storages = []

    def tensor(self, tensor):
        tensor = tensor.detach()
        flat = tensor.contiguous().flatten()
        key = str(len(self.storages))
        self.storages.append(flat.numpy().tobytes())
        kind = self.name("torch", self.KINDS[tensor.dtype])
        storage = PersistentId(("storage", kind, key, "cuda:0", flat.numel()))
        stride = tensor.contiguous().stride()
        rebuild = self.name("torch._utils", "_rebuild_tensor_v2")
        return Call(rebuild, storage, 0, tuple(tensor.shape), tuple(stride), False, OrderedDict())

    def dumps(self, value, method=zipfile.ZIP_STORED):
        data, file = dumps(value, 2), io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("x/data.pkl", data)
            archive.writestr("x/byteorder", b"little")
            for key, storage in enumerate(self.storages):
                archive.writestr(f"x/data/{key}", storage)
            archive.writestr("x/version", b"3\n")
        return file.getvalue()


def plain_module(form, name, tensors, children=None, **attributes):
    """A `torch.nn.Module` that was pickled as it is, by the name of its class."""
    module, _, cls = name.rpartition(".")
    state = {"training": False, "_parameters": {k: form.parameter(v) for k, v in tensors.items()}, "_buffers": {}}
    return New(form.name(module, cls), {**state, "_modules": children or {}, **attributes})


def stylegan2_kwargs(kwargs, style, form):
    """Init kwargs of a generator in the three styles: 1 nested, 2 converted from TensorFlow, 3 flattened."""
    kwargs = {**kwargs}
    mapping, synthesis = dict(kwargs.pop("mapping_kwargs", {})), dict(kwargs.pop("synthesis_kwargs", {}))
    if style == 2:
        mapping = {
            "embed_features": None,
            "layer_features": None,
            "activation": "lrelu",
            "lr_multiplier": 0.01,
        } | mapping
        synthesis = {"architecture": "skip", "resample_filter": [1, 3, 3, 1], "use_noise": True} | synthesis
    if style == 3:
        synthesis = {"num_fp16_res": 0, "conv_clamp": None} | synthesis
        return {**kwargs, "mapping_kwargs": form.easy(mapping), **synthesis, "fused_modconv_default": "inference_only"}
    return {**kwargs, "mapping_kwargs": form.easy(mapping), "synthesis_kwargs": form.easy(synthesis)}


DATA_SET = {
    "class_name": "training.dataset.ImageFolderDataset",
    "path": "/data/x.zip",
    "use_labels": True,
    "max_size": 10,
}


def augment_pipe(form):
    state = {"_parameters": {}, "_buffers": {"p": form.tensor(torch.zeros([]))}, "_modules": {}, "xflip": 1}
    return form.persistent("AugmentPipe", state)


def stylegan2_file(form, G_ema, G=None, D=None, style=1, extras="all"):
    """A snapshot of StyleGAN2-ADA; `extras`: 'all', 'none' (None, as converted files) or 'missing'."""
    table = {}
    if extras != "missing":
        table["training_set_kwargs"] = dict(DATA_SET) if extras == "all" else None
    if G is not None:
        table["G"] = form.module(G, stylegan2_kwargs(G.init_kwargs, style, form))
    if D is not None:
        table["D"] = form.module(D, D.init_kwargs)
    table["G_ema"] = form.module(G_ema, stylegan2_kwargs(G_ema.init_kwargs, style, form))
    if extras != "missing":
        table["augment_pipe"] = augment_pipe(form) if extras == "all" else None
    return form.dumps(table)


def edm_file(form, net, extras=True, attributes=None):
    """A snapshot of EDM."""
    live = {name: getattr(net, name) for name in ("sigma_min", "sigma_max")}
    table = {"ema": form.module(net, net.init_kwargs, attributes={**live, **(attributes or {})})}
    if extras:
        table["loss_fn"] = form.persistent("EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5})
        table |= {"augment_pipe": augment_pipe(form), "dataset_kwargs": dict(DATA_SET)}
    return form.dumps(table)


def edm2_file(form, net, **init_kwargs):
    """A snapshot of EDM2 for pixels; its tensors are published in float16."""
    table = {"encoder": form.persistent("StandardRGBEncoder", {}), "dataset_kwargs": form.easy(dict(DATA_SET))}
    table["loss_fn"] = form.persistent("EDM2Loss", {"P_mean": -0.8, "P_std": 1.6, "sigma_data": 0.5})
    table["ema"] = form.module(net, {**net.init_kwargs, **init_kwargs})
    return form.dumps(form.easy(table))


# TensorFlow.


def tf_array(form, value):
    value = np.asarray(value, order="C")
    code = {"float32": "f4", "float64": "f8", "int32": "i4", "float16": "f2"}[value.dtype.name]
    dtype = Call(form.name("numpy", "dtype"), code, 0, 1, state=(3, "<", None, None, None, -1, -1, 0))
    if value.ndim == 0:
        return Call(form.name(f"{form.core}.multiarray", "scalar"), dtype, value.tobytes())
    reconstruct = form.name(f"{form.core}.multiarray", "_reconstruct")
    state = (1, value.shape, dtype, False, value.tobytes())
    return Call(reconstruct, form.name("numpy", "ndarray"), (0,), b"b", state=state)


def tf_network(form, table, arrays, net, path="", changes=None):
    """A network from golden JSON and arrays ('<net>|<component path>|<variable>')."""
    state = {"version": table["version"], "name": table["name"], "static_kwargs": dict(table["static_kwargs"])}
    state["components"] = {
        name: tf_network(form, part, arrays, net, f"{path}/{name}".lstrip("/"))
        for name, part in table["components"].items()
    }
    state |= {"build_module_src": SOURCE, "build_func_name": table["build_func_name"]}
    state["variables"] = [(name, tf_array(form, arrays[f"{net}|{path}|{name}"])) for name, *_ in table["variables"]]
    return New(form.name("dnnlib.tflib.network", "Network"), {**state, **(changes or {})})


def tf_file(form, table, arrays, changes=None):
    """(G, D, Gs), with Gs for G as well; `changes`: name of a network → entries of its state to replace."""
    changes = changes or {}
    nets = [tf_network(form, table[name], arrays, name, changes=changes.get(name)) for name in ("Gs", "D", "Gs")]
    return form.dumps(tuple(nets))


def write(path, data) -> Path:
    path = Path(path)
    path.write_bytes(data)
    return path
