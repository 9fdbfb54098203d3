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
from torch import distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils import selective_finetune
from utils.selective_finetune import attach_slice

PLAIN = ("--optimizer_type", "SGD", "--learning_rate", "1", "--max_train_epochs", "4")
needs_fork = pytest.mark.skipif(os.name != "posix", reason="needs fork")
ROWS = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def blocks():
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 8)])})
    return model, attach_slice(model, "0.1", 2)


def loss_of(model, rows):
    return model["blocks"][1](model["blocks"][0](rows).tanh()).square().mean()


class CountSent(TorchDispatchMode):
    """Every operation between processes that the code inside asks for, by whatever function: its name, its bytes."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.sent.append((func.__name__.split(".")[0], sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def in_two_processes(work, folder):
    """What `work(rank, sent)` returns in each, forked, after the names and bytes of what it sent."""
    context = multiprocessing.get_context("fork")
    results, address = context.Queue(), f"file://{folder}/rendezvous"
    workers = [context.Process(target=process, args=(rank, address, work, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    received = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    return received


def process(rank, address, work, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    with CountSent() as counter:
        returned = work(rank, counter.sent)
    results.put((counter.sent, returned))
    dist.destroy_process_group()


def step(rank, _):
    """A whole step on half of the rows; its gradients."""
    model, trained = blocks()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    loss_of(model, ROWS[2 * rank : 2 * rank + 2]).backward()
    trained.reduce_gradients()
    optimizer.step()
    trained.write_back()
    return [parameter.grad.tolist() for parameter in trained.parameters()]


@needs_fork
def test_gradients_of_two_processes_are_those_of_their_joint_batch_and_nothing_else_is_sent(tmp_path):
    model, trained = blocks()
    loss_of(model, ROWS).backward()
    for sent, gradients in in_two_processes(step, tmp_path):
        assert sent == [("allreduce_", 4 * trained.count)]
        for parameter, gradient in zip(trained.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, torch.tensor(gradient))


@needs_fork
def test_a_large_slice_is_reduced_in_pieces_to_the_same_gradients(tmp_path, monkeypatch):
    for name in ("whole", "pieces"):
        (tmp_path / name).mkdir()
    whole = in_two_processes(step, tmp_path / "whole")
    monkeypatch.setattr(selective_finetune, "_TOGETHER", 10)
    pieces = in_two_processes(step, tmp_path / "pieces")
    for (sent_whole, gradients), (sent, same_gradients) in zip(whole, pieces, strict=True):
        assert gradients == same_gradients
        assert len(sent) > len(sent_whole) and sum(size for _, size in sent) == sum(size for _, size in sent_whole)


def send_in_every_way(rank, sent):
    """How many operations were seen of each way to send."""
    own, both, other = torch.ones(3), [torch.ones(3), torch.ones(3)], 1 - rank
    at_0 = rank == 0
    ways = {
        "all_reduce": lambda: dist.all_reduce(own),
        "broadcast": lambda: dist.broadcast(own, 0),
        "reduce": lambda: dist.reduce(own, 0),
        "all_gather": lambda: dist.all_gather(both, own),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.empty(6), own),
        "gather": lambda: dist.gather(own, both if at_0 else None),
        "scatter": lambda: dist.scatter(own, both if at_0 else None),
        "reduce_scatter": lambda: dist.reduce_scatter(own, both),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(own, torch.ones(6)),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(4), torch.ones(4)),
        "send": lambda: (dist.send if at_0 else dist.recv)(own, other),
        "isend": lambda: (dist.isend if at_0 else dist.irecv)(own, other).wait(),
        "batch_isend_irecv": lambda: [
            work.wait() for work in dist.batch_isend_irecv([dist.P2POp(dist.isend if at_0 else dist.irecv, own, other)])
        ],
        "barrier": dist.barrier,
        "all_reduce_coalesced": lambda: dist.all_reduce_coalesced([own]),
        "send_object_list": lambda: (dist.send_object_list if at_0 else dist.recv_object_list)([1], other),
        "broadcast_object_list": lambda: dist.broadcast_object_list([1], 0),
        "all_gather_object": lambda: dist.all_gather_object([None, None], 1),
        "gather_object": lambda: dist.gather_object(1, [None, None] if at_0 else None),
        "scatter_object_list": lambda: dist.scatter_object_list([None], [1, 2]),
        "functional": lambda: functional.all_reduce(own, "sum", dist.group.WORLD).wait(),
    }
    seen = {}
    for name, way in ways.items():
        before = len(sent)
        way()
        seen[name] = len(sent) - before
    return seen


@needs_fork
def test_no_way_to_send_goes_uncounted(tmp_path):
    for _, seen in in_two_processes(send_in_every_way, tmp_path):
        assert seen and all(seen.values()), seen


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
