"""A corpus of videos as tokens: made by many machines, and read back in any order.

`inputs` finds the videos, `child` tokenizes one after another in a process of its own, `engines` spreads
them, `drive` commits results, `manifest` remembers them. `shard` holds thousands of clips in a file,
`dataset` and `loader` read them, `export` writes the formats of others.
"""
