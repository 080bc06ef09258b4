"""PTX text to a `Module`."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from ptxsim.errors import PTXSyntaxError
from ptxsim.operands import (
    Address,
    Float,
    Integer,
    Not,
    Offset,
    Pair,
    Parenthesis,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
    literal_bits,
)
from ptxsim.program import Body, Instruction, Module, Parameter, Scope, Variable
from ptxsim.scalar_types import BITS
from ptxsim.tokens import END, NUMBERS, Token, integer, number, tokenize

_SPACES = (".shared", ".local", ".global", ".const", ".param")
_TABLES = (".branchtargets", ".callprototype", ".calltargets")
_RETURN = "%return"
"""The label after the instructions of a function, where they stand in place of a call."""


class _Function(NamedTuple):
    """A device function: its results' and parameters' names, and where in the tokens its body begins."""

    names: list[str]
    body: int


class Parser:
    def __init__(self, text: str) -> None:
        self._tokens = tokenize(text)
        self._next = 0
        self._module = Module()
        self._functions: dict[str, _Function] = {}
        self._n_names = 0

    # -- tokens ----------------------------------------------------------------------------------------------------

    def peek(self, ahead: int = 0) -> Token:
        index = self._next + ahead
        return self._tokens[index] if index < len(self._tokens) else END

    def next(self) -> Token:
        token = self.peek()
        self._next += 1
        return token

    def expect(self, text: str) -> Token:
        token = self.next()
        if token.text != text:
            raise PTXSyntaxError(f"PTX line {token.line}: expected {text!r}, found {token.text!r}")
        return token

    def accept(self, text: str) -> bool:
        """Go past the next token if it is this one."""
        is_next = self.peek().text == text
        self._next += is_next
        return is_next

    def skip_to(self, text: str) -> None:
        while True:
            token = self.next()
            if token.text == text:
                return
            if token is END:
                raise PTXSyntaxError(f"the text ends before {text!r}")

    def skip_block(self) -> None:
        self.expect("{")
        depth = 1
        while depth:
            token = self.next()
            if token is END:
                raise PTXSyntaxError("unbalanced braces")
            depth += (token.text == "{") - (token.text == "}")

    def unique(self, name: str) -> str:
        self._n_names += 1
        return f"{name}#{self._n_names}"

    # -- module level ----------------------------------------------------------------------------------------------

    def parse(self) -> Module:
        self._find_functions()
        while self.peek() is not END:
            token = self.peek()
            if token.text in (".visible", ".weak", ".extern", ".common", ";"):
                self.next()
            elif token.text == ".entry":
                self._entry()
            elif token.text == ".func":
                self._skip_function()
            elif token.text in (".global", ".const", ".shared"):
                for variable in self._variables():
                    self._module.variables[variable.name] = variable
            elif token.text == ".section":
                self.next()
                self.next()
                self.skip_block()
            elif token.text in (".pragma", ".alias"):
                self.skip_to(";")
            else:
                raise PTXSyntaxError(f"PTX line {token.line}: unexpected {token.text!r} at module level")
        return self._module

    def _find_functions(self) -> None:
        """Note the device functions, which may stand after the kernels that call them."""
        for start, token in enumerate(self._tokens):
            if token.text == ".func":
                self._next = start + 1
                words = []
                while self.peek() is not END and self.peek().text not in ("{", ";"):
                    words.append(self.next())
                # A name follows each parameter's type; the function's own stands right before the last parenthesis.
                names = [word.text for word in words if word.kind == "name"]
                last = max((i for i, word in enumerate(words) if word.text == "("), default=len(words))
                if self.peek().text == "{" and names:
                    name = words[last - 1].text if words[last - 1].kind == "name" else names[-1]
                    names.remove(name)
                    self._functions[name] = _Function(names, self._next)
        self._next = 0

    def _skip_function(self) -> None:
        while self.peek().text not in ("{", ";"):
            if self.next() is END:
                raise PTXSyntaxError("unterminated .func")
        if self.peek().text == "{":
            self.skip_block()
        else:
            self.next()

    def _entry(self) -> None:
        self.next()
        name = self.next().text
        parameters: list[Parameter] = []
        end = 0
        if self.accept("("):
            while not self.accept(")"):
                parameters.append(self._parameter(end))
                end = parameters[-1].offset + parameters[-1].size
                self.accept(",")
        body = Body(name, parameters, end)
        while self.peek().kind == "directive":
            directive = self.next().text
            body.directives[directive] = list(self._integers())
        if self.accept(";"):
            return
        self._body(body)
        self._module.bodies[name] = body

    def _integers(self) -> Iterator[int]:
        while self.peek().kind == "integer":
            yield integer(self.next().text)
            self.accept(",")

    def _parameter(self, end: int) -> Parameter:
        """The parameter that follows those that end at this byte."""
        self.expect(".param")
        kind = name = ""
        align, count, is_pointer = 0, None, False
        while self.peek().text not in (",", ")"):
            token = self.next()
            if token.text == ".align":
                value = integer(self.next().text)
                if not is_pointer:  # else it is what the pointer points to that is aligned
                    align = value
            elif token.text == ".ptr":
                is_pointer = True
            elif token.kind == "directive" and token.text[1:] in BITS:
                kind = token.text[1:]
            elif token.kind == "name":
                name = token.text
            elif token.text == "[":
                count = integer(self.next().text)
                self.expect("]")
            elif token.kind != "directive":
                raise PTXSyntaxError(f"PTX line {token.line}: unexpected {token.text!r} in a parameter list")
        width = BITS[kind] // 8
        offset = _round_up(end, align or width)
        return Parameter(name, kind, width * (1 if count is None else count), offset, count is not None)

    # -- variables -------------------------------------------------------------------------------------------------

    def _variables(self) -> Iterator[Variable]:
        space = self.next().text[1:].split("::")[0]
        align, kind, n_elements = 0, "", 1
        while self.peek().kind == "directive":
            directive = self.next().text
            if directive == ".align":
                align = integer(self.next().text)
            elif directive == ".attribute":
                self.skip_to(")")
            elif directive in (".v2", ".v4"):
                n_elements = int(directive[2:])
            elif directive[1:] in BITS:
                kind = directive[1:]
            elif directive not in (".ptr", *_SPACES):
                raise PTXSyntaxError(f"PTX line {self.peek().line}: unknown {directive!r} in a declaration")
        while True:
            name = self.next()
            if name.kind != "name" or not kind:
                raise PTXSyntaxError(f"PTX line {name.line}: bad variable declaration near {name.text!r}")
            width = BITS[kind] // 8
            count, is_array = 1, False
            while self.accept("["):
                is_array = True
                count *= 0 if self.peek().text == "]" else integer(self.next().text)
                self.expect("]")
            initial = None
            if self.accept("="):
                initial = self._initializer(kind)
                if is_array and count == 0:
                    count = len(initial) // width
                initial = initial.ljust(width * n_elements * count, b"\0")
            size = width * n_elements
            yield Variable(name.text, space, align or max(1, size), size * count, initial)
            if not self.accept(","):
                break
        self.expect(";")

    def _initializer(self, kind: str) -> bytes:
        values, depth, is_negative = b"", 0, False
        while True:
            token = self.next()
            if token.kind in NUMBERS:
                value = _negated(number(token)) if is_negative else number(token)
                is_negative = False
                values += literal_bits(value, kind).to_bytes(BITS[kind] // 8, "little")
            elif token.text in "{}":
                depth += 1 if token.text == "{" else -1
            elif token.text == "-":
                is_negative = True
                continue
            elif token.text != ",":
                raise NotImplementedError(
                    f"PTX line {token.line}: an initializer with {token.text!r}; only numbers are supported"
                )
            if depth == 0:
                return values

    # -- bodies ----------------------------------------------------------------------------------------------------

    def _body(self, body: Body, scope: Scope | None = None) -> None:
        self.expect("{")
        outermost = scope = scope or Scope()
        while True:
            token = self.peek()
            if token is END:
                raise PTXSyntaxError(f"kernel {body.name}: missing closing brace")
            if token.text == "{":
                self.next()
                scope = Scope(scope)
            elif token.text == "}":
                self.next()
                if scope is outermost:
                    return
                assert scope.parent is not None
                scope = scope.parent
            elif token.text == ";":
                self.next()
            elif token.text == ".reg":
                self._registers(body, scope)
            elif token.text in _SPACES:
                for variable in self._variables():
                    key = scope.variables[variable.name] = self.unique(variable.name)
                    body.variables[key] = variable
            elif token.kind == "directive":  # .pragma and the like
                self.skip_to(";")
            elif token.kind == "name" and self.peek(1).text == ":":
                self.next()
                self.next()
                if self.peek().text in _TABLES:
                    self.skip_to(";")
                else:
                    scope.labels[token.text] = len(body.code)
            else:
                self._add(body, self._instruction(scope))

    def _add(self, body: Body, instruction: Instruction) -> None:
        """Add an instruction; in place of a call stand the function's own, in place of its return a branch."""
        op, scope = instruction.parts[0], instruction.scope
        called = [arg.name for arg in instruction.args if isinstance(arg, Symbol)]
        if op == "ret" and scope.find("labels", _RETURN) is not None:
            instruction = replace(instruction, op="bra", parts=["bra"], args=[Symbol(_RETURN)])
        elif op == "call" and called and called[0] in self._functions:
            self._call(body, instruction, self._functions[called[0]])
            return
        body.code.append(instruction)

    def _call(self, body: Body, call: Instruction, function: _Function) -> None:
        arguments = [arg.items for arg in call.args if isinstance(arg, Parenthesis)]
        keys = [item.name for items in arguments for item in items]
        if len(keys) != len(function.names):
            raise PTXSyntaxError(f"PTX line {call.line}: `{call.text}` has {len(keys)} arguments")
        scope = Scope()
        scope.variables.update(zip(function.names, keys, strict=True))
        scope.labels[_RETURN] = -1
        if call.guard is not None:
            key, is_negated = call.guard
            guard = (key, not is_negated)
            branch = replace(call, op="bra", parts=["bra"], args=[Symbol(_RETURN)], guard=guard, scope=scope)
            body.code.append(branch)
        after, self._next = self._next, function.body
        self._body(body, scope)
        self._next = after
        scope.labels[_RETURN] = len(body.code)

    def _registers(self, body: Body, scope: Scope) -> None:
        self.next()
        token = self.next()
        kind = token.text[1:]
        if kind not in BITS:
            raise NotImplementedError(f"PTX line {token.line}: .reg {token.text}")
        while True:
            name = self.next().text
            names = [name]
            if self.accept("<"):
                names = [f"{name}{index}" for index in range(integer(self.next().text))]
                self.expect(">")
            for name in names:
                key = scope.registers[name] = self.unique(name)
                body.registers[key] = kind
            if not self.accept(","):
                break
        self.expect(";")

    def _instruction(self, scope: Scope) -> Instruction:
        start, guard = self._next, None
        if self.accept("@"):
            is_negated = self.accept("!")
            token = self.next()
            key = scope.find("registers", token.text)
            if key is None:
                raise PTXSyntaxError(f"PTX line {token.line}: unknown guard {token.text!r}")
            guard = (key, is_negated)
        op = self.next()
        if op.kind != "name":
            raise PTXSyntaxError(f"PTX line {op.line}: expected an instruction, found {op.text!r}")
        args = []
        while self.peek().text != ";":
            if self.peek() is END:
                raise PTXSyntaxError(f"PTX line {op.line}: missing ';'")
            args.append(self._operand(scope))
            if not self.accept(",") and self.peek().text != ";":
                raise PTXSyntaxError(f"PTX line {op.line}: unexpected {self.peek().text!r} in `{op.text}`")
        text = _spell(self._tokens[start : self._next])
        self.next()
        return Instruction(op.line, text, op.text, op.text.split("."), guard, args, scope)

    def _operand(self, scope: Scope) -> Any:
        token = self.next()
        if token.text == "{":
            return Vector(self._operands(scope, "}"))
        if token.text == "(":
            return Parenthesis(self._operands(scope, ")"))
        if token.text == "[":
            return self._address(scope, token.line)
        if token.text == "!":
            return Not(self._operand(scope))
        if token.text == "-":
            return _negated(number(self.next()))
        if token.kind in NUMBERS:
            return number(token)
        if token.kind != "name":
            raise PTXSyntaxError(f"PTX line {token.line}: unexpected {token.text!r} as an operand")
        operand = _named(scope, token.text)
        if self.accept("|"):
            return Pair(operand, self._operand(scope))
        if self.peek().text in ("+", "-"):
            sign = -1 if self.next().text == "-" else 1
            if self.accept("-"):
                sign = -sign
            return Offset(operand, sign * integer(self.next().text))
        return operand

    def _operands(self, scope: Scope, end: str) -> tuple[Any, ...]:
        items = []
        while not self.accept(end):
            items.append(self._operand(scope))
            self.accept(",")
        return tuple(items)

    def _address(self, scope: Scope, line: int) -> Address:
        base, offset = self._operand(scope), 0
        if isinstance(base, Offset):
            base, offset = base.base, base.offset
        if self.accept("]"):
            return Address(base, offset)
        depth = 1
        while depth:
            token = self.next()
            if token is END:
                raise PTXSyntaxError(f"PTX line {line}: missing ']'")
            depth += (token.text == "[") - (token.text == "]")
        return Address(None)


def _named(scope: Scope, name: str) -> Any:
    if name == "_":
        return Sink()
    key = scope.find("registers", name)
    if key is not None:
        return Register(key)
    if name.startswith("%") or name == "WARP_SZ":
        return Special(name)
    return Symbol(scope.find("variables", name) or name)


def _negated(literal: Integer | Float) -> Integer | Float:
    return Integer(-literal.value) if isinstance(literal, Integer) else Float(-literal.value)


def _spell(tokens: list[Token]) -> str:
    text = ""
    for index, token in enumerate(tokens):
        begins_operand = token.kind in ("name", *NUMBERS) or token.text in "[{"
        text += " " * (index > 0 and begins_operand and tokens[index - 1].text not in "@!-[{+") + token.text
    return text


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
