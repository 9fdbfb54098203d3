"""Several processes: what crosses between them, and that all end with the same slice."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import ITEMS, flags, run, write_dataset, write_dit
from torch import nn

from utils.selective_finetune import attach_slice

PLAIN = ("--optimizer_type", "SGD", "--learning_rate", "1", "--max_train_epochs", "4")
ROWS = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def blocks():
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 8)])})
    return model, attach_slice(model, "0.1", 2)


def loss_of(model, rows):
    return model["blocks"][1](model["blocks"][0](rows).tanh()).square().mean()


def process(rank, address, results):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    sent, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor: sent.append(tensor.nbytes) or all_reduce(tensor)
    model, trained = blocks()
    loss_of(model, ROWS[2 * rank : 2 * rank + 2]).backward()
    trained.reduce_gradients()
    results.put((rank, sum(sent), [parameter.grad.tolist() for parameter in trained.parameters()]))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_gradients_of_two_processes_are_those_of_their_joint_batch_and_nothing_else_is_sent(tmp_path):
    context = multiprocessing.get_context("fork")
    results, address = context.Queue(), f"file://{tmp_path}/rendezvous"
    workers = [context.Process(target=process, args=(rank, address, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    received = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    model, trained = blocks()
    loss_of(model, ROWS).backward()
    for _, sent, gradients in received:
        assert sent == 4 * trained.count
        for parameter, gradient in zip(trained.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, torch.tensor(gradient))


@pytest.mark.slow
def test_two_launched_processes_train_the_slice_of_one_with_twice_the_batch(tmp_path):
    write_dit(tmp_path / "base.safetensors", torch.float32)
    data = write_dataset(tmp_path)
    for stem in ITEMS.keys() - {"high0", "high1"}:
        (tmp_path / "pics" / f"{stem}.png").unlink()
    run(tmp_path, *PLAIN)
    (tmp_path / "out" / "one.safetensors").rename(tmp_path / "alone.safetensors")
    data.write_text(data.read_text().replace("batch_size = 2", "batch_size = 1"))
    # accelerate's launcher starts one process on a CPU, whatever it is asked; this is what it calls for several GPUs.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(Path(__file__).parents[1] / "wan_train_network.py")
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    subprocess.run([*launch, script, *flags(tmp_path, *PLAIN)], check=True, env=on_cpu)
    base, alone, together = (
        load_file(tmp_path / name) for name in ("base.safetensors", "alone.safetensors", "out/one.safetensors")
    )
    assert any(not torch.equal(base[name], alone[name]) for name in base)
    for name, tensor in base.items():
        torch.testing.assert_close(together[name] - tensor, alone[name] - tensor, rtol=1e-5, atol=1e-7)
