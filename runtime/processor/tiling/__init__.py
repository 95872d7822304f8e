"""One module per way to lay a picture out in tiles, called as `ImageContract.tiling.kind`, each with `prepare`."""
