"""`--streaming true`: rows are read and tokenized during training, one chunk at a time.

One process per machine (`producer`) reads rows (`rows`) and tokenizes a few thousand of them into a chunk (`chunks`),
a token cache of its own; it stays a few chunks ahead of training. All processes of the machine memory-map the chunks
(`source`) and take their samples from them (`steps`), as with a dataset that is tokenized before training. Each chunk
is shuffled and packed separately, and deleted when no step needs it any more.
"""
