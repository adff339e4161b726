"""Flower's deployment engine as it is used here: all of its internals that are relied upon stand in this folder.

A coordinator hosts Flower's SuperLink in its own process and takes the task of a server app itself; a site runs
Flower's SuperNode beside a process of its own that takes the tasks of a client app. No code travels: what Flower asks
to be shipped with a run is empty, and is installed and imported nowhere.

    coordinator process                                          site
    round loop → Dispatch → SuperLink (inner port, loopback)
                            SuperLink (outer port, TLS) ← HTTPS ─ SuperNode ← loopback ─ Inbox → resident process

These internals change between versions, so the version is pinned, and ``tests/test_flower.py`` holds the contract.
"""
