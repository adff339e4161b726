"""The documentation as a site: pages of this repository, and a reference from docstrings that are read, not imported.

    make docs

Sources are found from the repository's root, so that links between its README, docs/ and benchmarks/ lead
somewhere on the site as they do in the repository.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

project = "bellwether"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser", "reference"]
root_doc = "docs/site/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "bellwether/model/starter/README.md",
    "docs/*.md",
    "docs/site/*.rst",
]
exclude_patterns = [".venv", "build", "runs"]  # not looked into
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_heading_anchors = 4
myst_enable_extensions = ["html_image"]

nitpicky = True

# Types of Python and of other packages are named, not linked to: a site that needs no network looks nothing up.
nitpick_ignore_regex = [("py:.*", r"(?!bellwether\.).*")]
# Inner parts that signatures name: described in the source alone.
nitpick_ignore = [
    ("py:class", f"bellwether.{name}")
    for name in (
        *(f"tools.json_text.{number}" for number in ("Amount", "Count", "Finite", "Loss", "Number", "Truth")),
        "data.prompts.Template",
        "exchange.packing.Packed",
        "exchange.records.Group",
        "federate.Engine",
        "method.cohort.Trace",
        "model.base.OpenedBase",
        "recipe.plain.Location",
        "report.compare_table.ClientGain",
        "report.compare_table.Line",
        "store.comparison.Comparison",
        "store.comparison.Outcome",
        "store.comparison.Trial",
        "recipe.recipe.Data",
        "runner.wiring.Setting",
        "store.holdings.Share",
    )
]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "bellwether"
html_copy_source = False
html_show_sphinx = False
