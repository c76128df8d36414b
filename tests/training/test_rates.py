"""Learning rates that follow from the kind of network and the batch."""

import math

import pytest

from refine.config import RefineConfig
from refine.networks.bases import TrainingRate
from refine.networks.edm import EDMPrecond
from refine.networks.one_step import OneStepGenerator
from refine.training.rates import STUDENT_SHARE, learning_rates
from tests.training.test_trainer import make_student, make_teacher


def test_rates_of_other_batches_follow_the_square_root():
    assert TrainingRate(1e-3, 512).at(32) == pytest.approx(2.5e-4)


def test_each_network_learns_at_the_rate_of_its_kind():
    teacher = make_teacher()  # width 8
    assert learning_rates(RefineConfig("g", "t", batch=64), make_student(), teacher) == pytest.approx(
        (STUDENT_SHARE * 2.5e-3, 1e-3 * 128 / 8 / math.sqrt(8))
    )
    G = OneStepGenerator.from_teacher(teacher, 1.0)
    lr, aux_lr = learning_rates(RefineConfig("one-step", "t"), G, teacher)
    assert lr == pytest.approx(STUDENT_SHARE * aux_lr / 10)


def test_the_two_families_of_u_nets_have_rates_of_their_own():
    small = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    song, adm = (EDMPrecond(8, 1, 0, model_type=name, **small) for name in ("SongUNet", "DhariwalUNet"))
    assert song.training_rate == pytest.approx((4e-3, 512)) and adm.training_rate == pytest.approx((6e-4, 4096))


def test_given_rates_are_taken():
    config = RefineConfig("g", "t", lr=0.0, aux_lr=3e-4)
    assert learning_rates(config, make_student(), make_teacher()) == (0.0, 3e-4)
