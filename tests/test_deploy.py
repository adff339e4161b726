"""Units and compose files: what they start is a command as it is, and they may write nothing but their own folder."""

import configparser
import shlex
from pathlib import Path

import click
import pytest
import typer
import yaml

from bellwether.cli.app import app

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
COMPOSE = sorted(DEPLOY.glob("*.yaml"))


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read_string(path.read_text())
    return parser


def service(path: Path) -> dict[str, object]:
    (one,) = yaml.safe_load(path.read_text())["services"].values()
    return one


def started() -> dict[str, list[str]]:
    """Return what is started, by the file's name, as words after ``bellwether``."""
    units = {path.name: shlex.split(unit(path)["Service"]["ExecStart"]) for path in UNITS}
    assert all(Path(words[0]).name == "bellwether" for words in units.values())
    return {name: words[1:] for name, words in units.items()} | {
        path.name: list(map(str, service(path)["command"])) for path in COMPOSE
    }


@pytest.mark.parametrize("name", [path.name for path in (*UNITS, *COMPOSE)])
def test_what_a_file_starts_is_understood_by_the_command(name):
    command, words = typer.main.get_command(app), started()[name]
    while isinstance(command, click.Group):
        _, command, words = command.resolve_command(click.Context(command), words)
    context = click.Context(command)
    assert command.parse_args(context, list(words)) == []  # every word was taken
    assert context.params["folder"] is not None
    assert "--yes" in words or name.endswith(("coordinator.service", "coordinator.yaml"))


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_writes_to_its_own_folder_alone_and_begins_again_what_failed(path):
    settings = unit(path)["Service"]
    assert settings["ProtectSystem"] == "strict"
    assert settings["ReadWritePaths"] == settings["WorkingDirectory"]
    assert settings["Restart"] == "on-failure"
    assert settings["KillSignal"] == "SIGINT"


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_a_container_writes_to_its_own_folder_alone_and_has_no_rights(path):
    settings = service(path)
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["restart"] == "on-failure"
    writable = [volume for volume in settings["volumes"] if not str(volume).endswith(":ro")]
    folder = settings["command"][settings["command"].index("--folder") + 1]
    assert [str(volume).partition(":")[2] for volume in writable] == [folder]


def test_a_site_opens_no_port_and_a_coordinator_opens_that_of_the_docs():
    assert "ports" not in service(DEPLOY / "site.yaml")
    assert service(DEPLOY / "coordinator.yaml")["ports"] == ["8443:8443"]
    assert "--address fed.example.org:8443" in (DEPLOY.parent / "docs" / "federation.md").read_text()
