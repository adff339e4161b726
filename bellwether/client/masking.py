"""What a client does so that the server learns the sum of updates and not its own: secrets, shares, mask, opening.

Secure aggregation of Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS,
figure 4), without the round of signatures that it adds against a server that lies about who is there. With client u's
rounded weighted update q_u, the seed b_u of its own mask and the key s_uv that it has in common with v, modulo 2^64,

    y_u = q_u + PRG(b_u) + Σ_{v after u} PRG(s_uv) - Σ_{v before u} PRG(s_uv)

A client takes one step after the other, each once in a round, and keeps what it needs for the next in its own folder:
it announces keys, deals shares of b_u and of its masking key, sends y_u, and opens shares of others. Of each other
client it opens a share of one of both alone, and then it forgets the round, so that it can be asked for nothing more;
a round that begins anew begins with new secrets. Deviation: with its keys a client announces a hash of b_u, by which
wrong shares of it are found out.

In a simulation secrets are drawn from the run's seed, so that a run can be repeated: masks then hide nothing from
whoever knows the seed. In a real federation they are drawn from the operating system.

What the server can no longer see of an update, the client checks itself, by the server's own check: shapes, finite
values, norms. A client that wants to spoil a sum does not.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from bellwether.errors import RoundFailed, UpdateRejected
from bellwether.exchange.checks import check_update
from bellwether.exchange.masks import (
    KEY,
    coefficients,
    derived,
    needed_of,
    numbers_of,
    own_mask,
    pair_mask,
    pledge_of,
    public_key,
    seal,
    unseal,
)
from bellwether.exchange.messages import (
    MASKED,
    SECRETS,
    Announced,
    AnnounceTask,
    Dealt,
    Masking,
    Reply,
    Revealed,
    SecureTask,
    ShareTask,
    TrainTask,
    UnmaskTask,
    Update,
)
from bellwether.exchange.ring import as_vector, into_ring
from bellwether.exchange.secure_checks import check_announced
from bellwether.method.method import Method, without_values
from bellwether.recipe.secure import LEAST_COHORT
from bellwether.store.client_state import SECURE
from bellwether.tools.atomic import make_folder, write_atomic
from bellwether.tools.functions import naming
from bellwether.tools.json_text import KEPT, Count, Finite, plain, read_json
from bellwether.tools.shamir import BYTES, shares_of

_Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]


@dataclass(frozen=True)
class _Secrets:
    """What a client keeps of a round between two steps.

    Args:
        seed: what all its secrets derive from.
        needed: how many clients must take part to the end.
        largest: the largest absolute value that can be masked.
        keys: sealing key, masking key and pledge of each client, once shares are dealt.
        shares: what each other client sealed for it, once its update is masked.
    """

    __pydantic_config__ = KEPT

    seed: _Hex
    needed: Count
    largest: Finite
    keys: Mapping[str, tuple[_Hex, _Hex, _Hex]] | None = None
    shares: Mapping[str, _Hex] | None = None

    def key(self, purpose: str) -> bytes:
        """Return the secret for a purpose."""
        return derived(bytes.fromhex(self.seed), purpose)

    @property
    def sealing(self) -> bytes:
        """The key that opens what others seal for it."""
        return self.key("sealing key")

    @property
    def masking(self) -> bytes:
        """The key of the masks that it has in common with others."""
        return self.key("masking key")

    @property
    def mask_seed(self) -> bytes:
        """The seed of its own mask."""
        return self.key("seed of its own mask")

    @property
    def announced(self) -> Announced:
        """What it announces of them."""
        return Announced(public_key(self.sealing), public_key(self.masking), pledge_of(self.mask_seed))

    def dealt(self, count: int) -> list[bytes]:
        """Return for each holder its shares of the mask's seed and of the masking key, one after the other."""
        parts = [
            shares_of(int.from_bytes(secret, "big"), coefficients(self.key(purpose), self.needed - 1), count)
            for secret, purpose in ((self.mask_seed, "shares of its seed"), (self.masking, "shares of its key"))
        ]
        return [b"".join(share.to_bytes(BYTES, "big") for share in shares) for shares in zip(*parts, strict=True)]


def take_part(client: str, task: SecureTask, folder: Path, *, real: bool) -> Announced | Dealt | Revealed:
    """Take a step of secure aggregation, other than sending an update, and return what is sent.

    Args:
        client: the client's name.
        task: what it is asked.
        folder: its own.
        real: whether secrets are drawn from the operating system, and not from the seed that the task brings.

    Raises:
        UpdateRejected: it must not take the step, as one clause.
        CheckpointError: what it keeps cannot be read or written.
    """
    if isinstance(task, AnnounceTask):
        return _announce(task, folder, real)
    return _deal(client, task, folder) if isinstance(task, ShareTask) else _reveal(client, task, folder)


def as_masked(reply: Reply, task: TrainTask, method: Method, folder: Path) -> Reply:
    """Return a reply whose update is masked where its task says how, or one that says why it is not sent.

    Args:
        reply: a client's, with its update as it would travel otherwise.
        task: what it was asked.
        method: weighs the update, and says which arrays come with it.
        folder: the client's own.

    Raises:
        CheckpointError: what it keeps cannot be read or written.
    """
    if task.masking is None or reply.update is None:
        return reply
    try:
        return replace(reply, update=_masked(reply, task, task.masking, method, folder))
    except UpdateRejected as reason:
        return replace(reply, update=None, failure=str(reason))


def _announce(task: AnnounceTask, folder: Path, real: bool) -> Announced:
    """Draw the secrets of a round, which forgets those of all before."""
    if task.cohort < LEAST_COHORT:
        raise UpdateRejected(f"it masks nothing for a cohort of {task.cohort}, where {LEAST_COHORT} are needed")
    drawn = secrets.token_bytes(KEY) if real else derived(task.draws.seeds[SECRETS].to_bytes(8, "big"), "a simulation")
    kept = _Secrets(drawn.hex(), needed_of(task.cohort, task.settings.threshold), task.settings.range)
    for path in (folder / SECURE).glob("*.json"):
        path.unlink()
    _keep(folder, task.round, kept)
    return kept.announced


def _deal(client: str, task: ShareTask, folder: Path) -> Dealt:
    """Deal both secrets out, to all that announced keys."""
    kept = _recall(folder, task.round)
    if kept is None or kept.keys is not None:
        raise UpdateRejected("it has announced no keys since it dealt shares last")
    for name, announced in task.keys.items():
        check_announced(Reply(name, 0.0, secured=announced))
    own = task.keys.get(client)
    if own is None or replace(own, signature=b"") != kept.announced:
        raise UpdateRejected("the keys that came as its own are not those that it announced")
    if len({key for one in task.keys.values() for key in (one.sealing, one.masking)}) < 2 * len(task.keys):
        raise UpdateRejected("two clients announced the same key")
    # A server that told of a smaller cohort than it asks would need fewer shares of each secret than half of them.
    if kept.needed < needed_of(len(task.keys), 0.5):
        raise UpdateRejected(f"{len(task.keys)} clients announced keys, more than the cohort that was told of")
    if len(task.keys) < kept.needed:
        raise UpdateRejected(f"{len(task.keys)} clients announced keys, and {kept.needed} are needed")
    numbers, dealt = numbers_of(task.keys), kept.dealt(len(task.keys))
    sealed = {
        name: seal(kept.sealing, one.sealing, (task.round, client, name), dealt[numbers[name] - 1])
        for name, one in task.keys.items()
        if name != client
    }
    keys = {name: (one.sealing.hex(), one.masking.hex(), one.pledge.hex()) for name, one in task.keys.items()}
    _keep(folder, task.round, replace(kept, keys=keys))
    return Dealt(sealed)


def _masked(reply: Reply, task: TrainTask, masking: Masking, method: Method, folder: Path) -> Update:
    """Return a client's update, checked as the server would and masked."""
    kept, client, shares = _recall(folder, task.round), reply.client, masking.shares
    if kept is None or kept.keys is None or kept.shares is not None:
        raise UpdateRejected("it has dealt no shares since it masked an update last")
    if client in shares or not shares.keys() <= kept.keys.keys():
        raise UpdateRejected("shares came for it of clients that announced no keys")
    if len(shares) + 1 < kept.needed:
        raise UpdateRejected(f"{len(shares) + 1} clients dealt shares, and {kept.needed} are needed")
    with naming("What the method expects back", RoundFailed):
        due, weight = dict(method.returns(task.payload)), _weight(reply.update, method)
    limits = task.round, masking.max_rows, masking.max_norm
    try:
        update = check_update(reply, task.payload, due, *limits, bound=method.bound(task.payload))
        sent = task.payload.expected
        change = {key: update.tensors[key].astype(float) - value for key, value in sent.items()}
        values_P = as_vector(change, update.arrays)
        hidden_P = into_ring(values_P, weight, kept.largest, float(masking.max_rows), len(shares) + 1)
    except UpdateRejected:  # the reason can name a value or a norm, which nobody shall see
        raise UpdateRejected(
            "its update cannot be masked: it claims too many rows, is too long, or has values that are not finite or "
            f"beyond {kept.largest:g} (secure_aggregation.range)"
        ) from None
    hidden_P = hidden_P + own_mask(kept.mask_seed, len(values_P))
    for name in shares:
        public = bytes.fromhex(kept.keys[name][1])
        hidden_P += pair_mask(kept.masking, public, task.round, client, name, len(values_P))
    # Written before anything leaves: of two updates under the same masks the difference would be seen.
    _keep(folder, task.round, replace(kept, shares={name: share.hex() for name, share in shares.items()}))
    return replace(update, tensors={}, arrays={}, packed={MASKED: hidden_P})


def _weight(update: Update | None, method: Method) -> float:
    assert update is not None
    assert method.weigh is not None  # the recipe refuses other methods
    return float(method.weigh(without_values(update)))


def _reveal(client: str, task: UnmaskTask, folder: Path) -> Revealed:
    """Open a share of one secret of each client: of a survivor its mask's seed, of others their masking key."""
    kept = _recall(folder, task.round)
    if kept is None or kept.keys is None or kept.shares is None:
        raise UpdateRejected("it has no masked update in this round, or has opened its shares already")
    survivors, dealers = set(task.survivors), {*kept.shares, client}
    if client not in survivors or not survivors <= dealers:
        raise UpdateRejected("the survivors are not among those that dealt shares, or it is none of them")
    if len(survivors) < kept.needed:
        raise UpdateRejected(f"{len(survivors)} updates are in the sum, and {kept.needed} are needed")
    opened = {client: kept.dealt(len(kept.keys))[numbers_of(kept.keys)[client] - 1]}
    for name, share in kept.shares.items():
        public = bytes.fromhex(kept.keys[name][0])
        opened[name] = unseal(kept.sealing, public, (task.round, name, client), bytes.fromhex(share))
    (folder / SECURE / f"{task.round:04d}.json").unlink()
    return Revealed(
        {name: both[:BYTES] for name, both in opened.items() if name in survivors},
        {name: both[BYTES:] for name, both in opened.items() if name not in survivors},
    )


def _keep(folder: Path, round: int, kept: _Secrets) -> None:
    make_folder(folder / SECURE)
    write_atomic(folder / SECURE / f"{round:04d}.json", json.dumps(plain(kept)).encode())


def _recall(folder: Path, round: int) -> _Secrets | None:
    path = folder / SECURE / f"{round:04d}.json"
    if not path.exists():
        return None
    kept: _Secrets = read_json(path, _Secrets, "remove it, and the round begins anew with other secrets")
    return kept
