"""
What MkDocs calls when it builds the site (`hooks` in mkdocs.yml). Most of it is the page on the Python interface, api.md, which is
made from the docstrings and not stored. The package is parsed and not imported, so that the site can be built without PyTorch.
"""

import ast
import inspect
import re
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "trl_score"
PUBLIC = {  # heading: module: names
    "Training": {
        "score_config": ["SCoReConfig"],
        "score_trainer": ["SCoReTrainer"],
        "callbacks": ["CollapseAlarm", "KeepBestCheckpoint"],
    },
    "Objective": {
        "objective": [
            "Stage",
            "stage_one",
            "stage_two",
            "two_stages",
            "resolve_stage1_steps",
            "targets",
            "shaped_rewards",
            "leave_one_out_advantages",
            "kl_weights",
            "balanced_stage1_beta",
            "spread_to_tokens",
            "sum_per_attempt",
        ],
    },
    "Measuring": {
        "evaluation": ["evaluate_self_correction", "Evaluation", "load_evaluation"],
        "scaling": ["inference_scaling"],
        "report": ["write_report"],
    },
    "Sampling": {
        "decoding": ["Decoding"],
        "sampling": ["Attempt", "Sampler", "TokenSampler", "TransformersSampler", "VLLMSampler", "EndpointSampler"],
    },
    "Rollouts to learn from": {
        "collection": ["collect", "with_first_attempts"],
        "baselines": ["star_traces", "pair_traces", "tokenized"],
    },
    "Tasks": {
        "tasks": ["get_task"],
        "tasks.base": ["Task"],
        "tasks.math": ["MathTask"],
        "tasks.code": ["CodeTask"],
        "tasks.arithmetic": ["Arithmetic"],
    },
    "Sandbox": {"sandbox": ["Sandbox", "Submission", "Verdict"], "sandbox.names": ["undefined_names"]},
}
HEAD = """# Python

This page is for readers who ask: which classes and functions are public, what are their arguments, and which errors do they raise?
The page [Options](options.md) has the options of training.
"""
SECTIONS = {"Args", "Parameters", "Attributes", "Returns", "Raises", "Example", "Examples"}
Definition = ast.ClassDef | ast.FunctionDef


def definition(module: str, name: str) -> Definition:
    """
    A class or function of the package, also where the module imports it from a neighbour.

    Raises:
        `KeyError`: If the module has no such name.
    """
    path = PACKAGE / Path(*module.split("."))
    is_package = path.is_dir()
    path = path / "__init__.py" if is_package else path.with_suffix(".py")
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, Definition) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in {each.name for each in node.names}:
            here = module.split(".") if is_package else module.split(".")[:-1]
            return definition(".".join([*here, node.module]), name)
    raise KeyError(f"`trl_score.{module}` has no `{name}`.")


def shortest(module: str, name: str) -> str:
    """The package that a name is imported from: the outermost that imports it, else its module."""
    parents = module.split(".")
    for number in range(len(parents)):
        nodes = ast.walk(ast.parse(PACKAGE.joinpath(*parents[:number], "__init__.py").read_text("utf-8")))
        if any(isinstance(node, ast.ImportFrom) and name in {each.name for each in node.names} for node in nodes):
            return ".".join(["trl_score", *parents[:number]])
    return f"trl_score.{module}"


def arguments(node: ast.FunctionDef) -> str:
    """A signature on one line, without `self` and annotations."""
    node = ast.parse(ast.unparse(node)).body[0]
    for each in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]:
        if each is not None:
            each.annotation = None
    node.args.args = [each for each in node.args.args if each.arg not in ("self", "cls")]
    return f"({ast.unparse(node.args)})"


def fields(node: ast.ClassDef) -> str:
    """The constructor of a dataclass; nothing for another class without `__init__`."""
    if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        return ""
    found = [each for each in node.body if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each)]
    texts = [f"{each.target.id}={ast.unparse(each.value)}" if each.value else each.target.id for each in found]
    return f"({', '.join(texts)})"


def linked(text: str) -> str:
    """Docstring references, [`name`] and [`~module.name`], as links where the page has them and else as code."""
    names = {name for modules in PUBLIC.values() for found in modules.values() for name in found}

    def link(match: re.Match) -> str:
        name = match[1].removeprefix("~").split(".")
        shown = ".".join(name[-2:]) if name[-1][0].islower() and len(name) == 2 else name[-1]
        anchor = next((part for part in reversed(name) if part in names), None)
        return f"[`{shown}`](#{anchor.lower()})" if anchor and name[0] != "trl" else f"`{shown}`"

    return re.sub(r"\[`(~?[\w.]+)`\](?!\()", link, text)


def rendered(docstring: str) -> str:
    """A docstring in TRL's format as Markdown."""
    lines, out, section = inspect.cleandoc(docstring).splitlines(), [], None
    fenced = False
    for line in lines:
        fenced ^= line.strip().startswith("```")
        heading = re.fullmatch(r"(\w+):(?: (.*))?", line)
        if heading and heading[1] in SECTIONS and not fenced:
            section = heading[1]
            out += ["", f"**{section}**", "", *([heading[2]] if heading[2] else [])]
            continue
        if section in ("Args", "Parameters", "Attributes") and not fenced:
            if entry := re.fullmatch(r"    ([\w*, ]+)(?: \((.*)\))?:", line):
                names = ", ".join(f"`{name.strip()}`" for name in entry[1].split(","))
                out += [f"- {names}" + (f" ({entry[2]}):" if entry[2] else ":")]
                continue
            line = line.removeprefix("    ").strip() and f"  {line.strip()}"
        elif section in ("Returns", "Raises") and not fenced:
            line = line.strip()
            if section == "Raises" and re.match(r"`\w+`: ", line):
                line = f"- {line}"
            elif section == "Raises" and line:
                line = f"  {line}"
        elif line and not line.startswith(" ") and not fenced and section:
            section = None  # text after a section
        out.append(line)
    return linked("\n".join(out)).strip()


def entry(module: str, node: Definition) -> str:
    """The part of the page on a class or a function."""
    own = shortest(module, node.name)
    text = [f"### `{node.name}` {{ #{node.name.lower()} }}"]
    if isinstance(node, ast.FunctionDef):
        signature, methods = arguments(node), []
    else:
        functions = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
        signature = arguments(functions["__init__"]) if "__init__" in functions else fields(node)
        methods = [each for name, each in functions.items() if not name.startswith("_") and ast.get_docstring(each)]
    if node.name == "SCoReConfig":
        docstring = inspect.cleandoc(ast.get_docstring(node)).partition("Parameters:")[0]
        text += [
            f"`from {own} import {node.name}`",
            rendered(docstring),
            "Its fields are on the page [Options](options.md).",
        ]
        return "\n\n".join(text)
    text += [f"```python\nfrom {own} import {node.name}\n\n{wrapped(node.name + signature)}\n```"]
    text += [rendered(ast.get_docstring(node) or "")]
    for method in methods:
        hooks = node.name == "SCoReTrainer" and method.name != "generate_attempts"  # TRL's, and documented there
        if not hooks:
            title = f"{node.name}.{method.name}"
            text += [f"#### `{title}` {{ #{title.lower()} }}"]
            if "property" not in map(ast.unparse, method.decorator_list):
                text += [f"```python\n{wrapped(method.name + arguments(method))}\n```"]
            text += [rendered(ast.get_docstring(method))]
    return "\n\n".join(text)


def wrapped(signature: str, width: int = 100) -> str:
    """A signature, one argument a line if it is long."""
    if len(signature) <= width:
        return signature
    name, _, rest = signature.partition("(")
    return name + "(\n" + "".join(f"    {part},\n" for part in split_arguments(rest[:-1])) + ")"


def split_arguments(text: str) -> list[str]:
    """Arguments at the commas that stand in no bracket or string."""
    call = ast.parse(f"def f({text}): ...").body[0].args
    plain = [each.arg for each in call.posonlyargs + call.args]
    defaults = [None] * (len(plain) - len(call.defaults)) + call.defaults
    found = [
        name if value is None else f"{name}={ast.unparse(value)}" for name, value in zip(plain, defaults, strict=True)
    ]
    if call.vararg:
        found.append(f"*{call.vararg.arg}")
    elif call.kwonlyargs:
        found.append("*")
    for each, value in zip(call.kwonlyargs, call.kw_defaults, strict=True):
        found.append(each.arg if value is None else f"{each.arg}={ast.unparse(value)}")
    return found + ([f"**{call.kwarg.arg}"] if call.kwarg else [])


def page() -> str:
    parts = [HEAD]
    for heading, modules in PUBLIC.items():
        parts.append(f"## {heading}\n")
        for module, names in modules.items():
            parts += [entry(module, definition(module, name)) + "\n" for name in names]
    return "\n".join(parts)


def on_files(files, config):
    """MkDocs: add the page to the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "api.md", content=page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """MkDocs: links to files of the repository outside of the site lead to the repository."""
    return markdown.replace("](../", f"]({config.repo_url}/blob/main/")
