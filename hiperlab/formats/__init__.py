"""Files of other tools, read without running anything in them, and written as those tools expect."""
