"""Generation at scale: an output prefix that fills exactly once.

`spec`, `plan` and `layout` describe the work and its objects; `engine` and `shard_writer` write one shard;
`ray_pool`, `sample_worker` and `coordinator` write many at once; `done_records`, `stored_generation`, `manifest` and
`finalize` prove that all of it exists; `driver` runs everything. Importing this package imports no Ray.
"""
