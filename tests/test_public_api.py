"""What may be imported: every module on its own merits, every name that `__all__` promises."""

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("coordinator", "expert_node", "client", "shoal")
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__main__.py"
]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_keeps_the_promises_of_its_all(name: str) -> None:
    module = importlib.import_module(name)
    promised: list[str] = getattr(module, "__all__", [])
    assert len(set(promised)) == len(promised)
    assert [each for each in promised if not hasattr(module, each)] == []


@pytest.mark.processes
def test_every_module_imports_without_a_warning_when_it_comes_first() -> None:
    # One process a package's worth of modules would hide a missing import behind an earlier one:
    # each is imported with nothing else of ours loaded.
    code = (
        "import sys, importlib\n"
        "for name in sys.argv[1:]:\n"
        "    for old in [m for m in sys.modules if m.split('.')[0] in "
        f"{PACKAGES!r} and not m.startswith(('shoal.v1', 'shoal._kernels'))]:\n"
        "        del sys.modules[old]\n"
        "    importlib.import_module(name)\n"
    )
    names = [name for name in MODULES if not name.startswith("shoal.v1")]
    with ThreadPoolExecutor(2) as pool:  # each half a process of its own, side by side
        command = [sys.executable, "-W", "error", "-c", code]
        halves = (names[::2], names[1::2])
        list(pool.map(lambda half: subprocess.run([*command, *half], check=True, cwd=ROOT), halves))
