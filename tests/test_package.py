"""What is shipped: every configuration composes and builds, and the wheel works outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from ropelab import claims, config, runs

CHECKOUT = Path(__file__).parent.parent


@pytest.mark.parametrize("pos", config.choices("pos"))
@pytest.mark.parametrize("model", ["tiny"])
def test_every_encoding_composes_and_builds(pos: str, model: str) -> None:
    resolved = config.load([f"pos={pos}", f"model={model}"])
    assert config.from_dict(json.loads(json.dumps(config.to_dict(resolved)))) == resolved
    assert runs.build_model(resolved, 257, scaling=runs.NO_SCALING, original_ctx=resolved.train.ctx).n_parameters() > 0


@pytest.mark.parametrize("scaling", config.choices("scaling"))
def test_every_scaling_composes(scaling: str) -> None:
    resolved = config.load([f"scaling={scaling}"])
    assert config.from_dict(json.loads(json.dumps(config.to_dict(resolved)))) == resolved


@pytest.mark.parametrize("group", ["model", "data"])
def test_every_other_choice_composes(group: str) -> None:
    for name in config.choices(group):
        more = ["data.path=somewhere"] if name in ("text", "hf") else []
        assert getattr(config.load([f"{group}={name}", *more]), group).name == name


@pytest.mark.parametrize("group", ["pos", "scaling"])
def test_every_method_says_what_it_is(group: str) -> None:
    for name in config.choices(group):
        assert config.about(group, name).summary, name
        assert config.about(group, name).paper, name


def test_the_claims_and_the_demo_load() -> None:
    folder = config.config_dir()
    assert len(claims.packaged_claims(folder)) >= 11
    demo = claims.load_set("demo", folder)
    assert len(demo.claims) == 11


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """Built, installed into a clean environment, it shows a method and trains two steps from another folder."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(CHECKOUT)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("ropelab-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "configs").rglob("*.yaml")}
    assert {name.removeprefix("ropelab/") for name in names if name.startswith("ropelab/configs/")} == shipped
    assert "ropelab/py.typed" in names

    # a clean environment that borrows the libraries of this one, so that only the wheel itself is installed anew
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    subprocess.run(
        [str(binaries / "pip"), "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    libraries = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (site / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    environment = {**os.environ, "ROPELAB_CACHE": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)

    def ropelab(*arguments: str) -> str:
        done = subprocess.run(
            [str(binaries / "ropelab"), *arguments],
            cwd=elsewhere, env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout

    where = subprocess.run(
        [str(binaries / "python"), "-c", "import ropelab.config as c; print(c.config_dir())"],
        cwd=elsewhere, env=environment, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    assert Path(where) == site / "ropelab" / "configs"
    assert json.loads(ropelab("show", "--pos", "rope", "--json"))["rotation"]["inv_freq"][0] == 1.0
    trained = json.loads(ropelab("train", "--pos", "alibi", "train.steps=2", "--json"))
    assert trained["status"] == "done"
    assert (elsewhere / "runs" / trained["run"] / "manifest.json").is_file()
