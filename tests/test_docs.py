"""README, CONTRIBUTING and docs agree with the code, with each other and with the results that they quote."""

import argparse
import ast
import functools
import itertools
import re
from pathlib import Path

import harness
import pytest
from harness import ROOT
from test_megatron_flags import NEW_IN_19, NEW_IN_20

README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REFUSALS = ROOT / "docs" / "reference" / "refusals.md"
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")
SOURCES = ("hgrn2_megatron", "kernels", "examples", "benchmarks", "scripts")

# flags of other people's programs than Megatron
OTHER_PROGRAMS = {
    "torchrun": "--nproc_per_node",
    "lm-evaluation-harness": "--tasks --include_path --batch_size --model_args --model",
}
# flags of Megatron releases that the installed one does not have
OTHER_RELEASES = {
    f"--{name.replace('_', '-')}" for name in (*NEW_IN_19, *NEW_IN_20, "output_logit_dtype", "megatron_fsdp_version")
}


def rows(text: str) -> list[list[str]]:
    """Return the cells of every table row of a page, without the lines that separate a head from its rows."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]


def section(page: Path, heading: str) -> str:
    """Return the text under a `##` heading."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S)
    assert found, f"{page.name} has no section {heading}"
    return found[1]


def prose(text: str) -> str:
    """Return a page without its code: no indented blocks, no fenced blocks and no spans."""
    text = re.sub(r"^(```.*?^```|    .*?)$", "", text, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


# the map


def files() -> set[str]:
    """Every module and script that the map must name. It names the jobs of scripts/offline as one folder."""
    found = itertools.chain.from_iterable((ROOT / source).rglob("*") for source in SOURCES)
    kept = {path.relative_to(ROOT).as_posix() for path in found if path.suffix in (".py", ".sh", ".slurm")}
    return {name for name in kept if not re.search("__init__.py$|/build/|/jobs/", name)}


def mapped() -> dict[str, str]:
    """Return the description of each path in CONTRIBUTING's map. The path of a folder ends in a slash."""
    found, folders = {}, []
    for line in section(CONTRIBUTING, "Map of the tree").splitlines():
        if not line.startswith("    "):
            continue
        depth, name, words = re.fullmatch(r"    ((?:  )*)(\S+) *(.*)", line).groups()
        folders[len(depth) // 2 :] = [name]
        found["".join(folders)] = words
    return found


def test_the_map_names_every_module_and_nothing_else():
    named = {path for path in mapped() if not path.endswith("/")}
    assert len(named) > 80
    assert sorted(files() - named) == []
    assert sorted(named - files()) == []


def test_the_map_says_something_of_each_module_and_names_folders_that_exist():
    for path, words in mapped().items():
        assert words or path.endswith("/"), path
        assert (ROOT / path).exists(), path


# the refusals


def flags_of(text: str) -> set[str]:
    """The flags that a text names, `--hgrn2-*` aside."""
    return set(FLAG.findall(text.replace("--hgrn2-*", "")))


def strings_of(node: ast.AST, constants: dict[str, str]) -> str:
    """All strings in an expression, with those of the module's constants that it names."""
    words = []
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            words.append(part.value)
        elif isinstance(part, ast.Name):
            words.append(constants.get(part.id, ""))
    return " ".join(words)


@functools.cache
def package() -> dict[str, ast.Module]:
    folder = ROOT / "hgrn2_megatron"
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}


def named_strings(tree: ast.Module) -> dict[str, str]:
    """The strings that a module's variables are set to, but for texts of several lines."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.IfExp | ast.JoinedStr):
            text = strings_of(node.value, {})
            found |= {target.id: text for target in node.targets if isinstance(target, ast.Name) and "\n" not in text}
    return found


def is_table_row(node: ast.AST) -> bool:
    """Return whether a node is a row of a table: a condition, its flag, and what to do instead."""
    if not (isinstance(node, ast.Tuple) and len(node.elts) == 3 and isinstance(node.elts[0], ast.Lambda | ast.Name)):
        return False
    return all(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in node.elts[1:])


def refusals() -> list[tuple[str, set[str]]]:
    """Return, for each refusal that names a flag, its place in the package and the flags in its message.

    A refusal is a UsageError or ValueError that is made, or a row (condition, flag, what to do instead) of a table.
    """
    found = []
    for name, tree in package().items():
        constants = named_strings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UsageError", "ValueError"):
                found.append((f"{name}:{node.lineno}", flags_of(strings_of(node, constants))))
            elif is_table_row(node):
                found.append((f"{name}:{node.lineno}", flags_of(node.elts[1].value)))
    return [(where, flags) for where, flags in found if flags]


# sections whose rows list flags one by one, which the code has as the keys or values of a dict
LISTS = ("Differences from a checkpoint", "What fla's format cannot express")


def documented_refusals() -> list[tuple[str, set[str]]]:
    """Return the first cell of each row of refusals.md that names flags in it, and these flags."""
    text = REFUSALS.read_text()
    for heading in LISTS:
        text = text.replace(section(REFUSALS, heading), "")
    return [(row[0], flags_of(row[0])) for row in rows(text) if flags_of(row[0])]


def unmatched(needs: list[tuple[str, set[str]]], allowed) -> list[str]:
    """Return the names of the first list that get no partner of their own.

    Args:
        needs: name and flags of each.
        allowed: function that returns, for some flags, the indices of the possible partners.
    """
    taken: dict[int, int] = {}

    def place(one: int, seen: set[int]) -> bool:
        for other in allowed(needs[one][1]):
            if other not in seen:
                seen.add(other)
                if other not in taken or place(taken[other], seen):
                    taken[other] = one
                    return True
        return False

    return [f"{name}: {' '.join(sorted(flags))}" for one, (name, flags) in enumerate(needs) if not place(one, set())]


def test_every_refusal_has_a_row_of_its_own_and_every_row_a_refusal():
    """A row goes with a refusal whose message has all the flags of the row's first cell."""
    code, docs = refusals(), documented_refusals()
    assert len(code) > 80 and len(docs) > 80
    assert unmatched(code, lambda flags: [i for i, (_, row) in enumerate(docs) if row <= flags]) == []
    assert unmatched(docs, lambda row: [i for i, (_, flags) in enumerate(code) if row <= flags]) == []


def test_every_flag_that_is_compared_or_cannot_be_converted_is_listed():
    keys = set()
    for tree in package().values():
        for node in ast.walk(tree):
            parts = [*node.keys, *node.values] if isinstance(node, ast.Dict) else []
            if isinstance(node, ast.Subscript):
                parts = [node.slice]
            keys |= {flag for part in parts if part for flag in flags_of(strings_of(part, {}))}
    listed = set()
    for heading in LISTS:
        listed |= {flag for row in rows(section(REFUSALS, heading)) for flag in flags_of(row[0])}
    assert len(keys) > 20
    assert sorted(keys - listed) == [] and sorted(listed - keys) == []


def test_every_field_of_a_config_that_is_refused_is_listed():
    refused = set()
    for node in ast.walk(package()["hgrn2_megatron/conversion/config.py"]):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_refuse":
            refused.add(strings_of(node.args[0], {}).split()[0])
    listed = {re.match(r"`(\w+)`", row[0])[1] for row in rows(section(REFUSALS, "What a config.json may not have"))[1:]}
    assert len(refused) > 5
    assert refused == listed


# the flags


@functools.cache
def parser_flags() -> set[str]:
    """Every flag of Megatron's own parser with the plugin's."""
    import megatron.training.arguments

    from hgrn2_megatron.arguments import add_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser = add_arguments(megatron.training.arguments.add_megatron_arguments(parser))
    return {flag for action in parser._actions for flag in action.option_strings}


def script_flags() -> set[str]:
    """Every flag of this project's own commands, examples, benchmarks and scripts."""
    found = set()
    for path in (ROOT / name for name in files() if name.endswith(".py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument" and node.args:
                flags = flags_of(strings_of(node.args[0], {}))
                found |= flags
                if any(getattr(word.value, "attr", "") == "BooleanOptionalAction" for word in node.keywords):
                    found |= {f"--no-{flag.removeprefix('--')}" for flag in flags}
    return found


def test_every_flag_in_the_pages_exists():
    others = {flag for flags in OTHER_PROGRAMS.values() for flag in flags.split()}
    known = parser_flags() | script_flags() | others | OTHER_RELEASES
    assert len(parser_flags()) > 500
    unknown = {f"{page.relative_to(ROOT)}: {flag}" for page in PAGES for flag in flags_of(page.read_text()) - known}
    assert sorted(unknown) == []


def test_every_flag_of_other_programs_is_used():
    used = {flag for page in PAGES for flag in flags_of(page.read_text())}
    assert [flag for flags in OTHER_PROGRAMS.values() for flag in flags.split() if flag not in used] == []


def test_every_flag_of_the_plugin_is_documented():
    own = {flag for flag in parser_flags() if flag.startswith("--hgrn2-")}
    table = section(ROOT / "docs" / "reference" / "flags.md", "The plugin's flags")
    assert own and own == {flag for row in rows(table) for flag in flags_of(row[0])}


def test_every_name_of_the_operator_is_documented():
    names = re.findall(r'^    "(\w+)",$', (ROOT / "kernels" / "hgrn2_kernels" / "__init__.py").read_text(), re.M)
    page = (ROOT / "docs" / "reference" / "operator.md").read_text()
    assert len(names) > 8
    assert [name for name in names if not re.search(rf"`{name}\b", page)] == []


# links


def anchors(page: Path) -> set[str]:
    """The anchors that a renderer makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_and_anchors_resolve(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_the_pages_have_links():
    assert sum(len(re.findall(r"\]\(", page.read_text())) for page in PAGES) > 80


def test_pages_that_the_code_names_exist():
    files_of_code = [ROOT / name for name in files()] + [ROOT / "pyproject.toml", ROOT / "Makefile"]
    named = [(path, page) for path in files_of_code for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())]
    assert named
    assert [f"{path.relative_to(ROOT)}: {page}" for path, page in named if not (ROOT / page).exists()] == []


# lengths and tables


def words(text: str) -> list[str]:
    """Return the words that a reader sees. A link counts as its text, and marks do not count."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return [word for word in text.split() if re.search(r"\w", word)]


def test_readme_is_short():
    assert 500 < len(words(README.read_text())) < 1100


def test_rows_of_readme_are_short():
    found = rows(README.read_text())
    assert len(found) > 20
    assert [row for row in found if len(words(" ".join(row))) > 20] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_cells_of_tables_are_short(page):
    assert [cell for row in rows(page.read_text()) for cell in row if len(words(cell)) > 20] == []


def test_generated_tables_equal_their_results():
    assert "<!-- table: " in README.read_text()
    done = harness.python("scripts/tables.py", "--check")
    assert done.returncode == 0, done.stdout


# docstrings


def test_no_docstring_begins_with_a_word_that_says_nothing():
    found, wrong = 0, []
    for source in ("hgrn2_megatron", "kernels", "examples", "benchmarks"):
        for path in sorted((ROOT / source).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node) or ""
                    found += bool(text)
                    if re.match(r"(What|Which|Of|Whether)\b", text):
                        wrong.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert found > 300
    assert not wrong, f"{len(wrong)} docstrings:\n" + "\n".join(wrong)
