"""Several processes: what crosses between them, and that all end with the same slice."""

import multiprocessing
import os

import pytest
import torch
from torch import nn

from utils.selective_finetune import attach_slice

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
