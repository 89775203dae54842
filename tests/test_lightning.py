"""A Lightning Trainer with a method inside, against the plain loop."""
import logging
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import hosts
from datasel_wb.lightning import Selection
from datasel_wb.loading import with_ids
from datasel_wb.selectors import RS2, InfoBatch, Uniform
from datasel_wb.weighting import SPCL, BatchWeight, DataParameters, Sigma

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision

for name in ("lightning.pytorch", "lightning.fabric", "lightning"): logging.getLogger(name).setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")
QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
             max_epochs=hosts.EPOCHS)


class Module(L.LightningModule):
    "The common network; the loss is the method's."
    def __init__(self, selection):
        super().__init__()
        self.inner, self.selection, self.seen, self.validated = hosts.Net(), selection, [], []
    def forward(self, x): return self.inner(x)
    def training_step(self, batch, batch_idx):
        self.seen.append(batch[2].tolist())
        return self.selection.loss(self(batch[0]), batch)
    def validation_step(self, batch, batch_idx): self.validated.append((self.global_step, self.training))
    def configure_optimizers(self): return hosts.sgd(self)


class Manual(Module):
    "Steps by itself, once for `PIECES` batches and at the end of an epoch."
    automatic_optimization, PIECES = False, 1
    def training_step(self, batch, batch_idx):
        opt, last = self.optimizers(), batch_idx + 1 == self.trainer.num_training_batches
        self.manual_backward(super().training_step(batch, batch_idx) / self.PIECES)
        if (batch_idx + 1) % self.PIECES == 0 or last:
            opt.step()
            opt.zero_grad()


class Stop(Callback):
    "An exception, as a kill would come, after batch `until`."
    def __init__(self, until): self.until = until
    def on_train_batch_end(self, trainer, *_):
        self.until -= 1
        if not self.until: raise RuntimeError("killed")


def fit(make, batch=hosts.BATCH, module=Module, ckpt_path=None, callbacks=(), data=None, loader=None, val=None, **more):
    "A module after a training, and its `Selection`."
    own = {k: more.pop(k) for k in ("records", "dev_dataset", "shuffle") if k in more}
    loading = {k: more.pop(k) for k in ("drop_last", "num_workers", "persistent_workers") if k in more}
    selection = Selection(make(), data or TensorDataset(*hosts.numbers()), n_classes=hosts.CLASSES, seed=hosts.SEED,
                          dev_batch_size=32, **own)
    net = module(selection)
    more = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)} | more
    trainer = L.Trainer(**QUIET | more, callbacks=[selection, *callbacks])
    trainer.fit(net, loader or selection.dataloader(batch, **loading), val, ckpt_path=ckpt_path)
    return net, selection


def held(): return TensorDataset(*hosts.numbers(96, seed=9))


@pytest.fixture(scope="module")
def plain():
    return hosts.Plain(held)


@pytest.mark.parametrize("module", [Module, Manual], ids=["automatic", "manual"])
@pytest.mark.parametrize("name", hosts.METHODS)
def test_lightning_gives_what_the_plain_loop_gives(name, module, plain):
    net, selection = fit(hosts.METHODS[name], module=module, drop_last=True, records=True,
                         dev_dataset=held() if name in hosts.WHOLE else None)
    assert net.seen == plain(name)[3]
    hosts.assert_like(plain(name), net, selection.selector, selection.records)


class Quarters(Manual): PIECES = 4


@pytest.mark.parametrize("module", [Module, Quarters], ids=["automatic", "manual"])
@pytest.mark.parametrize("name", ["uniform", "data parameters"])
def test_four_micro_batches_of_16_are_one_batch_of_64(name, module, plain):
    pieces = {"accumulate_grad_batches": 4} if module is Module else {}
    net, selection = fit(hosts.METHODS[name], 16, module, records=True, **pieces)
    assert sum(net.seen, []) == sum(plain(name)[3], [])
    hosts.assert_like(plain(name), net, selection.selector, selection.records)


@pytest.mark.parametrize("name, workers", [("uniform", 0), ("rs2", 0), ("infobatch", 0), ("infobatch", 2),
                                           ("data parameters", 0)])
def test_a_killed_training_goes_on_with_the_same_bits(name, workers, tmp_path):
    more = {"num_workers": workers} | ({"persistent_workers": True} if workers else {})
    def make(folder, **kw):
        saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=16, save_top_k=-1)
        return fit(hosts.METHODS[name], 16, callbacks=[saves, *kw.pop("callbacks", [])], records=True, **more, **kw)
    whole, chosen = make(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"): make(tmp_path / "killed", callbacks=[Stop(17)])
    again, resumed = make(tmp_path / "again", ckpt_path=tmp_path / "killed" / "step=16.ckpt")
    assert again.seen == whole.seen[16:] and len(again.seen) > 9
    hosts.assert_equal(whole, again)
    for k, v in hosts.tensors(chosen.selector).items(): assert torch.equal(v, hosts.tensors(resumed.selector)[k]), k
    assert torch.equal(chosen.records.rows, resumed.records.rows)


@pytest.mark.parametrize("name, workers", [("rs2", 0), ("infobatch", 0), ("infobatch", 2)])
@pytest.mark.parametrize("when", ["epoch", "validation", "batch"])
def test_a_checkpoint_at_the_end_of_an_epoch_is_followed_by_the_next(when, name, workers, tmp_path):
    saves = {"epoch": dict(every_n_epochs=1, save_on_train_epoch_end=True), "validation": dict(every_n_epochs=1),
             "batch": dict(every_n_train_steps=12 if name == "infobatch" else 9)}[when]
    val = DataLoader(held(), 32) if when == "validation" else None
    def make(folder, **kw):
        return fit(hosts.METHODS[name], 16, val=val, num_workers=workers,
                   callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **saves)], **kw)
    whole, _ = make(tmp_path / "whole")
    first = min((tmp_path / "whole").glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1]))
    done = int(first.stem.split("=")[1])
    again, _ = make(tmp_path / "again", ckpt_path=first)
    assert again.seen == whole.seen[done:] and 0 < len(again.seen) < len(whole.seen)
    hosts.assert_equal(whole, again)


def test_a_shorter_epoch_ends_with_a_step_and_a_validation():
    "InfoBatch, of whose epochs the first is whole; five batches to a step."
    net, selection = fit(lambda: InfoBatch(0.5, delta=1.0), 16, accumulate_grad_batches=5, val=DataLoader(held(), 96),
                         num_sanity_val_steps=0)
    assert len(net.validated) == hosts.EPOCHS and not any(training for _, training in net.validated)
    steps = [step for step, _ in net.validated]
    assert steps[0] == 3 and steps[-1] == int(selection.selector.steps_done) < 9
    assert len(net.seen) < 36 and selection.guest.pending == 0


def test_validation_is_left_alone():
    "The method's state and the records are those of a training without validation."
    a, one = fit(hosts.METHODS["data parameters"], records=True, val=DataLoader(held(), 32), val_check_interval=1)
    b, two = fit(hosts.METHODS["data parameters"], records=True)
    hosts.assert_equal(a, b)
    assert len(a.validated) > 9 and torch.equal(one.records.rows, two.records.rows)


def test_a_subset_is_named_by_the_places_in_the_full_set():
    part = Subset(TensorDataset(*hosts.numbers()), list(range(100, 190)))
    net, selection = fit(InfoBatch, 32, data=part, records=True)
    assert set(sum(net.seen, [])) == set(range(100, 190))
    assert selection.records.table().id.tolist() == list(range(100, 190))


class Breaks(Module):
    "Infinite gradients in the second step."
    def on_after_backward(self):
        if self.trainer.fit_loop.total_batch_idx == 1: self.inner.net[0].bias.grad.fill_(math.inf)


@pytest.mark.parametrize("module, without", [(Module, None), (Breaks, 1)], ids=["no overflow", "an overflow"])
def test_a_scaler_changes_nothing_and_a_step_that_it_skips_teaches_nothing(module, without, plain):
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    net, selection = fit(hosts.METHODS["data parameters"], module=module, plugins=[scaled])
    assert int(selection.selector.steps_done) == 9 - (without is not None)
    hosts.assert_like(plain("data parameters", without=without), net, selection.selector)


def test_schedules_know_the_steps():
    _, selection = fit(SPCL)
    assert selection.selector.task.steps == 9 == int(selection.selector.steps_done)


class Plain(Module):
    def training_step(self, batch, batch_idx): return self.selection.loss(self(batch[0]), batch)


def with_loader(loader):
    return lambda make=InfoBatch: fit(make, module=Plain, loader=loader)


@pytest.mark.parametrize("bad, said", [
    (lambda: fit(BatchWeight, dev_dataset=held(), accumulate_grad_batches=4),
     "^accumulate_grad_batches = 4: must be 1 with BatchWeight, which weighs the examples of a step against each"),
    (lambda: fit(BatchWeight), "^BatchWeight needs dev_batch, which this task lacks"),
    (lambda: fit(BatchWeight, dev_dataset=TensorDataset(torch.zeros(8, 2), torch.zeros(8).long())),
     "^dev: the model cannot take its batches"),
    (lambda: fit(lambda: nn.Linear), "^selector is a type: must be a Selector"),
    (lambda: fit(Uniform, records=3), "^records is a int: must be True, a Dynamics or a Recorder"),
    (with_loader(DataLoader(with_ids(TensorDataset(*hosts.numbers())), 64)),
     "^InfoBatch chooses the examples of an epoch, so the training loader must have its sampler"),
    (lambda: with_loader(fit(Uniform, max_epochs=1)[1].dataloader(64))(),
     "^the training loader's sampler is of another Selection than this of InfoBatch: must be its own$"),
    (lambda: with_loader(DataLoader(TensorDataset(*hosts.numbers()), 64))(Uniform),
     r"^batch: is \(x, y\), must have the ids of its examples: wrap the training set in with_ids"),
    (lambda: fit(InfoBatch, max_epochs=-1, max_steps=3), "^InfoBatch needs epochs, which this task lacks"),
    (lambda: fit(SPCL, max_epochs=-1), "^max_epochs = -1: must be 1 or more with SPCL, which plans by steps"),
    (lambda: len(Selection(RS2(), TensorDataset(*hosts.numbers())).dataloader(64)),
     "^RS2: the order of the examples is known when its training begins; leave the loader to the trainer that has it$"),
])
def test_bad_input_is_one_sentence(bad, said):
    with pytest.raises(ValueError, match=said) as caught: bad()
    assert "\n" not in str(caught.value)


def test_a_method_trains_once():
    selection = Selection(Uniform(), TensorDataset(*hosts.numbers()))
    for ok in (True, False):
        trainer = L.Trainer(**QUIET, enable_checkpointing=False, callbacks=[selection])
        if ok: trainer.fit(Plain(selection), selection.dataloader(64))
        else:
            with pytest.raises(ValueError, match="^Uniform belongs to a training already: give each a fresh one$"):
                trainer.fit(Plain(selection), selection.dataloader(64))
