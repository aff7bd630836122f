"""What every store promises, on each of them, and on a reference of ten lines beside it."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from tests.durability.conftest import STORES, Open

from carousel_server.store.store import Record, Store

PAST, FUTURE = 1e9, 4e9

pytestmark = pytest.mark.parametrize("new_space", STORES, indirect=True)


def record(session_id: str = "s", epoch: int = 1, **fields: object) -> Record:
    live = Record(session_id, epoch, "ann", "tagger", "2", b"\x00state\xff", "", FUTURE)
    return replace(live, **fields)  # type: ignore[arg-type]


async def test_a_record_comes_back_as_it_went(opened: Open) -> None:
    """Every field and byte of a commit is there for another opener, and a later commit replaces it."""
    first = record(owner="", payload=bytes(range(256)) * 40, expires_at=FUTURE + 0.123456)
    store = opened()
    assert await store.commit([first, record("naïve ☃")]) == set()
    assert await opened().read("s") == first
    assert await store.commit([record(payload=b"")]) == set()
    assert await opened().read("s") == record(payload=b"")
    assert await opened().read("naïve ☃") == record("naïve ☃")


async def test_what_was_never_there(store: Store) -> None:
    """An unknown session is None to read and to claim, and there is nothing to drop, list or sweep."""
    assert await store.read("s") is None
    assert await store.claim("s") is None
    assert await store.drop("s") is False
    assert await store.list(None, limit=10) == []
    assert await store.sweep(FUTURE) == 0
    assert await store.commit([]) == set()


async def test_the_older_of_two_owners_is_refused(opened: Open) -> None:
    """Once a session is claimed, its former owner's commits of it are refused whatever their epoch, others are not."""
    older, newer = opened(), opened()
    await older.commit([record(), record("other")])
    assert await newer.claim("s") == record(epoch=2)
    for epoch in (1, 2, 3):
        mine = [record(epoch=epoch, payload=b"late"), record("other", payload=b"mine")]
        assert await older.commit(mine) == {"s"}
    assert await newer.read("s") == record(epoch=2)
    assert await newer.read("other") == record("other", payload=b"mine")
    assert await newer.commit([record(epoch=2, payload=b"next")]) == set()
    assert await older.claim("s") == record(epoch=3, payload=b"next")
    assert await newer.commit([record(epoch=2)]) == {"s"}


async def test_a_holder_fences_its_own_past(store: Store) -> None:
    """A process that raised a session's epoch itself, for a newer stream, has its older commits refused."""
    await store.commit([record()])
    assert await store.commit([record(epoch=2)]) == set()
    assert await store.commit([record(epoch=1)]) == {"s"}


async def test_two_that_open_one_name(opened: Open) -> None:
    """Of two processes that open a session of the same name at once, the store knows one, and refuses the other."""
    first, second = opened(), opened()
    answers = await asyncio.gather(first.commit([record()]), second.commit([record(payload=b"other")]))
    assert sorted(answers, key=len) == [set(), {"s"}]


async def test_claims_at_once(opened: Open) -> None:
    """Claims at the same time each get an epoch of their own, and only the newest of them may write."""
    stores = [opened() for _ in range(6)]
    await stores[0].commit([record()])
    claimed = [found for found in await asyncio.gather(*(store.claim("s") for store in stores)) if found is not None]
    assert sorted(found.epoch for found in claimed) == [2, 3, 4, 5, 6, 7]
    refused = [await store.commit([found]) for store, found in zip(stores, claimed, strict=True)]
    assert [found.epoch for found, ids in zip(claimed, refused, strict=True) if not ids] == [7]


async def test_a_claim_of_what_was_seen(opened: Open) -> None:
    """With an epoch, a claim takes a session only as it was seen, and changes nothing where another was faster."""
    store, faster = opened(), opened()
    await store.commit([record()])
    assert await faster.claim("s", epoch=1) == record(epoch=2)
    assert await store.claim("s", epoch=1) is None
    assert await faster.commit([record(epoch=2, payload=b"next")]) == set()
    assert await store.claim("s", epoch=2) == record(epoch=3, payload=b"next")
    assert await store.claim("other", epoch=1) is None


async def test_a_tombstone_answers_and_makes_way(opened: Open) -> None:
    """A tombstone is given to who claims, keeps its epoch and its holder, and yields to a newer session of its name."""
    older, newer = opened(), opened()
    await older.commit([record()])
    await newer.claim("s")
    gone = record(epoch=2, payload=b"", gone="closed")
    await newer.commit([gone])
    assert await older.claim("s") == gone
    assert await newer.read("s") == gone
    assert await older.commit([record(epoch=1)]) == {"s"}
    assert await older.commit([record(epoch=2)]) == {"s"}
    assert await newer.list(None, limit=10) == []
    assert await older.commit([record(epoch=3, owner="bob")]) == set()
    assert await newer.commit([gone]) == {"s"}
    assert [found.owner for found in await newer.list(None, limit=10)] == ["bob"]
    assert await newer.list("ann", limit=10) == []


async def test_what_expired_is_gone(opened: Open) -> None:
    """After its time a record is neither read, claimed, listed nor dropped, and its name is free, swept or not."""
    store = opened()
    await store.commit([record(expires_at=time.time() + 0.2), record("tomb", gone="closed", expires_at=PAST)])
    assert await store.read("tomb") is None
    await asyncio.sleep(0.3)
    assert await store.read("s") is None
    assert await store.claim("s") is None
    assert await store.list("ann", limit=10) == []
    assert await store.drop("s") is False
    await store.commit([record(expires_at=PAST)])
    assert await opened().commit([record(owner="bob")]) == set()
    assert await store.list("ann", limit=10) == []
    await store.sweep(time.time())
    assert await store.read("s") == record(owner="bob")


async def test_sweeping_leaves_what_lives(store: Store) -> None:
    """A sweep frees every record that expired over a minute ago, however many, and no other."""
    expired = [record(f"old {number}", expires_at=PAST) for number in range(2500)]
    await store.commit([*expired, record(), record("tomb", gone="closed")])
    assert await store.sweep(time.time()) == len(expired)
    assert await store.sweep(time.time()) == 0
    assert await store.read("s") == record()
    assert await store.read("tomb") is not None
    assert [found.session_id for found in await store.list("ann", limit=10)] == ["s"]


async def test_lists_page_by_owner(store: Store) -> None:
    """Pages of a list hold each live session of its owner once, in order, without payload; None lists all owners."""
    records = [record(f"s{number:02}", owner="bob" if number % 3 == 0 else "ann") for number in range(20)]
    await store.commit(records)
    await store.commit([record("s04", gone="closed"), record("s05", expires_at=PAST)])
    live = [replace(kept, payload=b"") for kept in records if kept.session_id not in ("s04", "s05")]
    for owner in ("ann", "bob", "nobody", None):
        pages, after = [], ""
        while page := await store.list(owner, limit=4, after=after):
            pages += page
            after = page[-1].session_id
        assert pages == [kept for kept in live if owner in (None, kept.owner)]


class Reference:
    """What a store is: the records by id, with who holds them."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[Record, int]] = {}

    def commit(self, who: int, new: Record) -> bool:
        old, holder = self.known.get(new.session_id, (None, who))
        if old and not (holder == who and old.epoch <= new.epoch) and not (old.gone and old.epoch < new.epoch):
            return False
        self.known[new.session_id] = (new, who)
        if new.expires_at == PAST:
            del self.known[new.session_id]
        return True

    def claim(self, who: int, session_id: str) -> Record | None:
        old, _ = self.known.get(session_id, (None, who))
        if old and not old.gone:
            self.known[session_id] = (replace(old, epoch=old.epoch + 1), who)
        return self.known[session_id][0] if old else None


IDS = st.sampled_from("abc")
OPENERS = st.integers(0, 1)
RECORDS = st.builds(
    Record,
    session_id=IDS,
    epoch=st.integers(1, 5),
    owner=st.sampled_from(("", "ann")),
    model=st.just("tagger"),
    version=st.just("1"),
    payload=st.binary(max_size=20),
    gone=st.sampled_from(("", "", "closed")),
    expires_at=st.sampled_from((FUTURE, FUTURE, PAST)),
)


class Machine(RuleBasedStateMachine):
    """Two openers of one place, each of which may end without a word and begin anew."""

    def __init__(self, space: Open) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.space = space
        self.stores: list[Store] = []
        self.holders: list[int] = [0, 1]
        self.reference = Reference()
        for _ in range(2):
            self.loop.run(self.begin())

    async def begin(self) -> None:
        self.stores.append(self.space())

    @rule(at=OPENERS, records=st.lists(RECORDS, max_size=3, unique_by=lambda each: each.session_id))
    def commit(self, at: int, records: list[Record]) -> None:
        refused = {new.session_id for new in records if not self.reference.commit(self.holders[at], new)}
        assert self.loop.run(self.stores[at].commit(records)) == refused

    @rule(at=OPENERS, session_id=IDS)
    def claim(self, at: int, session_id: str) -> None:
        wanted = self.reference.claim(self.holders[at], session_id)
        assert self.loop.run(self.stores[at].claim(session_id)) == wanted

    @rule(at=OPENERS, session_id=IDS)
    def drop(self, at: int, session_id: str) -> None:
        known = self.reference.known.pop(session_id, None) is not None
        assert self.loop.run(self.stores[at].drop(session_id)) == known

    @rule(at=OPENERS)
    def crash(self, at: int) -> None:
        self.loop.run(self.stores[at].close())
        self.stores[at] = self.space()
        self.holders[at] = max(self.holders) + 1

    @rule(at=OPENERS)
    def sweep(self, at: int) -> None:
        self.loop.run(self.stores[at].sweep(time.time()))

    @rule(at=OPENERS, session_id=IDS, owner=st.sampled_from((None, "", "ann")))
    def look(self, at: int, session_id: str, owner: str | None) -> None:
        known = {name: kept for name, (kept, _) in sorted(self.reference.known.items())}
        assert self.loop.run(self.stores[at].read(session_id)) == known.get(session_id)
        live = [replace(kept, payload=b"") for kept in known.values() if not kept.gone and owner in (None, kept.owner)]
        assert self.loop.run(self.stores[at].list(owner, limit=10)) == live

    def teardown(self) -> None:
        for store in self.stores:
            self.loop.run(store.close())
        self.loop.close()


def test_any_story_of_two_processes(new_space: Callable[[], Open]) -> None:
    """Whatever two processes commit, claim, drop and sweep, crashes between, a store says what the reference says."""
    story = settings(max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(lambda: Machine(new_space()), settings=story)
