"""What the seam lets a method do: each power by a small method that needs it, on a real tiny model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from asking import evaluate_tasks, train, train_task
from test_federate import START, A, AddingEngine, begin, federation
from test_model_training import token_rows
from tiny_models import random_adapter, tiny_base

from bellwether.client.optimizer import StackedAdamW, StackedSGD
from bellwether.client.train import train_cohort
from bellwether.engine.local import LocalEngine
from bellwether.errors import RecipeError, RoundFailed
from bellwether.exchange.adapter import Adapter, flat, key_a, key_b, stacked
from bellwether.exchange.messages import Payload, Reply, TrainTask
from bellwether.federate import federate
from bellwether.method.average import fedavg
from bellwether.method.cohort import everyone_last, what_is_known
from bellwether.method.flexlora import flexlora
from bellwether.method.method import Finished, Method, Pass, State, by_rows
from bellwether.method.personal import ditto, feddpa, fine_tuned
from bellwether.method.returned import first_state
from bellwether.method.scaffold import CHANGE, CONTROL, scaffold
from bellwether.model.lora import LoraLayers
from bellwether.recipe import recipe
from bellwether.recipe.method import METHODS
from bellwether.runner.checks import check_methods, method_warnings
from bellwether.store.client_state import METHOD, forgotten, keep_state, kept_rounds
from bellwether.tools.randomness import Randomness

SGD = recipe.Training(
    optimizer="sgd", learning_rate=0.05, schedule="constant", clip_norm=None, batch_size=4, local_epochs=2
)
ADAMW = recipe.Training(learning_rate=4e-3, batch_size=4, weight_decay=0.1)


@pytest.fixture(scope="module")
def base():
    return tiny_base("llama")


@pytest.fixture
def start(base) -> Adapter:
    return random_adapter(base, rank=3, alpha=6.0, dropout=0.0)


@pytest.fixture
def layers(base, start):
    made = LoraLayers(base.model, start.config, dtype=torch.float64)
    yield made
    made.detach()


def order_of(adapter: Adapter) -> tuple[str, ...]:
    return tuple(adapter.tensors)


# Optimizers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("ours", "theirs"), [(StackedSGD, torch.optim.SGD), (StackedAdamW, torch.optim.AdamW)])
def test_a_stacked_optimizer_steps_every_slot_like_torchs_own(ours, theirs, weight_decay):
    generator = torch.Generator().manual_seed(0)
    values_KP = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    grads_KP = torch.zeros_like(values_KP)
    parameters = [torch.nn.Parameter(row_P.clone()) for row_P in values_KP]
    optimizer = ours(values_KP, grads_KP, weight_decay)
    rates = [0.1, 0.02]
    others = [theirs([p], lr=rate, weight_decay=weight_decay) for p, rate in zip(parameters, rates, strict=True)]
    for _ in range(4):
        for slot, parameter in enumerate(parameters):
            grads_KP[slot] = torch.randn(7, generator=generator, dtype=torch.float64)
            parameter.grad = grads_KP[slot].clone()
            others[slot].step()
        optimizer.step(rates)
    for slot, parameter in enumerate(parameters):
        torch.testing.assert_close(values_KP[slot], parameter.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", [StackedSGD, StackedAdamW])
def test_nothing_moves_values_that_are_not_trained(kind):
    values_KP = torch.ones(2, 6, dtype=torch.float64)
    grads_KP = torch.full_like(values_KP, 5.0)
    trained_P = torch.tensor([1.0, 1, 0, 0, 1, 0], dtype=torch.float64)
    optimizer = kind(values_KP, grads_KP, 0.5, trained_P)
    optimizer.clip(2, 1.0)
    # Clipped by the norm of what is trained alone: three entries of 5.
    torch.testing.assert_close(grads_KP[0, 0].item(), 5 / (5 * 3**0.5 + 1e-6), rtol=1e-12, atol=0)
    for _ in range(3):
        optimizer.step([0.1, 0.1])
        grads_KP.fill_(5.0)
    assert torch.equal(values_KP[:, trained_P == 0], torch.ones(2, 3, dtype=torch.float64))
    assert (values_KP[:, trained_P == 1] != 1).all()


# Which tensors are trained, sent and kept ---------------------------------------------------------


def only_b(adapter: Adapter) -> tuple[str, ...]:
    return tuple(key for key in adapter.tensors if "lora_B" in key)


def test_a_frozen_half_stays_bit_for_bit_and_only_the_other_one_comes_back(base, layers, start):
    payload = Payload(start, trained=only_b(start))
    (reply,) = train(base, layers, {"a": token_rows(8)}, payload, ADAMW)
    assert reply.update.tensors.keys() == set(only_b(start))
    after = layers.read(0)
    for key, value in start.tensors.items():
        assert (after[key].tobytes() == value.tobytes()) == ("lora_A" in key), key


@pytest.mark.parametrize("slots", [1, 3])
def test_clients_that_train_unlike_parts_or_scalings_do_so_side_by_side_as_alone(base, layers, start, slots):
    layers.detach()
    rows = {"a": token_rows(8), "b": token_rows(16)[8:], "c": token_rows(24)[16:]}
    a_keys, b_keys = ([key for key in start.tensors if half in key] for half in ("lora_A", "lora_B"))
    scaled = replace(start, config=replace(start.config, alpha=2.0))
    payloads = {"a": Payload(start, trained=tuple(a_keys)), "b": Payload(start, trained=tuple(b_keys))}
    tasks = {name: train_task(sent, SGD, name) for name, sent in {**payloads, "c": Payload(scaled)}.items()}
    both = LoraLayers(base.model, start.config, slots, dtype=torch.float64)
    together = {reply.client: reply.update for reply in train_cohort(base, both, rows, tasks, fedavg())}
    both.detach()
    assert {name: set(update.tensors) for name, update in together.items()} == {
        "a": set(a_keys), "b": set(b_keys), "c": set(start.tensors),
    }  # fmt: skip
    for name in rows:
        own = LoraLayers(base.model, tasks[name].adapter.config, dtype=torch.float64)
        (alone,) = train_cohort(base, own, {name: rows[name]}, {name: tasks[name]}, fedavg())
        own.detach()
        assert alone.update.metrics["loss"] == pytest.approx(together[name].metrics["loss"], rel=1e-12)
        for key, value in alone.update.tensors.items():
            np.testing.assert_allclose(together[name].tensors[key], value, rtol=0, atol=1e-12)


def test_a_client_may_send_arrays_alone(start):
    assert Payload(start, returned=()).expected == {}
    assert Payload(start, trained=()).expected == {}
    assert Payload(start, trained=(), returned=only_b(start)).expected.keys() == set(only_b(start))


def test_halves_in_turn_are_data_of_the_task():
    seen = []

    def half(state, client, round):
        keys = [key for key in state.adapter.tensors if ("lora_B" in key) == (round % 2 == 1)]
        return Payload(state.adapter, trained=tuple(keys))

    class Watching(AddingEngine):
        def ask(self, tasks, deadline=None):
            for reply in super().ask(tasks, deadline):
                if reply.update is not None:
                    keys = tasks[reply.client].payload.expected
                    seen.append(tuple(keys))
                    update = replace(reply.update, tensors={key: reply.update.tensors[key] for key in keys})
                    reply = replace(reply, update=update)
                yield reply

    progress = federate(federation(method=replace(fedavg(), give=half), engine=Watching()), begin())
    assert [len(set(keys)) for keys in seen] == [1] * 12
    a, b = (progress.adapter.tensors[key("q")] for key in (key_a, key_b))
    # B in rounds 1 and 3, A in round 2: each adds 30.
    np.testing.assert_allclose((a[0, 0], b[0, 0]), (30.0, 60.0))


# Clients' own state -------------------------------------------------------------------------------


def counting() -> Method:
    """A method whose clients keep how often they have trained, and send it."""

    def finish(trained):
        count = trained.own.get("count", np.zeros(1)) + 1
        last = trained.passes[-1]
        return Finished({key: last[key] for key in trained.payload.expected}, {"count": count}, {"count": count})

    def close(closing):
        return State(closing.state.adapter, {"count": closing.mean.arrays["count"]})

    return Method(close, weigh=by_rows, finish=finish, returns=lambda payload: {"count": (1,)})


def test_what_a_client_keeps_goes_on_from_the_last_round_that_counted(base, layers, start, tmp_path):
    def count(round, settled):
        tasks = {"a": train_task(start, SGD, "a", round=round, rounds=9, settled=settled)}
        cohort, folders = {"a": token_rows(4)}, {"a": tmp_path / "a"}
        (reply,) = train_cohort(base, layers, cohort, tasks, counting(), None, folders)
        return reply.update.arrays["count"].item()

    assert count(1, 0) == 1
    assert count(2, 1) == 2
    assert count(3, 2) == 3
    # Round 3 did not count, such as one below its quorum, or one that a run goes back before.
    assert count(3, 2) == 3
    assert count(4, 2) == 3
    assert count(5, 4) == 4
    assert sorted(path.name for path in (tmp_path / "a" / "method").iterdir())[-1] == "0005.npz"


def test_a_client_goes_on_from_no_round_but_the_one_that_counted_last(base, layers, start, tmp_path):
    keeps = {1: True, 2: True, 3: False, 4: True}

    def finish(trained):
        finished = counting().finish(trained)
        return finished if keeps[round] else replace(finished, own=None)

    def count(settled, certain=0):
        more = {"round": round, "rounds": 9, "settled": settled, "certain": certain}
        tasks, folders = {"a": train_task(start, SGD, "a", **more)}, {"a": tmp_path / "a"}
        method = replace(counting(), finish=finish)
        (reply,) = train_cohort(base, layers, {"a": token_rows(4)}, tasks, method, None, folders)
        return reply.update.arrays["count"].item()

    def files():
        return sorted(path.name for path in (tmp_path / "a" / "method").iterdir())

    round = 1
    assert count(0) == 1
    round = 2
    assert count(1) == 2
    round = 3  # round 2 did not count; in this one the client keeps nothing, and it counts
    assert count(1) == 2
    records = [SimpleNamespace(round=number, clients=[SimpleNamespace(client="a")], failure=None) for number in (1, 3)]
    assert forgotten({"a": tmp_path / "a"}, records, chooses=False) == []
    round = 4
    assert count(3) == 1
    assert files() == ["0001.npz", "0003.npz", "0004.npz"]
    round = 4  # as before, but that no later round than 1 is said to have counted, and that 1 cannot come back
    assert count(1, certain=1) == 2
    assert files() == ["0001.npz", "0004.npz"]
    assert forgotten({"a": tmp_path / "a"}, records, chooses=False) == [tmp_path / "a" / "method" / "0003.npz"]


def test_what_is_kept_is_forgotten_once_no_checkpoint_can_go_back_to_it():
    engine = AddingEngine({(3, "a"): lambda reply: []})
    words = ("federation.rounds=5", "output.keep_checkpoints=2")
    federate(federation(*words, engine=engine), begin())
    trained = [tasks for tasks in engine.tasks if all(isinstance(task, TrainTask) for task in tasks.values())]
    # While round r runs, there are the checkpoints of rounds r-2 and r-1.
    assert [tasks["b"].certain for tasks in trained] == [0, 0, 1, 2, 3]
    assert [tasks["a"].certain for tasks in trained] == [0, 0, 1, 2, 2]


def test_a_client_that_lost_its_state_begins_without_it(base, layers, start, tmp_path):
    tasks = {"a": train_task(start, SGD, "a", round=7, rounds=9, settled=6)}
    folders = {"a": tmp_path / "a"}
    (reply,) = train_cohort(base, layers, {"a": token_rows(4)}, tasks, counting(), None, folders)
    assert reply.update.arrays["count"].item() == 1


def test_a_round_that_failed_or_left_a_client_out_does_not_settle_it():
    silent = {(2, client): (lambda reply: []) for client in "abc"} | {(3, "a"): lambda reply: []}
    engine = AddingEngine(silent)
    progress = federate(federation("federation.failed_rounds=1", engine=engine), begin())
    trained = [tasks for tasks in engine.tasks if all(isinstance(task, TrainTask) for task in tasks.values())]
    assert [{client: task.settled for client, task in tasks.items()} for tasks in trained] == [
        dict.fromkeys("abcd", 0),
        dict.fromkeys("abcd", 1),
        dict.fromkeys("abcd", 1),  # d answered in round 2, which failed
    ]
    known = what_is_known(dict.fromkeys("abcd", 1), progress.rounds)
    assert {client: one.settled for client, one in known.items()} == {"a": 1, "b": 3, "c": 3, "d": 3}
    assert (known["d"].rows, known["d"].loss, known["d"].seconds) == (40, 2.0, 1.0)


# Several passes, corrections, and what a client serves --------------------------------------------


def losses(replies):
    """The summed losses that clients tell of their rows."""
    return {reply.client: sum(totals.loss for totals in reply.totals.values()) for reply in replies}


def test_a_second_pass_trains_an_adapter_of_the_clients_own_that_it_alone_serves(base, layers, start, tmp_path):
    rows, folders = {"a": token_rows(8), "b": token_rows(16)[8:]}, {name: tmp_path / name for name in "ab"}
    engine = LocalEngine(base, layers, rows, {"a": token_rows(3), "b": token_rows(3)}, ditto(pull=1.0), folders=folders)
    tasks = {name: train_task(start, SGD, name, round=1, rounds=3) for name in "ab"}
    replies = {reply.client: reply.update for reply in engine.ask(tasks)}
    shared = {name: train(base, layers, {name: rows[name]}, start, SGD, rounds=3)[0].update for name in "ab"}
    for name in "ab":  # the first pass is FedAvg's, whatever the second one does
        for key, value in shared[name].tensors.items():
            np.testing.assert_array_equal(replies[name].tensors[key], value)
    evaluation = recipe.Evaluation(generate=False)
    asked = {name: replace(task, settled=1) for name, task in evaluate_tasks("ab", start, evaluation).items()}
    own = losses(engine.ask(asked))
    sent = losses(engine.ask(evaluate_tasks("ab", start, evaluation)))
    assert sent["a"] == sent["b"]
    assert len({own["a"], own["b"], sent["a"]}) == 3
    assert losses(engine.ask({name: replace(task, shared=True) for name, task in asked.items()})) == sent


def test_a_sum_of_two_adapters_is_served_as_one_of_twice_the_rank(base, layers, start, tmp_path):
    local = random_adapter(base, rank=3, alpha=6.0, dropout=0.0, seed=7)
    keep_state(tmp_path / "a", METHOD, 1, local.tensors)
    engine = LocalEngine(base, layers, {}, {"a": token_rows(6)}, feddpa(mix=0.25), folders={"a": tmp_path / "a"})
    evaluation = recipe.Evaluation(generate=False)
    asked = {name: replace(task, settled=1) for name, task in evaluate_tasks("a", start, evaluation).items()}
    mixed = losses(engine.ask(asked))["a"]
    layers.detach()
    before = {path: base.model.get_submodule(path).weight.clone() for path in start.config.modules}
    with torch.no_grad():  # both products added to the weights, each with its share
        for adapter, share in ((start, 0.75), (local, 0.25)):
            for path in start.config.modules:
                a_RI, b_OR = (torch.from_numpy(adapter.tensors[key(path)]) for key in (key_a, key_b))
                base.model.get_submodule(path).weight += share * adapter.config.scaling * b_OR @ a_RI
    nothing = start.with_tensors({key: np.zeros_like(value) for key, value in start.tensors.items()})
    plain = LoraLayers(base.model, start.config, dtype=torch.float64)
    merged = LocalEngine(base, plain, {}, {"a": token_rows(6)}, fedavg())
    found = losses(merged.ask(evaluate_tasks("a", nothing, evaluation)))["a"]
    plain.detach()
    with torch.no_grad():
        for path, weight in before.items():
            base.model.get_submodule(path).weight.copy_(weight)
    assert mixed == pytest.approx(found, rel=1e-10)


def test_in_the_last_round_clients_tune_what_they_were_sent_as_in_any_other_and_serve_that(
    base, layers, start, tmp_path
):
    rows, held_out = {"a": token_rows(8), "b": token_rows(16)[8:]}, {"a": token_rows(3), "b": token_rows(3)}
    folders = {name: tmp_path / name for name in "ab"}
    method = fine_tuned(fedavg())
    engine = LocalEngine(base, layers, rows, held_out, method, folders=folders)
    payload = method.last.give(State(start), SimpleNamespace(rank=3), 3)
    tasks = {name: train_task(payload, SGD, name, round=3, rounds=3) for name in "ab"}
    for reply in engine.ask(tasks):
        assert reply.update.tensors == {}
    evaluation = recipe.Evaluation(generate=False)
    asked = {name: replace(task, settled=3) for name, task in evaluate_tasks("ab", start, evaluation).items()}
    served = losses(engine.ask(asked))
    alone = {name: train(base, layers, {name: rows[name]}, start, SGD, round=3, rounds=3)[0].update for name in "ab"}
    for name in "ab":
        plain = LocalEngine(base, layers, {}, held_out, fedavg())
        tuned = start.with_tensors(alone[name].tensors)
        assert served[name] == losses(plain.ask(evaluate_tasks(name, tuned, evaluation)))[name]
    # Before the last round, and where a client missed it, it serves what is sent.
    assert losses(engine.ask(evaluate_tasks("ab", start, evaluation))) != served


def test_all_clients_are_asked_in_the_last_round_and_nothing_of_theirs_is_averaged():
    engine = AddingEngine()

    class Silent(AddingEngine):
        def ask(self, tasks, deadline=None):
            engine.tasks.append(tasks)
            for reply in super().ask(tasks, deadline):
                if reply.update is not None and not tasks[reply.client].payload.expected:
                    reply = replace(reply, update=replace(reply.update, tensors={}))
                yield reply

    method, given = fine_tuned(fedavg()), federation("federation.rounds=3", engine=Silent())
    sample = everyone_last(lambda sampling: ["b"], given.recipe.federation, None)
    progress = federate(replace(given, method=method, sample=sample), begin())
    assert [record.cohort for record in progress.rounds[:2]] == [("b",), ("b",)]
    assert sorted(progress.rounds[2].cohort) == ["a", "b", "c", "d"]
    assert progress.rounds[2].bytes_up == 0
    assert progress.rounds[2].adapter == progress.rounds[1].adapter != progress.rounds[0].adapter


def test_a_correction_sees_client_step_rate_start_and_both_sides_arrays(base, layers, start, tmp_path):
    seen = []

    def correct(step):
        both = step.sent["sent"].tolist(), step.own["own"].tolist()
        seen.append((step.client, step.number, step.rate, both, torch.equal(step.start_P, first_P)))
        step.sent["sent"].add_(1)  # its own copy, as everything that it is given
        step.own["own"].add_(1)
        return step.gradient_P

    first_P, sent = torch.from_numpy(flat(start.tensors, order_of(start))), np.array([1.0, 2.0])
    method = replace(fedavg(), passes=(Pass(correct=correct),))
    training = SGD.model_copy(update={"schedule": "linear", "local_epochs": 1})
    folders = {"a": tmp_path / "a"}
    keep_state(folders["a"], METHOD, 1, {"own": np.array([3.0])})
    tasks = {"a": train_task(Payload(start, {"sent": sent}), training, "a", rounds=3, round=2, settled=1)}
    (reply,) = train_cohort(base, layers, {"a": token_rows(8)}, tasks, method, None, folders)
    rates = [0.05 * 4 / 6, 0.05 * 3 / 6]  # by hand: two steps in the second of three rounds
    expected = zip(rates, [([1.0, 2.0], [3.0]), ([2.0, 3.0], [4.0])], strict=True)
    assert seen == [("a", number, pytest.approx(rate), both, True) for number, (rate, both) in enumerate(expected)]
    assert sent.tolist() == [1.0, 2.0]
    assert reply.update.client == "a"


def test_a_method_of_ones_own_that_keeps_nothing_leaves_an_empty_file_which_is_no_lost_one(
    base, layers, start, tmp_path
):
    for method, kept in ((fedavg(), []), (replace(fedavg(), finish=lambda trained: Finished(trained.passes[-1])), [1])):
        tasks, folders = {"a": train_task(Payload(start), SGD, "a")}, {"a": tmp_path / "a"}
        list(train_cohort(base, layers, {"a": token_rows(2)}, tasks, method, None, folders))
        assert kept_rounds(folders["a"], METHOD) == kept


def test_scaffold_at_real_clients_is_the_correction_applied_step_by_step(base, layers, start, tmp_path):
    size = sum(value.size for value in start.tensors.values())
    draw = np.random.default_rng(0)
    control_P = draw.normal(size=size) * 1e-2
    payload = Payload(start, {CONTROL: control_P})
    tasks, folders = {"a": train_task(payload, SGD, "a")}, {"a": tmp_path / "a"}
    (reply,) = train_cohort(base, layers, {"a": token_rows(8)}, tasks, scaffold(), None, folders)
    # A gradient with c added is that of a loss with a linear term, which torch takes itself.
    plain = replace(fedavg(), passes=(Pass(correct=lambda step: step.gradient_P + torch.from_numpy(control_P)),))
    (other,) = train(base, layers, {"a": token_rows(8)}, start, SGD, method=plain)
    for key, value in other.update.tensors.items():
        np.testing.assert_allclose(reply.update.tensors[key], value, rtol=0, atol=1e-14)
    moved_P = flat(start.tensors, order_of(start)) - flat(reply.update.tensors, order_of(start))
    steps = 4  # eight rows, batches of four, two epochs
    np.testing.assert_allclose(reply.update.arrays[CHANGE], moved_P / (steps * 0.05) - control_P, atol=1e-12)

    # In its next round the client takes its own variate off, c_i⁺ = (x - y_i) / (K η) - c after the first one.
    own_P = moved_P / (steps * 0.05) - control_P
    tasks = {"a": train_task(payload, SGD, "a", round=2, rounds=2, settled=1)}
    (reply,) = train_cohort(base, layers, {"a": token_rows(8)}, tasks, scaffold(), None, folders)
    shift_P = torch.from_numpy(control_P - own_P)
    plain = replace(fedavg(), passes=(Pass(correct=lambda step: step.gradient_P + shift_P),))
    (other,) = train(base, layers, {"a": token_rows(8)}, start, SGD, method=plain, round=2, rounds=2)
    for key, value in other.update.tensors.items():
        np.testing.assert_allclose(reply.update.tensors[key], value, rtol=0, atol=1e-12)


# Ranks, and weights that are folded in ------------------------------------------------------------


def test_clients_of_unlike_ranks_train_as_they_do_alone_and_send_their_own_shapes(base, layers, start):
    method, rows = flexlora(), {"a": token_rows(8), "b": token_rows(16)[8:], "c": token_rows(24)[16:]}
    ranks = {"a": 1, "b": 3, "c": 1}
    payloads = {name: method.give(State(start), SimpleNamespace(rank=rank), 1) for name, rank in ranks.items()}
    tasks = {name: train_task(payloads[name], SGD, name) for name in rows}
    together = {reply.client: reply.update for reply in train_cohort(base, layers, rows, tasks, method)}
    assert together.keys() == rows.keys()
    for name, rank in ranks.items():
        own = LoraLayers(base.model, payloads[name].adapter.config, dtype=torch.float64)
        layers.detach()
        (alone,) = train_cohort(base, own, {name: rows[name]}, {name: tasks[name]}, method)
        own.detach()
        for key, value in alone.update.tensors.items():
            assert value.shape[0 if "lora_A" in key else 1] == rank
            assert value.tobytes() == together[name].tensors[key].tobytes()
        layers = LoraLayers(base.model, start.config, dtype=torch.float64)
    layers.detach()


def test_a_folded_update_trains_and_scores_like_a_base_that_has_it_in_its_weights(base, layers, start):
    before = {path: base.model.get_submodule(path).weight.clone() for path in start.config.modules}
    folded = random_adapter(base, rank=2, alpha=3.0, dropout=0.0, seed=5)
    (ours,) = train(base, layers, {"a": token_rows(8)}, Payload(start, folded=folded), SGD)
    assert all(torch.equal(base.model.get_submodule(path).weight, weight) for path, weight in before.items())
    with torch.no_grad():
        for path in start.config.modules:
            a_RI, b_OR = (torch.from_numpy(folded.tensors[key(path)]) for key in (key_a, key_b))
            base.model.get_submodule(path).weight += folded.config.scaling * b_OR @ a_RI
    try:
        (theirs,) = train(base, layers, {"a": token_rows(8)}, start, SGD)
    finally:
        for path, weight in before.items():
            base.model.get_submodule(path).weight.data = weight
    for key, value in theirs.update.tensors.items():
        np.testing.assert_allclose(ours.update.tensors[key], value, rtol=0, atol=1e-12)
    assert ours.update.metrics["loss"] == pytest.approx(theirs.update.metrics["loss"], rel=1e-12)


def test_a_folded_update_stands_in_weights_that_are_stored_the_other_way_round_as_well():
    base = tiny_base("gpt2")
    start, folded = (random_adapter(base, rank=2, alpha=3.0, dropout=0.0, seed=seed) for seed in (1, 5))
    layers = LoraLayers(base.model, start.config, dtype=torch.float64)
    (ours,) = train(base, layers, {"a": token_rows(8)}, Payload(start, folded=folded), SGD)
    for path in start.config.modules:
        a_RI, b_OR = (torch.from_numpy(folded.tensors[key(path)]) for key in (key_a, key_b))
        base.model.get_submodule(path).weight.data += folded.config.scaling * (b_OR @ a_RI).T
    (theirs,) = train(base, layers, {"a": token_rows(8)}, start, SGD)
    for key, value in theirs.update.tensors.items():
        np.testing.assert_allclose(ours.update.tensors[key], value, rtol=0, atol=1e-12)


def test_a_folded_update_and_the_adapter_are_one_adapter_in_the_end(base, start):
    folded = random_adapter(base, rank=2, alpha=3.0, dropout=0.0, seed=5)
    whole = stacked([folded, start])
    assert whole.config.rank == 5
    for path in start.config.modules:

        def product(adapter, path=path):
            return adapter.config.scaling * adapter.tensors[key_b(path)] @ adapter.tensors[key_a(path)]

        np.testing.assert_allclose(product(whole), product(folded) + product(start), rtol=0, atol=1e-12)


# The server ---------------------------------------------------------------------------------------


def test_the_method_closes_failed_and_empty_rounds_and_knows_of_all_clients():
    seen = []

    def close(closing):
        seen.append((closing.round, closing.clients, len(closing.cohort), closing.mean, closing.failure is None))
        return closing.state

    silent = {(2, client): (lambda reply: []) for client in "abc"}
    method = Method(close, weigh=by_rows)
    words = ("federation.failed_rounds=1", "federation.rounds=2")
    federate(federation(*words, method=method, engine=AddingEngine(silent)), begin())
    assert [one[:3] for one in seen] == [(1, 4, 4), (2, 4, 4)]
    assert seen[0][3] is not None
    assert seen[0][4]
    assert seen[1][3:] == (None, False)


def test_the_servers_draws_are_none_that_a_client_is_given():
    drawn, given = [], []

    def close(closing):
        drawn.append(closing.randomness.numpy("noise", round=closing.round).integers(2**62))
        return closing.state

    engine = AddingEngine()
    federate(federation("federation.rounds=2", method=Method(close), engine=engine), begin())
    for tasks in engine.tasks:
        given += [seed for task in tasks.values() for seed in task.draws.seeds.values()]
    assert len(set(drawn)) == 2
    assert 0 not in given, "the run's own seed went out"
    for seed in given:
        clients_own = [np.random.default_rng(seed).integers(2**62)]
        clients_own += [Randomness(seed).numpy("noise", round=round).integers(2**62) for round in (1, 2)]
        assert not {*drawn} & {*clients_own}
    assert not {*drawn} & {Randomness(0).numpy("noise", round=round).integers(2**62) for round in (1, 2)}
    federate(federation("federation.rounds=2", method=Method(close), engine=engine), begin())
    assert drawn[:2] == drawn[2:], "the same recipe draws the same"


def test_every_client_is_given_what_is_its_own_and_nothing_of_others():
    def give(state, client, round):
        return Payload(state.adapter, {"secret": np.full(2, float(ord(client.client)))})

    engine = AddingEngine()
    federate(federation("federation.rounds=1", method=replace(fedavg(), give=give), engine=engine), begin())
    (tasks,) = engine.tasks
    assert {client: task.payload.arrays["secret"][0] for client, task in tasks.items()} == {
        client: float(ord(client)) for client in "abcd"
    }
    assert len({id(task) for task in tasks.values()}) == 4
    batches = {client: task.draws.seeds["batch order"] for client, task in tasks.items()}
    assert len(set(batches.values())) == 4


def test_a_sampler_sees_what_is_known_of_clients_and_the_methods_state():
    def greedy(sampling):
        """Those who trained on most rows so far as anybody knows; everybody at first."""
        seen.append(sampling.state.arrays.get("rounds", 0))
        known = [client for client in sampling.clients if sampling.known[client].rows is not None]
        return sorted(known, key=lambda client: -sampling.known[client].rows)[:2] if known else sampling.clients

    def close(closing):
        return State(closing.state.adapter, {"rounds": closing.round})

    seen = []
    progress = federate(federation(sample=greedy, method=Method(close, weigh=by_rows)), begin())
    assert [record.cohort for record in progress.rounds] == [tuple("abcd"), ("d", "c"), ("d", "c")]
    assert seen == [0, 1, 2]


def test_a_method_that_is_not_linear_gets_the_updates_in_the_order_of_names():
    seen = []

    def close(closing):
        seen.append([update.client for update in closing.updates])
        return closing.state

    class Backwards(AddingEngine):
        def ask(self, tasks, deadline=None):
            return reversed(list(super().ask(tasks, deadline)))

    federate(federation("federation.rounds=1", method=Method(close), engine=Backwards()), begin())
    assert seen == [["a", "b", "c", "d"]]


def test_bytes_of_arrays_count_in_both_directions():
    class Sending(AddingEngine):
        def ask(self, tasks, deadline=None):
            for reply in super().ask(tasks, deadline):
                arrays = {"up": np.zeros(100, np.float32)}
                yield replace(reply, update=replace(reply.update, arrays=arrays)) if reply.update else reply

    plain = federate(federation("federation.rounds=1"), begin()).rounds[0]
    method = replace(
        fedavg(),
        give=lambda state, client, round: Payload(state.adapter, {"down": np.zeros(50, np.float32)}),
        returns=lambda payload: {"up": (100,)},
    )
    more = federate(federation("federation.rounds=1", method=method, engine=Sending()), begin()).rounds[0]
    assert more.bytes_up - plain.bytes_up == 4 * (400 + len(b', ["up", [100]]'))
    assert more.bytes_down - plain.bytes_down == 4 * (200 + len(b', ["down", [50]]'))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            replace(fedavg(), give=lambda state, client, round: 1 / 0),
            "Round 1: the method fedavg failed .*ZeroDivision",
        ),
        (replace(fedavg(), weigh=lambda update: float("nan")), "Round 1: the method fedavg weighs .* by nan"),
        (replace(fedavg(), weigh=lambda update: -1.0), "Round 1: the method fedavg weighs .* by -1"),
        (replace(fedavg(), weigh=lambda update: "x"), "Round 1: the method fedavg weighs .* by 'x'"),
        (replace(fedavg(), give=lambda state, client, round: None), "Round 1: the method fedavg gives .* a NoneType"),
        (
            replace(fedavg(), give=lambda state, client, round: Payload(state.adapter, trained=("q",))),
            "Round 1: the method fedavg names q, which the adapter that it gives a has not",
        ),
        (
            replace(fedavg(), give=lambda state, client, round: Payload(state.adapter, {"c": [0.0]})),
            "Round 1: the method fedavg gives a c as a list; give an array",
        ),
        (replace(fedavg(), returns=lambda payload: 1 / 0), "what the method fedavg expects back failed .*ZeroDivision"),
        (replace(fedavg(), returns=lambda payload: [7]), "what the method fedavg expects back failed"),
        (
            Method(lambda closing: replace(closing.state, folded=START)),
            "the method fedavg folds an update into the base; say so by Method\\(..., folds=True\\)",
        ),
        (Method(lambda closing: replace(closing.state, folded="x"), folds=True), "the method fedavg folds no adapter"),
        (
            Method(
                lambda closing: replace(closing.state, folded=replace(START, tensors={A: START.tensors[A]})), folds=True
            ),
            "the method fedavg folds an adapter whose .*lora_B.weight is NoneType",
        ),
        (
            Method(lambda closing: State(replace(START, tensors=dict(reversed(START.tensors.items()))))),
            "the method fedavg returned no adapter with the same tensors in the same order",
        ),
    ],
)
def test_what_a_method_must_not_do_is_said_in_a_sentence(method, said):
    with pytest.raises(RoundFailed, match=said):
        federate(federation(method=method), begin())


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (lambda sampling: (1 / 0 for _ in "a"), "the sampler uniform failed .*ZeroDivision"),
        (lambda sampling: [["a"]], "the sampler uniform returned \\['a'\\], which is no client"),
    ],
)
def test_what_a_sampler_must_not_do_is_said_in_a_sentence(sample, said):
    with pytest.raises(RoundFailed, match=f"Round 1: {said}"):
        federate(federation(sample=sample), begin())


@pytest.mark.parametrize(
    ("begins", "said"),
    [
        (lambda adapter: 1 / 0, "The method's begin failed .*ZeroDivision"),
        (lambda adapter: adapter, "The method's begin returned a Adapter; return a State"),
        (lambda adapter: State(adapter, 7), "The method's begin returned a int as what it remembers"),
    ],
)
def test_what_a_method_begins_with_is_checked(begins, said):
    with pytest.raises(RoundFailed, match=said):
        first_state(replace(fedavg(), begin=begins), START)


def test_what_a_client_sends_and_serves_is_said_in_a_sentence_where_it_cannot_be_had(base, layers, start):
    with pytest.raises(RoundFailed, match="What the method lets a client send is a dict; return a Finished"):
        train(base, layers, {"a": token_rows(4)}, start, SGD, method=replace(fedavg(), finish=lambda trained: {}))
    engine = LocalEngine(base, layers, {}, {"a": token_rows(2)}, replace(fedavg(), serves=lambda payload, own: 1 / 0))
    with pytest.raises(RoundFailed, match="What the method lets a client serve failed at .*ZeroDivision"):
        list(engine.ask(evaluate_tasks("a", start, recipe.Evaluation(generate=False))))


def test_a_failed_survey_is_closed_with_all_clients_that_were_drawn():
    seen = []

    class Silent(AddingEngine):
        def ask(self, tasks, deadline=None):
            return iter(())

    def close(closing):
        seen.append((closing.cohort, closing.failure is None))
        return closing.state

    words = ("federation.rounds=1", "federation.failed_rounds=1", "selection.method=hierarchical")
    federate(federation(*words, engine=Silent(), method=Method(close, weigh=by_rows)), begin())
    assert seen == [(("a", "b", "c", "d"), False)]


# Before anything is loaded ------------------------------------------------------------------------


def recipe_of(*overrides):
    from bellwether.recipe.file import load_recipe

    return load_recipe(None, list(overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.name=scaffold"], ['training.optimizer is "adamw", but the method scaffold is right only with "sgd"']),
        (["method.name=scaffold", "training.optimizer=sgd"], ["training.schedule", "training.clip_norm is 1.0"]),
        (
            ["lora.ranks=[2, 4]"],
            ["lora.ranks gives clients unlike ranks, but the method fedavg takes one rank for all"],
        ),
        (
            ["method.name=flora", "model.quantization=4bit"],
            [
                "The method flora folds updates into the base, but model.quantization is 4bit; set "
                "model.quantization=none"
            ],
        ),
        (
            ["method.name=fedex_lora", "model.dtype=bfloat16"],
            ["The method fedex_lora folds updates into the base, whose weights would lose most of them in bfloat16"],
        ),
    ],
)
def test_what_a_method_is_not_right_with_is_refused_before_anything_is_loaded(overrides, said):
    with pytest.raises(RecipeError) as caught:
        check_methods(recipe_of(*overrides), ["a", "b"], None)
    assert all(text in str(caught.value) for text in said)


ONE_RANK = set(METHODS) - {"flora", "flexlora", "hetlora"}
FOLDING = {"flora", "fedex_lora"}


@pytest.mark.parametrize(
    ("overrides", "unable"),
    [
        (["training.optimizer=adamw"], {"scaffold"}),
        (["lora.ranks=[2, 4]"], ONE_RANK),
        (["model.quantization=8bit"], FOLDING),
        (["model.dtype=bfloat16"], FOLDING),
        (["training.loss=dpo"], FOLDING),
        (["compression.up=4bit"], {"flora", "flexlora"}),
        (["compression.down=8bit"], {"flora", "flexlora"}),
    ],
)
def test_just_the_methods_that_cannot_do_what_a_recipe_asks_for_are_refused(overrides, unable):
    plain_sgd = ["training.optimizer=sgd", "training.schedule=constant", "training.clip_norm=null"]
    refused = set()
    for name in METHODS:
        try:
            check_methods(recipe_of(f"method.name={name}", *plain_sgd, *overrides), ["a", "b"], None)
        except RecipeError:
            refused.add(name)
    assert refused == unable


def test_what_clients_serve_of_their_own_is_said_to_be_none_of_the_runs_test_rows():
    assert method_warnings(recipe_of("method.name=fedex_lora")) == []
    (said,) = method_warnings(recipe_of("method.name=ditto"))
    assert "are of what all share: set partition.client_test_fraction to see" in said
    (said,) = method_warnings(recipe_of("method.name=fedsa_lora", "partition.client_test_fraction=0.2"))
    assert said.endswith("the adapter at the end are of what all share.")
    words = ["method.fine_tune=true", "partition.client_test_fraction=0.2", "federation.rounds=1"]
    (said, _) = method_warnings(recipe_of(*words))
    assert "federation.rounds is 1: nothing is averaged; give at least 2" in said


def test_a_method_is_taken_with_what_it_needs():
    words = ["method.name=scaffold", "training.optimizer=sgd", "training.schedule=constant", "training.clip_norm=null"]
    check_methods(recipe_of(*words), ["a", "b"], None)
    check_methods(recipe_of("method.name=flexlora", "lora.ranks={a: 2}"), ["a", "b"], None)
    with pytest.raises(RecipeError, match="lora.ranks names 'z', but there is no such client"):
        check_methods(recipe_of("method.name=flexlora", "lora.ranks={z: 2}"), ["a", "b"], None)
    with pytest.raises(RecipeError, match="lora.ranks goes up to 16, but lora.rank, the server's, is 8"):
        recipe_of("method.name=flexlora", "lora.ranks=[4, 16]")


def test_naming_another_method_leaves_the_fields_of_the_last_one_behind():
    from bellwether.recipe.file import with_overrides

    first = recipe_of("method.mu=0.5", "method.name=fedprox")
    assert first.method.mu == 0.5
    second = with_overrides(first, {"method.learning_rate": 0.5, "method.name": "fedadam"})
    assert second.method.model_dump() == {
        "name": "fedadam", "fine_tune": False, "learning_rate": 0.5, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.name=fedavgg", "'fedavgg' is not one of fedavg, uniform, fedprox,"),
        ("method.beta1=0.5", "there is no field method.beta1; did you mean training.beta?"),
        ("method={name: fedadam, beta3: 1}", "there is no field method.beta3; did you mean method.beta"),
        ("method={name: fedprox, mu: -1}", "method.mu is -1: input should be greater than 0 (FedProx's mu"),
        ("method=fedadam", "method is 'fedadam'"),
    ],
)
def test_a_mistake_in_a_method_names_its_field_without_more(override, said):
    with pytest.raises(RecipeError) as caught:
        recipe_of(override)
    assert said in str(caught.value)
    assert "own." not in str(caught.value)


def test_reply_without_update_is_left_out_of_a_method_with_arrays():
    engine = AddingEngine({(1, "d"): lambda reply: [Reply("d", 1.0, failure="no power")]})
    progress = federate(federation("federation.rounds=1", engine=engine), begin())
    assert progress.rounds[0].left_out == {"d": "no power"}
    assert START.tensors.keys() == progress.adapter.tensors.keys()
