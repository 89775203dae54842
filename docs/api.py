"""The API reference, a page per module of the installed package: signatures, docstrings, comments of the arguments."""
import ast
import importlib
import inspect
import re
import textwrap
from dataclasses import fields, is_dataclass
from functools import cached_property

from fastcore.docments import docments


def safe(text: str) -> str:
    "A comment as Markdown: what looks like markup is text, code in backticks stays code."
    return "".join(t if t.startswith("`") else re.sub(r"([\\<>*_\[\]$|{}])", r"\\\1", t)
                   for t in re.split(r"(`[^`]+`)", " ".join(text.split())))


def node_of(function) -> ast.FunctionDef:
    "Syntax tree of a function; annotations in quotes, of packages that are imported late, without them."
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    for part in ast.walk(node.args): part.annotation = unquoted(getattr(part, "annotation", None))
    node.returns = unquoted(node.returns)
    return node


def unquoted(annotation):
    "The expression of an annotation in quotes; another one as it is."
    text = getattr(annotation, "value", None)
    return (ast.parse(text, mode="eval").body if isinstance(annotation, ast.Constant) and isinstance(text, str)
            else annotation)


def call(function, skip_first: bool = False) -> str:
    "Signature of a function as it is written in its source."
    node = node_of(function)
    if skip_first: del (node.args.posonlyargs or node.args.args)[0]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    return f"({ast.unparse(node.args)}){returns}"


def comments(function) -> dict:
    "Comment of each argument that has one; `return` is the value."
    return {k: v for k, v in docments(function).items() if v and k != "self"}


def field_lines(docs: dict) -> list:
    "Comments of arguments as a field list."
    name = {"return": "returns"}
    return [f":{name.get(k, f'param {k}')}: {safe(v)}" for k, v in docs.items()]


def type_name(annotation) -> str:
    "An annotation as text."
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def class_call(cls) -> tuple:
    "Signature of a class, and the comments of its arguments."
    if is_dataclass(cls):
        shown = [f"{f.name}: {type_name(f.type)} = {f.default!r}" for f in fields(cls)]
        return f"({', '.join(shown)})", {f.name: f.metadata.get("doc", "")
                                         for f in fields(cls) if f.metadata.get("doc")}
    if hasattr(cls, "_fields"):   # a NamedTuple
        shown = [k + (f" = {cls._field_defaults[k]!r}" if k in cls._field_defaults else "") for k in cls._fields]
        return f"({', '.join(shown)})", {k: v for k, v in docments(cls).items() if v and k in cls._fields}
    if "__init__" in cls.__dict__: return call(cls.__init__, True), comments(cls.__init__)
    return "", {}


def block(kind: str, head: str, body: list, depth: int, options=()) -> str:
    "A directive of the Python domain, fenced for its depth."
    fence = "`" * (5 - depth)
    return "\n".join([f"{fence}{{py:{kind}}} {head}", *options, "", *body, fence])


def member(name: str, thing) -> str:
    "A method or property of a class."
    if isinstance(thing, (property, cached_property)):
        f = getattr(thing, "fget", None) or thing.func
        return block("property", name, [inspect.getdoc(f) or ""], 1)
    plain = isinstance(thing, staticmethod)
    f = inspect.unwrap(getattr(thing, "__func__", thing))
    options = [":staticmethod:"] if plain else [":classmethod:"] if isinstance(thing, classmethod) else []
    return block("method", name + call(f, not plain),
                 [inspect.getdoc(f) or "", "", *field_lines(comments(f))], 1, options)


def is_member(name: str, thing) -> bool:
    "Whether a class's own attribute belongs into the reference."
    return (not name.startswith("_") and (inspect.isfunction(thing)
                                          or isinstance(thing, (property, cached_property, staticmethod, classmethod))))


def entry(module, name: str, label: str) -> str:
    "The reference of one exported name, with a link to the place that the label marks in its chapter."
    thing, source = getattr(module, name), f"{{ref}}`source <{label}>`"
    if inspect.isclass(thing):
        signature, docs = class_call(thing)
        bases = [f"`{b.__name__}`" for b in thing.__bases__ if b not in (object, tuple)]
        body = [inspect.getdoc(thing) or "", "", *([f"Based on {', '.join(bases)}.", ""] if bases else []),
                *field_lines(docs), "", source, ""]
        return block("class", name + signature,
                     body + [member(k, v) + "\n" for k, v in thing.__dict__.items() if is_member(k, v)], 0)
    if callable(thing):
        f = inspect.unwrap(thing)
        return block("function", name + call(f),
                     [inspect.getdoc(f) or "", "", *field_lines(comments(f)), "", source], 0)
    return block("data", name, [value(thing), "", source], 0)


def value(thing) -> str:
    "What a constant is, in a line."
    if isinstance(thing, dict): return "Keys: " + ", ".join(f"`{k}`" for k in thing) + "."
    return f"`{thing!r}`"


def pages(chapters: dict) -> dict:
    "Markdown of the reference by file name, from the labels of the exported names of each chapter."
    found, rows = {}, []
    for chapter, labels in chapters.items():
        short = re.sub(r"^\d\d_", "", chapter)
        module = importlib.import_module(f"datasel_wb.{short}")
        own = [n for n in module.__all__ if n in labels]   # what it takes over from a module below stands there
        entries = [entry(module, n, labels[n]) for n in sorted(own, key=str.lower)]
        head = [f"# {short}", f"{module.__doc__}. The chapter: [{short}]({chapter}.ipynb).",
                f"```{{py:module}} datasel_wb.{short}\n```"]
        found[f"api_{short}.md"] = "\n\n".join(head + entries)
        rows.append(f"| [{short}](api_{short}.md) | {module.__doc__} | {len(entries)} |")
    table = "\n".join(["| module | what is in it | names |", "|---|---|---|", *rows])
    tree = "\n".join(["```{toctree}", ":hidden:", "", *(f"api_{re.sub(r'^[0-9]+_', '', c)}" for c in chapters), "```"])
    text = "Every exported name, with the comments of its arguments; each entry leads to the place in its chapter."
    return found | {"api.md": "\n\n".join(["# API", text, table, tree])}
