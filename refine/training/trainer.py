"""One iteration of refinement around `diff_instruct`: three networks, two optimisers, and what they learn from."""

import copy
import math
from typing import Any

import torch

from refine.config import RefineConfig
from refine.diff_instruct import aux_loss
from refine.guidance import guided
from refine.networks.bases import Denoiser, Generator
from refine.noise import SigmaLaw, make_weighting
from refine.objectives import make_objective
from refine.pair import check_label_dist, check_pair, draw_labels
from refine.torch_utils import distributed
from refine.torch_utils.batch_slice import micro_batches
from refine.torch_utils.misc import RunningMeans, gradient_norm
from refine.training.diversity import distance_gradient
from refine.training.ema import ema_beta, update_ema
from refine.training.precision import LossScale, compile_networks, set_precision

# Where the gap between aux and teacher is reported: bins of the noise level.
SIGMA_EDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
GAP_NAMES = [
    f"Gap/sigma_{low:g}-{high:g}" for low, high in zip((0, *SIGMA_EDGES), (*SIGMA_EDGES, math.inf), strict=True)
]

MAX_CLASSES = 20  # the gap is reported for each class where there are no more


class Trainer:
    """Refines a student with a teacher, step by step; `refine.training.loop` calls it and writes the files.

    Args:
        config: All options.
        student: Generator G(z, c), float32; its weights are where the run starts.
        teacher: Denoiser D(x, sigma, c); where its images or classes differ from the student's, `bridge` joins them.
        device: Where the networks run.

    Attributes:
        remarks: Lines on what --precision and --compile could not do on this machine.

    Raises:
        ValueError: The networks do not fit together, or the options name an impossible law or weighting.
    """

    def __init__(
        self,
        config: RefineConfig,
        student: Generator,
        teacher: Denoiser,
        device: torch.device | str = "cpu",
    ):
        self.bridge = check_pair(student, teacher)
        self.config, self.device = config, torch.device(device)
        self.sigma = SigmaLaw(**vars(config.sigma))
        self.aux_sigma = SigmaLaw(**vars(config.aux_sigma))
        self.weighting = make_weighting(config.weighting)
        self.objective = make_objective(config.objective, config.sid_alpha)
        self.label_prior = check_label_dist(config.label_dist, student, teacher)

        torch.manual_seed(config.seed)
        self.teacher = copy.deepcopy(teacher).to(self.device, memory_format=torch.channels_last)
        self.teacher.eval().requires_grad_(False)
        self.aux = copy.deepcopy(teacher).to(self.device, memory_format=training_format(teacher, self.device))
        self.aux.train(config.dropout).requires_grad_(True)
        self.G = copy.deepcopy(student).to(self.device, memory_format=training_format(student, self.device)).train()
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        # As it came; of the given weights also in a resumed run.
        self.G_start = copy.deepcopy(self.G).requires_grad_(False) if config.keep_distances else None
        self.student_parameters = select_parameters(self.G, config.train)
        # eps as published; lr is set before every step.
        # Fused, Adam reads and writes its tensors once: 2.5 to 6 times as fast on a CPU. And it can skip a step without
        # the host knowing.
        options = {"eps": 1e-8, "fused": True}
        self.student_optimizer = torch.optim.Adam(self.student_parameters, betas=config.betas, **options)
        self.aux_optimizer = torch.optim.Adam(self.aux.parameters(), betas=config.aux_betas, **options)
        self.skips = {name: SkippedSteps(self.device) for name in ("student", "aux")}

        computing = (self.G, self.aux, self.teacher)
        remark = set_precision(config.precision, computing, self.device)
        self.remarks = [remark] if remark else []
        if config.compile and (remark := compile_networks(computing, self.device)):
            self.remarks.append(remark)
        self.loss_scales = {name: LossScale(config.precision, self.device) for name in ("student", "aux")}
        self.null_label = self.teacher.has_null_label
        if config.guidance != 1:
            self.teacher = guided(self.teacher, config.guidance)
        self._kept = []  # with --reuse-batch: images, still joined to G, latents, labels of the last auxiliary step
        self._sigma_edges = torch.tensor(SIGMA_EDGES, device=self.device)

        self.nimg = 0  # images through the student step
        self.warmup_steps_done = 0
        self.means = RunningMeans(self.device)

    # One iteration.

    def step(self) -> None:
        """The auxiliary steps and the student step of one iteration, and the moving average."""
        for index in range(self.config.aux_steps):
            keep = self.config.reuse_batch and index == self.config.aux_steps - 1
            self.aux_step(self.config.aux_lr, keep)
        self.student_step(self.config.lr * self.config.lr_factor(self.nimg))
        beta = ema_beta(self.config.batch, self.nimg, self.config.ema_kimg, self.config.ema_rampup)
        update_ema(self.G_ema, self.G, beta)
        self.nimg += self.config.batch

    def aux_step(self, lr: float, keep: bool = False) -> None:
        """One step of aux on fresh images of the student, which are kept for the student step if `keep`."""
        self.aux_optimizer.zero_grad(set_to_none=True)
        for z, c, drawing in self._micro_batches():
            with drawing:
                with torch.set_grad_enabled(keep):
                    x = self.bridge.images(self._images(self.G, z, c))
                sigma = self.aux_sigma.sample(len(x), self.device)
                loss = aux_loss(self.aux, x, self._teacher_labels(c, len(x)), sigma)
            self.loss_scales["aux"].scale(loss.sum() / self.config.batch).backward()
            self.means.add("Loss/aux", loss)
            if keep:
                self._kept.append((x, z, c))
        self._optimize("aux", self.aux_optimizer, list(self.aux.parameters()), lr)

    def student_step(self, lr: float) -> None:
        """One step of the student along the objective's gradient."""
        self.student_optimizer.zero_grad(set_to_none=True)
        for z, c, drawing in self._micro_batches():
            with drawing:
                if self._kept:
                    x, z, c = self._kept.pop(0)
                else:
                    x = self.bridge.images(self._images(self.G, z, c))
                sigma = self.sigma.sample(len(x), self.device)
                labels = self._teacher_labels(c, len(x))
                gradient, gap = self.objective(self.teacher, self.aux, x.detach(), labels, sigma, self.weighting)
                # ikl has no value, only a gradient: its mean square over pixels is reported.
                self.means.add("Loss/student_gradient", gradient.square().mean(dim=[1, 2, 3]))
                if self.G_start is not None:
                    gradient = gradient + self.config.keep_distances * self._distance_gradient(x, z, c)
            x.backward(self.loss_scales["student"].scale(gradient / self.config.batch))
            self._report_gap(gap, sigma, c)
            self._report_diversity(x.detach(), c)
        self._optimize("student", self.student_optimizer, self.student_parameters, lr)

    def _optimize(self, name: str, optimizer: torch.optim.Optimizer, parameters: list, lr: float) -> None:
        """Gradients summed over the processes, and a step with them unless they are NaN or infinite."""
        distributed.sum_gradients(parameters)
        self.loss_scales[name].unscale(parameters)
        norm = gradient_norm(parameters)
        self.loss_scales[name].update(norm)
        self.means.add(f"Grad/{name}", norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.skips[name].step(optimizer, norm)

    def _micro_batches(self):
        """(z, c, context for random draws) of the micro-batches that make up this process's share of one batch.

        The numbers drawn do not depend on how the batch is cut; gradients differ by the order of additions only.
        The student's running mean of w, which every forward moves, becomes that of the whole batch, too.
        """
        z, c = self._latents()
        n = self.config.batch
        size = self.config.batch_gpu or n
        cut = distributed.world_size() > 1 or size < n
        buffers = [buffer for buffer in self.G.buffers() if cut and buffer.is_floating_point()]
        before = [buffer.clone() for buffer in buffers]
        moves = [torch.zeros_like(buffer) for buffer in buffers]
        for rows, drawing in micro_batches(n, size, distributed.rank(), distributed.world_size(), self.device):
            yield z[rows], None if c is None else c[rows], drawing
            share = (rows.stop - rows.start) / n
            for move, buffer, old in zip(moves, buffers, before, strict=True):
                move.add_(buffer - old, alpha=share)
                buffer.copy_(old)
        distributed.sum_tensors(moves)
        for move, buffer in zip(moves, buffers, strict=True):
            buffer.add_(move)

    def _latents(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents and labels of one whole batch, the same in every process."""
        n = self.config.batch
        z = torch.randn(n, self.G.z_dim, device=self.device)
        return z, draw_labels(n, self.G.c_dim, self.label_prior, self.device) if self.G.c_dim else None

    def _teacher_labels(self, c: torch.Tensor | None, n: int) -> torch.Tensor | None:
        """What teacher and aux are told of images with the student's labels c, by the rules of `refine.bridge`."""
        classes = self.bridge.teacher[2]
        if classes and c is None and not self.null_label:
            return draw_labels(n, classes, self.label_prior, self.device)
        return c if classes else None

    def _images(self, G: Generator, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        return G(z, c, **G.accepted(noise_mode=self.config.noise_mode))

    @torch.no_grad()
    def _distance_gradient(self, x: torch.Tensor, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        gradient = distance_gradient(x, self.bridge.images(self._images(self.G_start, z, c)))
        self.means.add("Loss/distances", gradient.square().mean(dim=[1, 2, 3]))
        return gradient

    def _report_gap(self, gap: torch.Tensor, sigma: torch.Tensor, c: torch.Tensor | None) -> None:
        """mean|D_aux − D_teacher| by noise level and by class."""
        self.means.add_binned(GAP_NAMES, torch.bucketize(sigma.flatten(), self._sigma_edges), gap)
        if c is not None and c.shape[1] <= MAX_CLASSES:
            names = [f"Gap/class_{index}" for index in range(c.shape[1])]
            self.means.add_binned(names, c.argmax(dim=1), gap)

    def _report_diversity(self, x: torch.Tensor, c: torch.Tensor | None) -> None:
        """Standard deviation of pixels within the batch, and within its classes."""
        if len(x) < 2:
            return
        self.means.add("Diversity/batch_spread", x.var(dim=0).mean().sqrt())
        if c is not None:  # variance around class means, from sums: no loop over classes, no synchronisation
            count = c.sum(dim=0).clamp_min(1)
            x = x.flatten(1)
            centre = (c.t() @ x) / count[:, None]
            freedom = (c.sum(dim=0) - 1).clamp_min(0).sum().clamp_min(1)
            within = (x - c @ centre).square().sum(dim=0) / freedom
            self.means.add("Diversity/class_spread", within.mean().sqrt())

    # The state that a resumed run needs.

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes from step to step; plain tensors and numbers."""
        return {
            "networks": {name: getattr(self, name).state_dict() for name in ("G", "G_ema", "aux")},
            "student_optimizer": self.student_optimizer.state_dict(),
            "aux_optimizer": self.aux_optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "nimg": self.nimg,
            "warmup_steps_done": self.warmup_steps_done,
            "loss_scales": {name: scale.state for name, scale in self.loss_scales.items()},
            "skips": {name: skips.counts for name, skips in self.skips.items()},
            "means": self.means.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result, with networks made from the same files.

        Raises:
            ValueError: The state is of other networks.
        """
        try:
            for name, values in state["networks"].items():
                getattr(self, name).load_state_dict(values)
            self.student_optimizer.load_state_dict(state["student_optimizer"])
            self.aux_optimizer.load_state_dict(state["aux_optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the training state does not fit the networks of --gan and --teacher: {reason}") from None
        for name, scale in self.loss_scales.items():
            scale.state.copy_(state["loss_scales"][name])
        for name, skips in self.skips.items():
            skips.counts.copy_(state["skips"][name])
        self.means.load_state_dict(state["means"])
        self.nimg, self.warmup_steps_done = state["nimg"], state["warmup_steps_done"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


class SkippedSteps:
    """Steps of an optimiser with NaN or infinite gradients are left out, and counted.

    One such gradient would end in Adam's moments and stay there. The counts live on the device.
    """

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # in all, in a row until now

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
        """A step if `norm`, that of all gradients, is finite."""
        broken = ~norm.isfinite()
        self.counts += broken
        self.counts[1] *= broken
        if optimizer.defaults["fused"]:
            optimizer.grad_scale, optimizer.found_inf = None, broken.float()  # decided on the device: no waiting
            optimizer.step()
        elif not broken:  # on a CPU there is nothing to wait for
            optimizer.step()

    def read(self) -> tuple[int, int]:
        """(in all, in a row until now); a CPU–GPU synchronisation."""
        total, row = self.counts.tolist()
        return total, row


def training_format(network: torch.nn.Module, device: torch.device) -> torch.memory_format:
    """The memory format in which a network trains fastest.

    On a CPU channels_last makes every forward pass faster (1.05 to 1.14 times) but, in wide networks, weight gradients
    slower. Forward and backward, contiguous and channels_last: 88 and 77 ms for the shipped student, 247 and 232 for
    its U-Net; 1.6 and 2.1 s, 4.1 and 4.7 s for those of CIFAR-10's size. (torch 2.13, one thread, AVX2)
    """
    wide = any(p.ndim == 4 and p.shape[1] >= 256 for p in network.parameters())
    return torch.contiguous_format if wide and device.type == "cpu" else torch.channels_last


def select_parameters(G: Generator, train: str) -> list[torch.nn.Parameter]:
    """The parameters of the part of the student that is to move; gradients of the rest are switched off.

    Raises:
        ValueError: The generator has no such part.
    """
    if train not in G.trainable_parts:
        parts = " or ".join(G.trainable_parts)
        raise ValueError(f"--train is {train}, but this generator has no part of that name; expected {parts}")
    G.requires_grad_(train == "all")
    part = G.part(train)
    part.requires_grad_(True)
    return list(part.parameters())
