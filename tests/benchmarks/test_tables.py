"""The script that writes the tables of README.md and docs/ from benchmarks/results/."""

import json
import sys
from pathlib import Path

import harness
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "tables.py"


@pytest.fixture
def tables():
    return harness.load("scripts/tables.py")


@pytest.fixture
def tree(tables, tmp_path, monkeypatch):
    """A README with one table, and the results of that table."""
    (tmp_path / "docs" / "evidence").mkdir(parents=True)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "TABLES", {"speed": ("run", ["run", "tokens/s", "loss apart"])})
    write_results(tmp_path, 57639)
    (tmp_path / "README.md").write_text("# Speed\n\n<!-- table: speed -->\n<!-- end -->\n\nAfter it.\n")
    return tmp_path


def write_results(folder, rate):
    rows = [{"run": "HGRN2", "tokens/s": rate, "loss apart": 0}, {"run": "attention", "loss apart": 2e-4}]
    (folder / "run.json").write_text(json.dumps({"rows": rows}))


def run(tables, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["tables.py", *words])
    return tables.main()


def test_pages_show_the_results_of_this_tree(tables, monkeypatch, capsys):
    status = run(tables, monkeypatch, "--check")
    assert status == 0, capsys.readouterr().out


def test_a_table_is_written_and_then_checked(tables, tree, monkeypatch):
    assert run(tables, monkeypatch) == 0
    assert (tree / "README.md").read_text() == (
        "# Speed\n\n<!-- table: speed -->\n| run | tokens/s | loss apart |\n| --- | --- | --- |\n"
        "| HGRN2 | 57,639 | 0 |\n| attention |  | 2.0e-04 |\n<!-- end -->\n\nAfter it.\n"
    )
    assert run(tables, monkeypatch, "--check") == 0


def test_a_changed_figure_is_an_error(tables, tree, monkeypatch, capsys):
    run(tables, monkeypatch)
    write_results(tree, 57640)
    assert run(tables, monkeypatch, "--check") == 1
    assert "README.md: speed: differs from its results" in capsys.readouterr().out
    assert "57,639" in (tree / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: sped -->\n<!-- end -->\n", "no table is named 'sped'"),
        ("<!-- table: speed -->\n| run |\n", "no <!-- end -->"),
        ("<!-- table: speed -->\n<!-- table: speed -->\n<!-- end -->\n", "no <!-- end -->"),
        ("<!-- table: speed-->\n<!-- end -->\n", "misspelled"),
    ],
)
def test_marks_that_cannot_be_read_are_errors(text, message, tables, tree, monkeypatch, capsys):
    page = tree / "docs" / "evidence" / "page.md"
    page.write_text(text)
    assert run(tables, monkeypatch) == 1
    output = capsys.readouterr().out
    assert "docs/evidence/page.md: " in output and message in output
    assert page.read_text() == text


def test_a_column_that_no_row_has_is_an_error(tables, tree, monkeypatch, capsys):
    monkeypatch.setattr(tables, "TABLES", {"speed": ("run", ["run", "rate"])})
    assert run(tables, monkeypatch, "--check") == 1
    assert "run.json has no rate" in capsys.readouterr().out
