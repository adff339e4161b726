"""What a coordinator does with its folder, its list of sites and its run, in this process and without a network."""

import contextlib
import dataclasses

import pytest
from test_federate import AddingEngine, begin, federation
from test_sites import papers  # noqa: F401

pytest.importorskip("flwr")

from bellwether.errors import FederationError
from bellwether.exchange.messages import Reply
from bellwether.federate import federate
from bellwether.method.cohort import make_sampler
from bellwether.recipe.file import load_recipe
from bellwether.site import coordinator
from bellwether.site.keys import make_site_keys
from bellwether.site.papers import invite, invited, make_federation_folder, participants, revoke


class Killed(BaseException):
    """Ends a process at a moment where nothing is tidied up any more."""


def kill_while_waiting(folder, monkeypatch):
    """Begin a federation's run, and leave its folder as a process that is killed before the first commit does."""
    from bellwether.store.run_folder import RunFolder

    def killed(*anything):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(coordinator, "_over_link", killed)
        patched.setattr(RunFolder, "discard", RunFolder.close)
        with pytest.raises(Killed):
            coordinator.serve(folder)
    assert (folder / "run" / "recipe.yaml").is_file()
    assert not any((folder / "run" / "checkpoints").iterdir())


def test_a_coordinator_killed_while_it_waited_for_sites_goes_on_by_the_same_command(papers, monkeypatch):  # noqa: F811
    kill_while_waiting(papers / "federation", monkeypatch)
    waited = []

    @contextlib.contextmanager
    def nobody(setting, *anything):
        waited.append(setting.folder)
        raise FederationError("0 of 2 sites are there.")
        yield

    monkeypatch.setattr(coordinator, "_over_link", nobody)
    for _ in range(2):
        with pytest.raises(FederationError, match="0 of 2 sites"):
            coordinator.serve(papers / "federation")
    assert waited == [papers / "federation" / "run"] * 2


def keys_of(folder, name):
    (folder / name).mkdir()
    return make_site_keys(folder / name)


@pytest.fixture
def sites(tmp_path):
    """A coordinator's folder whose sites are a, b, c and d, as ``federation`` has them."""
    folder = tmp_path / "federation"
    make_federation_folder(folder, load_recipe(None), {"base model": "1234"}, "127.0.0.1:9")
    for name in "abcd":
        invite(folder, name, keys_of(tmp_path, name))
    return folder


def test_a_revoked_key_is_never_taken_again_under_whatever_name_and_however_it_is_written(sites, tmp_path):
    revoked = invited(sites)[1].key
    revoke(sites, "b")
    invite(sites, "b", keys_of(tmp_path, "new"))
    body = revoked.removeprefix("bw1-")
    for name in ("b", "e"):
        for key in (revoked, "bw1-" + body.replace("-", "+").replace("_", "/")):
            with pytest.raises(FederationError, match="revoked|already|another key"):
                invite(sites, name, key)
    with pytest.raises(FederationError, match="The key of e was revoked"):
        invite(sites, "e", revoked)
    assert [(site.name, site.revoked) for site in invited(sites)] == [(name, False) for name in "abcd"]
    revoke(sites, "b")
    assert [site.name for site in invited(sites) if site.revoked] == ["b"]


def test_half_a_revoked_key_is_not_taken_either(sites, tmp_path):
    from bellwether.site.keys import public_word

    revoke(sites, "b")
    keys_of(tmp_path, "mixed")
    (tmp_path / "b" / "flower.key").replace(tmp_path / "mixed" / "flower.key")
    with pytest.raises(FederationError, match="The key of e was revoked"):
        invite(sites, "e", public_word(tmp_path / "mixed"))


class Recording(AddingEngine):
    """Of those that are asked, who is revoked does not answer; before the second round, one is."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def ask(self, tasks, deadline=None):
        gone = {site.name for site in invited(self.folder) if site.revoked}
        for reply in super().ask(tasks, deadline):
            yield Reply(reply.client, 0.0, failure="its site was revoked") if reply.client in gone else reply


def test_a_revoked_site_is_in_no_cohort_and_counts_for_no_quorum(sites):
    participants(sites)
    told = federation("federation.quorum=1", "federation.fraction=0.5", engine=Recording(sites))
    own = make_sampler(told.recipe.federation, None)
    told = dataclasses.replace(told, sample=coordinator._among_staying(own, sites))
    first = federate(dataclasses.replace(told, recipe=told.recipe), begin()).rounds
    assert [len(record.cohort) for record in first] == [2, 2, 2]
    for name in "abc":
        revoke(sites, name)
    assert [record.cohort for record in federate(told, begin()).rounds] == [("d",)] * 3
    assert all(record.failure is None for record in federate(told, begin()).rounds)
    revoke(sites, "d")
    with pytest.raises(FederationError, match="All sites of .* are revoked"):
        federate(told, begin())


def test_a_sampler_without_revoked_sites_draws_as_in_a_rehearsal(sites):
    told = federation("federation.fraction=0.5")
    own = make_sampler(told.recipe.federation, None)
    cohorts = [
        [record.cohort for record in federate(dataclasses.replace(told, sample=one), begin()).rounds]
        for one in (own, coordinator._among_staying(own, sites))
    ]
    assert cohorts[0] == cohorts[1]


def test_the_quorum_before_the_first_round_is_of_those_who_are_not_revoked(papers, monkeypatch):  # noqa: F811
    needed = []

    def over_link(setting, folder, made, listen, sites, deadline):
        needed.append(sites)
        raise Killed

    monkeypatch.setattr(coordinator, "_over_link", over_link)
    text = (papers / "federation" / "recipe.yaml").read_text()
    assert "quorum: 0.5" in text
    (papers / "federation" / "recipe.yaml").write_text(text.replace("quorum: 0.5", "quorum: 1.0"))
    for revoked in (None, "south"):
        participants(papers / "federation")
        if revoked:
            revoke(papers / "federation", revoked)
        with pytest.raises(Killed):
            coordinator.serve(papers / "federation")
    assert needed == [2, 1]
