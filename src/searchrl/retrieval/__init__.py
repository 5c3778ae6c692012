"""Search behind one protocol: corpus, indexes, a loopback server and the clients that episodes talk to.

Importing this package, ``types`` or ``client`` is light; torch, transformers, faiss and bm25s load only when
an index or an encoder is used.
"""
