"""What Sphinx does not do itself: names in backticks link to the reference, and charts are drawn without a network."""
import re

from docutils import nodes
from sphinx.util.nodes import make_refnode
import vl_convert


def known_names(objects) -> dict:
    "What may stand in backticks -> full names that it can mean."
    found = {}
    for full, o in objects:
        if o.objtype == "module": continue
        _, module, *rest = full.split(".")
        for key in (".".join(rest), ".".join([module, *rest])): found.setdefault(key, []).append(full)
    return found


def meaning(text: str, known: dict, page: str) -> str | None:
    "The full name that a piece of code stands for, or None. A plain word is a name only in its own chapter, or called."
    name = text.removesuffix("()").removeprefix("datasel_wb.")
    fits = known.get(name, [])
    here = [f for f in fits if page.endswith(f.split(".")[1])]
    if here: return here[0]
    plain = name.isalpha() and name.islower() and name == text
    return fits[0] if len(fits) == 1 and not plain else None


def link_names(app, doctree, page) -> None:
    "Inline code that names something exported becomes a link to it."
    domain = app.env.domains.python_domain
    known = known_names(domain.objects.items())
    for literal in list(doctree.findall(nodes.literal)):
        if isinstance(literal.parent, (nodes.reference, nodes.title)): continue
        if full := meaning(literal.astext(), known, page):
            o = domain.objects[full]
            literal.replace_self(make_refnode(app.builder, page, o.docname, o.node_id, literal.deepcopy(), full))


def link_types(app, env, node, content):
    "A type in a signature that another module of the package exports becomes a link, too."
    fits = known_names(env.domains.python_domain.objects.items()).get(node.get("reftarget"), [])
    if node.get("refdomain") != "py" or len(fits) != 1: return None
    o = env.domains.python_domain.objects[fits[0]]
    return make_refnode(app.builder, node["refdoc"], o.docname, o.node_id, content, fits[0])


def list_parameters(app, page, template, context, doctree) -> None:
    "Long signatures as lists; Sphinx writes <dl> without <dt>, which a screen reader cannot tell apart."
    def plain(found):
        return '<ul class="sig-params">' + found[1].replace("<dd>", "<li>").replace("</dd>", "</li>") + "</ul>"
    context["body"] = re.sub(r'<dl>\s*((?:<dd><em class="sig-param">.*</dd>\s*)+)</dl>', plain, context.get("body", ""))


def chart_scripts(app, page, template, context, doctree) -> None:
    "Vega on the pages that have a chart, and on no others."
    if 'class="chart"' in context.get("body", ""):
        app.add_js_file("vega.js")
        app.add_js_file("charts.js")


def write_vega(app, error) -> None:
    "The Vega bundle of the installed vl-convert, in a function: Sphinx's search uses the same global names."
    if error: return
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    (app.outdir / "_static" / "vega.js").write_text(f"(function () {{\n{bundle}\n}})();\n")


def setup(app) -> dict:
    "Connect all of it."
    app.setup_extension("sphinx-mathjax-offline")
    app.extensions["sphinx-mathjax-offline"].parallel_read_safe = True   # it copies files when all is built
    app.connect("doctree-resolved", link_names)
    app.connect("missing-reference", link_types)
    app.connect("html-page-context", list_parameters)
    app.connect("html-page-context", chart_scripts)
    app.connect("build-finished", write_vega)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
