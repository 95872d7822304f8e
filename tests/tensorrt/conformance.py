"""Proves from the syntax tree that code uses only what the listings of TensorRT's modules have.

The class of each expression is followed from annotations (`builder: trt.Builder`), from what the listings say a call
returns, and from `self.trt`, which is the module. Inside `if self.has("feature"):` only the versions that have the
feature are looked at, in its `else`, and after an `if` that leaves, only the others.
What cannot be followed is itself a finding: a name that is computed, a property's value that is not annotated.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.tensorrt.listing import VERSIONS, Member, Signature, load_listing

from bridgeport.runtime.tensorrt.versions import ENUMS, Version, has

# Methods that a subclass in Python overrides and that the genuine class does not show: TensorRT looks them up by
# name. From the docstring of IOutputAllocator in the bindings themselves.
CALLBACKS = {
    "IOutputAllocator": {
        "reallocate_output": ["tensor_name", "memory", "size", "alignment"],
        "reallocate_output_async": ["tensor_name", "memory", "size", "alignment", "stream"],
        "notify_shape": ["tensor_name", "shape"],
    }
}
ENUM_ATTRIBUTES = ("name", "value")  # what pybind11 gives every member


class Kind(NamedTuple):
    """What an expression is: "module", "class", "enum", "member", "object", "method", "list", "unknown"."""

    form: str
    name: str = ""
    member: str = ""


Scope = dict[str, Kind | None]


@dataclass
class Checker:
    """Findings of `check`, and every (class or enum, member) that was used while 10.3 was looked at."""

    findings: list[str] = field(default_factory=list)
    used_on_10_3: set[tuple[str, str]] = field(default_factory=set)
    file: str = ""
    versions: tuple[str, ...] = VERSIONS
    returns: dict[str, Kind] = field(default_factory=dict)
    own: Scope = field(default_factory=dict)

    def check(self, sources: dict[str, str]) -> list[str]:
        """Check files, name -> text, that may call each other."""
        trees = {name: ast.parse(text) for name, text in sources.items()}
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and (kind := self._annotated(node.returns)) is not None:
                    self.returns[node.name] = kind
        for tree in trees.values():
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                    self._keep_attribute(node.targets[0], node.value)
        for name, tree in trees.items():
            self.file = name
            self._block(tree.body, {}, VERSIONS)
        return self.findings

    def _keep_attribute(self, target: ast.expr, value: ast.Call) -> None:
        if isinstance(target, ast.Attribute) and isinstance(value.func, ast.Attribute) and _is_self(target.value):
            self.own[target.attr] = self.returns.get(value.func.attr)

    def _say(self, node: ast.AST, text: str) -> None:
        self.findings.append(f"{self.file}:{getattr(node, 'lineno', 0)}: {text}")

    # Statements

    def _block(self, body: list[ast.stmt], scope: Scope, versions: tuple[str, ...]) -> None:
        for statement in body:
            self.versions = versions
            if not versions:
                return
            if isinstance(statement, ast.If):
                inside, outside = self._split(statement.test, scope, versions)
                self._block(statement.body, dict(scope), inside)
                self._block(statement.orelse, dict(scope), outside)
                if isinstance(statement.body[-1], (ast.Return, ast.Raise)):
                    versions = outside
            else:
                self._statement(statement, scope, versions)

    def _statement(self, statement: ast.stmt, scope: Scope, versions: tuple[str, ...]) -> None:
        if isinstance(statement, ast.FunctionDef):
            self._function(statement, dict(scope), versions)
        elif isinstance(statement, ast.ClassDef):
            self._class(statement, dict(scope), versions)
        elif isinstance(statement, ast.AnnAssign):
            self._annotated_assignment(statement, scope)
        elif isinstance(statement, ast.Assign):
            kind = self._infer(statement.value, scope)
            for target in statement.targets:
                self._assign(target, kind, scope)
        elif isinstance(statement, ast.For):
            self._assign(statement.target, _element(self._infer(statement.iter, scope)), scope)
            self._block(statement.body, scope, versions)
        elif isinstance(statement, ast.Try):
            for body in (statement.body, *(handler.body for handler in statement.handlers), statement.finalbody):
                self._block(body, scope, versions)
        else:
            for child in ast.iter_child_nodes(statement):
                if isinstance(child, ast.expr):
                    self._infer(child, scope)
            self._block(getattr(statement, "body", []), scope, versions)

    def _function(self, node: ast.FunctionDef, scope: Scope, versions: tuple[str, ...]) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            if argument.arg == "module":  # by name, in the adapter and in what we write for boards
                scope["module"] = Kind("module")
                continue
            loose = argument.annotation is None and argument.arg not in ("self", "cls")
            if loose or (isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any"):
                self._say(argument, f"argument {argument.arg} of {node.name} has no class that could be followed")
            scope[argument.arg] = self._annotated(argument.annotation)
        self._block(node.body, scope, versions)

    def _class(self, node: ast.ClassDef, scope: Scope, versions: tuple[str, ...]) -> None:
        self.versions = versions
        base = next((kind for base in node.bases if (kind := self._infer(base, scope)) is not None), None)
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and base is not None and base.form == "class":
                self._override(item, base.name)
            self._block([item], dict(scope), versions)

    def _override(self, method: ast.FunctionDef, base: str) -> None:
        if method.name == "__init__":
            return
        names = [argument.arg for argument in method.args.args[1:]]
        for version in self.versions:
            member = load_listing(version).classes[base].get(method.name)
            callback = CALLBACKS.get(base, {}).get(method.name)
            accepted = [signature.names for signature in member.signatures] if member else [callback]
            if callback is None and member is None:
                self._say(method, f"{version} has no {base}.{method.name} to override")
            elif names not in accepted:
                self._say(method, f"{base}.{method.name} is called with {accepted[0]}, it takes {names}")

    def _annotated_assignment(self, statement: ast.AnnAssign, scope: Scope) -> None:
        kind = self._annotated(statement.annotation)
        came = self._infer(statement.value, scope) if statement.value is not None else None
        named = came is not None and came.form in ("object", "member")
        if named and kind is not None and came != kind:
            self._say(statement, f"a {came.name if came else ''} is annotated as {kind.name}")
        self._assign(statement.target, kind, scope)

    def _assign(self, target: ast.expr, kind: Kind | None, scope: Scope) -> None:
        if isinstance(target, ast.Name):
            scope[target.id] = kind
        elif isinstance(target, ast.Tuple):
            for part in target.elts:
                self._assign(part, _element(kind), scope)
        elif isinstance(target, ast.Attribute):
            owner = self._infer(target.value, scope)
            if owner is not None and owner.form == "object":
                self._member(target, owner.name, target.attr, write=True)
            elif owner is not None:
                self._say(target, f"{target.attr} is set on a {owner.form} that is no object")

    def _split(
        self, test: ast.expr, scope: Scope, versions: tuple[str, ...]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The versions in which `test` may hold, and those in which it may not."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inside, outside = self._split(test.operand, scope, versions)
            return outside, inside
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            inside = versions
            for part in test.values:
                inside, _ = self._split(part, scope, inside)
            return inside, versions
        self.versions = versions
        self._infer(test, scope)
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute) and test.func.attr == "has":
            feature = test.args[0]
            if isinstance(feature, ast.Constant) and isinstance(feature.value, str):
                name = feature.value
                inside = tuple(version for version in versions if has(Version.parse(version), name))
                return inside, tuple(version for version in versions if version not in inside)
            self._say(test, "the feature is not a literal")
        return versions, versions

    # Expressions

    def _infer(self, node: ast.expr, scope: Scope) -> Kind | None:
        if isinstance(node, ast.Name):
            return Kind("module") if node.id in ("trt", "module") and node.id not in scope else scope.get(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, scope)
        if isinstance(node, ast.Call):
            return self._call(node, scope)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
            scope = dict(scope)
            for generator in node.generators:
                self._assign(generator.target, _element(self._infer(generator.iter, scope)), scope)
                for test in generator.ifs:
                    self._infer(test, scope)
            element = self._infer(node.elt, scope)
            return Kind("list", element.name, element.form) if element is not None else None
        if isinstance(node, ast.IfExp):
            return self._conditional(node, scope)
        if isinstance(node, ast.Lambda):
            return self._infer(node.body, dict(scope))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._infer(child, scope)
        return None

    def _conditional(self, node: ast.IfExp, scope: Scope) -> Kind | None:
        before = self.versions
        inside, outside = self._split(node.test, scope, before)
        kinds = []
        for part, versions in ((node.body, inside), (node.orelse, outside)):
            self.versions = versions
            kinds.append(self._infer(part, scope))
        self.versions = before
        return kinds[0] or kinds[1]

    def _attribute(self, node: ast.Attribute, scope: Scope) -> Kind | None:
        if _is_self(node.value):
            return Kind("module") if node.attr == "trt" else self.own.get(node.attr)
        owner = self._infer(node.value, scope)
        if owner is None:
            return None
        if owner.form == "module":
            return self._of_module(node)
        if owner.form == "enum":
            return self._enum_member(node, owner.name)
        if owner.form == "member":
            if node.attr not in ENUM_ATTRIBUTES:
                self._say(node, f"a member of {owner.name} has no {node.attr}")
            return None
        if owner.form in ("object", "class"):
            return self._member(node, owner.name, node.attr, write=False)
        self._say(node, f"{node.attr} is read from {owner.name or 'something'}, whose class is not annotated")
        return None

    def _of_module(self, node: ast.Attribute) -> Kind | None:
        found = None
        for version in self.versions:
            listing = load_listing(version)
            if node.attr in listing.classes:
                found = Kind("class", node.attr)
            elif node.attr in listing.enums:
                found = Kind("enum", node.attr)
            else:
                self._say(node, f"{version} has no {node.attr}")
            self._use(version, node.attr, "")
        return found

    def _enum_member(self, node: ast.Attribute, enum: str) -> Kind:
        for version in self.versions:
            if node.attr not in load_listing(version).enums[enum]:
                self._say(node, f"{version} has no {enum}.{node.attr}")
            self._use(version, enum, node.attr)
        return Kind("member", enum)

    def _member(self, node: ast.AST, owner: str, name: str, *, write: bool) -> Kind | None:
        kind: Kind | None = None
        for version in self.versions:
            member = load_listing(version).classes.get(owner, {}).get(name)
            self._use(version, owner, name)
            if member is None:
                self._say(node, f"{version} has no {owner}.{name}")
            elif write and not (member.kind == "property" and member.writable):
                self._say(node, f"{owner}.{name} cannot be set on {version}")
            elif member.kind == "property":
                kind = Kind("unknown", f"{owner}.{name}")
            elif member.kind == "Severity":  # a constant of the class
                kind = Kind("member", "ILogger.Severity")
            else:
                kind = Kind("method", owner, name)
        return kind

    def _use(self, version: str, owner: str, name: str) -> None:
        if version == "10.3":
            self.used_on_10_3.add((owner, name))

    # Calls

    def _call(self, node: ast.Call, scope: Scope) -> Kind | None:
        for value in (*node.args, *(keyword.value for keyword in node.keywords)):
            self._infer(value, scope)
        if isinstance(node.func, ast.Name) and node.func.id == "getattr":
            return self._getattr(node, scope)
        if isinstance(node.func, ast.Attribute) and _is_self(node.func.value):
            return self.returns.get(node.func.attr)
        called = self._infer(node.func, scope)
        if called is None or called.form not in ("class", "method"):
            if called is not None:
                self._say(node, f"a {called.form} is called")
            return None
        name = "__init__" if called.form == "class" else called.member
        unbound = isinstance(node.func, ast.Attribute) and name == "__init__" and called.form == "method"
        returns = [self._fit(node, called.name, name, version, unbound) for version in self.versions]
        return Kind("object", called.name) if called.form == "class" else self._returned(returns)

    def _fit(self, node: ast.Call, owner: str, name: str, version: str, unbound: bool) -> str:
        member: Member | None = load_listing(version).classes.get(owner, {}).get(name)
        if member is None or not member.signatures:
            self._say(node, f"{owner}.{name} has no signature on {version}: it cannot be called from Python")
            return ""
        if any(isinstance(argument, ast.Starred) for argument in node.args) or None in [k.arg for k in node.keywords]:
            self._say(node, f"the arguments of {owner}.{name} are computed")
            return ""
        positional, keywords = len(node.args) - unbound, [keyword.arg or "" for keyword in node.keywords]
        for signature in member.signatures:
            if _takes(signature, positional, keywords):
                return signature.returns
        told = " or ".join(str(signature.names) for signature in member.signatures)
        self._say(node, f"{owner}.{name} takes {told} on {version}, {positional} and {keywords} are passed")
        return ""

    def _returned(self, returns: list[str]) -> Kind | None:
        listing = load_listing(VERSIONS[-1])
        text = returns[0] if returns else ""
        if text in listing.classes:
            return Kind("object", text)
        if text in listing.enums:
            return Kind("member", text)
        inner = text.removeprefix("list[").removesuffix("]")
        return Kind("list", inner, "object") if inner in listing.classes and inner != text else None

    def _getattr(self, node: ast.Call, scope: Scope) -> Kind | None:
        owner = self._infer(node.args[0], scope)
        if owner is None:
            return None
        if owner.form != "enum" or owner.name not in ENUMS:
            self._say(node, "a name is computed, and no table of versions.py says which it can be")
            return None
        return Kind("member", owner.name)

    def _annotated(self, annotation: ast.expr | None) -> Kind | None:
        if isinstance(annotation, ast.BinOp):  # trt.Builder | None
            return self._annotated(annotation.left)
        if not isinstance(annotation, ast.Attribute):
            return None
        if ast.unparse(annotation) == "trt.ILogger.Severity":
            return Kind("member", "ILogger.Severity")
        if ast.unparse(annotation).startswith("trt.") and not isinstance(annotation.value, ast.Name):
            self._say(annotation, f"annotated as {ast.unparse(annotation)}, which no version has")
        if not (isinstance(annotation.value, ast.Name) and annotation.value.id == "trt"):
            return None
        known = [load_listing(version) for version in VERSIONS]
        if any(annotation.attr in listing.enums for listing in known):
            return Kind("member", annotation.attr)
        if not any(annotation.attr in listing.classes for listing in known):
            self._say(annotation, f"annotated as {annotation.attr}, which no version has")
        return Kind("object", annotation.attr)


def _takes(signature: Signature, positional: int, keywords: list[str]) -> bool:
    names = signature.names
    if positional > len(names):
        return False
    given = names[:positional] + keywords
    required = {parameter.name for parameter in signature.parameters if parameter.required}
    return len(set(given)) == len(given) and set(given) <= set(names) and required <= set(given)


def _element(kind: Kind | None) -> Kind | None:
    return Kind(kind.member, kind.name) if kind is not None and kind.form == "list" else None


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
