"""Which keys of the configuration the package reads: types are followed through its syntax trees.

`cfg.optim.lr` is a read of `OptimConfig.lr` because `cfg` is known to be a `Config`: by the
annotation of a parameter, attribute, property or function, or by what was assigned to it. A word
that merely looks like a key, such as `.size` of something else, is none. What a section's own class
reads (its checks) does not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

ROOT = "Config"  # the class that holds the sections
OWN = "own"  # its method that gives the section of a method: cfg.own(ZegFormerConfig)
Environment = dict[str, str]  # name -> the class of what it holds


@dataclass
class Class:
    """What is known of a class: its bases, and the classes of its attributes."""

    bases: list[str]
    attributes: Environment = field(default_factory=dict)
    body: list[ast.stmt] = field(default_factory=list)


class Package:
    """The syntax trees of a package, with what their annotations tell."""

    def __init__(self, sources: Iterable[str]) -> None:
        self.trees = [ast.parse(source) for source in sources]
        self.classes: dict[str, Class] = {}
        self.functions: Environment = {}  # of what a function returns
        nodes = [node for tree in self.trees for node in ast.walk(tree)]
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                bases = [name for base in node.bases if (name := _named(base))]
                self.classes[node.name] = Class(bases, body=node.body)
        for node in nodes:
            if isinstance(node, ast.FunctionDef) and (name := self.annotated(node.returns)):
                self.functions[node.name] = name
            if isinstance(node, ast.ClassDef):
                self.classes[node.name].attributes |= dict(self._declared(node))
        self.classes[ROOT].attributes |= dict(_of_methods(nodes))
        self.sections = {
            key: name
            for key, name in self.classes[ROOT].attributes.items()
            if name in self.classes and name.endswith("Config")
        }
        self.given = {name for node in nodes if (name := _own(node)) is not None}
        self.reads: set[tuple[str, str]] = set()
        for _ in range(3):  # what one class holds may be told by another
            for tree in self.trees:
                Reader(self).block(tree.body, {}, "")

    def section_keys(self) -> list[tuple[str, str]]:
        """Every key, with the class of its section."""
        return [
            (name, statement.target.id)
            for name in sorted({*self.sections.values(), *self.given})
            for statement in self.classes[name].body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        ]

    def dead(self) -> list[str]:
        """The keys that nothing reads."""
        return [
            f"{name}.{key}" for name, key in self.section_keys() if (name, key) not in self.reads
        ]

    def annotated(self, annotation: ast.expr | None) -> str | None:
        """The class of ours that an annotation names: of `X`, `"X"`, `X | None`, `Annotated[X]`."""
        match annotation:
            case ast.Name() | ast.Attribute():
                name = _named(annotation)
                return name if name in self.classes else None
            case ast.Constant(value=str(text)):
                return self.annotated(ast.parse(text, mode="eval").body)
            case ast.BinOp(left=left, right=right):
                return self.annotated(left) or self.annotated(right)
            case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[first, *_])):
                return self.annotated(first)
        return None

    def attribute(self, name: str | None, attribute: str) -> str | None:
        """The class of an attribute of a class, or of one of its bases."""
        if name is None or name not in self.classes:
            return None
        known = self.classes[name]
        found = known.attributes.get(attribute)
        inherited = (self.attribute(base, attribute) for base in known.bases if base != name)
        return found or next((each for each in inherited if each), None)

    def _declared(self, node: ast.ClassDef) -> Iterator[tuple[str, str]]:
        for statement in node.body:
            match statement:
                case ast.AnnAssign(target=ast.Name(id=attribute), annotation=annotation):
                    found = self.annotated(annotation)
                case ast.FunctionDef(name=attribute, returns=annotation):
                    found = self.annotated(annotation) if _is_property(statement) else None
                case _:
                    continue
            if found:
                yield attribute, found


class Reader:
    """Walks statements in order, notes what names hold, and what is read of sections."""

    def __init__(self, package: Package) -> None:
        self.package = package

    def block(self, body: list[ast.stmt], known: Environment, inside: str) -> None:
        """Statements of a module, class or function; `inside` is the class they are in."""
        for statement in body:
            self.statement(statement, known, inside)

    def statement(self, node: ast.stmt, known: Environment, inside: str) -> None:
        sections = {ROOT, *self.package.sections.values(), *self.package.given}
        match node:
            case ast.ClassDef():
                if node.name not in sections:
                    self.block(node.body, dict(known), node.name)
                return
            case ast.FunctionDef():
                own, given = dict(known), node.args
                for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs):
                    own.pop(argument.arg, None)
                    if found := self.package.annotated(argument.annotation):
                        own[argument.arg] = found
                if inside and "self" in {argument.arg for argument in given.args[:1]}:
                    own["self"] = inside
                self.block(node.body, own, inside)
                return
            case ast.Assign(targets=[target], value=value):
                self.assign(target, value, known)
            case ast.AnnAssign(target=target, annotation=annotation):
                self.hold(target, self.package.annotated(annotation), known)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self.statement(child, known, inside)
            else:
                self.expression(child, known, inside)

    def expression(self, node: ast.AST, known: Environment, inside: str) -> None:
        for inner in ast.walk(node):
            if isinstance(inner, ast.NamedExpr):
                self.assign(inner.target, inner.value, known)
            if isinstance(inner, ast.stmt):  # of a match or an exception handler
                self.statement(inner, known, inside)
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Load):
                found = self.type_of(inner.value, known)
                if found is not None:
                    self.package.reads.add((found, inner.attr))

    def assign(self, target: ast.expr, value: ast.expr, known: Environment) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self.assign(one, other, known)
            return
        self.hold(target, self.type_of(value, known), known)

    def hold(self, target: ast.expr, found: str | None, known: Environment) -> None:
        match target:
            case ast.Name(id=name):
                if found:
                    known[name] = found
            case ast.Attribute(value=value, attr=attribute):
                owner = self.type_of(value, known)
                if found and owner in self.package.classes:
                    self.package.classes[owner].attributes.setdefault(attribute, found)

    def type_of(self, node: ast.expr, known: Environment) -> str | None:
        """The class of ours that an expression is of; None where that is not told."""
        package = self.package
        match node:
            case ast.Name(id=name):
                return known.get(name)
            case ast.Attribute(value=value, attr=attribute):
                return package.attribute(self.type_of(value, known), attribute)
            case ast.Call(func=function, args=arguments):
                if (name := _own(node)) is not None:
                    return name
                name = _named(function)
                if name == "replace" and arguments:
                    return self.type_of(arguments[0], known)
                return name if name in package.classes else package.functions.get(name or "")
            case ast.IfExp(body=one, orelse=other) | ast.BoolOp(values=[one, *_, other]):
                return self.type_of(one, known) or self.type_of(other, known)
            case ast.NamedExpr(value=value):
                return self.type_of(value, known)
        return None


def _of_methods(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    """The methods' own sections, as each tells them: sections={"name": "module:Class"}."""
    for node in nodes:
        match node:
            case ast.keyword(arg="sections", value=ast.Dict(keys=keys, values=values)):
                for key, value in zip(keys, values, strict=True):
                    match key, value:
                        case ast.Constant(value=str(name)), ast.Constant(value=str(path)):
                            yield name, path.partition(":")[2]


def _own(node: ast.AST) -> str | None:
    """The class that is asked for in `cfg.own(ZegFormerConfig)`."""
    match node:
        case ast.Call(func=ast.Attribute(attr=name), args=[ast.Name(id=given)]) if name == OWN:
            return given if given.endswith("Config") else None
    return None


def _named(node: ast.expr) -> str | None:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return None


def _is_property(node: ast.FunctionDef) -> bool:
    return any(_named(one) in ("property", "cached_property") for one in node.decorator_list)
