"""Pages are free, used or cached, and nothing else; content is found by hash and given up in order."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold.cache.blocks import IdPool
from fourfold.cache.pages import PagePool, chain_at, chain_next, chain_root
from fourfold.core.row_format import PAGE_TOKENS


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


def cached_pool(size: int, numbers: list[int]) -> tuple[PagePool, list[bytes]]:
    """A pool whose pages hold content 0, 1, …, released in the order of `numbers`."""
    gone: list[bytes] = []
    pool = PagePool(size, gone.append)
    taken = pool.allocate(len(numbers))
    for number, page in enumerate(taken):
        pool.publish(page, digest(number))
    for number in numbers:
        pool.release([taken[number]])
    return pool, gone


def counts(pool: PagePool) -> tuple[int, int, int]:
    pool.check()
    return pool.num_free, pool.num_used, pool.num_cached


def test_a_page_goes_from_free_to_used_to_free() -> None:
    pool = PagePool(3)
    assert counts(pool) == (3, 0, 0)
    pages = pool.allocate(2)
    assert len(set(pages)) == 2
    assert counts(pool) == (1, 2, 0)
    pool.release(pages)
    assert counts(pool) == (3, 0, 0)
    assert pool.allocate(0) == []


def test_published_content_stays_until_the_room_is_needed() -> None:
    pool, gone = cached_pool(2, [0])
    assert counts(pool) == (1, 0, 1)
    assert pool.num_available == 2
    assert pool.has(digest(0))
    pool.allocate(1)
    assert not gone
    pool.allocate(1)
    assert gone == [digest(0)]
    assert not pool.has(digest(0))
    assert counts(pool) == (0, 2, 0)


def test_the_least_recently_released_is_given_up_first() -> None:
    pool, gone = cached_pool(4, [2, 0, 3, 1])
    pool.release([pool.share(digest(2))])
    for _ in range(4):
        pool.allocate(1)
    assert gone == [digest(n) for n in (0, 3, 1, 2)]


def test_later_pages_of_a_chain_are_given_up_before_earlier_ones() -> None:
    """Without its first page the rest of a chain is worthless."""
    gone: list[bytes] = []
    pool = PagePool(3, gone.append)
    pages = pool.allocate(3)
    for number, page in enumerate(pages):
        pool.publish(page, digest(number))
    pool.release(pages)
    pool.allocate(3)
    assert gone == [digest(2), digest(1), digest(0)]


def test_a_shared_page_is_never_given_up() -> None:
    pool, gone = cached_pool(3, [0, 1, 2])
    page = pool.share(digest(1))
    assert pool.share(digest(1)) == page
    assert pool.references(page) == 2
    assert counts(pool) == (0, 1, 2)
    pool.allocate(2)
    with pytest.raises(ValueError, match="asked for 1 pages, 0 are available"):
        pool.allocate(1)
    pool.release([page])
    assert pool.references(page) == 1
    pool.release([page])
    assert counts(pool) == (0, 2, 1)
    assert gone == [digest(0), digest(2)]
    with pytest.raises(KeyError):
        pool.share(digest(0))


def test_of_equal_contents_the_first_stays() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(2)
    pool.publish(first, digest(7))
    pool.publish(second, digest(7))
    pool.publish(first, digest(8))  # a page has one content
    assert not pool.has(digest(8))
    pool.release([second])
    assert counts(pool) == (1, 1, 0)
    assert pool.share(digest(7)) == first


def test_a_second_copy_takes_over_once_the_first_is_gone() -> None:
    pool = PagePool(3)
    first, second = pool.allocate(2)
    pool.publish(first, digest(7))
    pool.release([first])
    pool.allocate(2)
    assert not pool.has(digest(7))
    pool.publish(second, digest(7))
    assert pool.share(digest(7)) == second


def test_forgetting_frees_what_is_cached_and_hides_what_is_used() -> None:
    pool, gone = cached_pool(3, [0, 1])
    page = pool.share(digest(1))
    pool.forget()
    assert sorted(gone) == [digest(0), digest(1)]
    assert counts(pool) == (2, 1, 0)
    assert not pool.has(digest(1))
    pool.release([page])
    assert counts(pool) == (3, 0, 0)


def test_misuse_is_refused_and_changes_nothing() -> None:
    pool, _ = cached_pool(2, [0])
    free = pool.allocate(1)
    pool.release(free)
    for call in (
        lambda: pool.release(free),
        lambda: pool.publish(free[0], digest(1)),
        lambda: pool.reference(free),
        lambda: pool.allocate(3),
    ):
        with pytest.raises(ValueError, match=r"used|available"):
            call()
    assert counts(pool) == (1, 0, 1)


@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_any_sequence_of_calls_keeps_the_books(size: int, rng: random.Random) -> None:
    """Against a ledger: who holds which page how often, and what content can be found."""
    found: dict[bytes, int] = {}
    pool = PagePool(size, lambda gone: found.pop(gone) and None)
    held: list[int] = []
    for _ in range(120):
        action = rng.randrange(5)
        if action == 0 and pool.num_available:
            held += pool.allocate(rng.randint(1, pool.num_available))
        elif action == 1 and held:
            page = rng.choice(held)
            content = digest(rng.randrange(20))
            if content not in found and page not in found.values():
                found[content] = page
            pool.publish(page, content)
        elif action == 2 and found:
            content = rng.choice(sorted(found))
            held.append(pool.share(content))
            assert held[-1] == found[content]
        elif action == 3 and held:
            held.append(rng.choice(held))
            pool.reference([held[-1]])
        elif held:
            rng.shuffle(held)
            gone = rng.randint(1, len(held))
            pool.release(held[:gone])
            held = held[gone:]
        pool.check()
        assert {page: pool.references(page) for page in range(size) if pool.references(page)} == (
            Counter(held)
        )
        assert pool.num_cached == len(set(found.values()) - set(held))
        assert all(pool.has(content) for content in found)
    pool.release(held)
    pool.forget()
    assert counts(pool) == (size, 0, 0)


def test_a_hash_depends_on_every_token_before_it() -> None:
    root = chain_root("model", None)
    tokens = list(range(PAGE_TOKENS))
    seen = {root, chain_next(root, tokens)}
    for place in (0, 1, 100, PAGE_TOKENS - 1):
        changed = tokens.copy()
        changed[place] += 1
        seen.add(chain_next(root, changed))
    seen.add(chain_next(root, tokens[::-1]))
    seen.add(chain_next(chain_next(root, tokens), tokens))
    for other in (chain_root("model", "salt"), chain_root("model2", None), chain_root("model", "")):
        seen.add(chain_next(other, tokens))
    assert len(seen) == 11
    assert {len(each) for each in seen} == {32}
    assert chain_next(root, tuple(tokens)) == chain_next(root, tokens)


def test_salts_and_fingerprints_cannot_be_put_together_to_collide() -> None:
    pairs = [("a", "b"), ("a', 'b", None), ("ab", ""), ("a", "b'"), ("", "ab"), ("a", None)]
    assert len({chain_root(*pair) for pair in pairs}) == len(pairs)


def test_only_whole_pages_have_a_hash() -> None:
    for wrong in (0, PAGE_TOKENS - 1, PAGE_TOKENS + 1):
        with pytest.raises(ValueError, match=f"256 tokens, found {wrong}"):
            chain_next(b"", [0] * wrong)


def test_hashes_are_computed_once() -> None:
    root, tokens = chain_root("", None), list(range(3 * PAGE_TOKENS))
    hashes: list[bytes] = []
    expected = root
    for page in range(3):
        expected = chain_next(expected, tokens[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS])
        assert chain_at(root, hashes, tokens, page) == expected
    assert len(hashes) == 3
    assert chain_at(root, hashes, [], 1) == hashes[1]


def test_ids_are_handed_out_lowest_first_and_given_back_once() -> None:
    pool = IdPool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.give_back([1, 0])
    assert pool.take(1) == [0]
    assert pool.num_free == 2
    with pytest.raises(ValueError, match="asked for 3 ids, 2 are free"):
        pool.take(3)
    pool.give_back([0])
    with pytest.raises(ValueError, match="id 0 was given back but is not taken"):
        pool.give_back([0])
    assert pool.num_free == 3
