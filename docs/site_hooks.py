"""Pages of the documentation site that are made from other files when the site is built."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "crossmae_det"


def model_zoo() -> str:
    """MODEL_ZOO.md with links that lead to pages of the site."""
    page = (REPO / "MODEL_ZOO.md").read_text(encoding="utf-8")
    page = page.replace("docs/benchmarks.md", "benchmarks.md")
    # Browsers show .txt and download .py.
    return re.sub(r"(\]\(configs/[^)]+\.(?:py|yaml))\)", r"\1.txt)", page)


def api_pages() -> Iterator[tuple[str, str]]:
    """Name and page of every package: its own docstring, then its public modules."""
    for init in sorted(PACKAGE.glob("*/__init__.py")):
        name = init.parent.name
        lines = [f"# crossmae_det.{name}", "", f"::: crossmae_det.{name}", "    options:"]
        lines += ["      members: false", ""]
        for path in sorted(init.parent.rglob("*.py")):
            if not path.name.startswith("_"):
                module = ".".join(path.relative_to(init.parent).with_suffix("").parts)
                lines += [f"## {module}", "", f"::: crossmae_det.{name}.{module}", ""]
        yield name, "\n".join(lines)


def on_files(files: Files, config: Any) -> Files:
    """Add the model zoo, the configs that it links to as text, and the API reference."""
    files.append(File.generated(config, "model_zoo.md", content=model_zoo()))
    for path in sorted((REPO / "configs").rglob("*")):
        if path.suffix in (".py", ".yaml"):
            name = path.relative_to(REPO).as_posix()
            files.append(File.generated(config, f"{name}.txt", abs_src_path=str(path)))
    for name, page in api_pages():
        files.append(File.generated(config, f"api/{name}.md", content=page))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Links to MODEL_ZOO.md, which lies outside of docs/, lead to its page."""
    return markdown.replace("../MODEL_ZOO.md", "model_zoo.md")
