"""The recipe's section of choosing rows: which of its rows a client trains on, and what of them leaves it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from bellwether.recipe.section import Section, ours_or_own


class Selection(Section):
    """Which of its rows a client trains on in a round."""

    method: Annotated[
        str, AfterValidator(ours_or_own("full", "hierarchical", "random", "k_center", "perplexity", "length"))
    ] = Field(
        "full",
        description="full (all rows, as FedIT), hierarchical (a coreset picked at two levels, as FedHDS), random, "
        "k_center (spread out in the space of features), perplexity (loss nearest the median), length (longest "
        "responses), or package.module:function; clients that train outside a federation take all their rows",
    )
    rows: Annotated[int, Field(ge=1, strict=True)] | Literal["hierarchical"] | None = Field(
        None,
        description="rows that a client trains on, at most; hierarchical: as many as that method keeps at the client, "
        "so that rivals of like size can be compared; null: rows_per_cluster of each kept cluster (hierarchical), "
        "or fraction (others)",
    )
    fraction: float | None = Field(None, gt=0, le=1, description="share of its rows that a client trains on, at most")
    weigh_by: Literal["selected", "all"] = Field(
        "selected",
        description="what FedAvg weighs a client by: the rows it trained on (as FedHDS's release does), or all it has",
    )
    features: Literal["model", "proxy"] = Field(
        "model",
        description="whose hidden states stand for a row: the tuned model's, or a frozen proxy's (FedHDS-Turbo)",
    )
    proxy: str | None = Field(
        None,
        min_length=1,
        description="folder or hub name of the proxy, a causal model or a sentence encoder; cuts longer texts (proxy)",
    )
    pooling: Literal["last", "mean"] = Field(
        "last",
        description="the last token's hidden state, or the mean over all; a sentence encoder pools as its folder says",
    )
    layers: Literal["all"] | Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        "all", description="layers whose hidden states are put side by side: 0 is the embedding, -1 the last layer"
    )
    space: Literal["shared", "per_client_tsne", "none"] = Field(
        "shared",
        description="where rows are clustered: one projection for all clients, a t-SNE of each client's own (as the "
        "paper; clients' spaces differ), or the features as they are",
    )
    projection_sources: tuple[str, ...] = Field(
        (),
        description="sources of public text whose principal components are the shared projection; () draws a random "
        "orthonormal one from the seed (shared)",
    )
    dimensions: int = Field(16, ge=1, description="dimensions of the space that rows are clustered in")
    min_cluster_rows: int = Field(
        5, ge=2, description="rows of a cluster at least; no centroid of fewer leaves a client"
    )
    min_group_centroids: int = Field(2, ge=2, description="centroids of a group at least, at the server")
    keep_lone: bool = Field(
        False, description="also keep centroids that are in no group, such as of topics that one client alone has"
    )
    count_itself: bool = Field(
        True,
        description="whether HDBSCAN counts a point among its own neighbours, so that groups of exactly "
        "min_group_centroids are found; false as in the paper's release",
    )
    whole_client: bool = Field(
        True,
        description="whether a client in whose rows HDBSCAN sees no two clusters has one of all its rows; false gives "
        "it none, as in the paper",
    )
    rows_per_cluster: int = Field(1, ge=1, description="rows taken of a kept cluster, those nearest its centroid")
    rotate: bool = Field(
        False,
        description="take rows first that the client has trained on least often, before those nearest the centroid; "
        "else the same typical rows are taken round after round (hierarchical, random)",
    )
    refresh: int = Field(
        1,
        ge=0,
        description="rounds after which a client computes its features anew; 0 never; a proxy's stay as they are",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="largest norm of a row's features, longer ones are scaled down; null does not clip"
    )
    noise: float = Field(
        0.0,
        ge=0,
        description="standard deviation of the Gaussian noise on every released centroid, in units of its sensitivity, "
        "twice clip_norm; a simulation draws it from the seed, so whoever knows that can take it off",
    )

    def min_samples(self, least: int) -> int:
        """Return HDBSCAN's number of neighbours, as scikit-learn counts them, where clusters have so many points."""
        return least if self.count_itself else least + 1

    @property
    def surveys(self) -> bool:
        """Whether clients send centroids before they train."""
        return self.method == "hierarchical" or self.rows == "hierarchical"
