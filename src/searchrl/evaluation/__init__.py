"""Held-out questions: answered greedily or sampled, scored one way, with intervals and tables.

``rollouts`` plays and scores, for the trainer and for `searchrl eval` alike; ``summary`` and ``tables`` say
what it amounts to; ``benchmark`` is `searchrl eval` itself.
"""
