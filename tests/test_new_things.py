"""A new encoding is two files, a scaling two, a protocol and a kernel one: added to a copy of the package, and used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ropelab

ROOT = Path(ropelab.__file__).parent.parent

ADDED = {
    "ropelab/positions/log_distance.py": '''
        """Scores fall with the logarithm of distance."""

        from __future__ import annotations

        import torch
        from torch import Tensor

        from ropelab.positions.base import Geometry, PositionEncoding, distances
        from ropelab.positions.record import Positions


        class LogDistance(PositionEncoding):
            """-slope log(1 + i - j) is added to the score."""

            name = "log_distance"

            def __init__(self, geometry: Geometry, *, slope: float) -> None:
                super().__init__()
                self.n_head, self.slope = geometry.n_head, slope

            def record(self, positions: Tensor, *, ctx: int) -> Positions:
                return Positions(bias=-self.slope * torch.log1p(distances(positions)).repeat(self.n_head, 1))
    ''',
    "configs/pos/log_distance.yaml": """
        # label: log distance
        # summary: scores fall with the logarithm of distance
        # paper: -
        name: log_distance
        slope: 1.0
    """,
    "ropelab/scalings/root.py": '''
        """Half of position interpolation."""

        from __future__ import annotations

        from dataclasses import dataclass

        from torch import Tensor

        from ropelab.positions import Spectrum
        from ropelab.scalings.base import SpectralScaling


        @dataclass(frozen=True, kw_only=True)
        class Root(SpectralScaling):
            """Frequencies divided by a power of s."""

            name = "root"

            power: float

            def spectrum(self, inv_freq: Tensor, *, base: float, ctx: int) -> Spectrum:
                return Spectrum(inv_freq / self.factor**self.power)
    ''',
    "configs/scaling/root.yaml": """
        # label: root
        # summary: every angle divided by a power of the factor
        # paper: -
        # applies to: rope, p_rope
        name: root
        factor: auto
        original_ctx: null
        power: 0.5
    """,
    "ropelab/protocols/heads.py": '''
        """The head of every block."""

        from __future__ import annotations

        from collections.abc import Sequence

        from ropelab.protocols.base import Protocol


        class Heads(Protocol):
            """One window at the beginning of every block of span tokens."""

            name = "heads"
            summary = "one window at the head of each block; the targets change with ctx"
            same_targets = False

            def starts(self, *, blocks: int, span: int, ctx: int, scored: int) -> Sequence[int]:
                return [block * span for block in range(blocks)]
    ''',
    "ropelab/attention/kernels/loop.py": '''
        """A plain loop."""

        from __future__ import annotations

        from typing import Any

        import torch
        from torch import Tensor

        from ropelab.attention.kernels.base import Kernel
        from ropelab.attention.scores import Request


        class Loop(Kernel):
            """Query by query."""

            name = "loop"
            summary = "query by query, for 24 tokens"
            priority = 100

            @classmethod
            def supports(cls, request: Request) -> bool:
                return not request.bias.scored

            @classmethod
            def suits(cls, request: Request) -> bool:
                return not request.training and request.length == 24

            def __call__(
                self, q: Tensor, k: Tensor, v: Tensor, *, far: tuple[Tensor, Tensor] | None, decay: Any
            ) -> Tensor:
                rows = []
                for i in range(self.request.length):
                    score = q[:, :, i : i + 1] @ k[:, :, : i + 1].transpose(-2, -1) * q.shape[-1] ** -0.5
                    score = score + self.scores.mask(i, i + 1, 0, decay)
                    rows.append(torch.softmax(score, -1).to(v.dtype) @ v[:, :, : i + 1])
                return torch.cat(rows, dim=2)
    ''',
    "tests/test_added.py": '''
        """What was added, as its user meets it."""

        import json

        import torch
        from typer.testing import CliRunner

        from ropelab import cli
        from ropelab.attention import Attend, Bias
        from ropelab.report.figures import method_name


        def answer(*arguments):
            done = CliRunner().invoke(cli.app, [*arguments, "--json"])
            assert done.exit_code == 0, (arguments, done.stderr)
            return json.loads(done.stdout)


        def test_they_are_listed():
            listed = answer("show")
            assert listed["pos"]["log_distance"]["summary"] == "scores fall with the logarithm of distance"
            assert listed["scaling"]["root"]["applies_to"] == ["rope", "p_rope"]
            assert method_name("log_distance", "none", None, None) == "log distance"
            assert method_name("rope", "root", 4.0, None) == "RoPE + root \\u00d74"


        def test_they_are_shown():
            bias = answer("show", "--pos", "log_distance", "pos.slope=2.0", "--ctx", "4")["bias"]["by_distance"][0]
            assert abs(bias[1] + 2 * 0.6931472) < 1e-6
            shown = answer("show", "--pos", "rope", "--scaling", "root", "--factor", "4", "--ctx", "8")
            assert shown["rotation"]["inv_freq"][0] == 0.5


        def test_they_are_trained_and_evaluated(folder):
            shape = ["model.n_layer=1", "model.d_model=32", "model.n_head=2", "train.ctx=16", "train.batch_size=4",
                     "data=text", f"data.path={folder / 'text'}", f"runs_dir={folder / 'runs'}",
                     f"cache_dir={folder / 'cache'}", "train.steps=1", "device=cpu"]
            small = ["eval.tokens=100", "eval.last=4", f"cache_dir={folder / 'cache'}", "device=cpu"]
            run = answer("train", "--pos", "log_distance", *shape)["run_dir"]
            assert [row["status"] for row in answer("eval", run, "--ctx", "16,32", *small)["rows"]] == ["ok", "ok"]
            run = answer("train", "--pos", "rope", *shape)["run_dir"]
            rows = answer("eval", run, "--ctx", "16,32", "--scaling", "root", "--factor", "2", *small)["rows"]
            assert [row["status"] for row in rows] == ["ok", "ok"]
            found = answer("eval", run, "--ctx", "16,32", "--protocol", "heads", *small)
            assert (found["protocol"]["name"], found["protocol"]["targets_digest"]) == ("heads", None)
            documents = found["protocol"]["documents"]
            assert [row["tokens"] // row["ctx"] for row in found["rows"]] == [found["rows"][1]["tokens"] // 32] * 2
            assert documents and found["rows"][0]["tokens"] % 16 == 0
            page = CliRunner().invoke(cli.app, ["report", run, "-o", str(folder / "report")])
            assert page.exit_code == 0, page.stderr
            assert "one window at the head of each block" in (folder / "report" / "report.html").read_text()


        def test_the_kernel_is_chosen_and_right():
            rows = answer("show", "--pos", "log_distance", "--attention", "--ctx", "24")["attention"]
            assert [(row["kernel"], row["what"]) for row in rows][1] == ("loop", "query by query, for 24 tokens")
            q, k, v = torch.randn(3, 2, 2, 24, 8).unbind(0)
            for bias in (Bias(-torch.rand(2, 24)), Bias(window=5), Bias(block=6)):
                loop, blocks = (
                    Attend(24, bias=bias, device=q.device, training=False, kernel=name)(q, k, v)
                    for name in (None, "blocks")
                )
                torch.testing.assert_close(loop, blocks)
    ''',
}


CONTRACT = (
    "added or tables_of_names or what_scalings_declare"
    " or ((contract or scaling_applies or factor_of_one or never_starts) and (log_distance or root))"
)


@pytest.mark.slow
def test_each_is_a_file_or_two_and_the_contract_tests_run_on_it(tmp_path: Path) -> None:
    for name in ("ropelab", "configs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for name, text in ADDED.items():
        assert not (tmp_path / name).exists()
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        (tmp_path / name).write_text("\n".join(line[indent:] for line in lines).rstrip() + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", CONTRACT,
         "tests/test_added.py", "tests/test_positions.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 4 + 20  # those of test_added, and the contract tests
