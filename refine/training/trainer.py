"""One iteration of refinement around `diff_instruct`: three networks, two optimisers, and what they learn from."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from refine.config import RefineConfig
from refine.diff_instruct import aux_loss
from refine.guidance import Autoguided, Guided
from refine.images import clamp_images
from refine.networks.bases import Denoiser, Generator
from refine.noise import SigmaLaw, make_weighting
from refine.objectives import make_objective
from refine.pair import check_label_dist, check_pair
from refine.torch_utils.misc import RunningMeans
from refine.training.adversary import LEARNING_RATE as CRITIC_LR
from refine.training.adversary import PENALTY_EVERY, Adversary, Others
from refine.training.averages import PowerAverages
from refine.training.batches import Batches, Fakes, MicroBatch
from refine.training.diversity import distance_gradient
from refine.training.ema import ema_beta, update_emas
from refine.training.graphs import Graphs, why_none
from refine.training.observe import Observer
from refine.training.optimise import GuardedAdam
from refine.training.pace import Pace
from refine.training.precision import (
    chosen_precision,
    inference_format,
    prepare,
    training_format,
    tuned_convolutions,
)
from refine.training.rates import learning_rates
from refine.training.regularise import AUGMENT_DIM, Augmentation, set_dropout

_Task = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]  # images, labels, σ, noise


class Trainer:
    """Refines a student with a teacher, step by step; `refine.training.loop` calls it and writes the files.

    Args:
        config: All options.
        student: Generator G(z, c), float32; its weights are where the run starts.
        teacher: Denoiser D(x, sigma, c); where its images or classes differ from the student's, `bridge` joins them.
        device: Where the networks run.
        others: Images that a critic compares the student's with; needed with --adversarial.
        guide: What guides the teacher with config.guidance; without it, guidance is classifier-free.

    Attributes:
        G, aux, teacher: The student, the auxiliary network, the teacher.
        lr, aux_lr: Their learning rates at full height: those of the options, or what `rates` says of the networks.
        averages: Power-function averages of the student, one per length; none with --average=ema.
        G_ema: The longest of them, or the exponential moving average.
        adversary: The critic of --adversarial, or None.
        pace: How many auxiliary steps an iteration has.
        precision: What the networks compute in: --precision, or what auto means here.
        graphs: The CUDA graphs of the steps.
        optimizers: Those of 'student' and 'aux', and of 'critic' where there is one.
        nimg: Images through the student step.
        rate_factor: What both learning rates are multiplied with; less than 1 after a run went back (`--rollback`).
        remarks: Lines on what --precision and --compile could not do on this machine.

    Raises:
        ValueError: The networks do not fit together, or the options name an impossible distribution of noise levels,
            weighting or objective.
    """

    def __init__(
        self,
        config: RefineConfig,
        student: Generator,
        teacher: Denoiser,
        device: torch.device | str = "cpu",
        others: Others | None = None,
        guide: Denoiser | None = None,
    ):
        self.bridge = check_pair(student, teacher)
        self.config, self.device = config, torch.device(device)
        self.sigma = SigmaLaw(**vars(config.sigma))
        self.aux_sigma = SigmaLaw(**vars(config.aux_sigma))
        self.weighting = make_weighting(config.weighting)
        self.objective = make_objective(config.objective, vars(config))
        if needed := self.objective.further_networks:
            raise ValueError(f"--objective={config.objective} needs {', '.join(needed)}; expected one without")
        prior = check_label_dist(config.label_dist, student, teacher)
        prior = None if prior is None else prior.to(self.device)  # once: a copy in every draw would wait for a GPU
        self.lr, self.aux_lr = learning_rates(config, student, teacher)

        torch.manual_seed(config.seed)
        self.precision, remark = chosen_precision(config.precision, self.device)
        self.remarks = [remark] if remark else []
        formats = [training_format(network, self.precision, self.device) for network in (student, teacher)]
        seen_in = inference_format(self.precision, self.device)
        self.teacher = _copied(teacher, self.device, seen_in).eval().requires_grad_(False)
        self.aux = _copied(teacher, self.device, formats[1]).float().requires_grad_(True)
        self.aux.train(config.dropout or config.aux_dropout is not None)
        if config.aux_dropout is not None:
            set_dropout(self.aux, config.aux_dropout)
        self.augmentation = None
        if config.aux_augment:
            self.augmentation = Augmentation(config.aux_augment, self.aux.augment_dim == AUGMENT_DIM)
        self.G = _copied(student, self.device, formats[0]).train()
        self.averages = PowerAverages(self.G, config.average_lengths if config.average == "power" else ())
        self.G_ema = self.averages.longest() or copy.deepcopy(self.G).eval().requires_grad_(False)
        # As it came; of the given weights also in a resumed run.
        self.G_start = copy.deepcopy(self.G).requires_grad_(False) if config.keep_distances else None
        self.student_parameters = select_parameters(self.G, config.train)
        self.optimizers = {
            "student": GuardedAdam(self.student_parameters, config.betas, config.clip, self.precision, self.device),
            "aux": GuardedAdam(self.aux.parameters(), config.aux_betas, config.aux_clip, self.precision, self.device),
        }

        computing = [self.G, self.aux, self.teacher]
        guide = guide if config.guidance != 1 else None  # which would not be asked
        if guide is not None:
            guide = _copied(guide, self.device, torch.channels_last).eval().requires_grad_(False)
            computing.append(guide)
        self.remarks += prepare(computing, {self.G, self.aux}, self.precision, config.compile, self.device)
        self.adversary = None
        if config.adversarial:
            if others is None:
                raise ValueError(f"--adversarial is {config.adversarial}, but there are no images to compare with")
            self.adversary = Adversary(others, teacher.img_resolution, teacher.img_channels, self.device)
            self.critic = self.adversary.critic
            self.optimizers["critic"] = self.adversary.optimizer
        self.null_label = self.teacher.has_null_label
        if guide is not None:
            self.teacher = Autoguided(self.teacher, guide, config.guidance)
        elif config.guidance != 1:
            self.teacher = Guided(self.teacher, config.guidance)
        size = config.batch_gpu or config.batch
        classes = self.bridge.teacher[2]
        self.graphs = Graphs(self.device, why_none(config, self.device, computing))
        once = self.graphs.reason is None  # elsewhere micro-batches draw again, so that nothing needs to be kept
        self.batches = Batches(self.G, config.batch, size, prior, classes, self.null_label, self.device, once)
        self._kept: list[Fakes] = []  # with --reuse-batch: those of the last auxiliary step, still joined to G

        self.nimg = 0
        self.warmup_steps_done = 0
        self.rate_factor = 1.0
        self.pace = Pace(config.aux_steps, self.device)
        self.means = RunningMeans(self.device)
        self._observe = Observer(self.means, self.device)

    # One iteration.

    def warm_up_step(self) -> None:
        """A step of those who are to be ahead of the student before it moves."""
        with tuned_convolutions(self.device):
            self.aux_step(self.rate_factor * self.aux_lr)
            self.critic_step()
        self.warmup_steps_done += 1

    def step(self) -> None:
        """The steps of aux, critic and student in one iteration, and the moving average."""
        with tuned_convolutions(self.device):
            self._step()
        self.nimg += self.config.batch

    def _step(self) -> None:
        iteration, aux_lr = self.nimg // self.config.batch, self.rate_factor * self.aux_lr
        student_lr = self.rate_factor * self.lr * self.config.lr_factor(self.nimg)
        for _ in range(self.pace.steps - 1):
            self.aux_step(aux_lr)
        with self._measured_lag(self.pace.measures(iteration)):
            if not self.config.reuse_batch:
                self.aux_step(aux_lr)
            else:  # all at once: what aux has seen stays joined to the student until its step
                aux = {"aux": (aux_lr, functools.partial(self._aux_part, True))}
                self._take(aux | self._critic_steps() | {"student": (student_lr, self._student_part)})
        self.means.add("Aux/steps", float(self.pace.steps))
        self.pace.end(iteration)
        if not self.config.reuse_batch:
            self.critic_step()
            self.student_step(student_lr)
        self._average(before=self.nimg, now=self.nimg + self.config.batch)

    def _average(self, before: int, now: int) -> None:
        if self.averages.networks:
            self.averages.update(self.G, before, now)
        else:
            beta = ema_beta(now - before, before, self.config.ema_kimg, self.config.ema_rampup)
            update_emas([(self.G_ema, beta)], self.G)

    def aux_step(self, lr: float, keep: bool = False) -> None:
        """One step of aux on fresh images of the student, which are kept for the student step if `keep`."""
        self._take({"aux": (lr, functools.partial(self._aux_part, keep))})

    def critic_step(self) -> None:
        """With --adversarial, one step of the critic on fresh images of the student."""
        self._take(self._critic_steps())

    def student_step(self, lr: float) -> None:
        """One step of the student along the objective's gradient, and the critic's."""
        self._take({"student": (lr, self._student_part)})

    def _take(self, steps: dict[str, tuple[float, Callable[[], None]]]) -> None:
        """Steps of optimisers, name → (rate, what is done at that rate), as one part of the iteration."""
        if not steps:
            return
        optimizers = [self.optimizers[name] for name in steps]
        for optimizer, (lr, _) in zip(optimizers, steps.values(), strict=True):
            optimizer.begin(lr)

        def part() -> None:
            with self.means.together():
                for _, step in steps.values():
                    step()

        variant = (*(optimizer.phase for optimizer in optimizers), "critic" in steps and self._penalised)
        self.graphs.run(" and ".join(steps), variant, part)
        for optimizer in optimizers:
            optimizer.end()

    # What the steps do on the device, and nothing else: this may be recorded as a CUDA graph, see `graphs`.

    def _aux_part(self, keep: bool) -> None:
        optimizer = self.optimizers["aux"]
        optimizer.zero_grad()
        for batch in self.batches.micro_batches():
            with batch.drawing:
                x, task = self._auxiliary_task(batch, keep)
                loss = self._aux_loss(*task)
            loss.backward(optimizer.scale.scale(torch.full_like(loss, 1 / self.config.batch)))
            self.means.add("Loss/aux", loss)
            if keep:
                self._kept.append(Fakes(x, batch.z, batch.c))
        self._optimise("aux")

    def _auxiliary_task(self, batch: MicroBatch, keep: bool = False) -> tuple[torch.Tensor, _Task]:
        """Fresh images of the student, joined to it if `keep`; and what aux is to denoise."""
        with torch.set_grad_enabled(keep):
            x = self._images(self.G, batch.z, batch.c)
        sigma = self.aux_sigma.sample(len(x), self.device)
        labels = self.batches.teacher_labels(batch.c, len(x))
        return x, (x.detach(), labels, sigma, torch.randn_like(x))

    @contextmanager
    def _measured_lag(self, measured: bool) -> Iterator[None]:
        """Measures what the auxiliary step in the block gains, on images and noise that it does not see."""
        tasks = []
        for batch in self.batches.micro_batches() if measured else ():
            with batch.drawing, torch.no_grad():
                _, task = self._auxiliary_task(batch)
                tasks.append((task, aux_loss(self.aux, *task)))
        yield
        for task, before in tasks:
            with torch.no_grad():
                after = aux_loss(self.aux, *task)
            self.pace.add(before, after)
            self.means.add("Aux/lag", (before - after) / before.mean())

    def _critic_steps(self) -> dict[str, tuple[float, Callable[[], None]]]:
        return {} if self.adversary is None else {"critic": (self.rate_factor * CRITIC_LR, self._critic_part)}

    @property
    def _penalised(self) -> bool:
        return (self.warmup_steps_done + self.nimg // self.config.batch) % PENALTY_EVERY == 0

    def _critic_part(self) -> None:
        assert self.adversary is not None
        self.optimizers["critic"].zero_grad()
        for batch in self.batches.micro_batches():
            with batch.drawing:
                with torch.no_grad():
                    x = self._images(self.G, batch.z, batch.c)
                verdict = self.adversary.judge(x, batch.c, self._penalised)
            (verdict.loss.sum() / self.config.batch).backward()
            self.means.add("Loss/critic", verdict.loss)
            self.means.add("Critic/right", verdict.right)
        self._optimise("critic")

    def _student_part(self) -> None:
        optimizer = self.optimizers["student"]
        optimizer.zero_grad()
        for batch in self.batches.micro_batches():
            with batch.drawing:
                fakes = self._kept.pop(0) if self._kept else None
                if fakes is None:
                    fakes = Fakes(self._images(self.G, batch.z, batch.c), batch.z, batch.c)
                x, c = fakes.x, fakes.c
                sigma = self.sigma.sample(len(x), self.device)
                labels, noise = self.batches.teacher_labels(c, len(x)), torch.randn_like(x)
                found = self.objective(self.teacher, self.aux, x.detach(), labels, sigma, noise, self.weighting)
                gradient = found.gradient
                # ikl has no value, only a gradient: its mean square over pixels is reported.
                self.means.add("Loss/student_gradient", gradient.square().mean(dim=[1, 2, 3]))
                for tag in self.objective.logs:
                    self.means.add(tag, found.logged[tag])
                if self.adversary is not None:
                    gradient = gradient + self.config.adversarial * self._critic_gradient(x, c, gradient)
                if self.G_start is not None:
                    pull = self._distance_gradient(self.G_start, fakes)
                    gradient = gradient + self.config.keep_distances * pull
            x.backward(optimizer.scale.scale(gradient / self.config.batch))
            self._observe.gap(found.gap, sigma, c)
            self._observe.diversity(x.detach(), c)
        self._optimise("student")

    def _aux_loss(
        self, x: torch.Tensor, labels: torch.Tensor | None, sigma: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """`diff_instruct.aux_loss`, of augmented images where that is asked for."""
        aux: Any = self.aux
        if self.augmentation is not None:
            x, augment_labels = self.augmentation(x)
            if augment_labels is not None:
                aux = functools.partial(aux, augment_labels=augment_labels)
        return aux_loss(aux, x, labels, sigma, noise)

    def _images(self, G: Generator, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        """A student's images as the teacher takes them."""
        x = G(z, c, **G.accepted(noise_mode=self.config.noise_mode))
        return self.bridge.images(clamp_images(x) if self.config.clamp else x)

    def _optimise(self, name: str) -> None:
        """A step of an optimiser, and what is logged of its gradient."""
        optimizer = self.optimizers[name]
        self.means.add(f"Grad/{name}", optimizer.apply())
        if optimizer.signal is not None:
            self.means.add(f"Signal/{name}", optimizer.signal)

    def _critic_gradient(self, x: torch.Tensor, c: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """The critic's gradient, made as long as the objective's over the images that are computed at once."""
        assert self.adversary is not None
        gradient = self.adversary.gradient(x, c)
        norm = torch.linalg.vector_norm(gradient)
        return gradient * torch.where(norm > 0, torch.linalg.vector_norm(like) / norm, 0.0)

    @torch.no_grad()
    def _distance_gradient(self, G_start: Generator, fakes: Fakes) -> torch.Tensor:
        gradient = distance_gradient(fakes.x, self._images(G_start, fakes.z, fakes.c))
        self.means.add("Loss/distances", gradient.square().mean(dim=[1, 2, 3]))
        return gradient

    # The state that a resumed run needs.

    @property
    def stateful(self) -> tuple[str, ...]:
        """The networks that change."""
        return ("G", "G_ema", "aux", *(["critic"] if self.adversary else []))

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes from step to step; plain tensors and numbers."""
        return {
            "networks": {name: getattr(self, name).state_dict() for name in self.stateful},
            "averages": self.averages.state_dict(),
            **{f"{name}_optimizer": optimizer.adam.state_dict() for name, optimizer in self.optimizers.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "nimg": self.nimg,
            "warmup_steps_done": self.warmup_steps_done,
            "loss_scales": {name: optimizer.scale.state for name, optimizer in self.optimizers.items()},
            "steps": {name: optimizer.steps for name, optimizer in self.optimizers.items()},
            "skips": {name: optimizer.skips.counts for name, optimizer in self.optimizers.items()},
            "means": self.means.state_dict(),
            "pace": self.pace.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result, with networks made from the same files.

        Raises:
            ValueError: The state is of other networks.
        """
        try:
            for name, values in state["networks"].items():
                getattr(self, name).load_state_dict(values)
            self.averages.load_state_dict(state.get("averages", {}))
            for name, optimizer in self.optimizers.items():
                optimizer.adam.load_state_dict(state[f"{name}_optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the training state does not fit the networks of --gan and --teacher: {reason}") from None
        self.graphs.forget()
        for name, optimizer in self.optimizers.items():
            optimizer.forget()
            optimizer.scale.state.copy_(state["loss_scales"][name])
            optimizer.skips.counts.copy_(state["skips"][name])
            optimizer.steps = int(state.get("steps", {}).get(name, 0))
        self.means.load_state_dict(state["means"])
        if "pace" in state:
            self.pace.load_state_dict(state["pace"])
        self.nimg, self.warmup_steps_done = state["nimg"], state["warmup_steps_done"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def _copied(network: torch.nn.Module, device: torch.device, memory_format: torch.memory_format) -> Any:
    copied = copy.deepcopy(network)
    return copied.to(device, memory_format=memory_format)  # type: ignore[call-overload]  # torch's stubs leave it out


def select_parameters(G: Generator, train: str) -> list[torch.nn.Parameter]:
    """The parameters of the part of the student that is to be trained; the rest is frozen.

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
