"""One file, one technique. The folders are the families; the listing is the table of contents."""
