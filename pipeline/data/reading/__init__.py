"""Reading a data set: global order, shard cache, random access, batches."""
