"""What is done to files of any size in bounded memory, slab by slab.

`slabs` reads ahead and writes behind, `ranked` joins weights with their scores, `limits` finds the
k-th largest norm of what is larger than a slab, `dropping` decides and zeroes, `pruning` is the
whole of it. `masks`, `occupancy`, `inspection`, `verification`, `comparison`, `storage` and
`export` are the other things that one pass over a file can do.
"""
