"""Seeds: NVIDIA's latents, the same labels for all, nothing that depends on batches."""

import numpy as np
import pytest
import torch

from refine.images import to_uint8
from refine.metrics.sampling import latents_of_seeds, sample_images, sample_teacher
from refine.networks.edm import EDMPrecond
from refine.networks.sampler import heun_sampler
from refine.networks.sampler_settings import SamplerSettings
from refine.networks.stylegan2 import Generator
from tests.metrics.networks import PlainGenerator


def gather(batches):
    images, classes = zip(*batches, strict=True)
    return torch.cat(images), None if classes[0] is None else torch.cat(classes)


def small_stylegan(c_dim=3):
    options = {"mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": {"channel_base": 128, "channel_max": 8}}
    G = Generator(z_dim=8, c_dim=c_dim, w_dim=8, img_resolution=16, img_channels=1, **options).eval()
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            parameter.data.fill_(0.5)
    return G


def test_latents_are_nvidias():
    z, classes = latents_of_seeds([3, 77], [16])
    assert classes is None and z.dtype == torch.float32
    for row, seed in zip(z, [3, 77], strict=True):
        np.testing.assert_array_equal(row, np.random.RandomState(seed).randn(1, 16)[0].astype(np.float32))


def test_labels_come_from_the_same_stream_after_z():
    stream = np.random.RandomState(5)
    stream.randn(1, 16)
    z, classes = latents_of_seeds([5], [16], num_classes=10)
    assert classes.tolist() == [stream.randint(10)]
    assert torch.equal(z, latents_of_seeds([5], [16])[0])
    asked_z, asked = latents_of_seeds([5, 6], [16], 10, [7, 2])
    assert asked.tolist() == [7, 2] and torch.equal(asked_z[:1], z)


def test_drawn_labels_are_uniform():
    counts = latents_of_seeds(range(4000), [1], 10)[1].bincount(minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.1 %


@pytest.mark.parametrize(
    "num_classes, classes, match", [(10, 10, "class 10 .*0 to 9"), (10, [1, -1], "class -1"), (0, 0, "unconditional")]
)
def test_impossible_classes_are_told(num_classes, classes, match):
    with pytest.raises(ValueError, match=match):
        latents_of_seeds([0, 1], [4], num_classes, classes)


def test_any_generator_is_sampled_batch_by_batch():
    G = PlainGenerator(c_dim=4)
    whole, classes = gather(sample_images(G, range(10), batch=10))
    parts, part_classes = gather(sample_images(G, range(10), batch=3))
    assert torch.equal(whole, parts) and torch.equal(classes, part_classes) and whole.dtype == torch.uint8
    z, drawn = latents_of_seeds(range(10), [64], 4)
    assert torch.equal(classes, drawn)
    assert torch.equal(whole.flatten(1)[:, 1:], to_uint8(z / 3)[:, 1:])


def test_stylegan_noise_is_reproducible_and_leaves_the_random_state_alone():
    G = small_stylegan()
    state = torch.get_rng_state()
    first, second = (gather(sample_images(G, range(6), batch=3))[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    const, in_other_batches = (gather(sample_images(G, range(6), batch=n, noise_mode="const"))[0] for n in (6, 4))
    assert torch.equal(const, in_other_batches) and not torch.equal(const, first)


def test_truncation_reaches_the_generator():
    G = small_stylegan()
    untruncated, mean_image = (
        gather(sample_images(G, range(4), noise_mode="const", truncation_psi=psi, classes=1))[0] for psi in (1, 0)
    )
    assert not torch.equal(untruncated, mean_image) and (mean_image == mean_image[0]).all()


def test_teacher_is_sampled_by_heun():
    teacher = EDMPrecond(
        8, 1, label_dim=3, model_type="SongUNet", model_channels=16, channel_mult=[1], num_blocks=1
    ).eval()
    images, classes = gather(sample_teacher(teacher, range(3), batch=2, settings=SamplerSettings(3)))
    noise, drawn = latents_of_seeds(range(3), [1, 8, 8], 3)
    with torch.no_grad():
        expected = heun_sampler(teacher, noise, torch.nn.functional.one_hot(drawn, 3).float(), num_steps=3)
    assert torch.equal(classes, drawn)
    assert (images.int() - to_uint8(expected).int()).abs().max() <= 1  # rounding of float32 may cross a level


def test_fresh_noise_belongs_to_the_seed():
    teacher = EDMPrecond(8, 1, model_type="SongUNet", model_channels=16, channel_mult=[1], num_blocks=1).eval()
    settings = SamplerSettings(4, S_churn=40, S_noise=1.003)
    images = [gather(sample_teacher(teacher, [5, 6, 7], batch=batch, settings=settings))[0].int() for batch in (1, 3)]
    still = gather(sample_teacher(teacher, [5, 6, 7], settings=SamplerSettings(4)))[0].int()
    assert (images[0] - images[1]).abs().max() <= 1 < (images[0] - still).abs().max()
    state = torch.get_rng_state()
    again = gather(sample_teacher(teacher, [7], settings=settings))[0].int()
    assert (again[0] - images[0][2]).abs().max() <= 1 and torch.equal(torch.get_rng_state(), state)


def test_nan_images_are_told_with_their_seed():
    class Broken(PlainGenerator):
        def forward(self, z, c):
            x = super().forward(z, c)
            x[1] = float("nan")
            return x

    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3 images, first for seed 11"):
        gather(sample_images(Broken(), range(10, 13)))
