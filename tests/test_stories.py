"""Five newcomers, from their data to a result: what each would write, and how many lines of it are for datasel_wb.

Each story is a function as its user would have it: public names, imported in it. A line that is there for datasel_wb
ends in `# datasel`; `lines` counts them, and those in the loop, and finds one whose mark is missing.
"""
import ast
import inspect
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from datasel_wb import Explorer, SelectionTrainer, noise_auroc   # the trainer before transformers, which looks for XLA

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")
MARK = "  # datasel"
HOST = ("trainer", "loader")   # what a user has anyway, made with something of ours in it


def lines(story) -> tuple:
    "How many lines of a function are there for datasel_wb: in all, and in its loops."
    rows = inspect.getsource(story).splitlines()
    marked = {n for n, row in enumerate(rows, 1) if row.endswith(MARK)}
    tree, ours, used, loops = ast.parse("\n".join(rows)), set(), set(), set()
    def uses(node): return any(isinstance(n, ast.Name) and n.id in ours for n in ast.walk(node))
    for node in sorted((n for n in ast.walk(tree) if hasattr(n, "lineno")), key=lambda n: n.lineno):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("datasel_wb"):
            ours |= {a.asname or a.name for a in node.names}
            used.add(node.lineno)
        if isinstance(node, ast.Assign) and uses(node.value):
            ours |= {t.id for t in node.targets if isinstance(t, ast.Name) and t.id not in HOST + ("loss",)}
        if isinstance(node, ast.With):
            ours |= {i.optional_vars.id for i in node.items if i.optional_vars and uses(i.context_expr)}
        if isinstance(node, (ast.For, ast.While)): loops |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.FunctionDef) and node.name == "training_step":
            loops |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, ast.Name) and node.id in ours: used.add(node.lineno)
    assert used <= marked, f"not marked: {[rows[n - 1].strip() for n in sorted(used - marked)]}"
    return len(marked), len(marked & loops)


def faces(run, rows, data=None) -> list:
    "What the explorer's cards show of some examples: a text, names and values, or `picture`."
    panel = Explorer(run, data)
    assert panel.message.value == ""
    panel.select(rows)
    shown = {c["row"]: c["text"] or c["pairs"] or "picture" for c in panel.chosen.cards.cards}
    assert bool(panel.chosen.cards.sheet) == ("picture" in shown.values())
    assert not any(c["missing"] for c in panel.chosen.cards.cards)
    panel.close()
    return [shown[r] for r in rows]


def found(scores, wrong) -> float:
    "How well high scores single out what is wrong: 0.5 by chance, 1 at best."
    return noise_auroc(-torch.as_tensor(np.array(scores, dtype=float)), torch.as_tensor(wrong))


# An image folder

COLOURS = {"leaf": (60, 160, 60), "rust": (160, 80, 50), "sky": (70, 110, 180)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "120 pictures of 12 x 12 in three folders, each tenth in a wrong one."
    root, g = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for k in range(120):
        kind, wrong = k % 3, k % 10 == 7
        values = g.normal(list(COLOURS.values())[kind], 45, (12, 12, 3)).clip(0, 255).astype(np.uint8)
        folder = root / list(COLOURS)[(kind + wrong) % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(values).save(folder / f"{'wrong' if wrong else 'right'}_{k}.png")
    return root


def image_folder(root, run):
    from datasel_wb import DataParameters, Recorder, Sigma, Task, with_ids  # datasel
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor
    torch.manual_seed(0)
    data = ImageFolder(root, ToTensor())
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 144, 32), nn.ReLU(), nn.Linear(32, len(data.classes)))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sel = DataParameters(inst=Sigma(lr=5.0)).bind(Task(model, n=len(data)))  # datasel
    loader = DataLoader(with_ids(data), 16, shuffle=True)  # datasel
    with Recorder(run, data.targets, classes=data.classes, selector=sel) as recorder:  # datasel
        for _ in range(12):
            for x, y, idx in loader:  # datasel
                loss = sel.loss(model(x), (x, y, idx))  # datasel
                opt.zero_grad()
                loss.backward()
                opt.step()
                sel.after_step()  # datasel
                recorder.record(idx)  # datasel
    return data, recorder.table()  # datasel


def test_an_image_folder_in_an_own_loop(pictures, tmp_path):
    "9 lines, 4 in the loop, one of which is for the records."
    assert lines(image_folder) == (9, 4)
    data, table = image_folder(pictures, tmp_path / "pictures")
    wrong = ["wrong" in name for name, _ in data.samples]
    assert table.presentations.eq(12).all() and sum(wrong) == 12
    assert found(table["sigma/inst"], wrong) > 0.9 and found(table.forgetting, wrong) > 0.9
    suspicious = table["sigma/inst"].nlargest(12).index.tolist()
    assert sum(wrong[i] for i in suspicious) >= 9                              # 1.2 by chance
    assert faces(tmp_path / "pictures", suspicious, data) == ["picture"] * 12


# A dataset of one's own, two workers, and a machine that goes away

class Readings(Dataset):
    "192 rows of 8 numbers in two classes, some hard."
    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.x, self.noise = torch.randn(192, 8, generator=g), torch.randn(192, generator=g)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], int(self.x[i, :3].sum() + 0.5 * self.noise[i] > 0)


class Killed(Exception): "The machine went away."


def own_loop(folder, visited, until=None):
    from datasel_wb import InfoBatch, Task, with_ids  # datasel
    torch.manual_seed(0)
    data, epochs, begin, step = Readings(), 6, 0, 0
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    opt = torch.optim.Adam(model.parameters(), lr=0.02)
    sel = InfoBatch().bind(Task(model, n=len(data), epochs=epochs))  # datasel
    loader = DataLoader(with_ids(data), 16, sampler=sel.sampler(), num_workers=2, persistent_workers=True)  # datasel
    if (folder / "last.pt").exists():
        state = torch.load(folder / "last.pt")
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        sel.load_state_dict(state["sel"])  # datasel
        begin, step = state["epoch"], state["step"]
    for epoch in range(begin, epochs):
        for x, y, idx in loader:  # datasel
            visited.append(idx.tolist())
            loss = sel.loss(model(x), (x, y, idx))  # datasel
            opt.zero_grad()
            loss.backward()
            opt.step()
            sel.after_step()  # datasel
            step += 1
            if step % 5 == 0:
                state = {"model": model.state_dict(), "opt": opt.state_dict(), "epoch": epoch, "step": step}
                torch.save(state | {"sel": sel.state_dict()}, folder / "last.pt")  # datasel
            if step == until: raise Killed
    return model


def test_a_plain_dataset_with_two_workers_is_killed_and_resumed(tmp_path):
    "8 lines, 4 in the loop, one of which is for the checkpoint."
    assert lines(own_loop) == (8, 4)
    for name in ("whole", "cut"): (tmp_path / name).mkdir()
    whole, first, rest = [], [], []
    model = own_loop(tmp_path / "whole", whole)
    epochs, n = [], 0
    for ids in whole:                                              # an epoch ends where an id would come again
        if not epochs or n in (192, len(epochs[-1])) or set(ids) & set(epochs[-1]): epochs.append([])
        epochs[-1] += ids
    counts = [len(set(e)) for e in epochs]
    assert counts[0] == counts[-1] == 192 and max(counts[1:-1]) < 0.9 * 192 and len(counts) == 6
    with pytest.raises(Killed): own_loop(tmp_path / "cut", first, until=23)    # in the second epoch; saved at 20
    again = own_loop(tmp_path / "cut", rest)
    assert first == whole[:23] and rest == whole[20:]
    for name, p in model.state_dict().items(): assert torch.equal(p, again.state_dict()[name])
    one, two = (torch.load(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for name in ("losses", "scale", "steps_done"): assert torch.equal(one["sel"][name], two["sel"][name])


# Sentences with transformers

def questions() -> pd.DataFrame:
    "Ten intents of banking77, 40 sentences each, where the data are; else as many that are made here."
    file = Path(os.environ.get("DATASEL_DATA") or "/nowhere", "banking77", "train.csv")
    if file.exists():
        frame = pd.read_csv(file)
        kinds = frame.category.value_counts().index[:10]
        return pd.concat([frame[frame.category == k][:40] for k in kinds], ignore_index=True)
    things = "card account transfer payment refund pin fee rate top-up limit".split()
    asked = "where is my {}", "why was the {} declined", "how do i change the {}", "please explain this {} to me"
    return pd.DataFrame([(f"{asked[k % 4].format(t)} number {k}", t) for t in things for k in range(40)],
                        columns=["text", "category"])


def sentences(frame, run, folder):
    from datasel_wb import DataParameters, Recorder, SelectionTrainer, Sigma  # datasel
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import (BertConfig, BertForSequenceClassification, DataCollatorWithPadding,
                              PreTrainedTokenizerFast, TrainingArguments)
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(frame.text.str.lower(), trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    kinds = sorted(set(frame.category))
    data = Dataset.from_dict({"text": frame.text, "labels": [kinds.index(c) for c in frame.category]})
    data = data.map(lambda rows: tokenizer([t.lower() for t in rows["text"]], truncation=True, max_length=32),
                    batched=True)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, num_labels=len(kinds), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    args = TrainingArguments(folder, use_cpu=True, num_train_epochs=12, per_device_train_batch_size=32,
                             learning_rate=1e-2, report_to=[], save_strategy="no", disable_tqdm=True)
    with Recorder(run, data["labels"], classes=kinds, data=frame.text.tolist()) as recorder:  # datasel
        trainer = SelectionTrainer(model=model, args=args, train_dataset=data,  # datasel
                                   data_collator=DataCollatorWithPadding(tokenizer),
                                   selector=DataParameters(inst=Sigma(lr=5.0)), records=recorder)  # datasel
        trainer.train()
    return recorder.table()  # datasel


def test_sentences_with_transformers(tmp_path):
    "5 lines; the Trainer's own loop is as it was."
    assert lines(sentences) == (5, 0)
    frame = questions()
    kinds, wrong = sorted(set(frame.category)), np.arange(len(frame)) % 12 == 5
    frame.loc[wrong, "category"] = [kinds[(kinds.index(c) + 3) % len(kinds)] for c in frame.category[wrong]]
    table = sentences(frame, tmp_path / "bank", tmp_path / "trainer")
    assert table.presentations.eq(12).all() and table["class"].tolist() == frame.category.tolist()
    assert table[~wrong].correct_last.mean() > 0.85                           # 0.1 by chance
    assert found(table.forgetting, wrong) > 0.65 and found(table["sigma/inst"], wrong) > 0.75  # 0.5 ± 0.05 by chance
    rows = table["sigma/inst"].nlargest(6).index.tolist()
    assert faces(tmp_path / "bank", rows) == frame.text[rows].tolist()


# A table in Lightning; numbers and several labels at once in an own loop

@pytest.fixture(scope="module")
def customers():
    "20,000 rows of 30 numbers and whether a customer stays; 1 label of 20 is wrong."
    g = np.random.default_rng(0)
    x = g.normal(size=(20_000, 30))
    stays, wrong = x @ np.linspace(-1, 1, 30) + x[:, 0] * x[:, 1] > 0, np.arange(20_000) % 20 == 7
    return pd.DataFrame(x, columns=[f"f{k}" for k in range(30)]).assign(stays=(stays ^ wrong).astype(int)), wrong


def table_in_lightning(frame, run):
    from datasel_wb import InfoBatch, Recorder, Selection, with_ids  # datasel
    import lightning as L
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))
        def training_step(self, batch, batch_idx):
            x, _, _ = batch  # datasel
            return selection.loss(self.net(x), batch)  # datasel
        def configure_optimizers(self): return torch.optim.Adam(self.parameters(), lr=3e-3)
    L.seed_everything(0, verbose=False)
    with Recorder(run, frame["stays"], data=frame) as recorder:  # datasel
        selection = Selection(InfoBatch(), with_ids(frame, label="stays"), records=recorder)  # datasel
        trainer = L.Trainer(accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False, callbacks=[selection])  # datasel
        trainer.fit(Module(), selection.dataloader(256))  # datasel
    return recorder.table()  # datasel


def test_a_table_in_lightning(customers, tmp_path):
    "8 lines, 2 in the step."
    assert lines(table_in_lightning) == (8, 2)
    frame, wrong = customers
    table = table_in_lightning(frame, tmp_path / "customers")
    assert table.presentations.min() >= 2 and table.presentations.sum() < 0.85 * 4 * 20_000
    assert table[~wrong].correct_last.mean() > 0.9                            # 0.5 by chance
    assert found(table.el2n, wrong) > 0.9
    shown, = faces(tmp_path / "customers", [11])
    assert [name for name, _ in shown[:2]] == ["f0", "f1"] and float(shown[1][1]) == pytest.approx(frame.f1[11], 1e-3)


def own_targets(x, y, target, run):
    from datasel_wb import Recorder, SPCL, Task, with_ids  # datasel
    torch.manual_seed(0)
    width = y.shape[1] if y.ndim > 1 else 1
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, width))
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    sel = SPCL().bind(Task(model, n=len(x), steps=10 * len(x) // 32, target=target))  # datasel
    loader = DataLoader(with_ids(TensorDataset(x, y)), 32, shuffle=True)  # datasel
    with Recorder(run, y, target=target, selector=sel, data=x) as recorder:  # datasel
        for _ in range(10):
            for x, y, idx in loader:  # datasel
                loss = sel.loss(model(x), (x, y, idx))  # datasel
                opt.zero_grad()
                loss.backward()
                opt.step()
                sel.after_step()  # datasel
                recorder.record(idx)  # datasel
    return model, recorder.table()  # datasel


@pytest.mark.parametrize("target", ["regression", "multilabel"])
def test_other_targets_in_an_own_loop(target, tmp_path):
    "9 lines, 4 in the loop, one of which is for the records."
    assert lines(own_targets) == (9, 4)
    g = torch.Generator().manual_seed(0)
    x, wrong = torch.randn(640, 6, generator=g), torch.arange(640) % 10 == 3
    truth = x @ torch.randn(6, 3, generator=g)
    y = truth[:, 0] if target == "regression" else (truth > 0).float()
    y = torch.where(wrong, y + 6 * truth[:, 1].sign(), y) if y.ndim == 1 else torch.where(wrong[:, None], 1 - y, y)
    model, table = own_targets(x, y, target, tmp_path / target)
    with torch.no_grad(): told = model(x)[~wrong]
    if target == "regression": assert F.mse_loss(told[:, 0], y[~wrong]) < 0.2 * y[~wrong].var()
    else: assert ((told > 0) == (y[~wrong] > 0)).float().mean() > 0.9
    assert found(table.residual if target == "regression" else table.el2n, wrong) > 0.9
    assert table.weight_mean[wrong.numpy()].mean() < 0.6 * table.weight_mean[~wrong.numpy()].mean()
    assert [name for name, _ in faces(tmp_path / target, [5])[0][:2]] == ["0", "1"]


# A language model on three sources

def texts_of(source: int, n: int, seed: int):
    "Sequences [n, 12] of 10 tokens; in each source another token follows a token, nine times of ten."
    follows = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(k)) for k in (1, 2, 3)])[source]
    g, tokens = torch.Generator().manual_seed(seed), []
    tokens.append(torch.randint(10, (n,), generator=g))
    for _ in range(11):
        other = torch.randint(10, (n,), generator=g)
        tokens.append(torch.where(torch.rand(n, generator=g) < 0.9, follows[tokens[-1]], other))
    return torch.stack(tokens, 1)


SOURCES = np.repeat(["news", "code", "chat"], 64).tolist()


def mixed(): return torch.cat([texts_of(k, 64, 10 + k) for k in range(3)])


def gpt():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=12, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.0,
                                      embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))


def weighted_texts(ids, dev):
    from datasel_wb import BatchWeight, Dynamics, Task, with_ids  # datasel
    model = gpt()
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    held = TensorDataset(dev[:, :-1], dev[:, 1:])
    sel = BatchWeight().bind(Task(model, n=len(ids), dev=held, target="tokens"))  # datasel
    records = Dynamics(n=len(ids), target="tokens")  # datasel
    loader = DataLoader(with_ids(TensorDataset(ids[:, :-1], ids[:, 1:])), 24, shuffle=True)  # datasel
    for _ in range(6):
        for x, y, idx in loader:  # datasel
            logits = model(x).logits
            loss = sel.loss(logits, (x, y, idx))  # datasel
            opt.zero_grad()
            loss.backward()
            opt.step()
            sel.after_step()  # datasel
            records.record(idx, logits, sel.seen.losses, y, sel.seen.weights)  # datasel
    return records.table()  # datasel


def test_a_language_model_weighs_each_text(tmp_path):
    "9 lines, 4 in the loop, one of which is for the records."
    assert lines(weighted_texts) == (9, 4)
    table = weighted_texts(mixed(), texts_of(1, 48, 20))
    share = table.groupby(SOURCES).weight_mean.mean() / table.weight_mean.mean() / 3
    assert share["code"] > 0.5 and table.presentations.eq(6).all()            # 1/3 by chance
    assert table[np.array(SOURCES) == "code"].loss_last.mean() < 0.9 * table.loss_last.mean()


def mixed_texts(ids, sources, dev, folder):
    from datasel_wb import DDS, GroupScorer, SelectionTrainer  # datasel
    from datasets import Dataset
    from transformers import TrainingArguments, default_data_collator
    def columns(ids): return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    args = TrainingArguments(folder, use_cpu=True, num_train_epochs=6, per_device_train_batch_size=24,
                             learning_rate=3e-3, report_to=[], save_strategy="no", disable_tqdm=True)
    sel = DDS(GroupScorer(sources), lr=1.0)  # datasel
    trainer = SelectionTrainer(model=gpt(), args=args, data_collator=default_data_collator,  # datasel
                               train_dataset=columns(ids),
                               selector=sel, dev_dataset=columns(dev))  # datasel
    trainer.train()
    return dict(zip(sel.scorer.names, sel.scorer.scores().tolist()))  # datasel


@pytest.mark.parametrize("source", range(3))
def test_dds_finds_the_source_of_the_dev_set(source, tmp_path):
    "5 lines; the Trainer's own loop is as it was."
    assert lines(mixed_texts) == (5, 0)
    scores = mixed_texts(mixed(), SOURCES, texts_of(source, 48, 20), tmp_path)
    name = ("news", "code", "chat")[source]
    others = max(v for k, v in scores.items() if k != name)
    assert scores[name] > others + 0.5          # it counts e^0.5 times as much as the next, equal by chance
