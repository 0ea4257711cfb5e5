"""``deltaops intrinsic split``: tasks out of one labelled text file, by groups of its labels."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table


def split(
    data: list[str] = typer.Option(..., help="Labelled texts: JSONL or CSV; several are joined."),
    groups: Path = typer.Option(..., help='JSON: {"task": ["label", "label"], …}.'),
    out: Path = typer.Option(
        ..., help="New folder for a TASK.csv each, with columns text and label."
    ),
    text_column: str = typer.Option("text", help="Field of the text."),
    label_column: str = typer.Option("label", help="Field of the label."),
) -> None:
    """Make tasks of one labelled file: the texts of the labels that belong together.

    Example:  deltaops intrinsic split --data train.csv --label-column category
              --groups groups.json --out tasks
    """
    from deltaops.files import check_folder
    from deltaops.tuning.groups import grouped, read_groups, write_tasks
    from deltaops.tuning.read import Columns, read_examples
    from deltaops.tuning.recovered import refuse_used

    refuse_used(out)  # a task of another split would pass for one of this; --data may lie there
    found = read_groups(groups)
    columns = Columns(text_column, label_column)
    examples = [example for source in data for example in read_examples(source, columns)]
    tasks, rest = grouped(examples, found)
    check_folder(out)
    write_tasks(out, tasks)
    console = Console()
    table = Table("task", "labels", "texts")
    for name, texts in tasks.items():
        table.add_row(name, str(len(found[name])), str(len(texts)))
    console.print(table)
    if rest:
        console.print(f"{rest} texts have labels that are in no group, and were left out")
    console.print(f"wrote {len(tasks)} tasks to {out}", highlight=False)
