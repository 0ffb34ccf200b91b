"""The refiners over shards: more images than fit into memory."""
