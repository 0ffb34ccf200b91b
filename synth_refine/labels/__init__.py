"""Labels on their way in and out: files, artifacts, exports, datasets in memory."""
