"""`make images`: builds the images with docker or buildah, lists the packages in each, and may push them to a registry.

    python3 deploy/docker/images.py [--base cpu] [--registry REGISTRY [--push]] [IMAGE ...]

Needs nothing but Python and one of the two programs. Writes `images.json`, a list of the images with their digests, and
of each a CycloneDX list of its Python packages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/docker"
# Of every base, the images that there are; the first base that an image has is the one without a suffix in its tag.
IMAGES = {"cuda": ("encoder", "llm", "ray", "vllm"), "cpu": ("encoder", "llm", "ray", "gateway")}
CPU_IMAGE = "ubuntu:24.04"


@dataclass(frozen=True)
class Built:
    """An image as images.json has it.

    Args:
        name: with its registry, without a tag.
        id: the builder's own.
        digest: of what the registry has; None for an image that was not pushed.
        packages: file with the list of its Python packages, beside images.json.
        base: the image that it stands on, as it was asked for: with a digest only where that was named.
    """

    name: str
    tag: str
    id: str
    digest: str | None
    packages: str
    base: str

    @property
    def reference(self) -> str:
        return f"{self.name}:{self.tag}"


def main() -> int:
    args = _arguments()
    builder = args.builder or find_builder()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    args.output.mkdir(parents=True, exist_ok=True)
    built = []
    for image in args.images or IMAGES[args.base]:
        name = f"{args.registry}/vitrine-{image}" if args.registry else f"vitrine-{image}"
        tag = version + suffix(image, args.base)
        arguments = build_arguments(image, args.base, version, args.base_image)
        run(*build_command(builder, image, f"{name}:{tag}", arguments))
        packages = f"vitrine-{image}-{tag}.cdx.json"
        list_packages(builder, f"{name}:{tag}", args.output / packages)
        digest = push(builder, name, tag) if args.push else None
        image_base = base_of(image, arguments)
        built.append(Built(name, tag, image_id(builder, f"{name}:{tag}"), digest, packages, image_base))
    (args.output / "images.json").write_text(json.dumps([asdict(each) for each in built], indent=2) + "\n")
    for each in built:
        print(f"{each.reference}  {each.digest or each.id}")
    print(f"wrote {args.output / 'images.json'}" + ("" if args.push else "; ids are local: a digest comes with --push"))
    return 0


def suffix(image: str, base: str) -> str:
    """What distinguishes the tag of an image from that of the same one on another base."""
    return "" if base == next(each for each in IMAGES if image in IMAGES[each]) else f"-{base}"


def find_builder() -> str:
    """Docker where its daemon answers, as compose uses its images; else buildah, which needs no daemon."""
    why = "neither docker nor buildah is installed"
    if shutil.which("docker"):
        asked = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            return "docker"
        why = f"docker is installed, but does not answer ({asked.stderr.strip()}), and buildah is not"
    if shutil.which("buildah"):
        return "buildah"
    fail(f"{why}: images are built with one of them (Debian, Ubuntu: apt-get install buildah)")


def build_arguments(image: str, base: str, version: str, base_image: str | None) -> dict[str, str]:
    """The Dockerfile's arguments; those that are not named keep its defaults, which are CUDA's."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    arguments = {"VERSION": version, "REVISION": asked.stdout.strip() or "unknown"}
    if base == "cpu":
        arguments["BASE_IMAGE"] = CPU_IMAGE
        arguments["EXTRAS"] = "[gateway]" if image == "gateway" else "[encoder,worker]"
    if base_image:
        arguments["BASE_IMAGE"] = base_image
    if index := os.environ.get("TORCH_INDEX_URL"):
        arguments["TORCH_INDEX_URL"] = index
    return arguments


def base_of(image: str, arguments: dict[str, str]) -> str:
    """The image that this one stands on: vLLM's own, or the base of all others."""
    argument = "VLLM_IMAGE" if image == "vllm" else "BASE_IMAGE"
    [default] = re.findall(rf"(?m)^ARG {argument}=(.*)$", (FOLDER / "Dockerfile").read_text())
    return arguments.get(argument, str(default))


def build_command(builder: str, target: str, reference: str, arguments: dict[str, str]) -> list[str]:
    command = [builder, "build", "--file", str(FOLDER / "Dockerfile"), "--target", target, "--tag", reference]
    if builder == "buildah":
        # Images share their stages, as docker's do without being asked; OCI's format has no health checks.
        command += ["--layers", "--format", "docker"]
    return [*command, *(f"--build-arg={name}={value}" for name, value in arguments.items()), str(ROOT)]


def list_packages(builder: str, reference: str, file: Path) -> None:
    """Writes the image's Python packages, as its own Python finds them, by cyclonedx-py (sbom.Dockerfile)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [builder, "build", "--file", str(FOLDER / "sbom.Dockerfile"), "--build-arg", f"IMAGE={reference}"]
        run(*command, "--output", f"type=local,dest={folder}", str(FOLDER))
        shutil.move(f"{folder}/sbom.json", file)


def image_id(builder: str, reference: str) -> str:
    if builder == "docker":
        return run("docker", "image", "inspect", "--format", "{{.Id}}", reference)
    return "sha256:" + run("buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", reference)


def push(builder: str, name: str, tag: str) -> str:
    """Pushes an image and returns the digest by which the registry knows it."""
    if builder == "buildah":
        with tempfile.NamedTemporaryFile() as file:
            run("buildah", "push", "--digestfile", file.name, f"{name}:{tag}")
            return Path(file.name).read_text().strip()
    run("docker", "push", f"{name}:{tag}")
    known = json.loads(run("docker", "image", "inspect", "--format", "{{json .RepoDigests}}", f"{name}:{tag}"))
    return next(str(each).partition("@")[2] for each in known if each.startswith(f"{name}@"))


def run(*command: str) -> str:
    """Runs a builder's command, shows what it says while it builds or pushes, and returns what it answers otherwise."""
    shown = command[1] in ("build", "push")
    if shown:
        print("+", *command, flush=True)
    done = subprocess.run(
        command,
        stdout=None if shown else subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"DOCKER_BUILDKIT": "1"},
    )
    if done.returncode:
        fail(f"{' '.join(command[:2])} ended with {done.returncode}: {' '.join(command)}")
    return (done.stdout or "").strip()


def fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Builds Vitrine's images.")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="default: all that the base has")
    parser.add_argument("--base", choices=IMAGES, default="cuda", help="what images stand on (default: %(default)s)")
    parser.add_argument(
        "--base-image", help="that base in place of the usual one, such as a mirror's or a pinned digest"
    )
    parser.add_argument(
        "--registry", default="", help="in front of the images' names, such as registry.example.com/team"
    )
    parser.add_argument("--push", action="store_true", help="push to that registry, to which you are logged in")
    parser.add_argument(
        "--builder", choices=("docker", "buildah"), help="default: docker where it answers, else buildah"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "images", help="folder of images.json (default: images)")
    args = parser.parse_args()
    args.registry = args.registry.rstrip("/")
    for image in args.images:
        if image not in IMAGES[args.base]:
            parser.error(f"there is no image {image!r} on {args.base}, only {', '.join(IMAGES[args.base])}")
    if args.push and not args.registry:
        parser.error("--push needs --registry: the images' own names are no registry's")
    return args


if __name__ == "__main__":
    sys.exit(main())
