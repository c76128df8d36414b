"""Several processes train as one, and end as one."""

import functools
import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from refine.checkpoints.native import save_networks
from refine.metrics.detectors import load_detector
from refine.metrics.references import save_reference
from refine.metrics.statistics import FeatureStatistics
from refine.torch_utils import distributed
from refine.training.finding import training_states
from refine.training.trainer import Trainer
from tests.launch import free_port, launch, launch_ranks, wait
from tests.training.test_trainer import make_student, make_teacher

STEPS = (
    "--kimg=0.032",
    "--batch=4",
    "--tick=0.016",
    "--snap=1",
    "--lr=0.001",
    "--aux-lr=0.001",
    "--desc=x",
    "--metrics=none",
    "--adversarial=0",
)
LAST = "00000-x/network-snapshot-000000.032.safetensors"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    student = make_student()
    with torch.no_grad():
        for name, p in student.named_parameters():
            if name.endswith("noise_strength"):
                p.fill_(0.5)
    save_networks(folder / "gan.safetensors", {"G_ema": student}, provenance={})
    save_networks(folder / "teacher.safetensors", {"ema": make_teacher()}, provenance={})
    return (f"--gan={folder}/gan.safetensors", f"--teacher={folder}/teacher.safetensors")


def texts(logs):
    return "\n".join(f"{log.name}: {log.read_text()}" for log in logs if log.exists())


def test_two_and_four_processes_equal_one(pair, tmp_path):
    """With random noise inputs and dropout, too: image i meets the same numbers however the batch is cut.

    What is left is the order of additions; Adam's division by the root of a squared gradient near zero may enlarge it.
    """
    options = (*pair, *STEPS, "--dropout=true", "--aux-warmup-kimg=0.008")
    log = tmp_path / "log.txt"
    assert wait([launch([*options, f"--outdir={tmp_path}/1"], log)]) == [0], texts([log])
    one = load_file(tmp_path / "1" / LAST)
    for count in (2, 4):
        (tmp_path / f"ranks{count}").mkdir()
        outdir = f"--outdir={tmp_path}/{count}"
        processes, logs = launch_ranks([*options, outdir], tmp_path / f"ranks{count}", count)
        assert wait(processes) == [0] * count, texts(logs)
        several = load_file(tmp_path / str(count) / LAST)
        moved = 0
        for name, value in one.items():
            error, scale = (value - several[name]).abs().max().item(), value.abs().max().item()
            assert error <= 2e-5 * max(scale, 1e-2), (count, name, error, scale)
            moved += not torch.equal(value, several[name])
        assert logs[1].read_text() == "" and f"processes   {count}" in logs[0].read_text()
        assert len(list((tmp_path / str(count)).iterdir())) == 1  # one run folder for all
    assert not torch.equal(one["G.synthesis.b8.conv1.weight"], make_student().synthesis.b8.conv1.weight)


class Pixels(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :5].float() / 255


def blind(_seed):
    raise RuntimeError("the parrot is blind")


def count_images_and_fail_the_second_metric(counts):
    from refine.metrics import named

    look, calls = named.sample_images, []

    def counted(G, seeds, **options):
        calls.append(len(seeds))
        (counts / f"rank{os.environ['RANK']}-counts.txt").write_text(" ".join(map(str, calls)))
        if len(calls) % 2 == 0 and os.environ.get("RANK") == "1":
            return map(blind, seeds)
        return look(G, seeds, **options)

    named.sample_images = counted


def test_all_ranks_measure_and_a_metric_that_fails_in_one_ends_nothing(pair, tmp_path):
    torch.jit.script(Pixels()).save(tmp_path / "pixels.pt")
    detector = load_detector(tmp_path / "pixels.pt", trust=True)
    features = FeatureStatistics(keep_features=True).update(torch.rand(30, 5))
    save_reference(tmp_path / "ref.npz", features, detector)
    metrics = ",".join(f"{kind}250-{tmp_path}/pixels.pt" for kind in ("fd", "kid"))
    options = (*pair, *STEPS, "--average=ema", "--trust-detector", f"--metrics={metrics}", f"--ref={tmp_path}/ref.npz")
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        prepare = functools.partial(count_images_and_fail_the_second_metric, folder)
        processes, logs = launch_ranks([*options, f"--outdir={folder}"], folder, count, prepare)
        assert wait(processes) == [0] * count, texts(logs)
        run = folder / "00000-x"
        lines = [json.loads(line)["results"] for line in (run / "metric-fd250-pixels.jsonl").read_text().splitlines()]
        found[count] = [(line["fd_pixels"], line["recall"], line["num"]) for line in lines]
        assert len(lines) == 3
        failures = logs[0].read_text().count("metric kid250-pixels failed: the parrot is blind")
        assert failures == (3 if count == 2 else 0), texts(logs)
        assert logs[0].read_text().count("metric kid250-pixels at") == (3 if count == 1 else 0)
    assert found[2][0] == pytest.approx(found[1][0], rel=1e-9) and found[2] != found[1]
    assert found[2][2] == pytest.approx(found[1][2], rel=1e-3)  # after training in another order of additions
    assert [(tmp_path / "2" / f"rank{rank}-counts.txt").read_text() for rank in range(2)] == [
        " ".join([share] * 6) for share in ("100", "150")
    ]


def test_two_ranks_generate_what_one_does(pair, tmp_path):
    network = pair[0].replace("--gan", "--network")
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        args = [network, "--seeds=0-10,40", "--batch=3", "--device=cpu", f"--outdir={tmp_path}/out{count}"]
        processes, logs = launch_ranks(args, tmp_path / str(count), count, command="generate")
        assert wait(processes) == [0] * count, texts(logs)
        out = f"{tmp_path}/out{count}"
        assert logs[0].read_text().endswith(f"12 images in {out}, a grid of them in {out}-grid.png\n")
    assert logs[1].read_text() == ""
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / f"out{count}").iterdir()} for count in (1, 2))
    assert one == two and len(one) == 12
    assert (tmp_path / "out1-grid.png").read_bytes() == (tmp_path / "out2-grid.png").read_bytes()


def test_what_one_rank_cannot_generate_ends_all_with_its_message(tmp_path):
    G = make_student()
    with torch.no_grad():
        G.mapping.embed.weight[:, 2] = float("nan")  # images of class 2
    save_networks(tmp_path / "gan.safetensors", {"G_ema": G}, provenance={})
    args = [f"--network={tmp_path}/gan.safetensors", "--seeds=0-9", "--batch=1", "--device=cpu"]
    processes, logs = launch_ranks([*args, f"--outdir={tmp_path}/out"], tmp_path, 2, command="generate")
    codes = wait(processes)
    assert None not in codes and 0 not in codes, texts(logs)
    assert "NaN or infinity" in logs[0].read_text() and "Traceback" not in texts(logs)


def raise_in_rank_1():
    if os.environ["RANK"] == "1":
        step = Trainer.step

        def broken(self):
            if self.nimg == 8:
                raise ValueError("the parrot is dead")
            step(self)

        Trainer.step = broken


def die_in_rank_1():
    if os.environ["RANK"] == "1":
        step = Trainer.step

        def killed(self):
            if self.nimg == 8:
                os.kill(os.getpid(), 9)
            step(self)

        Trainer.step = killed


def die_in_rank_0_while_saving():
    if os.environ["RANK"] == "0":
        from refine.training import snapshots

        snapshots.save_networks = lambda *_, **__: os.kill(os.getpid(), 9)


def be_late():
    if os.environ["RANK"] == "1":
        time.sleep(4)


def be_impatient():
    from datetime import timedelta

    distributed.TIMEOUT = timedelta(seconds=3)


def test_a_rank_that_raises_ends_all_with_its_message(pair, tmp_path):
    processes, logs = launch_ranks([*pair, *STEPS, f"--outdir={tmp_path}"], tmp_path, 2, raise_in_rank_1)
    start = time.monotonic()
    codes = wait(processes)
    assert None not in codes and 0 not in codes and time.monotonic() - start < 60, texts(logs)
    assert logs[1].read_text() == "Error: the parrot is dead\n"
    last = logs[0].read_text().splitlines()[-1]
    assert last.startswith("Error: another process failed; rank 1 on ") and "the parrot is dead" in last


@pytest.mark.parametrize("prepare", [die_in_rank_1, die_in_rank_0_while_saving])
def test_a_killed_rank_ends_all(pair, tmp_path, prepare):
    processes, logs = launch_ranks([*pair, *STEPS, f"--outdir={tmp_path}"], tmp_path, 2, prepare)
    codes = wait(processes)
    assert sorted(codes) == [-9, 2], texts(logs)
    survivor = logs[codes.index(2)].read_text().splitlines()[-1]
    assert survivor.startswith(f"Error: rank {codes.index(2)} lost another process"), survivor


def interrupt_rank_1():
    if os.environ["RANK"] == "1":
        step = Trainer.step

        def interrupted(self):
            step(self)
            if self.nimg == 16:
                os.kill(os.getpid(), signal.SIGTERM)

        Trainer.step = interrupted


def test_a_signal_to_one_rank_stops_all_after_the_same_iteration_and_fewer_may_go_on(pair, tmp_path):
    args = [*pair, *STEPS, "--snap=0", f"--outdir={tmp_path}"]
    processes, logs = launch_ranks(args, tmp_path, 2, interrupt_rank_1)
    assert wait(processes) == [143, 143], texts(logs)
    assert "stopped; saved at" in logs[0].read_text() and "Error" not in texts(logs)
    (state,) = training_states(tmp_path / "00000-x")
    assert state.name == "training-state-000000.016.pt"
    log = tmp_path / "alone.txt"
    assert wait([launch(["--resume=latest", f"--outdir={tmp_path}"], log)]) == [0], log.read_text()
    assert (tmp_path / "00000-x" / "network-snapshot-000000.safetensors").exists()


def diverge_once():
    step = Trainer.step

    def diverging(self):
        step(self)
        if self.nimg == 20 and self.rate_factor == 1:
            with torch.no_grad():
                next(self.aux.parameters()).fill_(float("inf"))

    Trainer.step = diverging


def test_all_ranks_go_back_together(pair, tmp_path):
    found = {}
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        args = [*pair, *STEPS, "--rollback=1", f"--outdir={tmp_path}/out{count}"]
        processes, logs = launch_ranks(args, tmp_path / str(count), count, diverge_once)
        assert wait(processes) == [0] * count, texts(logs)
        assert "rollback    1 of 1: going on from training-state-000000.016.pt" in logs[0].read_text()
        found[count] = load_file(tmp_path / f"out{count}" / LAST)
    assert all((found[1][name] - x).abs().max() <= 2e-5 * x.abs().max().clamp_min(1e-2) for name, x in found[2].items())


def test_a_rank_may_come_late(pair, tmp_path):
    processes, logs = launch_ranks([*pair, *STEPS, f"--outdir={tmp_path}"], tmp_path, 2, be_late)
    assert wait(processes) == [0, 0], texts(logs)


def test_a_rank_that_never_comes_is_named(pair, tmp_path):
    port = free_port()
    args = [*pair, *STEPS, "--batch=3", f"--outdir={tmp_path}/out"]
    processes, logs = launch_ranks(args, tmp_path, 3, be_impatient, ranks=[0, 2], port=port)
    codes = wait(processes, 30)
    assert codes == [2, 2], texts(logs)
    assert "rank 1 of 3 did not come within 3 s" in logs[0].read_text() and not (tmp_path / "out").exists()


def test_batches_must_divide_and_one_voice_says_so(pair, tmp_path):
    processes, logs = launch_ranks([*pair, *STEPS, f"--outdir={tmp_path}/out"], tmp_path, 3)
    assert wait(processes) == [2, 2, 2]
    expected = "Error: --batch: 4 images for 3 processes; expected a multiple\n"
    assert [log.read_text() for log in logs] == [expected, "", ""]


def test_a_file_that_cannot_be_read_is_told_once(pair, tmp_path):
    args = [f"--gan={tmp_path}/nowhere.pkl", pair[1], *STEPS, f"--outdir={tmp_path}/out"]
    processes, logs = launch_ranks(args, tmp_path, 2)
    codes = wait(processes)
    assert None not in codes and 0 not in codes
    assert texts(logs).count("Error") == 1 and "nowhere.pkl" in logs[0].read_text()


def test_one_process_needs_no_launcher():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    x = torch.ones(3)
    assert distributed.sum_tensor(x) is x and distributed.largest(3) == 3
    distributed.wait_for_main()
    assert distributed.local_device("cuda") == "cuda"


def test_gpus_are_given_out_by_local_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.local_device("cuda") == "cuda:1" and distributed.local_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="expected cuda"):
        distributed.local_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine finds 1 GPUs"):
        distributed.local_device("cuda")


def test_gpus_are_named_to_nccl_and_its_communicators_aborted_after_an_error(monkeypatch):
    """What NCCL is asked for; no GPU is at hand to see what it does."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "_reached", lambda: distributed.dist.HashStore())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name in ("init_process_group", "new_group", "destroy_process_group"):
        note = functools.partial(lambda name, *args, **kwargs: calls.append((name, *args, kwargs)), name)
        monkeypatch.setattr(distributed.dist, name, note)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(distributed.dist.distributed_c10d, "_abort_process_group", lambda: calls.append(("abort", {})))
    monkeypatch.setattr(distributed, "_part", lambda: None)
    with distributed.session(cuda=True):
        name, backend, options = calls[0]
        assert (name, backend, options["device_id"]) == ("init_process_group", "nccl", torch.device("cuda", 1))
        assert 10 <= options["timeout"].total_seconds() / 60 <= 30  # `pulse` is faster
        assert all(call[-1]["timeout"] != options["timeout"] for call in calls[1:])
    assert calls[-1][0] == "destroy_process_group"
    with pytest.raises(ValueError, match="broken"), distributed.session(cuda=True):
        raise ValueError("broken")
    assert calls[-1][0] == "abort"
