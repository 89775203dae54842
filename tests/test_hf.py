"""Hugging Face's Trainer, TRL's SFTTrainer and Accelerate with a method inside, against the plain loop."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import hosts
from datasel_wb.core import token_loss
from datasel_wb.dynamics import Dynamics
from datasel_wb.hf import SelectionTrainer, attach, next_tokens, target_of, with_selection
from datasel_wb.hosts import guest_state
from datasel_wb.loading import with_ids
from datasel_wb.selectors import RS2, InfoBatch, Uniform
from datasel_wb.weighting import BatchWeight, DataParameters, Sigma
from waits import patience

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import (BertConfig, BertForSequenceClassification, BertForTokenClassification, GPT2Config,
                          GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, default_data_collator)

ROOT = Path(__file__).resolve().parents[1]


def arguments(folder, **more):
    "Arguments of a quick training on the CPU."
    return TrainingArguments(**dict(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=10 ** 6, per_device_train_batch_size=hosts.BATCH, num_train_epochs=hosts.EPOCHS, seed=hosts.SEED,
        max_grad_norm=0.0,
        lr_scheduler_type="constant") | more)


def trainer_of(folder, make, model=None, trainer=SelectionTrainer, callbacks=None, data=None, dev=False, records=None,
               **more):
    "A Trainer on the common rows with a method inside."
    model = model or hosts.Net()
    return trainer(model=model, args=arguments(folder, **more), train_dataset=data or hosts.DictRows(), selector=make(),
                   optimizers=(hosts.sgd(model), None), callbacks=callbacks, records=records,
                   dev_dataset=hosts.DictRows(96, seed=9) if dev else None,
                   task_kwargs={"n_classes": hosts.CLASSES, "dev_batch_size": 32})


def dev_loader(): return DataLoader(hosts.DictRows(96, seed=9), 32, collate_fn=without_extras)
def without_extras(rows): return default_data_collator([{k: r[k] for k in ("x", "labels")} for r in rows])


class Watch(TrainerCallback):
    "Ids of each step, as the method's records have them; an exception, as a kill would come, after step `until`."
    def __init__(self, until=math.inf): self.until, self.steps = until, 0
    def on_step_end(self, args, state, control, **_):
        self.steps += 1
        if state.global_step == self.until: raise KeyboardInterrupt


def visits(trainer):
    "Let a trainer note the ids of its micro-batches."
    seen, loss = [], trainer.guest.loss
    def noted(logits, batch):
        seen.append(batch.idx.tolist())
        return loss(logits, batch)
    trainer.guest.loss = noted
    return seen


@pytest.fixture(scope="module")
def plain():
    return hosts.Plain(dev_loader)


# Trainer

@pytest.mark.parametrize("name", hosts.METHODS)
def test_the_trainer_gives_what_the_plain_loop_gives(name, plain, tmp_path):
    t = trainer_of(tmp_path, hosts.METHODS[name], dev=name in hosts.WHOLE, records=True, dataloader_drop_last=True)
    seen = visits(t)
    t.train()
    assert seen == plain(name)[3]
    hosts.assert_like(plain(name), t.model, t.selector, t.records)


@pytest.mark.parametrize("name", hosts.IN_PIECES)
def test_four_micro_batches_of_16_are_one_batch_of_64(name, plain, tmp_path):
    "Also the last step of an epoch, which has fewer examples."
    t = trainer_of(tmp_path, hosts.METHODS[name], records=True, per_device_train_batch_size=16,
                   gradient_accumulation_steps=4)
    seen = visits(t)
    t.train()
    whole = plain(name, tail=True)
    assert sum(seen, []) == sum(whole[3], []) and t.state.global_step == len(whole[3])
    hosts.assert_like(whole, t.model, t.selector, t.records)


def test_a_subset_is_named_by_the_places_in_the_full_set(tmp_path):
    part = Subset(hosts.DictRows(), list(range(100, 190)))
    t = trainer_of(tmp_path, InfoBatch, data=part, records=True, num_train_epochs=2)
    seen = visits(t)
    t.train()
    assert set(sum(seen, [])) == set(range(100, 190)) and t.selector.losses.isfinite().nonzero()[:, 0].min() == 100
    assert t.records.table().id.tolist() == list(range(100, 190))


@pytest.mark.parametrize("name", ["uniform", "rs2", "infobatch", "data parameters"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_a_killed_training_goes_on_with_the_same_bits(name, pieces, tmp_path):
    "In the third epoch, where all before it had other lengths; the network draws random numbers."
    at = 13
    def make(folder, **more):
        t = trainer_of(folder, hosts.METHODS[name], hosts.noisy(), records=True, gradient_accumulation_steps=pieces,
                       per_device_train_batch_size=32 // pieces, save_strategy="steps", save_steps=at, **more)
        return t, visits(t)
    whole, seen = make(tmp_path / "whole")
    whole.train()
    killed, _ = make(tmp_path / "killed", callbacks=[Watch(at + 1)])
    with pytest.raises(KeyboardInterrupt): killed.train()
    again, rest = make(tmp_path / "killed")
    again.train(resume_from_checkpoint=True)
    assert rest == seen[-len(rest):] and 0 < len(rest) < len(seen)
    assert again.state.global_step == whole.state.global_step > at
    hosts.assert_equal(whole.model, again.model)
    for k, v in hosts.tensors(whole.selector).items(): assert torch.equal(v, hosts.tensors(again.selector)[k]), k
    assert torch.equal(whole.records.rows, again.records.rows)
    state = torch.load(tmp_path / "killed" / f"checkpoint-{at}" / "selector.pt", weights_only=True)
    assert state["method"] == type(whole.selector).__name__


def test_a_checkpoint_at_the_end_of_an_epoch_is_followed_by_the_next(tmp_path):
    def make(folder):
        return trainer_of(folder, hosts.METHODS["infobatch"], hosts.noisy(), save_strategy="epoch",
                          per_device_train_batch_size=32)
    whole = make(tmp_path / "whole")
    seen = visits(whole)
    whole.train()
    first = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[1]
    again = make(tmp_path / "again")
    rest = visits(again)
    again.train(resume_from_checkpoint=str(first))
    assert rest == seen[-len(rest):] and 0 < len(rest) < len(seen)
    hosts.assert_equal(whole.model, again.model)


def test_the_same_trainer_may_resume_and_may_not_begin_again(tmp_path):
    t = trainer_of(tmp_path, InfoBatch, save_strategy="steps", save_steps=4, callbacks=[Watch(5)])
    with pytest.raises(KeyboardInterrupt): t.train()
    with pytest.raises(ValueError, match="^InfoBatch belongs to a training already: give each a fresh one$"): t.train()
    for c in t.callback_handler.callbacks:
        if isinstance(c, Watch): c.until = math.inf
    t.train(resume_from_checkpoint=True)
    whole = trainer_of(tmp_path / "whole", InfoBatch)
    whole.train()
    hosts.assert_equal(whole.model, t.model)


def test_evaluation_and_prediction_are_those_of_the_host(tmp_path):
    data = hosts.DictRows(96, seed=9)
    t, host = (make(model=hosts.Net(), args=arguments(tmp_path), train_dataset=hosts.DictRows(), eval_dataset=data,
                    **more) for make, more in ((SelectionTrainer, {"selector": InfoBatch()}), (Trainer, {})))
    t.train()
    host.model.load_state_dict(t.model.state_dict())
    drop = ("runtime", "second", "epoch", "preparation")
    ours, theirs = ({k: v for k, v in s.evaluate().items() if not any(d in k for d in drop)} for s in (t, host))
    assert ours == theirs and ours["eval_loss"] > 0
    assert (t.predict(data).predictions == host.predict(data).predictions).all()
    before = guest_state(t.guest)
    t.evaluate()
    torch.testing.assert_close(guest_state(t.guest)["selector"]["losses"], before["selector"]["losses"])


@pytest.mark.parametrize("workers", [0, 2])
def test_columns_that_the_model_does_not_take_are_left_out_and_workers_are_kept(workers, tmp_path):
    rows = Dataset.from_list([{"x": x.tolist(), "labels": int(y), "comment": "no tensor"}
                              for x, y in zip(*hosts.numbers())]).with_format("torch", dtype=torch.float64,
                                                                               columns=["x"], output_all_columns=True)
    more = {"dataloader_persistent_workers": True} if workers else {}
    t = trainer_of(tmp_path, InfoBatch, data=rows, dataloader_num_workers=workers, dataloader_drop_last=True, **more)
    seen = visits(t)
    t.train()
    host = trainer_of(tmp_path, InfoBatch, dataloader_drop_last=True)
    assert (theirs := visits(host)) is not None and host.train() and seen == theirs
    hosts.assert_equal(t.model, host.model)


# Language models and what labels are

def gpt(vocabulary=17):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_positions=16, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, bos_token_id=0, eos_token_id=0))


def texts(n=48, length=9):
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 17, (n, length), generator=rng)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[0] = -100
    labels[0, -1] = ids[0, -1]
    columns = {"input_ids": ids, "labels": labels, "attention_mask": (ids > 0).int()}
    return Dataset.from_dict({k: v.tolist() for k, v in columns.items()})


def test_a_language_model_learns_the_next_token(tmp_path):
    t = SelectionTrainer(model=gpt(), args=arguments(tmp_path, per_device_train_batch_size=16, num_train_epochs=1),
                         train_dataset=texts(), records=True, selector=DataParameters(inst=Sigma(lr=1.0)))
    assert t.target == "tokens"
    model, rows = gpt(), default_data_collator([texts()[i] for i in range(48)])
    out = model(**rows)
    losses = token_loss(out.logits, next_tokens(rows["labels"]))
    counts = (rows["labels"][:, 1:] != -100).sum(1)
    torch.testing.assert_close((losses * counts).sum() / counts.sum(), out.loss)     # the model's own, over all tokens
    t.train()
    assert (t.selector.log_inst != 0).all() and t.records.column("presentations").eq(1).all()
    first = t.records.column("loss")
    assert torch.isfinite(first).all() and (first - losses.detach()).abs().max() < 1


@pytest.mark.parametrize("model, target", [
    (lambda c: BertForSequenceClassification(c(num_labels=3)), "class"),
    (lambda c: BertForSequenceClassification(c(num_labels=1)), "regression"),
    (lambda c: BertForSequenceClassification(c(num_labels=3, problem_type="multi_label_classification")), "multilabel"),
    (lambda c: BertForTokenClassification(c(num_labels=3)), "tokens"), (lambda c: gpt(), "tokens"),
    (lambda c: nn.Linear(2, 2), "class")])
def test_the_target_is_what_the_model_says(model, target):
    def config(**more):
        return BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
                          max_position_embeddings=8, **more)
    assert target_of(model(config)) == target


@pytest.mark.parametrize("target, labels", [("multilabel", [[0.0, 1.0, 1.0]]), ("regression", [0.5])])
def test_other_targets_train_as_by_hand(target, labels, tmp_path):
    x = hosts.numbers()[0]
    width = 3 if target == "multilabel" else 1
    rows = [{"x": v, "labels": torch.tensor(labels[0], dtype=torch.float64) * (i % 2)} for i, v in enumerate(x)]

    def net():
        model = hosts.Net()
        torch.manual_seed(2)
        model.net[2] = nn.Linear(8, width).double()
        return model
    t = SelectionTrainer(model=(model := net()), target=target, train_dataset=rows, selector=Uniform(), records=True,
                         args=arguments(tmp_path, num_train_epochs=1), optimizers=(hosts.sgd(model), None))
    seen = visits(t)
    t.train()
    by_hand = net()
    opt = hosts.sgd(by_hand)
    for ids in seen:
        out, y = by_hand(x[ids])["logits"], torch.stack([rows[i]["labels"] for i in ids])
        loss = (nn.functional.binary_cross_entropy_with_logits(out, y) if target == "multilabel"
                else nn.functional.mse_loss(out[:, 0], y))
        opt.zero_grad()
        loss.backward()
        opt.step()
    for a, b in zip(t.model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_label_smoothing_goes_into_the_loss(tmp_path):
    model = hosts.Net()
    model.config = BertConfig(num_labels=hosts.CLASSES)
    t = trainer_of(tmp_path, Uniform, model, label_smoothing_factor=0.2, num_train_epochs=1, max_steps=1)
    seen, before = visits(t), hosts.Net()
    t.train()
    x, y = hosts.numbers()
    loss = nn.functional.cross_entropy(before(x[seen[0]])["logits"], y[seen[0]], label_smoothing=0.2)
    opt = hosts.sgd(before)
    loss.backward()
    opt.step()
    for a, b in zip(t.model.parameters(), before.parameters()): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_trl_trains_with_a_method(tmp_path):
    trl, tokenizers = pytest.importorskip("trl"), pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast
    words = {f"w{i}": i for i in range(15)} | {"[PAD]": 15, "[UNK]": 16}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]")
    data = Dataset.from_dict({"text": [" ".join(f"w{(i * j) % 15}" for j in range(3 + i % 5)) for i in range(24)]})

    def make(**more):
        args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], save_strategy="no",
                             disable_tqdm=True, per_device_train_batch_size=8, num_train_epochs=2, seed=hosts.SEED,
                             **more)
        return with_selection(trl.SFTTrainer)(model=gpt(), args=args, train_dataset=data, processing_class=tokenizer,
                                              selector=DataParameters(inst=Sigma(lr=1.0)), records=True)
    t = make()
    t.train()
    assert type(t).__name__ == "SelectionSFTTrainer" and t.target == "tokens"
    assert (t.selector.log_inst != 0).all() and t.records.column("presentations").eq(2).all()
    with pytest.raises(ValueError, match="^packing = True: must be False with a selector$"): make(packing=True)


# Accelerate

def accelerated(name, folder=None, pieces=1, batch=hosts.BATCH, until=math.inf, save=None, load=None, drop_last=True,
                scaler=None, prepare=lambda model: None):
    "An Accelerate loop; saves after step `save`, stops after step `until`."
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=pieces), hosts.Net()
    accelerator.scaler = scaler
    prepare(model)
    sel = hosts.METHODS[name]().bind(hosts.task_of(model, dev_loader() if name in hosts.WHOLE else None))
    data = with_ids(TensorDataset(*hosts.numbers()))
    loader = DataLoader(data, batch, sampler=sel.sampler(seed=hosts.SEED), drop_last=drop_last)
    model, opt, loader = accelerator.prepare(model, hosts.sgd(model), loader)
    selection = attach(accelerator, sel, opt, loader, records=True)
    seen, begin = [], 0
    if load:
        accelerator.load_state(load)
        begin = loader.iteration
    for _ in range(begin, hosts.EPOCHS):
        for b in loader:
            with accelerator.accumulate(model):
                seen.append(b[2].tolist())
                accelerator.backward(selection.loss(model(b[0])["logits"], b))
                opt.step()
                opt.zero_grad()
            if accelerator.sync_gradients and int(sel.steps_done) == save: accelerator.save_state(folder)
            if int(sel.steps_done) >= until: return model, selection, seen
    return model, selection, seen


@pytest.mark.parametrize("name", hosts.METHODS)
def test_accelerate_gives_what_the_plain_loop_gives(name, plain):
    model, selection, seen = accelerated(name)
    assert seen == plain(name)[3]
    hosts.assert_like(plain(name), model, selection.selector, selection.records)


@pytest.mark.parametrize("name", ["uniform", "data parameters"])
def test_accelerate_in_four_pieces(name, plain):
    model, selection, seen = accelerated(name, pieces=4, batch=16)
    assert sum(seen, []) == sum(plain(name)[3], [])
    hosts.assert_like(plain(name), model, selection.selector, selection.records)


@pytest.mark.parametrize("at", [2, 3, 4])
def test_accelerate_goes_on_with_the_same_bits(at, tmp_path):
    "In the middle of an epoch and at its end."
    whole = accelerated("infobatch", drop_last=False)
    accelerated("infobatch", str(tmp_path), save=at, until=at + 1, drop_last=False)
    model, selection, rest = accelerated("infobatch", load=str(tmp_path), drop_last=False)
    assert rest == whole[2][-len(rest):] and len(rest) == len(whole[2]) - at
    hosts.assert_equal(whole[0], model)
    assert torch.equal(whole[1].records.rows, selection.records.rows)


def overflow(model, after):
    "Infinite gradients in the backward pass number `after`, counted from 0."
    calls = []
    def broken(grad):
        calls.append(0)
        return grad * math.inf if len(calls) == after + 1 else grad
    model.net[0].bias.register_hook(broken)


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("host", ["trainer", "accelerate"])
def test_a_scaler_changes_nothing_and_a_step_that_it_skips_teaches_nothing(host, pieces, plain, tmp_path):
    "A scale of 2**16; then an overflow in the second step, which forgets its examples."
    def trained(broken):
        AcceleratorState._reset_state(reset_partial_state=True)
        scaler = torch.amp.GradScaler("cpu")
        if host == "accelerate": return accelerated("data parameters", pieces=pieces, batch=64 // pieces, scaler=scaler,
                                                    prepare=lambda m: broken is None or overflow(m, broken))
        t = trainer_of(tmp_path, hosts.METHODS["data parameters"], per_device_train_batch_size=64 // pieces,
                       gradient_accumulation_steps=pieces)
        t.accelerator.scaler = scaler
        seen = visits(t)
        if broken is not None: overflow(t.model, broken)
        t.train()
        return t.model, t, seen
    model, guest, _ = trained(None)
    hosts.assert_like(plain("data parameters"), model, guest.selector)
    model, guest, seen = trained(pieces)       # in the first micro-batch of the second step
    assert int(guest.selector.steps_done) == 8
    lost = set(sum(seen[pieces:2 * pieces], []))
    part = hosts.bare(hosts.METHODS["data parameters"], None, without=1)
    hosts.assert_like(part, model, guest.selector)
    assert len(lost) == 64


# Several processes

def test_two_processes_are_one(tmp_path):
    "Trainer, Accelerate and Lightning under torchrun with gloo, half a batch each, against the plain loop."
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                          ROOT / "tests" / "hosts_job.py", tmp_path], env=env, capture_output=True, text=True,
                         timeout=patience(60))
    assert not run.returncode, run.stdout[-2000:] + run.stderr[-6000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert len(found) == 3 * 4
    for (host, name), got in found.items():
        model, sel, records, visited = hosts.bare(hosts.METHODS[name], None, tail=False)
        for k, v in model.state_dict().items(): torch.testing.assert_close(got["model"][k], v, rtol=1e-10, atol=1e-10)
        for k, v in hosts.tensors(sel).items():
            torch.testing.assert_close(got["selector"][k], v, rtol=1e-10, atol=1e-10,
                                       msg=lambda m: f"{host} {name} {k}: {m}")
        for k in ("loss", "presentations", "forgetting"):
            torch.testing.assert_close(got["records"][:, Dynamics.ROWS.index(k)], records.column(k), rtol=1e-5,
                                       atol=1e-6)


# What is refused

def packs(rows): return {"x": torch.stack([r["x"] for r in rows])[None], "labels": torch.tensor([0])}
def no_labels(rows): return {"x": torch.stack([r["x"] for r in rows])}
def a_list(rows): return list(rows)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): yield from hosts.DictRows()


class Strange(hosts.Net):
    def forward(self, x, labels=None): return "nothing"


@pytest.mark.parametrize("more, said", [
    ({"selector": BatchWeight(), "dev_dataset": hosts.DictRows(), "args": {"gradient_accumulation_steps": 4}},
     "^gradient_accumulation_steps = 4: must be 1 with BatchWeight, which weighs"),
    ({"selector": InfoBatch(), "args": {"max_steps": 3}},
     "^max_steps = 3: must be -1 with InfoBatch, which plans by epochs"),
    ({"selector": torch.optim.SGD}, "^selector is a type: must be a Selector"),
    ({"records": "yes"}, "^records is a str: must be True, a Dynamics or a Recorder"),
    ({"data_collator": packs}, "^the collator packs made 1 rows of 64: must keep each, or its idx is lost"),
    ({"data_collator": no_labels}, "^the collator no_labels gave x: must give 'labels' too"),
    ({"data_collator": a_list}, "^the collator a_list gave a list: must give a dict"),
    ({"train_dataset": Stream()}, "^dataset is a Stream, whose rows have no numbers"),
    ({"compute_loss_func": len}, "^compute_loss_func: must be None with a selector"),
    ({"target": "regression", "args": {"label_smoothing_factor": 0.1}}, "^label_smoothing_factor = 0.1: must be 0 for"),
    ({"args": {"train_sampling_strategy": "group_by_length"}}, "^train_sampling_strategy = 'group_by_length': must be"),
    ({"args": {"label_names": ["labels", "unused"]}}, "^label_names = .*: must be one name"),
    ({"args": {"auto_find_batch_size": True}}, "^auto_find_batch_size = True: must be False"),
    ({"selector": BatchWeight()}, "^BatchWeight needs dev_batch, which this task lacks"),
    ({"selector": BatchWeight(), "dev_dataset": [{"x": torch.zeros(2), "labels": 0}]}, "^dev: the model cannot take"),
    ({"model": Strange()}, "^the model gave a str: no rule finds logits in it; pass forward="),
])
def test_bad_input_is_one_sentence(more, said, tmp_path):
    more = {"model": hosts.Net(), "train_dataset": hosts.DictRows()} | more
    more["args"] = arguments(tmp_path, **more.get("args", {}))
    if "label_smoothing_factor" in said: more["model"].config = BertConfig()
    with pytest.raises(ValueError, match=said) as caught: SelectionTrainer(**more).train()
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_the_method_or_of_another_is_refused(tmp_path):
    t = trainer_of(tmp_path, InfoBatch, save_strategy="steps", save_steps=4)
    t.train()
    folder = tmp_path / "checkpoint-4"
    for make, said in ((lambda: RS2(0.7), "^selector = RS2: must be InfoBatch, with which the checkpoint was written$"),
                       (lambda: InfoBatch(0.3), "^InfoBatch: r = 0.3, must be 0.5, with which the checkpoint was")):
        with pytest.raises(ValueError, match=said):
            trainer_of(tmp_path, make).train(resume_from_checkpoint=str(folder))
    (folder / "selector.pt").unlink()
    with pytest.raises(ValueError, match="selector.pt is missing: must be there"):
        trainer_of(tmp_path, InfoBatch).train(resume_from_checkpoint=str(folder))


def test_an_accelerate_loop_is_refused_what_it_cannot_do():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=2), hosts.Net()
    opt, data = hosts.sgd(model), with_ids(TensorDataset(*hosts.numbers()))
    def loader(sel): return accelerator.prepare(DataLoader(data, 16, sampler=None if sel is None else sel.sampler()))
    a, b = (InfoBatch().bind(hosts.task_of(model, None)) for _ in range(2))
    weighs = BatchWeight().bind(hosts.task_of(model, dev_loader()))
    for bad, said in (((InfoBatch(), opt), "^selector is a InfoBatch: must be a Selector that is bound to its task"),
                      ((weighs, opt), "^gradient_accumulation_steps = 2: must be 1 with BatchWeight"),
                      ((a, opt, loader(b)), "^loader: its sampler is not that of this InfoBatch"),
                      ((a, opt, loader(None)), "^loader: its sampler is not that of this InfoBatch"),
                      ((a, model), "^optimizer is a Net: must be one of torch")):
        with pytest.raises(ValueError, match=said): attach(accelerator, *bad)


CPU = """
import sys
from transformers import Trainer, TrainingArguments
from datasel_wb.hf import SelectionTrainer
import hosts
args = TrainingArguments(output_dir=sys.argv[1], use_cpu=True, report_to=[], max_steps=1)
try: SelectionTrainer(model=hosts.Net(), args=args, train_dataset=hosts.DictRows())
except ValueError as e: print(e)
"""


def test_use_cpu_is_heard_beside_xla_or_refused(tmp_path):
    "Here the room was imported first; in a fresh process transformers is."
    pytest.importorskip("torch_xla")
    env = {k: v for k, v in os.environ.items() if k not in ("USE_TORCH_XLA", "PJRT_DEVICE")}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    t = trainer_of(tmp_path, Uniform)
    assert t.args.device.type == "cpu" and next(t.model.parameters()).device.type == "cpu"
    run = subprocess.run([sys.executable, "-c", CPU, str(tmp_path)], env=env, capture_output=True, text=True)
    assert not run.returncode, run.stderr[-3000:]
    assert run.stdout.strip().splitlines()[-1] == (
        "use_cpu = True, but the device is xla:0: import datasel_wb.hf before transformers, or set USE_TORCH_XLA=0")


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertLMHeadModel", "BertForMaskedLM",
                                  "BertForTokenClassification"])
def test_tokens_are_compared_as_the_models_own_loss_does(name, tmp_path):
    "GPT2LMHeadModel has no loss type of its own, and takes that of causal models all the same."
    import transformers
    small = {"num_labels": 30} if "Token" in name else {}
    if name.startswith("GPT2"): config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2)
    elif name.startswith("Llama"): config = transformers.LlamaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1,
                                                                     num_attention_heads=2, intermediate_size=24)
    else: config = transformers.BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                           intermediate_size=24, is_decoder="LMHead" in name, **small)
    model = getattr(transformers, name)(config)
    rows = [{"input_ids": r, "labels": r} for r in torch.randint(30, (8, 6)).tolist()]
    args = transformers.TrainingArguments(tmp_path, use_cpu=True, report_to=[], per_device_train_batch_size=8,
                                          max_steps=1)
    trainer = SelectionTrainer(model=model, args=args, train_dataset=rows, target="tokens",
                               data_collator=transformers.default_data_collator)
    batch = next(iter(trainer.get_train_dataloader()))
    ids = batch["input_ids"]
    with torch.no_grad():
        own = model.eval()(input_ids=ids, labels=ids).loss
        ours = token_loss(model(input_ids=ids).logits, batch["labels"]).mean()
    assert torch.isclose(own, ours)
