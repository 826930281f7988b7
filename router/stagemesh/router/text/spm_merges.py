"""The merges of a SentencePiece BPE vocabulary, which a GGUF file stores as scores only."""

from __future__ import annotations

from collections.abc import Container, Mapping


def merges_from_scores(vocab: Container[str], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first.

    SentencePiece joins the neighbours whose union scores best; a merge list applies its merges in order.
    Sorted by the score of their result the two are the same. Among equal scores the longest left part goes
    first, then the order of `scores`, as in transformers' `generate_merges`, so that both give equal ids.

    Args:
        vocab: All tokens.
        scores: Score of each token that merging may make: not control, unknown or byte tokens.
    """
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in scores.items():
        length = len(token)
        for cut in range(1, length):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-score, -cut, cut - length, left, right))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]
