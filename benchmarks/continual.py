import copy
import torch
import torch.nn.functional as F
from tiny_world import World, shifted, fixed_inputs, velocities
from continual_methods import METHODS

BATCH = 16


def teach(
    world,
    start,
    method,
    number,
    name,
    latents,
    rate,
    seed,
    steps=200,
    preserve=(),
    every=4,
    weight=4.0,
    batch=BATCH,
    replay=None,
    mix=None,
):
    model = world.model(start)
    learner = method(model, number)
    teacher = world.model(start) if preserve else None
    opt = torch.optim.AdamW(learner.parameters, lr=rate)
    sched = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda s: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item())
    )
    g = torch.Generator().manual_seed(1000 * seed + number)
    text = world.text(name)
    for step in range(1, steps + 1):
        rows = torch.randint(len(latents), (batch,), generator=g)
        x0 = latents[rows]
        sigma = shifted(torch.rand(batch, generator=g))
        s = sigma.view(-1, 1, 1, 1, 1)
        noise = torch.randn(x0.shape, generator=g)
        noisy = (1 - s) * x0 + s * noise
        F.mse_loss(model(noisy, 1000 * sigma, [text] * batch), noise - x0).backward()
        if preserve and step % every == 0:
            who = torch.randperm(len(preserve), generator=g)[:batch].tolist()
            if mix:  # share of characters: mix = number of trailing prompts that are characters
                nchar = mix
                if nchar:
                    k = batch // 2
                    a = torch.randint(len(preserve) - nchar, (batch - k,), generator=g).tolist()
                    b = (torch.randint(nchar, (k,), generator=g) + len(preserve) - nchar).tolist()
                    who = a + b
            pn = noisy
            if replay is not None:
                n2 = torch.randn(x0.shape, generator=g)
                pn = (1 - s) * replay[who] + s * n2
            texts = [world.text(preserve[i]) for i in who]
            b = len(who)
            with torch.no_grad():
                ans = teacher(pn[:b], 1000 * sigma[:b], texts)
            (weight * F.mse_loss(model(pn[:b], 1000 * sigma[:b], texts), ans)).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
        opt.step()
        opt.zero_grad()
        sched.step()
        learner.after_step()
    return learner.weights(), learner.values
