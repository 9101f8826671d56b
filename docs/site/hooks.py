"""What MkDocs does not do: pages of the root, links into the repository, formulas."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")


def on_files(files, config):
    """Adds the pages that stand in the repository's root."""

    def from_docs(match):
        target = match[1].removeprefix("docs/")
        on_site = target in ROOT_PAGES or files.get_file_from_path(target)
        return f"]({target})" if on_site else f"](../{match[1]})"

    for name in ROOT_PAGES:
        text = (Path(config.docs_dir).parent / name).read_text("utf-8")
        text = re.sub(r"\]\((?!https?://)([^)#]+)\)", from_docs, text)
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to what is not on the site lead to the repository, where it has a URL."""

    up = "../" * (page.file.src_uri.count("/") + 1)

    def link(match):
        text, target = match.groups()
        target = target.removeprefix(up) if target.startswith(up) else f"docs/{target}"
        return f"[{text}]({config.repo_url}{target})" if config.repo_url else text

    elsewhere = rf"{re.escape(up)}[^)]+|results(?:/[^)]*)?"
    return re.sub(rf"(?<!!)\[([^\]]+)\]\(({elsewhere})\)", link, markdown)


def on_page_content(content, page, config, files):
    """Notebooks link to pages; formulas become MathML, drawn without a script."""
    content = re.sub(r'(href="(?!https?:)[^"#]+)\.md(["#])', r"\1.html\2", content)

    def mathml(match):
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    pattern = r'<(span|div) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>'
    return re.sub(pattern, mathml, content, flags=re.S)
