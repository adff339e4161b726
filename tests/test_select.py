"""The space of features, clusters within a client and groups between clients."""

from collections import Counter

import numpy as np
import pytest
import torch
from rounding import FLOAT64, gamma

from bellwether.errors import ModelError, RecipeError, UpdateRejected
from bellwether.method.select.cluster import cluster, find_clusters, nearest_first
from bellwether.method.select.groups import keep
from bellwether.method.select.space import clip_rows, fit_projection, per_client_tsne, random_projection
from benchmarks.measure import agreement

# Worked by hand for clusters of at least 2. The nearest other row lies at 1, 1, 1, 3 and 1, 1, 1, so the tree of
# mutual reachability joins 0, 1 and 2 at distance 1, adds 5 at 3, joins 20, 21 and 22 at 1, and joins the two at 15.
# Every row leaves the first cluster at 1/1 but 5, which leaves at 1/3: a third as firm.
LINE = np.array([[0.0], [1.0], [2.0], [5.0], [20.0], [21.0], [22.0]])
LINE_STRENGTHS = [1, 1, 1, 1 / 3, 1, 1, 1]
LINE_CENTROIDS = [(0 + 1 + 2 + 5 / 3) / (3 + 1 / 3), 21]


def draw(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def blobs(seed: int, centres: int, each: int, width: int, spread: float = 4.0) -> np.ndarray:
    generator = draw(seed)
    middles = generator.normal(size=(centres, width)) * spread
    return np.repeat(middles, each, axis=0) + generator.normal(size=(centres * each, width))


# The space.


def test_a_random_projection_has_orthonormal_columns_and_lengthens_no_row():
    projection = random_projection(64, 16, draw(0))
    rows = draw(1).normal(size=(50, 64))
    assert projection.shape == (64, 16)
    np.testing.assert_allclose(projection.T @ projection, np.eye(16), atol=1e-12)
    assert (np.linalg.norm(rows @ projection, axis=1) <= np.linalg.norm(rows, axis=1)).all()


def test_the_same_generator_gives_every_client_the_same_projection():
    np.testing.assert_array_equal(random_projection(20, 3, draw(5)), random_projection(20, 3, draw(5)))
    assert not np.array_equal(random_projection(20, 3, draw(5)), random_projection(20, 3, draw(6)))


def test_a_random_projection_is_uniform_and_not_of_the_sign_that_lapack_prefers():
    corners = np.array([random_projection(4, 2, draw(seed))[0, 0] for seed in range(400)])
    # A column of a uniform rotation in 4 dimensions: mean 0, mean square 1/4.
    assert abs(corners.mean()) < 0.1
    assert (corners**2).mean() == pytest.approx(0.25, abs=0.05)


def test_a_projection_to_all_dimensions_is_a_rotation_and_to_more_is_refused():
    rotation = random_projection(5, 5, draw(0))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(5), atol=1e-12)
    with pytest.raises(RecipeError, match=r"6 dimensions .* 5 features; set selection.dimensions .* between 1 and 5"):
        random_projection(5, 6, draw(0))


def test_the_fitted_space_is_that_of_the_covariance_matrix():
    features = (draw(0).normal(size=(200, 6)) * [9, 1, 5, 0.1, 3, 0.5] + 100).astype(np.float32)
    mean, components = fit_projection(features, 3)
    features = features.astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(features.T))
    np.testing.assert_allclose(mean, features.mean(axis=0), rtol=FLOAT64)
    for number in range(3):
        expected = vectors[:, np.argsort(-values)[number]]
        expected = expected * np.sign(expected[np.abs(expected).argmax()])
        np.testing.assert_allclose(components[:, number], expected, rtol=0, atol=FLOAT64)


def test_the_fitted_space_of_very_many_rows_and_features_is_nearly_exact_and_always_the_same():
    generator = draw(0)
    features = generator.normal(size=(1100, 4)) * [40, 30, 20, 10] @ random_projection(1050, 4, generator).T
    features = features + generator.normal(size=features.shape) * 0.01
    _, components = fit_projection(features, 4)
    assert np.array_equal(components, fit_projection(features, 4)[1])
    centred = features - features.mean(axis=0)
    exact = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :4]
    np.testing.assert_allclose(np.abs(exact.T @ components), np.eye(4), atol=1e-6)
    assert (components[np.abs(components).argmax(axis=0), range(4)] > 0).all()


def test_too_little_public_text_for_the_space_is_refused():
    with pytest.raises(
        RecipeError, match=r"4 dimensions .* 4 rows of public text .* selection.dimensions to at most 3"
    ):
        fit_projection(np.zeros((4, 10)), 4)
    with pytest.raises(RecipeError, match="to at most 0"):
        fit_projection(np.zeros((0, 10)), 1)


@pytest.mark.parametrize("dimensions", [2, 16])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 9])
def test_tsne_takes_clients_of_any_size(rows, dimensions):
    points = per_client_tsne(draw(0).normal(size=(rows, 40)).astype(np.float32), dimensions, seed=3)
    assert points.shape == (rows, dimensions)
    assert np.isfinite(points).all()


def test_tsne_puts_rows_that_are_all_the_same_in_one_place():
    assert not per_client_tsne(np.full((12, 40), 0.1, dtype=np.float32), 2, seed=0).any()


def test_tsne_keeps_topics_apart_and_is_repeatable():
    features = blobs(0, 3, 12, 30, spread=10)
    points = per_client_tsne(features, 2, seed=1)
    assert agreement(cluster(points, 5).labels_N, np.repeat(range(3), 12))[0] == pytest.approx(1)
    np.testing.assert_array_equal(points, per_client_tsne(features, 2, seed=1))


def test_the_seed_of_tsne_matters_where_its_start_is_random():
    few = draw(0).normal(size=(9, 40))
    assert not np.array_equal(per_client_tsne(few, 16, seed=1), per_client_tsne(few, 16, seed=2))


def test_clipping_shortens_long_rows_only_and_keeps_their_direction():
    rows = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=np.float32)
    clipped = clip_rows(rows, 1.0)
    assert clipped.dtype == np.float32
    near = gamma(torch.float32, 4)  # a row, its factor, their product, and the numbers that are compared
    np.testing.assert_allclose(clipped, [[0.6, 0.8], [0.3, 0.4], [0, 0]], rtol=near)
    # The square of this norm does not fit float32.
    np.testing.assert_allclose(clip_rows(np.array([[3e30, 4e30]], dtype=np.float32), 1.0), [[0.6, 0.8]], rtol=near)


@pytest.mark.parametrize(
    "use",
    [
        lambda rows: clip_rows(rows, 1.0),
        lambda rows: cluster(rows, 2),
        lambda rows: per_client_tsne(rows, 2, seed=0),
        lambda rows: fit_projection(rows, 1),
    ],
)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_with_the_row(use, wrong):
    rows = LINE.copy()
    rows[4] = wrong
    with pytest.raises(ModelError, match="1 of 7 rows are not finite, first of row 4"):
        use(rows)


# Within a client.


def test_clusters_strengths_and_weighted_centroids_are_as_worked_by_hand():
    found = cluster(LINE, 2)
    assert found.labels_N.tolist() == [0, 0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(found.strengths_N, LINE_STRENGTHS)
    np.testing.assert_allclose(found.centroids_Cd[:, 0], LINE_CENTROIDS)


def test_with_one_more_neighbour_the_core_distances_are_those_of_the_release():
    # Second neighbours lie at 2, 1, 2, 4 and 2, 1, 2: the first three join at 2, and 5 at 4, half as firm.
    found = cluster(LINE, 2, min_samples=3)
    np.testing.assert_allclose(found.strengths_N, [1, 1, 1, 0.5, 1, 1, 1])
    np.testing.assert_allclose(found.centroids_Cd[:, 0], [(0 + 1 + 2 + 5 / 2) / 3.5, 21])


def test_the_fewest_rows_by_themselves_are_a_cluster_but_not_as_released():
    points = np.repeat([[0.0, 0.0], [50.0, 0.0], [0.0, 70.0]], 5, axis=0) + draw(0).normal(size=(15, 2))
    assert len(cluster(points, 5).centroids_Cd) == 3
    assert (find_clusters(points, 5, min_samples=6)[0] == -1).all()
    # Too few points to have so many neighbours are no error.
    assert (find_clusters(points, 5, min_samples=16)[0] == -1).all()


def test_the_nearest_rows_come_first_and_equally_near_ones_in_their_order():
    found = cluster(LINE, 2)
    assert nearest_first(LINE, found, 0) == [1, 2, 0, 3]  # at 0.4, 0.6, 1.4 and 3.6 from 1.4
    assert nearest_first(LINE, found, 1) == [5, 4, 6]  # at 0, 1 and 1


@pytest.mark.parametrize("seed", range(20))
def test_of_a_pair_the_nearest_is_the_same_in_whatever_order_it_comes(seed):
    points = blobs(seed, 2, 2, 16, spread=20)
    pairs = cluster(points, 2)
    assert pairs.labels_N.tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
    for number in (0, 1):
        first, second = nearest_first(points, pairs, number)
        assert points[first].tolist() < points[second].tolist()  # in lexicographic order


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_fewer_rows_than_a_cluster_needs_have_no_cluster(rows):
    found = cluster(draw(0).normal(size=(rows, 3)), 5)
    assert found.labels_N.tolist() == [-1] * rows
    assert found.centroids_Cd.shape == (0, 3)


@pytest.mark.parametrize(
    "points",
    [
        draw(0).normal(size=(5, 3)),
        draw(0).normal(size=(9, 3)),
        np.ones((12, 3)),
        np.arange(40.0)[:, None],
    ],
    ids=["as many as a cluster needs", "one short of two clusters", "all the same", "evenly on a line"],
)
def test_rows_that_make_no_two_clusters_are_one(points):
    found = cluster(points, 5)
    assert (found.labels_N == 0).all()
    assert (found.strengths_N == 1).all()
    np.testing.assert_allclose(found.centroids_Cd, [points.mean(axis=0)])


def test_as_in_the_paper_rows_that_make_no_two_clusters_can_be_none():
    points_Nd = np.random.default_rng(0).normal(size=(9, 2))
    found = cluster(points_Nd, 5, whole=False)
    assert found.labels_N.tolist() == [-1] * 9
    assert found.strengths_N.tolist() == [0] * 9
    assert found.centroids_Cd.shape == (0, 2)
    two_Nd = np.concatenate([points_Nd, points_Nd + 100])
    np.testing.assert_array_equal(cluster(two_Nd, 5, whole=False).labels_N, cluster(two_Nd, 5).labels_N)
    assert len(cluster(two_Nd, 5, whole=False).centroids_Cd) == 2


def test_repeated_rows_are_clusters_as_well():
    found = cluster(np.repeat([[0.0, 0.0], [5.0, 5.0]], 6, axis=0), 3)
    assert found.labels_N.tolist() == [0] * 6 + [1] * 6
    np.testing.assert_allclose(found.centroids_Cd, [[0, 0], [5, 5]])


def test_rows_between_the_clusters_are_of_none_and_do_not_move_centroids():
    points = np.concatenate([LINE, [[300.0]]])
    found = cluster(points, 2)
    assert found.labels_N.tolist() == [0, 0, 0, 0, 1, 1, 1, -1]
    assert found.strengths_N[-1] == 0
    np.testing.assert_allclose(found.centroids_Cd[:, 0], LINE_CENTROIDS)


@pytest.mark.parametrize(("least", "min_samples"), [(2, None), (2, 3), (5, None), (5, 6)])
@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_rows_does_not_change_what_is_chosen(least, min_samples, seed):
    points = draw(seed).normal(size=(50, 16))  # without structure, where HDBSCAN meets many equal distances
    order = draw(100 + seed).permutation(50)
    plain, permuted = cluster(points, least, min_samples), cluster(points[order], least, min_samples)
    assert permuted.labels_N.tolist() == plain.labels_N[order].tolist()
    assert permuted.strengths_N.tolist() == plain.strengths_N[order].tolist()
    for number in range(len(plain.centroids_Cd)):
        assert order[nearest_first(points[order], permuted, number)].tolist() == nearest_first(points, plain, number)


def test_moving_all_rows_moves_the_centroids_and_nothing_else():
    points = blobs(2, 4, 15, 8)
    plain, moved = cluster(points, 5), cluster(points + 37.5, 5)
    assert moved.labels_N.tolist() == plain.labels_N.tolist()
    np.testing.assert_allclose(moved.centroids_Cd, plain.centroids_Cd + 37.5)


def test_rows_in_single_precision_make_the_same_clusters():
    points = blobs(3, 4, 15, 8).astype(np.float32)
    found = cluster(points, 5)
    assert found.labels_N.tolist() == cluster(points.astype(np.float64), 5).labels_N.tolist()
    assert found.centroids_Cd.dtype == np.float64


def test_a_cluster_of_one_row_is_refused():
    with pytest.raises(ValueError, match="at least 2 rows, not 1"):
        cluster(LINE, 1)


@pytest.mark.parametrize("least", [2, 5])
@pytest.mark.parametrize("width", [2, 16])
def test_clusters_are_those_of_the_hdbscan_package(least, width):
    import hdbscan

    for seed in range(5):
        for points in (blobs(seed, 5, 10, width), draw(seed).normal(size=(50, width))):
            points = points[np.lexsort(points.T[::-1])]
            theirs = hdbscan.HDBSCAN(min_cluster_size=least, algorithm="prims_kdtree").fit(points)
            labels, strengths = find_clusters(points, least, min_samples=least + 1)
            assert labels.tolist() == theirs.labels_.tolist()
            np.testing.assert_allclose(strengths, theirs.probabilities_)


# Between clients.


def by_hand() -> dict[str, np.ndarray]:
    return {"a": LINE[[0, 4]], "b": LINE[[5, 1]], "none": np.zeros((0, 1)), "c": LINE[[2, 6, 3]]}


def test_of_each_group_the_centroid_nearest_to_the_weighted_mean_is_kept():
    kept = keep(by_hand())
    assert kept.numbers == {"a": [], "b": [0, 1], "none": [], "c": []}
    # 1.4 lies nearest to b's 1, and 21 is b's own; as released 1.57 lies nearest to c's 2.
    assert keep(by_hand(), min_samples=3).numbers == {"a": [], "b": [0], "none": [], "c": [0]}
    assert {client: [group == kept.groups["c"][0] for group in groups] for client, groups in kept.groups.items()} == {
        "a": [True, False],
        "b": [False, True],
        "none": [],
        "c": [True, False, True],
    }


def test_a_centroid_that_only_one_client_has_is_dropped_as_in_the_paper_or_kept_as_asked():
    centroids = by_hand() | {"d": np.array([[21.0], [300.0]])}
    assert keep(centroids).numbers["d"] == []
    assert keep(centroids).groups["d"][1] == -1
    lone = keep(centroids, lone=True)
    assert lone.numbers == {"a": [], "b": [0, 1], "none": [], "c": [], "d": [1]}
    assert lone.groups["d"][1] == 2


@pytest.mark.parametrize(
    "centroids", [{}, {"a": np.zeros((0, 4))}, {"a": np.ones((1, 4)), "b": np.ones((1, 4))}, {"a": np.ones((9, 4))}]
)
def test_without_two_groups_nothing_is_kept_unless_lone_centroids_are(centroids):
    counts = {client: len(array) for client, array in centroids.items()}
    assert keep(centroids).numbers == {client: [] for client in counts}
    assert keep(centroids, lone=True).numbers == {client: list(range(count)) for client, count in counts.items()}
    groups = [group for own in keep(centroids, lone=True).groups.values() for group in own]
    assert groups == list(range(sum(counts.values())))


def test_the_order_of_clients_does_not_change_what_is_kept():
    centroids = {f"client {number}": draw(number).normal(size=(5, 16)) for number in range(8)}
    turned = dict(reversed(centroids.items()))
    assert keep(centroids) == keep(turned)
    assert list(keep(turned).numbers) == list(turned)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 3)), r"Client bad sent centroids of shape \(2, 3\), where \(any, 1\) is due"),
        (np.zeros(3), r"Client bad sent centroids of shape \(3,\)"),
        (np.array([[0.0], [np.nan]]), "Client bad .* not finite in float32, first number 1"),
        (np.array([[1e300], [0.0]]), "Client bad .* not finite in float32, first number 0"),
        (np.array([["x"]], dtype=object), "Client bad .* type object"),
    ],
)
def test_centroids_that_cannot_be_compared_are_refused_with_the_clients_name(wrong, message):
    with pytest.raises(UpdateRejected, match=message):
        keep({"bad": wrong} | by_hand())


# A federation with known topics: 10 clients, each with rows of all 8, in an order of its own.


def federation(each: int = 20, width: int = 256) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    middles = draw(0).normal(size=(8, width)) * 3
    clients = {}
    for number in range(10):
        generator = draw(1000 + number)
        topics = generator.permutation(np.repeat(range(8), each))
        clients[f"client {number}"] = (middles[topics] + generator.normal(size=(8 * each, width)), topics)
    return clients


def survey(points: dict[str, np.ndarray], topics: dict[str, np.ndarray]):
    """Select at both levels; return (group, topic) of every centroid, and (topic, topic of its row) of the kept."""
    clusters = {client: cluster(own, 5) for client, own in points.items()}
    kept = keep({client: own.centroids_Cd for client, own in clusters.items()})
    majority = {
        client: [
            Counter(topics[client][own.labels_N == number].tolist()).most_common(1)[0][0]
            for number in range(len(own.centroids_Cd))
        ]
        for client, own in clusters.items()
    }
    chosen = [
        (majority[client][number], topics[client][nearest_first(points[client], clusters[client], number)[0]])
        for client, numbers in kept.numbers.items()
        for number in numbers
    ]
    flat = [
        (group, topic) for client in points for group, topic in zip(kept.groups[client], majority[client], strict=True)
    ]
    return flat, chosen


def test_in_one_shared_space_the_groups_are_the_topics_and_no_row_is_of_a_wrong_topic():
    rows = federation()
    agreements = []
    for seed in (7, 8, 9):
        projection = random_projection(256, 16, draw(seed))
        points = {client: features @ projection for client, (features, _) in rows.items()}
        flat, chosen = survey(points, {client: topics for client, (_, topics) in rows.items()})
        agreements.append(agreement(*zip(*flat, strict=True))[0])
        # Rows come in an order of each client's own, and centroids in the order of clusters: with either mixed
        # up, as in the released code, seven of eight rows would be of a wrong topic.
        assert [row for _, row in chosen] == [topic for topic, _ in chosen]
        assert sorted(topic for topic, _ in chosen) == list(range(8))
    assert np.mean(agreements) > 0.98


def test_in_a_space_per_client_the_groups_are_not_the_topics():
    rows = federation(each=8)
    points = {
        client: per_client_tsne(features, 2, seed=number) for number, (client, (features, _)) in enumerate(rows.items())
    }
    flat, chosen = survey(points, {client: topics for client, (_, topics) in rows.items()})
    assert agreement(*zip(*flat, strict=True))[0] < 0.3
    # Within each client the rows are still those of the centroid's topic.
    assert [row for _, row in chosen] == [topic for topic, _ in chosen]
