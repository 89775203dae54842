"""Two processes of torchrun: every host trains half of each batch, and the first process writes what came out."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hosts
from datasel_wb.core import bare
from datasel_wb.hf import SelectionTrainer, attach
from datasel_wb.lightning import Selection
from datasel_wb.loading import with_ids

import lightning as L
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

FOLDER, HALF = Path(sys.argv[1]), hosts.BATCH // 2
NAMES = ("uniform", "rs2", "infobatch", "data parameters")


def with_trainer(name):
    model = hosts.Net()
    args = TrainingArguments(
        output_dir=str(FOLDER / "out"), use_cpu=True, ddp_backend="gloo", report_to=[], save_strategy="no",
        disable_tqdm=True, logging_steps=10 ** 6, per_device_train_batch_size=HALF, num_train_epochs=hosts.EPOCHS,
        seed=hosts.SEED, max_grad_norm=0.0, lr_scheduler_type="constant", dataloader_drop_last=True)
    t = SelectionTrainer(model=model, args=args, train_dataset=hosts.DictRows(), selector=hosts.METHODS[name](),
                         optimizers=(hosts.sgd(model), None), records=True, task_kwargs={"n_classes": hosts.CLASSES})
    t.train()
    assert t.accelerator.num_processes == 2 and isinstance(t.model_wrapped, nn.parallel.DistributedDataParallel)
    return t.model, t.selector, t.records


def with_accelerate(name):
    accelerator, model = Accelerator(cpu=True), hosts.Net()
    sel = hosts.METHODS[name]().bind(hosts.task_of(model, None))
    loader = DataLoader(with_ids(TensorDataset(*hosts.numbers())), HALF, sampler=sel.sampler(seed=hosts.SEED),
                        drop_last=True)
    model, opt, loader = accelerator.prepare(model, hosts.sgd(model), loader)
    selection = attach(accelerator, sel, opt, loader, records=True)
    for _ in range(hosts.EPOCHS):
        for b in loader:
            accelerator.backward(selection.loss(model(b[0])["logits"], b))
            opt.step()
            opt.zero_grad()
    return bare(model), sel, selection.records


class Module(L.LightningModule):
    def __init__(self, selection): super().__init__(); self.inner, self.selection = hosts.Net(), selection
    def forward(self, x): return self.inner(x)
    def training_step(self, batch, batch_idx): return self.selection.loss(self(batch[0])["logits"], batch)
    def configure_optimizers(self): return hosts.sgd(self)


def with_lightning(name):
    selection = Selection(hosts.METHODS[name](), TensorDataset(*hosts.numbers()), records=True, n_classes=hosts.CLASSES,
                          seed=hosts.SEED)
    module = Module(selection)
    L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
              enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
              max_epochs=hosts.EPOCHS, callbacks=[selection]).fit(module, selection.dataloader(HALF, drop_last=True))
    return module.inner, selection.selector, selection.records


def main():
    found = {}
    for host in (with_trainer, with_accelerate, with_lightning):
        for name in NAMES:
            if host is not with_lightning: AcceleratorState._reset_state(reset_partial_state=False)
            model, sel, records = host(name)
            found[host.__name__, name] = {"model": dict(model.state_dict()), "selector": hosts.tensors(sel),
                                          "records": records.rows}
    if dist.get_rank() == 0: torch.save(found, FOLDER / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__": main()
