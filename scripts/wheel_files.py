"""What becomes of a built wheel: the same bytes from each build of one commit, a folder per family that pip
and uv install from, and beside each wheel what is in it. Only the standard library.

A folder per family, because installers take a local version label for a newer version, not for a platform:
of +cu130.sm80.sm89 and +cu130.sm90a in one folder they take the latter on every machine, since it sorts last.
"""

from __future__ import annotations

import email
import hashlib
import html
import importlib.util
import json
import os
import re
import shutil
import time
import uuid
import zipfile
from pathlib import Path
from urllib.parse import quote

spec = importlib.util.spec_from_file_location(
    "gpus", Path(__file__).resolve().parents[1] / "vtok_fast" / "installation" / "gpus.py"
)
gpus = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpus)

FAMILIES = gpus.FAMILIES
FIRST_DATE = 315532800  # 1980, before which a zip file has no date


def version_of(wheel: str) -> str:
    """``0.1.0+cu130.sm90a`` of a wheel's file name. Raises ValueError for another file's."""
    found = re.fullmatch(r"vtok_fast-([^-]+)-[^-]+-[^-]+-[^-]+\.whl", wheel)
    if found is None:
        raise ValueError(f"wheel: expected a file such as vtok_fast-0.1.0-cp311-cp311-TAG.whl, got {wheel}")
    return found[1]


def folder_for(wheel: str) -> str:
    """The folder of a wheel's family: ``cpu``, ``cu130-sm80-89``; of other lists, ``cu130-sm86-sm120``."""
    label = version_of(wheel).partition("+")[2]
    if not label:
        return "cpu"
    cuda, *archs = label.split(".")
    named = {tuple(f"sm{arch}" for arch in archs): family for family, archs in FAMILIES.items()}
    return f"{cuda}-{named.get(tuple(archs), '-'.join(archs))}"


def normalize(wheel: Path, epoch: int) -> None:
    """Writes a wheel anew with its files in order, of one date, readable by all, and without entries for
    folders: what is left are their contents."""
    date = time.gmtime(max(epoch, FIRST_DATE))[:6]
    part = wheel.with_name(f".{wheel.name}.part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(part, "w", compresslevel=9) as new:
        for entry in sorted(old.infolist(), key=lambda entry: entry.filename):
            if entry.is_dir():
                continue
            content = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                content = b"".join(sorted(content.splitlines(keepends=True)))
            written = zipfile.ZipInfo(entry.filename, date)
            written.compress_type = zipfile.ZIP_DEFLATED
            written.external_attr = (0o100755 if entry.external_attr >> 16 & 0o111 else 0o100644) << 16
            new.writestr(written, content)
    os.replace(part, wheel)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return email.message_from_bytes(archive.read(name))


def bill_of_materials(wheel: Path, epoch: int, built_in: dict[str, str]) -> dict:
    """What is in a wheel and what it asks for, in CycloneDX's form. ``built_in``: name and version of what
    was compiled into the native module."""
    about, hashed = metadata_of(wheel), digest(wheel)
    version = about["Version"]
    this = f"pkg:pypi/vtok-fast@{quote(version)}"
    components = [
        {"type": "library", "bom-ref": f"pkg:{kind}/{name}@{number}", "name": name, "version": number,
         "purl": f"pkg:{kind}/{name}@{number}", "scope": "required"}
        for name, number in sorted(built_in.items())
        for kind in ["pypi" if name == "pybind11" else "generic"]
    ]  # fmt: skip
    asked = [line.partition(";") for line in about.get_all("Requires-Dist") or [] if "extra ==" not in line]
    for requirement in sorted({text.strip() for text, _, _ in asked}):
        name = re.match(r"[\w.-]+", requirement)[0]
        components.append(
            {"type": "library", "bom-ref": f"pkg:pypi/{name}", "name": name, "purl": f"pkg:pypi/{name}",
             "scope": "required", "description": f"installed beside it: {requirement}"}
        )  # fmt: skip
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, hashed)}",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch)),
            "component": {
                "type": "library",
                "bom-ref": this,
                "name": "vtok-fast",
                "version": version,
                "purl": this,
                "licenses": [{"license": {"id": about["License-Expression"] or "Apache-2.0"}}],
                "hashes": [{"alg": "SHA-256", "content": hashed}],
            },
        },
        "components": components,
        "dependencies": [{"ref": this, "dependsOn": [part["bom-ref"] for part in components]}],
    }


def publish(wheel: Path, root: Path, epoch: int, built_in: dict[str, str]) -> Path:
    """Puts a wheel into its family's folder under ``root``, with its bill of materials, and writes the
    folder's index and check sums anew. Returns where it is."""
    folder = root / folder_for(wheel.name)
    folder.mkdir(parents=True, exist_ok=True)
    placed = folder / wheel.name
    shutil.copyfile(wheel, placed.with_name(f".{wheel.name}.part"))
    os.replace(placed.with_name(f".{wheel.name}.part"), placed)
    bill = bill_of_materials(placed, epoch, built_in)
    write(placed.with_name(f"{placed.stem}.cdx.json"), json.dumps(bill, indent=1) + "\n")
    write_index(folder)
    return placed


def write_index(folder: Path) -> None:
    """index.html, a page of links as pip and uv read it of a web server (of a folder they take the files),
    and SHA256SUMS for `sha256sum --check`."""
    wheels = sorted(folder.glob("*.whl"))
    links = []
    for path in wheels:
        python = html.escape(metadata_of(path)["Requires-Python"] or "", quote=True)
        address = f"{quote(path.name)}#sha256={digest(path)}"
        links.append(f'<a href="{address}" data-requires-python="{python}">{path.name}</a><br>')
    head = f"<!DOCTYPE html>\n<html><head><title>vtok-fast: {folder.name}</title></head><body>\n"
    write(folder / "index.html", head + "\n".join(links) + "\n</body></html>\n")
    listed = sorted([*wheels, *folder.glob("*.cdx.json")])
    write(folder / "SHA256SUMS", "".join(f"{digest(path)}  {path.name}\n" for path in listed))


def write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
