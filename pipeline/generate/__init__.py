"""Generation at scale: an output prefix that fills exactly once.

`spec` and `plan` say what is to be made; `engine` and `maker` make a shard; `cluster`, `worker` and `board` have
many made at once; `ledger`, `records`, `manifest` and `finish` prove that all is there; `run` drives it all.
Importing this package imports no Ray.
"""
