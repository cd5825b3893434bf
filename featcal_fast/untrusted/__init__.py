"""Reading what strangers wrote: documents of bounded size and depth, and programs of theirs that may not end."""
