"""The README's pages about PyTorch's own stacks run as they stand: the blocks of a page are one script.

A page that makes a process group runs on two ranks, in the environment that torchrun gives it. The pages about packages
that only `make test-clients` installs are run there.
"""

import os
import re
import socket
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
CLIENTS = {"transformers.Trainer", "accelerate", "Lightning"}


def _section(heading: str) -> str:
    return re.split(r"^## ", README.split(f"\n## {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def _scripts() -> dict[str, str]:
    pages = re.split(r"^### ", _section("Integrations"), flags=re.MULTILINE)[1:]
    titled = dict(page.split("\n", 1) for page in pages)
    block = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return {title: "\n".join(block.findall(page)) for title, page in titled.items()}


SCRIPTS = _scripts()
NAMESPACE = {"__name__": "__main__"}
"""What a page defines lives as long as its process: a DDP model that is freed after its group can hang in gloo."""


def test_every_page_has_a_script():
    assert SCRIPTS.keys() > CLIENTS
    assert all(SCRIPTS.values())


def run_page(title: str, folder: Path) -> None:
    """Runs on each rank, whose group gives way to the one that the page makes."""
    with socket.create_server(("localhost", 0)) as server:
        address = [server.getsockname()[1]]
    dist.broadcast_object_list(address)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(address[0]))
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    dist.destroy_process_group()
    os.chdir(folder)
    exec(compile(SCRIPTS[title], f"{title} in README.md", "exec"), NAMESPACE)


@pytest.mark.parametrize("title", sorted(SCRIPTS.keys() - CLIENTS))
def test_the_page_runs(title, tmp_path):
    run(run_page, 2 if "init_process_group" in SCRIPTS[title] else 1, title=title, folder=tmp_path)
