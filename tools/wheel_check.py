"""Build the wheel, install it apart from this folder, and run the command that it brings.

python tools/wheel_check.py     part of `.ci/run`: editable installs hide what a wheel forgets
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "wheel"
PACKAGES = ("coordinator", "expert_node", "client", "shoal")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def build() -> Path:
    """Return the wheel, built with the tools of this environment."""
    shutil.rmtree(BUILD, ignore_errors=True)
    wheel = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(BUILD)]
    subprocess.run([*wheel, str(ROOT)], check=True)
    [path] = BUILD.glob("*.whl")
    return path


def complaints(wheel: Path) -> list[str]:
    """Return what the wheel lacks, or holds and should not."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    wrong = [f"holds {top}" for top in sorted(tops - set(PACKAGES))]
    wanted = [f"{package}/py.typed" for package in PACKAGES]
    wanted += ["shoal/golden_digests.txt", "shoal/_kernels.pyi"]
    wanted += [
        f"shoal/models/{name}" for name in ("LICENSE", "README.md", "fables.shoal/manifest.json")
    ]
    wrong += [f"lacks {name}" for name in wanted if name not in names]
    if not any(name.startswith("shoal/_kernels.") and name.endswith(".so") for name in names):
        wrong.append("lacks the native module")
    return wrong


def main() -> None:
    """Build, look, install, run. Exits with what is wrong."""
    wheel = build()
    if wrong := complaints(wheel):
        sys.exit(f"{wheel.name}: {', '.join(wrong)}")
    site = BUILD / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    # Without `site` (-S) the editable install's hooks stay out; the libraries are named by path.
    code = "import sys; sys.path[:0] = sys.argv[1:]; import shoal; from client.cli import main;"
    code += "print(shoal.__file__, file=sys.stderr); sys.exit(main(['doctor', '--json']))"
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    ran = subprocess.run(
        [sys.executable, "-P", "-S", "-c", code, str(site), *sorted(libraries)],
        capture_output=True,
        text=True,
    )
    if str(site) not in ran.stderr:
        sys.exit(f"the wheel was not what ran: {ran.stderr}")
    findings = {f["name"]: f for f in json.loads(ran.stdout)["findings"]}
    for name in ("kernels", "numerics"):
        if findings[name]["state"] != "ok":
            sys.exit(f"{wheel.name}: {name}: {findings[name]['value']}")
    print(f"{wheel.name}: complete, and its kernels give the agreed bits")


if __name__ == "__main__":
    main()
