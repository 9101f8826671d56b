"""Every shell block of README and docs: what its commands name is there.

The blocks that serve a model are run by tests/export/test_served_blocks.py. The others
need hours, other people's data, a cluster or the network: here their commands are
parsed by the programs' own parsers.
"""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

import export.__main__
import training.__main__
from training import recipes
from training.methods import METHODS
from training.study.studies import STUDIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
APPS = {
    "training": typer.main.get_command(training.__main__.app),
    "export": typer.main.get_command(export.__main__.app),
}


def shell_blocks(page):
    text = page.read_text("utf-8")
    blocks = re.findall(r"^```(.*?)\n(.*?)^```$", text, re.S | re.M)
    return [block for language, block in blocks if language in ("", "bash", "sh")]


def commands(block):
    """The simple commands of a block, as lists of words."""
    block = re.sub(r"\\\n", " ", block)
    block = re.sub(r"<<(\w+)\n.*?^\1$", "", block, flags=re.S | re.M)
    for script in re.findall(r"bash -c '\n(.*?)'", block, re.S):
        yield from commands(script)
    block = re.sub(r"bash -c '\n.*?'", "bash", block, flags=re.S)
    block = re.sub(r"(^|\s)#.*", r"\1", block)
    lexer = shlex.shlex(block, posix=True, punctuation_chars="|&;\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words = []
    for word in lexer:
        if set(word) <= set("|&;\n"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def without_environment(words):
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def check_python(words):
    """Its module's command takes these arguments, and knows what they name."""
    assert words[:2] == ["python", "-m"], words
    module, *arguments = words[2:]
    if module == "pytest":
        assert (ROOT / arguments[0]).exists(), words
        return
    app = APPS[module]
    if arguments in ([], ["--help"]):
        return
    name, *arguments = arguments
    command = app.commands[name]
    given = command.make_context(name, arguments, resilient_parsing=False).params
    if module == "training" and given.get("recipe"):
        assert recipes.find(given["recipe"]), words
    methods = given.get("method") or ()
    methods = {methods} if isinstance(methods, str) else set(methods)
    assert methods <= set(METHODS), words
    if "study" in given:
        assert given["study"] in STUDIES, words


def check_pip(words):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert words[1] == "install", words
    for word in words[2:]:
        for extra in re.findall(r"\[(.*)\]", word):
            known = project["project"]["optional-dependencies"]
            assert set(extra.split(",")) <= set(known), words
        if word.startswith("."):
            folder = ROOT / word.partition("[")[0]
            assert (folder / "pyproject.toml").is_file(), words


def check_make(words):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(words[1:]) <= set(targets), words


def check_files(words):
    """The files of the repository that docker, kubectl and sed are given."""
    files = [word for word in words if word.startswith(("export/", "docs/"))]
    assert files, words
    assert all((ROOT / file).exists() for file in files), words


CHECKS = {
    "python": check_python,
    "pip": check_pip,
    "make": check_make,
    "kubectl": check_files,
    "sed": check_files,
}
# What is a shell's, Slurm's or run elsewhere, and says nothing of this repository.
OTHERS = {
    *(".", "source", "export", "echo", "mkdir", "if", "then", "fi", "git", "cd", "cp"),
    *("curl", "hosts=$(scontrol", "srun", "sed", "paste", "docker"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_shell_block_is_one(page):
    for block in shell_blocks(page):
        for words in map(without_environment, commands(block)):
            if not words:
                continue
            if words[0] in ("if", "then"):
                words = words[1:]
            in_repository = any(word.startswith("export/") for word in words)
            if words[:2] == ["docker", "compose"] or (
                words[0] in CHECKS and (words[0] != "sed" or in_repository)
            ):
                CHECKS.get(words[0], check_files)(words)
            else:
                assert words[0] in OTHERS or words[0] in ("[", "scontrol"), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_told_of_in_passing_has_its_options(page):
    """In a sentence a command may be without what it must be given."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
    for module, rest in re.findall(r"`python\s+-m\s+(training|export)\b([^`]*)`", text):
        words = rest.split()
        if not words or words[0].startswith("-"):
            continue
        command = APPS[module].commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        given = {word for word in words if word.startswith("--")}
        assert given <= known, (module, words)


def test_nothing_that_is_wrong_passes():
    for line, error in {
        "python -m training fit scenes --no-such-option": "No such option",
        "python -m training fit none": "none",
        "python -m training fit": "recipe",
        "python -m export nothing": "nothing",
        "pip install '.[nothing]'": "nothing",
        "make nothing": "nothing",
        "kubectl apply -k export/nothing": "export/nothing",
    }.items():
        (words,) = commands(line)
        with pytest.raises(Exception, match=error):
            CHECKS[words[0]](words)
