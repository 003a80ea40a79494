"""The code that travels with an exported model: the classes for transformers and all that they use, as one file.

It is taken from the modules of this package, so that what an exported folder runs is what the tests run: every
definition that the classes reach, in the order of the modules; imports of mmrec go, and a name that two modules have
gets that of its module before it.
"""

from __future__ import annotations

import ast
import builtins
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

from mmrec import __version__

PACKAGE = "mmrec"
ROOTS = {
    "mmrec.export.hf.configuration": "MmrecConfig",
    "mmrec.export.hf.tokenization": "MmrecTokenizer",
    "mmrec.export.hf.modeling": "MmrecForCausalLM",
}
HEADER = '''\
"""A language model of mmrec {version}, in plain torch, for transformers: nothing else has to be installed.

This file is written by ``mmrec export --format hf`` from mmrec's own modules, which say more.
"""

from __future__ import annotations

'''


class Module:
    """What one module defines and imports at its top level.

    Attributes:
        definitions: by name, the statements that make it (an assignment and the string that documents it).
        own: by name, the module and the name there of what is imported from mmrec; a whole module has the name "".
        foreign: by name, where else it is imported from ("" for a module), and how it is called there and here.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        self.lines = Path(spec.origin).read_text(encoding="utf-8").splitlines()
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.own: dict[str, tuple[str, str]] = {}
        self.foreign: dict[str, tuple[str, str]] = {}
        last: str | None = None
        for statement in ast.parse("\n".join(self.lines)).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self._import(statement)
            elif isinstance(statement, ast.Expr):  # a docstring
                if last is not None:
                    self.definitions[last].append(statement)
            else:
                last = _defined(statement)
                self.definitions.setdefault(last, []).append(statement)

    def _import(self, statement: ast.Import | ast.ImportFrom) -> None:
        for alias in statement.names:
            name = alias.asname or alias.name
            if isinstance(statement, ast.Import):
                self.foreign[name] = "", ast.unparse(alias)
                continue
            source = statement.module or ""
            if source.split(".")[0] != PACKAGE:
                self.foreign[name] = source, ast.unparse(alias)
            elif _is_module(source, alias.name):
                self.own[name] = f"{source}.{alias.name}", ""
            else:
                self.own[name] = source, alias.name

    @cached_property
    def modules(self) -> list[str]:
        """The modules of mmrec that this one imports from."""
        return list(dict.fromkeys(source for source, _ in self.own.values()))


@cache
def _is_module(package: str, name: str) -> bool:
    """Whether ``name`` is a module of ``package``, which may be none itself."""
    spec = find_spec(package)
    return spec is not None and bool(spec.submodule_search_locations) and find_spec(f"{package}.{name}") is not None


def _defined(statement: ast.stmt) -> str:
    """Return the name that a statement at the top level of a module defines."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return statement.name
    target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
    assert isinstance(target, ast.Name), ast.unparse(statement)
    return target.id


class Bundle:
    """The definitions that are reached from some classes, and the text of them all."""

    def __init__(self) -> None:
        self.modules: dict[str, Module] = {}
        self.reached: set[tuple[str, str]] = set()
        self.names: dict[str, tuple[str, str]] = {}  # in the bundle: which definition has the name
        self.imports: dict[str, tuple[str, str]] = {}

    def module(self, name: str) -> Module:
        """Return the module ``name``; those that it imports from come before it in :attr:`modules`."""
        if name not in self.modules:
            module = Module(name)
            for other in module.modules:
                self.module(other)
            self.modules[name] = module
        return self.modules[name]

    def resolve(self, module: str, name: str) -> tuple[str, str] | None:
        """Return where ``name`` of ``module`` is defined; None where it is none of mmrec's."""
        found = self.module(module)
        if name in found.definitions:
            return module, name
        if name in found.own:
            source, there = found.own[name]
            return (source, "") if not there else self.resolve(source, there)
        if name in found.foreign:
            known = self.imports.setdefault(name, found.foreign[name])
            assert known == found.foreign[name], f"two things are imported as {name}"
        return None

    def reach(self, module: str, name: str) -> None:
        """Take the definition of ``name``, and all that it uses."""
        if (module, name) in self.reached:
            return
        self.reached.add((module, name))
        for statement in self.module(module).definitions[name]:
            for _, target in self._uses(module, statement):
                self.reach(*target)

    def _uses(self, module: str, statement: ast.stmt) -> list[tuple[ast.Name | ast.Attribute, tuple[str, str]]]:
        """Return where a statement names a definition of mmrec, and which one."""
        found: list[tuple[ast.Name | ast.Attribute, tuple[str, str]]] = []
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                target = self.resolve(module, node.value.id)
                if target is not None and not target[1]:
                    inner = self.resolve(target[0], node.attr)
                    assert inner is not None, ast.unparse(node)
                    found.append((node, inner))
            elif isinstance(node, ast.Name):
                target = self.resolve(module, node.id)
                if target is not None and target[1]:
                    found.append((node, target))
        return found

    def text(self) -> str:
        """Return the definitions that were reached, as the text of one module after its imports."""
        order = [
            (module, name)
            for module, found in self.modules.items()
            for name in found.definitions
            if (module, name) in self.reached
        ]
        for module, name in order:
            taken = name in self.names or name in self.imports or hasattr(builtins, name)
            self.names[f"{module.rsplit('.', 1)[-1]}_{name}" if taken else name] = module, name
        renamed = {target: name for name, target in self.names.items()}
        parts = [*_import_lines(set(self.imports.values())), ""]
        section = None
        for module, name in order:
            if module != section:
                section = module
                parts.append(f"\n# {module}\n")
            parts.extend(self._written(module, name, renamed))
        return "\n".join(parts)

    def _written(self, module: str, name: str, renamed: dict[tuple[str, str], str]) -> list[str]:
        """Return the lines of a definition, with names as they are in the bundle."""
        lines: list[str] = []
        statements = self.modules[module].definitions[name]
        for statement in statements:
            begin = min([statement.lineno, *(one.lineno for one in getattr(statement, "decorator_list", []))])
            own = [line.encode() for line in self.modules[module].lines[begin - 1 : statement.end_lineno]]
            edits = [(node, renamed[target]) for node, target in self._uses(module, statement)]
            for node, new in sorted(edits, key=lambda edit: (edit[0].lineno, edit[0].col_offset), reverse=True):
                assert node.lineno == node.end_lineno
                row = node.lineno - begin
                own[row] = own[row][: node.col_offset] + new.encode() + own[row][node.end_col_offset :]
            if isinstance(statement, ast.FunctionDef | ast.ClassDef) and renamed[module, name] != name:
                row = statement.lineno - begin
                own[row] = own[row].replace(f" {name}".encode(), f" {renamed[module, name]}".encode(), 1)
            lines += [line.decode() for line in own]
        alone = isinstance(statements[0], ast.FunctionDef | ast.ClassDef)
        return ["", *lines, ""] if alone else lines


def _import_lines(imports: set[tuple[str, str]]) -> list[str]:
    """Return the lines that import: the standard library's, an empty one, then those of torch and transformers."""
    lines = [f"import {alias}" for source, alias in sorted(imports) if not source]
    for module in sorted({source for source, _ in imports if source}):
        names = ", ".join(sorted(alias for source, alias in imports if source == module))
        lines.append(f"from {module} import {names}")
    foreign = [line for line in lines if line.split()[1].split(".")[0] in ("torch", "transformers")]
    return [*(line for line in lines if line not in foreign), "", *foreign]


@cache
def bundled_code() -> str:
    """Return the text of the module that an exported folder has its classes from."""
    bundle = Bundle()
    for module, name in ROOTS.items():
        bundle.reach(module, name)
    return HEADER.format(version=__version__) + bundle.text() + "\n"
