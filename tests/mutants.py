"""Mutation testing: small changes to the sources, one at a time, each of which some test has to notice.

cosmic-ray makes the changes to Python, and one more here drops statements; a table of operators makes those to C++. A
seed draws a sample of the places that can be changed, and one change for each. They run in copies of the tree, with the
tests that tests/mutants.toml names for their file, the quickest first. It also lists what no test can notice, and why.

    make mutants                                       # or: python tests/mutants.py, where cosmic-ray is installed
    python tests/mutants.py --number 50 --seed 2 --files 'plan|numbers'
    python tests/mutants.py --again                    # those that survived the last run, with further tests

Results are printed, and kept in build/mutants.json.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.stateful
import parso
import pytest
import tomllib
import torch._dynamo  # noqa: F401  once, for all forks
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path(__file__).with_suffix(".toml")
REPORT = ROOT / "build" / "mutants.json"

CPP_OPERATORS = {
    " + ": " - ",
    " - ": " + ",
    " * ": " / ",
    " / ": " * ",
    " == ": " != ",
    " != ": " == ",
    " > ": " >= ",
    " < ": " <= ",
    " >= ": " > ",
    " <= ": " < ",
    " && ": " || ",
    " || ": " && ",
    "if (": "if (0 && ",
}
"""By their spaces: those of templates, pointers and signs have none."""


OPTIONS = ["-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]

# The same examples at every run, and no search for the smallest one that fails.
hypothesis.settings.register_profile(
    "mutants", derandomize=True, phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate)
)
hypothesis.settings.load_profile("mutants")

AUGMENTED = ("+=", "-=", "*=", "/=", "|=", "&=")


class Mutant(NamedTuple):
    """One change: the file, the line with it before and after, and the whole text of the file after it."""

    path: str
    line: int
    before: str
    after: str
    text: str


class DropStatement(Operator):
    """Replaces what stands on a line of its own by `pass`: a call, or an assignment to what has a value already."""

    def mutation_positions(self, node):
        if node.type == "simple_stmt" and node.parent.type != "file_input":
            first = node.children[0]
            is_call = first.type == "atom_expr"
            target = first.children[0].get_code() if first.type == "expr_stmt" else ""
            if is_call or "." in target or "[" in target or (target and first.children[1] in AUGMENTED):
                yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        first = node.children[0]
        prefix = first.get_first_leaf().prefix
        node.children[0] = parso.python.tree.Keyword("pass", first.start_pos, prefix)
        return node

    @classmethod
    def examples(cls):
        return ()


def _python_places(text: str, skipped: re.Pattern[str]) -> Iterator[list[Callable[[], str | None]]]:
    """Of each place: what can be made of the text by a change there."""
    tree, hints = get_ast(text), _hints(text)
    places = defaultdict(list)
    operators = [get_operator(name) for name in operator_names() if not skipped.search(name)]
    for operator in [DropStatement, *(known for known in operators if not known.arguments())]:
        starts = [start for node in ast_nodes(tree) for start, _ in operator().mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            if not any(begin <= start < end for begin, end in hints):
                places[start].append(lambda made=operator, n=occurrence: mutate_code(text, made(), n))
    return (places[start] for start in sorted(places))


def _hints(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the type hints are, which compute nothing, and `strict=True`, which only asserts."""
    found: list[ast.AST | None] = []
    for node in ast.walk(ast.parse(text)):
        found += [getattr(node, "annotation", None), getattr(node, "returns", None)]
        found += [node.value] if isinstance(node, ast.keyword) and node.arg == "strict" else []
    return [((hint.lineno, hint.col_offset), (hint.end_lineno, hint.end_col_offset)) for hint in found if hint]


def _cpp_places(text: str) -> Iterator[list[Callable[[], str | None]]]:
    for match in re.finditer("|".join(map(re.escape, CPP_OPERATORS)), text):
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if "//" not in line and not line.lstrip().startswith(("#", "static_assert")):
            yield [lambda match=match: text[: match.start()] + CPP_OPERATORS[match[0]] + text[match.end() :]]


def _draw(config: dict[str, Any], files: str, number: int, seed: int) -> list[Mutant]:
    """The sample, in the order of the files."""
    skipped, random_ = re.compile(config["skipped_operators"]), random.Random(seed)
    places = []
    for path in config["files"]:
        if re.search(files, path):
            text = (ROOT / path).read_text()
            found = _python_places(text, skipped) if path.endswith(".py") else _cpp_places(text)
            places += [(path, text, changes) for changes in found]
    print(f"{len(places)} places", flush=True)
    mutants = []
    for path, text, changes in random_.sample(places, min(number, len(places))):
        changed = random_.choice(changes)()
        if changed is not None and changed != text:
            pairs = zip(text.splitlines(), changed.splitlines(), strict=False)
            line, (before, after) = next((n, pair) for n, pair in enumerate(pairs, 1) if pair[0] != pair[1])
            mutants.append(Mutant(path, line, before.strip(), after.strip(), changed))
    return sorted(mutants, key=lambda mutant: (list(config["files"]).index(mutant.path), mutant.line))


class Copy:
    """A copy of the tree, in which one mutant at a time is tested."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config, self.folder = config, Path(tempfile.mkdtemp())
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
        for name in filter(None, listed.stdout.split("\0")):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.folder / name)
        tests = {test for tests in config["tests"].values() for test in tests}
        self._pytest(["--collect-only", *sorted(tests)], {}, None, keeps_bytecode=True)

    def kill(self, mutant: Mutant) -> str | None:
        """The test that noticed the mutant first, or None."""
        file, extensions = self.folder / mutant.path, self.folder / "build" / "extensions"
        before = file.read_text()
        file.write_text(mutant.text)
        environment = {"TORCH_EXTENSIONS_DIR": str(extensions)} if mutant.path.startswith("csrc/") else {}
        try:
            return self.failing(self._config["tests"][self._config["files"][mutant.path]], environment)
        finally:
            file.write_text(before)
            shutil.rmtree(extensions, ignore_errors=True)

    def failing(self, tests: list[str], environment: dict[str, str]) -> str | None:
        for part in (tests[:2], tests[2:]):  # most fall to the first ones, without a look at the others
            code, output = self._pytest(part, environment, self._config["timeout"])
            if code:
                failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
                return failed[0] if failed else f"code {code}: {output[-200:]}"
        return None

    def _pytest(
        self, tests: list[str], environment: dict[str, str], timeout: float | None, keeps_bytecode: bool = False
    ) -> tuple[int, str]:
        """The exit code and the output, in a fork of this process: most of a short run would be imports."""
        with tempfile.TemporaryFile("w+") as file:
            pid = os.fork()
            if pid == 0:
                os.setsid()
                for descriptor in (1, 2):
                    os.dup2(file.fileno(), descriptor)
                os.chdir(self.folder)
                os.environ |= {"PYTHONPATH": str(self.folder), **environment}
                sys.path[:] = [str(self.folder), *(path for path in sys.path if not Path(path).is_relative_to(ROOT))]
                sys.dont_write_bytecode = not keeps_bytecode
                code: int = pytest.ExitCode.INTERNAL_ERROR
                try:
                    code = pytest.main([*OPTIONS, *self._config["options"], *tests])
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            ends = time.monotonic() + (timeout or float("inf"))
            while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < ends:
                time.sleep(0.05)
            if done == (0, 0):
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return 1, "timeout"
            file.seek(0)
            return done[1], file.read()


_copy: Copy


def _begin(config: dict[str, Any]) -> None:
    """In each worker."""
    global _copy
    os.nice(10)
    _copy = Copy(config)


def _kill(mutant: Mutant) -> dict[str, Any]:
    started = time.monotonic()
    killer = _copy.kill(mutant)
    return {**mutant._asdict(), "killer": killer, "seconds": round(time.monotonic() - started)}


def _failing(tests: list[str]) -> str | None:
    return _copy.failing(tests, {})


def _end() -> None:
    shutil.rmtree(_copy.folder)
    time.sleep(1)  # so that every worker gets one of these


def _run(config: dict[str, Any], mutants: list[Mutant], n_workers: int) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    REPORT.parent.mkdir(exist_ok=True)
    selections = {config["files"][mutant.path] for mutant in mutants}
    every_test = list(dict.fromkeys(test for name in sorted(selections) for test in config["tests"][name]))
    with ProcessPoolExecutor(n_workers, initializer=_begin, initargs=(config,)) as pool:
        unchanged = pool.submit(_failing, every_test)
        for job in as_completed([unchanged, *(pool.submit(_kill, mutant) for mutant in mutants)]):
            if job is unchanged:
                if job.result():
                    pool.shutdown(cancel_futures=True)
                    sys.exit(f"The sources as they are fail {job.result()}")
                continue
            result = job.result()
            results.append(result)
            REPORT.write_text(json.dumps(results, indent=1))
            print(f"{len(results)}/{len(mutants)} {result['seconds']} s {result['path']}:{result['line']}")
            print(f"    - {result['before']}\n    + {result['after']}")
            print(f"    {result['killer'] or 'SURVIVED'}", flush=True)
        for job in [pool.submit(_end) for _ in range(n_workers)]:
            job.result()
    return results


def _is_excused(config: dict[str, Any], result: dict[str, Any]) -> bool:
    return any(all(result[key] == known[key] for key in ("path", "before", "after")) for known in config["equivalent"])


def _print_table(config: dict[str, Any], results: list[dict[str, Any]]) -> None:
    counts = Counter()
    for result in results:
        kind = "killed" if result["killer"] else "equivalent" if _is_excused(config, result) else "survived"
        for path in (result["path"], "all"):
            counts[path, kind] += 1
    print(f"{'file':34} killed survived equivalent")
    for path in [*sorted({result["path"] for result in results}), "all"]:
        print(f"{path:34} " + " ".join(f"{counts[path, kind]:8}" for kind in ("killed", "survived", "equivalent")))
    share = counts["all", "killed"] / max(1, counts["all", "killed"] + counts["all", "survived"])
    print(f"{share:.1%} of those that a test can notice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=220, help="how many places are changed")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    parser.add_argument("--files", default="", help="a regular expression of their files")
    parser.add_argument("--workers", type=int, default=2, help="how many mutants run at a time")
    parser.add_argument("--again", action="store_true", help="run further tests on those that survived the last run")
    arguments = parser.parse_args()
    config = tomllib.loads(CONFIG.read_text())
    if arguments.again:
        for name, tests in config["tests"].items():
            config["tests"][name] = [test for test in config["tests"]["again"] if test not in tests]
        last = json.loads(REPORT.read_text())
        mutants = [Mutant(*(each[name] for name in Mutant._fields)) for each in last if not each["killer"]]
    else:
        mutants = _draw(config, arguments.files, arguments.number, arguments.seed)
    results = _run(config, mutants, arguments.workers)
    _print_table(config, results)


if __name__ == "__main__":
    main()
