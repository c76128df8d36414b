"""The same iteration as a straightforward port would do it: what `iteration.py` compares with.

float32, eager, the default memory layout; one kernel per sample in modulated convolutions; reference ops; the U-Net's
box filter as plain depthwise convolutions; attention written out; fresh noise for each network; Adam and the
moving average tensor by tensor; losses read after every step.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F

from refine.config import RefineConfig
from refine.networks import edm_layers, stylegan2_layers
from refine.noise import SigmaLaw
from refine.torch_utils.ops import native
from refine.torch_utils.ops.conv2d_resample import conv2d_resample
from refine.training.rates import learning_rates


def modulated_conv2d(
    x, weight, styles, up=1, padding=0, resample_filter=None, demodulate=True, fused=None, scaled=False
):
    """StyleGAN2, eqs. 1–3, in their order: scale the kernels of each sample, demodulate them, convolve in groups."""
    n, (o, i, k, _) = len(x), weight.shape
    w = weight[None] * styles[:, None, :, None, None]
    d = (w.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).rsqrt() if demodulate is not False else 1
    w = d * (weight[None] if scaled else w)
    x, w = x.reshape(1, n * i, *x.shape[2:]), w.reshape(n * o, i, k, k)
    x = conv2d_resample(x, w, f=resample_filter, up=up, padding=padding, flip_weight=up == 1, groups=n)
    return x.reshape(n, o, *x.shape[2:]), None


def scaled_dot_product(q, k, v):
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / q.shape[2] ** 0.5).softmax(dim=3)
    return torch.einsum("nhqk,nhck->nhcq", weights, v)


@contextmanager
def plain_layers(networks):
    """The layers as a port would write them, inside."""
    convs = [m for network in networks for m in network.modules() if isinstance(m, edm_layers.Conv2d)]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(native, "choose", lambda op, x, impl: "ref"))
        stack.enter_context(mock.patch.object(stylegan2_layers, "modulated_conv2d", modulated_conv2d))
        stack.enter_context(mock.patch.object(edm_layers, "scaled_dot_product", scaled_dot_product))
        for conv in convs:
            stack.enter_context(mock.patch.object(conv, "box_filter", False))
        yield


class NaiveIteration:
    """`Trainer.step` for one batch, with the mathematics of `refine.diff_instruct` and none of its care.

    Args:
        config: Batch, rates and noise levels.
        G, aux, teacher: On their device, in the default memory layout; trained in place.
    """

    def __init__(self, config: RefineConfig, G, G_ema, aux, teacher, device):
        self.config, self.device = config, device
        self.G, self.G_ema, self.aux, self.teacher = G, G_ema, aux, teacher
        plain = {"eps": 1e-8, "foreach": False, "fused": False}
        lr, aux_lr = learning_rates(config, G, teacher)
        self.student_optimizer = torch.optim.Adam(G.parameters(), lr=lr, betas=config.betas, **plain)
        self.aux_optimizer = torch.optim.Adam(aux.parameters(), lr=aux_lr, betas=config.aux_betas, **plain)
        self.law = SigmaLaw()

    def step(self) -> tuple[float, float]:
        with plain_layers((self.G, self.aux, self.teacher)):
            losses = self._aux_step(), self._student_step()
        for target, source in zip(self.G_ema.parameters(), self.G.parameters(), strict=True):
            target.data.mul_(0.999).add_(source.data, alpha=0.001)
        return losses

    def _fakes(self):
        n = self.config.batch
        z = torch.randn(n, self.G.z_dim, device=self.device)
        c = F.one_hot(torch.randint(self.G.c_dim, [n], device=self.device), self.G.c_dim).float()
        return self.G(z, c), c, self.law.sample(n, self.device)

    def _aux_step(self) -> float:
        self.aux_optimizer.zero_grad()
        with torch.no_grad():
            x, c, sigma = self._fakes()
        D_x = self.aux(x + sigma * torch.randn_like(x), sigma, c)
        loss = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (D_x - x) ** 2).sum(dim=[1, 2, 3]).mean()
        loss.backward()
        self.aux_optimizer.step()
        return loss.item()

    def _student_step(self) -> float:
        self.student_optimizer.zero_grad()
        x, c, sigma = self._fakes()
        with torch.no_grad():
            D_teacher = self.teacher(x + sigma * torch.randn_like(x), sigma, c)
            D_aux = self.aux(x + sigma * torch.randn_like(x), sigma, c)
        loss = ((D_aux - D_teacher) * x).sum(dim=[1, 2, 3]).mean()
        loss.backward()
        self.student_optimizer.step()
        return loss.item()
