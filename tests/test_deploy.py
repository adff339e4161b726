"""Units and compose files: what they start is a command as it is, and they may write nothing but their own folder."""

import configparser
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
import typer
import yaml

from bellwether.cli.app import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
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


SECRET = ["federation/ca.key", "site/signing.key", "deploy/federation/flower.db", "deploy/site/ledger.jsonl"]
SECRET += ["deploy/data/rows.jsonl", "hospital/noise.key", "hospital.invitation", "deploy/hospital.invitation"]


def copied():
    """Return what the image takes in, as names in the repository."""
    lines = re.findall(r"^COPY (.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert lines
    return [name for line in lines for name in line.split()[:-1]]


def test_an_image_takes_in_the_package_alone():
    assert sorted(copied()) == ["LICENSE", "README.md", "bellwether", "constraints.txt", "pyproject.toml"]
    assert not re.search(r"^ADD ", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and line[0] != "#"]
    assert rules[0] == "*"  # and what is taken back is what is copied; the last rule that fits decides
    assert sorted(rule[1:] for rule in rules if rule[0] == "!") == sorted(copied())
    assert all(service(path)["build"] == {"context": "..", "dockerfile": "deploy/Dockerfile"} for path in COMPOSE)


def test_what_an_image_takes_in_is_enough_to_build_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(copied())


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.name)
def test_keys_and_rows_of_a_container_lie_outside_of_the_repository(path):
    lines = re.findall(r"^ +(?:# )?- (\S+):/\S+", path.read_text(), re.MULTILINE)
    assert lines
    assert all(Path(folder).is_absolute() for folder in lines)


def test_git_takes_no_key_row_or_invitation_and_all_of_the_package(tmp_path):
    def git(folder, *words):
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout

    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_bytes((ROOT / ".gitignore").read_bytes())
    package = [str(path.relative_to(ROOT)) for path in (ROOT / "bellwether").rglob("*.py")]
    for name in (*SECRET, *package):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    taken = git(tmp_path, "ls-files", "-o", "--exclude-standard").splitlines()
    assert not set(SECRET) & set(taken)
    assert set(package) <= set(taken)
