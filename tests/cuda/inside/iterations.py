"""Whole iterations of a `Trainer` on the device that is not there, and the same on the CPU. Prints JSON:

{name: {"events": what was waited for or copied, "hosts": tensors that are not on the device, "gradients": {network:
(angle, ratio of lengths) to the CPU's}}}; a text instead where a case cannot be tried here.
"""

import json
import sys

from tests.cuda import fake_device

DEVICE = fake_device.install()

import torch

from refine.config import RefineConfig
from refine.networks.ddpm import DDPMPrecond
from refine.networks.edm import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from refine.networks.edm2 import Precond
from refine.networks.one_step import OneStepGenerator
from refine.networks.stylegan2 import Generator
from refine.training import trainer as trainer_module
from refine.training.adversary import Others
from refine.training.trainer import Trainer

BATCH = 4
FIRST, WATCHED = 11, range(12, 16)  # iterations: with a penalty, with lag and signal measured, and Pace.end
SONG = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [8]}
NCSN = {**SONG, "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
NCSN |= {"decoder_type": "standard", "resample_filter": [1, 3, 3, 1]}
EDM2 = {"model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8]}
ADM = {"model_type": "DhariwalUNet", **EDM2}
DDPM = {"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
DDPM |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}


def student(classes=3, resolution=8, channels=3):
    synthesis = {"channel_base": 64, "channel_max": 8, "conv_clamp": 256}
    return Generator(8, classes, 8, resolution, channels, {"num_layers": 2}, synthesis)


def teacher(family=EDMPrecond, classes=3, **options):
    return family(8, 3, classes, **(options or SONG))


def pair(G=student, T=teacher):
    """Both with random weights; what begins at zero would hide what is behind it."""
    torch.manual_seed(0)
    networks = G(), T()
    for network in networks:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return networks


def one_step():
    _, T = pair(T=lambda: teacher(augment_dim=9, **SONG))
    return OneStepGenerator.from_teacher(T, 2.5), T


def bridged():
    """64×64 grey without classes to 32×32 RGB with classes and label dropout."""
    kwargs = {**SONG, "attn_resolutions": [16], "label_dropout": 0.1}
    return pair(lambda: student(0, 64, 1), lambda: EDMPrecond(32, 3, 3, **kwargs))


def with_drawn_labels():
    """A student without classes, and a teacher that knows no missing label."""
    return pair(lambda: student(0))


def bank():
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(256, [12, 3, 8, 8], generator=drawn, dtype=torch.uint8, device="cpu")
    return Others(images, torch.arange(12) % 3, 3, DEVICE), Others(images, torch.arange(12) % 3, 3, torch.device("cpu"))


CASES = {
    **{precision: (pair, {"precision": precision}) for precision in ("fp32", "tf32", "bf16", "fp16")},
    **{objective: (pair, {"objective": objective}) for objective in ("dmd", "sid", "sim", "ikl+sid")},
    "VP": (lambda: pair(T=lambda: teacher(VPPrecond, **SONG)), {}),
    "VE": (lambda: pair(T=lambda: teacher(VEPrecond, **NCSN)), {}),
    "iDDPM": (lambda: pair(T=lambda: teacher(iDDPMPrecond, **ADM)), {}),
    "EDM2": (lambda: pair(T=lambda: teacher(Precond, **EDM2)), {"dropout": True}),
    "DDPM": (lambda: pair(T=lambda: teacher(DDPMPrecond, **DDPM)), {}),
    "one-step": (one_step, {"gan": "one-step"}),
    "bridge": (bridged, {}),
    "drawn labels": (with_drawn_labels, {"batch_gpu": 2}),
    "critic": (pair, {"adversarial": 0.3}),
    "label-dist": (pair, {"label_dist": (1.0, 2.0, 3.0)}),
    "aux-steps": (pair, {"aux_steps": "auto"}),
    "micro-batches": (pair, {"batch_gpu": 2, "adversarial": 0.3, "aux_dropout": 0.2, "aux_augment": 0.5}),
    "regularised": (lambda: pair(T=lambda: teacher(augment_dim=9, **SONG)), {"aux_dropout": 0.2, "aux_augment": 0.5}),
    "distances": (pair, {"keep_distances": 0.5, "clip": 0.1, "aux_clip": 0.1, "reuse_batch": True, "clamp": True}),
    "averages": (pair, {"average": "power", "average_lengths": (0.05, 0.1)}),
    "guidance": (lambda: pair(T=lambda: teacher(label_dropout=0.1, **SONG)), {"guidance": 1.5}),
    "const noise": (pair, {"noise_mode": "const", "weighting": "sigma^-1", "lr_schedule": "cosine"}),
}


def same_formats():
    """On the CPU, too, networks have a GPU's memory formats: noise is drawn in the order of memory."""
    of_a_gpu = trainer_module.inference_format
    trainer_module.inference_format = lambda precision, device: of_a_gpu(precision, DEVICE)
    trainer_module.training_format = lambda network, precision, device: of_a_gpu(precision, DEVICE)


def trainer(networks, device, others, **options):
    defaults = {"gan": "g", "adversarial": 0.0, "average": "ema", "precision": "fp32"}
    config = RefineConfig(teacher="t", batch=BATCH, lr=1e-3, aux_lr=1e-3, **{**defaults, **options})
    return Trainer(config, *networks, device, others if config.adversarial else None)


def gradients(mine):
    """Of student, aux and critic after one step of each at rate 0; aux is moved from the teacher first."""
    with torch.no_grad():
        for parameter in mine.aux.parameters():
            parameter.mul_(1.1)
    torch.manual_seed(1)
    mine.aux_step(0.0, keep=mine.config.reuse_batch)
    mine.critic_step()
    mine.student_step(0.0)
    return {
        name: torch.cat([p.grad.flatten().cpu().double() for p in optimizer.parameters if p.grad is not None])
        for name, optimizer in mine.optimizers.items()
    }


def compare(mine, theirs):
    found = gradients(mine), gradients(theirs)
    result = {}
    for name, expected in found[1].items():
        cosine = torch.nn.functional.cosine_similarity(found[0][name], expected, dim=0)
        result[name] = (1 - cosine.item(), (found[0][name].norm() / expected.norm()).item(), expected.norm().item())
    return result


def hosts(mine):
    """What is not on the device, of all that a trainer holds."""
    modules = [
        mine.G,
        mine.G_ema,
        mine.aux,
        mine.teacher,
        *filter(None, [mine.G_start, mine.adversary and mine.critic]),
    ]
    found = [name for module in modules for name, x in module.state_dict().items() if not x.is_cuda]
    for name, optimizer in mine.optimizers.items():
        states = [x for state in optimizer.adam.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        found += [f"the optimiser of {name}"] * any(not x.is_cuda for x in states)
    return found


def tried(make, options):
    try:
        networks = make()
    except ValueError as error:
        if "diffusers is missing" in str(error):
            return str(error)
        raise
    on_device, on_host = bank()
    compared = compare(
        trainer(networks, DEVICE, on_device, **options), trainer(networks, torch.device("cpu"), on_host, **options)
    )
    mine = trainer(networks, DEVICE, on_device, **options)
    mine.nimg = FIRST * BATCH
    for optimizer in mine.optimizers.values():
        optimizer.steps = FIRST
    mine.step()  # Adam makes its state
    with fake_device.watched() as events:
        for _ in WATCHED:
            mine.step()
    return {"events": events, "hosts": hosts(mine), "gradients": compared}


if __name__ == "__main__":
    same_formats()
    names = sys.argv[1:] or list(CASES)
    print(json.dumps({name: tried(*CASES[name]) for name in names}))
