"""The bare loop that tests train a bound selector in."""
import torch

from datasel_wb.examples import Loader


def bare_loop(sel, epochs):
    "SGD on the model and the training set of the selector's task, batches of 64; yields each batch after its step."
    model = sel.task.model
    opt, loader = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), Loader(sel.task.train, 64, sel.task.prepare)
    for e in range(epochs):
        for b in loader(sel.epoch(e)):
            sel.loss(model(b.x), b).backward()
            opt.step()
            opt.zero_grad()
            sel.after_step(b)
            yield b
