"""`--streaming true`: rows are read and tokenized while training goes on, a chunk at a time.

One process a machine (`producer`) reads rows (`rows`), tokenizes a few thousand of them (`chunks`) into a token
cache of their own, and goes on when it is wanted. All processes of the machine map the chunks and deal out their
samples (`steps`), as they do with a data set that is tokenized before training. A chunk is shuffled and packed by
itself, and deleted when every process has gone past it.
"""
